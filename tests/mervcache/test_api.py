"""The public Python API: every name exists, nothing heavy is loaded early, a file that hides a package is named."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import featurestore
import mervcache
import trainer

ROOT = Path(mervcache.__file__).resolve().parents[1]


def python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run code as a script in `folder` would run: the folder comes first on the path."""
    script = folder / "a_users_script.py"
    script.write_text(code)
    variables = {"PATH": "", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, script], cwd=folder, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("name", mervcache.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(mervcache, name).__doc__


def test_completion_lists_public_names_alone():
    importlib.import_module("mervcache.console")  # which is then an attribute of the package

    for package in (mervcache, featurestore, trainer):
        assert dir(package) == sorted(package.__all__)


def test_editors_are_given_the_same_names_from_the_same_places():
    """`__init__.pyi` runs as Python: every name in it is the value that the package gives."""
    stub: dict[str, object] = {}
    exec((ROOT / "mervcache/__init__.pyi").read_text(), stub)
    assert sorted(stub["__all__"]) == sorted(mervcache.__all__)
    assert [name for name in mervcache.__all__ if stub[name] != getattr(mervcache, name)] == []


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = mervcache.trian


@pytest.mark.parametrize("package", ["mervcache", "trainer"])
def test_a_name_whose_extra_is_not_installed_names_the_extra(package, tmp_path):
    blocked = "import sys; sys.modules['torch'] = None\n"  # as if it were not installed
    found = python(f"{blocked}from {package} import Asker", tmp_path)
    message = "torch is not installed: pip install 'merv-pipeline[extract,train]'"
    assert found.stderr.splitlines()[-1] == f"ModuleNotFoundError: {message}"
    mended = f"try:\n    from {package} import Asker\nexcept ImportError as error:\n    print(error.name)"
    assert python(blocked + mended, tmp_path).stdout == "torch\n"


def test_open_store_reads_a_store(tmp_path, write_store, toy_identity):
    clip, identity = mervcache.Clip(dataset="toy", path="a.png", kind="image"), toy_identity()
    tokens = np.ones((1, *identity.grid[1:], identity.width), np.float32)
    store = write_store(tmp_path / "toy.zarr", [clip], {"toy": identity}, {("toy", clip.clip_id): {"tokens": tokens}})
    store.publish_snapshot()
    assert mervcache.open_store(tmp_path / "toy.zarr").clips.column("clip_id").to_pylist() == [clip.clip_id]


def test_importing_it_loads_nothing_heavy(tmp_path):
    heavy = "{'torch', 'pyarrow', 'zarr', 'dask', 'transformers', 'numpy', 'rich'}"
    done = python(f"import sys, mervcache; dir(mervcache); print({heavy} & set(sys.modules))", tmp_path)
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.parametrize("package", ["featurestore", "jobs", "pipeline", "trainer"])
def test_a_users_file_that_hides_a_package_is_named_and_not_run(tmp_path, package):
    (tmp_path / f"{package}.py").write_text("print('run by accident')")
    done = python("import mervcache; mervcache.FeatureStore", tmp_path)
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"ImportError: {tmp_path / package}.py hides the package '{package}' of MERV Cache: rename it"
    )


def test_a_folder_of_the_same_name_without_python_files_hides_nothing(tmp_path):
    (tmp_path / "jobs").mkdir()
    done = python("import mervcache; print(mervcache.FeatureStore.__name__)", tmp_path)
    assert (done.stdout, done.stderr) == ("FeatureStore\n", "")
