"""Fixtures of all rooms: servers that stand in for places far away, toy stores, and a cache folder that is nobody's."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

# The same cases every time: a test fails because of what was changed. New cases are benchmarks/fuzz.py's to find.
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")

# Files of few and long tests go first: at the end of a run on several processes they would keep one of them alone.
LONG = (
    "test_slurm.py",
    "test_faults.py",
    "test_suspect.py",
    "test_fault_kinds.py",
    "test_launch.py",
    "test_sharded_ranks.py",
    "test_ranks.py",
    "test_gpu_check.py",
    "test_stages.py",
    "test_outside_cluster.py",
    "test_sync.py",
)


def pytest_collection_modifyitems(items: list) -> None:
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))  # stable: the order within a file stays


def _load(name: str) -> ModuleType:
    """A fixture module by its file: test folders are not packages."""
    path = Path(__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What digests are remembered in, here and in every process that a test starts: not the user's."""
    before, folder = os.environ.get("XDG_CACHE_HOME"), tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


_s3, _web, _toys = _load("featurestore/s3_server"), _load("featurestore/web_server"), _load("toy_stores")
_hub, _terminals = _load("featurestore/hub_server"), _load("terminals")
s3, s3_endpoint, web = _s3.s3, _s3.s3_endpoint, _web.web
hub = _hub.hub
stepped_clock, terminal = _terminals.stepped_clock, _terminals.terminal
toy_identity, write_store = _toys.toy_identity, _toys.write_store
