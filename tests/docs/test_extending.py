"""The distribution of docs/extending.md, made of its blocks in a folder outside the project, in every command."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from featurestore import FeatureStore
from tests.docs.pages import ROOT, blocks_of

PAGE = "docs/extending.md"
TOY = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def outside(tmp_path_factory, made_once) -> Path:
    """A folder with the distribution installed in `site`, clips with captions, and settings at toy size."""
    folder = tmp_path_factory.mktemp("outside")
    text, package = (ROOT / PAGE).read_text(), folder / "site" / "merv_extras"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    blocks = {block.line: block.code for block in blocks_of(PAGE) if block.language in ("python", "toml")}
    lines = text.splitlines()
    for line, code in blocks.items():
        named = re.findall(r"`(?:merv_extras/)?(\w+\.(?:py|toml))`", "\n".join(lines[: line - 2]))[-1]
        (package / named if named != "my_cluster.py" else folder / named).write_text(code)
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    info = folder / "site" / f"merv_extras-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = (
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups))

    (folder / "clips").mkdir()
    shutil.copy(made_once / "clip.mp4", folder / "clips/a.mp4")
    shutil.copy(made_once / "clip.mp4", folder / "clips/b.mp4")
    with (folder / "clips/captions.csv").open("w", newline="") as file:
        rows = [
            ("video", "caption"),
            ("a.mp4", "A shape."),
            ("b.mp4", "A shape moves."),
            ("a.mp4", ""),
            ("../x.mp4", "No."),
        ]
        csv.writer(file).writerows(rows)
    architecture = "".join(f"  {name}: {TOY}\n" for name in ("vit", "dinov2"))
    settings = (
        "weights: random:0\ngrid: [4, 2, 2]\nbatch: {video: 2, image: 2}\ncanaries: false\ncompute_dtype: float32\n"
    )
    (folder / "toy.yaml").write_text(f"{settings}architecture:\n{architecture}".replace("'", ""))
    (folder / "steps.yaml").write_text(
        "max_steps: 2\nbatch_size: 2\nmicro_batch_size: 2\nprojector: {grid: [4, 2, 2]}\n"
    )
    return folder


def python(outside: Path, code: str, *words: str) -> subprocess.CompletedProcess:
    """A fresh process in the folder, which finds the distribution and the project as installed ones."""
    environment = {**os.environ, "PYTHONPATH": f"{outside / 'site'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=outside, env=environment, capture_output=True, text=True
    )


COMMANDS = """
import shlex, sys
from pipeline.cli.extract import main
from trainer.main import eval_main, train_main
programs = {"merv-pipeline": main, "merv-train": train_main, "merv-eval": eval_main}
for line in sys.argv[1:]:
    program, *words = shlex.split(line)
    try:
        programs[program](words, prog_name=program)
    except SystemExit as end:
        print("code", end.code, program, *words[:1], flush=True)
"""


@pytest.mark.slow
def test_the_commands_of_the_page_use_all_three_plug_ins(outside):
    (block,) = [block for block in blocks_of(PAGE) if block.language == "bash"]
    lines = ["merv-pipeline encoders", "merv-pipeline datasets captions", *block.code.splitlines()]
    done = python(outside, COMMANDS, *lines)
    codes = re.findall(r"^code (\d+) (.*)$", done.stdout, re.MULTILINE)
    assert [code for code, _ in codes] == ["0", "0", "3", "0", "0"], done.stdout + done.stderr  # 3: refused records
    assert "ViT-B/16, ImageNet-21k" in done.stdout
    assert "no caption" in done.stderr
    store = FeatureStore.open(outside / "features/captions.zarr")
    assert sorted(store.encoders) == ["dinov2", "vit"]
    assert store.read(["captions/a.mp4"], encoder="vit").shape == (1, 4, 2, 2, 32)
    assert [sample.turns[1].text for sample in store.samples()] == ["A shape.", "A shape moves."]
    assert "name: gated" in (outside / "runs/gated/config.yaml").read_text()


@pytest.mark.slow
def test_a_cluster_of_ones_own_serves_an_extraction(outside):
    done = python(outside, "import runpy; runpy.run_path('my_cluster.py', run_name='__main__')")
    assert done.stdout.splitlines()[-1:] == ["2 clips"], done.stdout + done.stderr
    assert len(FeatureStore.open(outside / "features/cluster.zarr")) == 2


def test_a_fusion_that_is_none_is_named(outside, monkeypatch):
    from mervcache.errors import UserError
    from trainer.config import FUSIONS, FusionConfig
    from trainer.model.fusion import build_fusion

    entry = type("Entry", (), {"name": "other", "value": "collections:OrderedDict"})()
    monkeypatch.setattr(FUSIONS, "_plug_ins", {"other": [entry]})
    with pytest.raises(UserError, match="other = collections:OrderedDict must be a class of Fusion"):
        build_fusion(FusionConfig(name="other"), 2, 8)
