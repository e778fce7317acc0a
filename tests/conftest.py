"""Shared fixtures: servers that stand in for remote services, toy stores, and a cache folder of the test run's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.featurestore.hub_server import hub
from tests.featurestore.s3_server import s3, s3_endpoint
from tests.featurestore.web_server import web
from tests.featurestore.xet_hub import xet_hub
from tests.terminals import stepped_clock, terminal
from tests.toy_stores import toy_identity, write_store

__all__ = [  # fixtures
    "hub",
    "s3",
    "s3_endpoint",
    "stepped_clock",
    "terminal",
    "toy_identity",
    "web",
    "write_store",
    "xet_hub",
]

# The same cases every time: a test fails because of what was changed. New cases are tests/stress/fuzz.py's to find.
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")


QUICK = {  # what an installed package is checked with, see scripts/check_wheel.sh: these need no extra
    "mervcache": {"config", "console", "progress_line", "tables", "text"},
    "featurestore": set("blocks clip_names layout locate receipts shards snapshots store tombstones writer".split()),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the quick tests. Slow files first: at the end of a run on several processes they would keep one alone."""
    for item in items:
        if item.path.stem.removeprefix("test_") in QUICK.get(item.path.parent.name, ()):
            item.add_marker("quick")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # stable: the order within a file stays


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
