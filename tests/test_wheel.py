"""The wheel: its files and metadata, and that reading a store needs no torch."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("mervcache", "featurestore", "jobs", "pipeline", "trainer")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the tracked files, built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and not name.startswith(("tests/", "docs/")) and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(folder / done.stdout.splitlines()[-1])


def test_it_holds_every_module_and_data_file_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    for name in (
        "pipeline/demo.yaml",
        "pipeline/reference_clips.tar.xz",
        "jobs/templates/driver.sbatch",
        "trainer/judge.txt",
    ):
        assert name in names
    assert {f"{package}/py.typed" for package in PACKAGES} <= names


def test_its_metadata_is_that_of_the_project(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert (metadata["Name"], metadata["Version"]) == ("merv-pipeline", PROJECT["project"]["version"])
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["project"]["optional-dependencies"])
    base = {re.match(r"[\w-]+", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert base == {"click", "google-crc32c", "numcodecs", "numpy", "pyarrow", "pyyaml", "rich", "zarr"}
    entries = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    for program in ("merv-pipeline", "merv-train", "merv-eval"):
        assert f"{program} = " in entries
    assert name.replace("METADATA", "licenses/LICENSE") in wheel.namelist()


def test_constraints_pin_what_every_extra_names():
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    extras = PROJECT["project"]["optional-dependencies"]
    named = [
        *PROJECT["project"]["dependencies"],
        *(line for extra, lines in extras.items() if extra not in ("cuda", "trackio") for line in lines),
    ]
    missing = {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in named} - pinned
    assert missing == {"merv-pipeline"}


WITHOUT_EXTRAS = """
import sys
from mervcache.errors import EXTRA_OF

class NotInstalled:  # pyarrow looks for pandas by itself, and takes a None in sys.modules for the module
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRA_OF:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
"""


def test_reading_a_store_needs_no_extra(tmp_path, write_store, toy_identity):
    import numpy as np

    from featurestore import Clip

    clip, identity = Clip(dataset="toy", path="a.mp4", kind="video"), toy_identity()
    tokens = np.ones((*identity.grid, identity.width), np.float16)
    store = write_store(tmp_path / "toy.zarr", [clip], {"toy": identity}, {("toy", clip.clip_id): {"tokens": tokens}})
    store.publish_snapshot()
    read = "mervcache.open_store('toy.zarr').read(['toy/a.mp4'], encoder='toy')"
    code = f"{WITHOUT_EXTRAS}import mervcache\nprint({read}.sum())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (f"{float(tokens.sum())}\n", "")


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (("extract", "--dataset", "demo", "--weights", "random:0"), "extract"),
        (("push", "toy.zarr", "hf://datasets/user/name"), "remote"),
        (("status", "hf://datasets/user/name"), "remote"),
        (("status", "s3://bucket/name"), "remote"),
    ],
)
def test_a_command_without_its_extra_names_it(tmp_path, words, extra):
    code = f"{WITHOUT_EXTRAS}from pipeline.cli.extract import main\nmain({words})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.search(rf"Error: .*: pip install 'merv-pipeline\[{extra}[,\]]", done.stderr), done.stderr
