"""Extraction through a scheduler and workers that somebody started with `dask scheduler` and `dask worker`."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

DASK = Path(sys.executable).with_name("dask")


@pytest.fixture
def cluster(tmp_path) -> Iterator[Path]:
    """The scheduler file of two processes that run in a folder with rooms of the project's names."""
    here, file = tmp_path / "here", tmp_path / "scheduler.json"
    for name in ("featurestore", "jobs", "pipeline", "trainer"):
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text("raise ImportError('not the installed one')")
    commands = [
        ["scheduler", "--scheduler-file", file, "--port", "0", "--no-dashboard"],
        ["worker", "--scheduler-file", file, "--nthreads", "1", "--local-directory", tmp_path, "--no-dashboard"],
    ]
    with ExitStack() as stack, (tmp_path / "log").open("w") as log:
        for command in commands:
            process = stack.enter_context(
                subprocess.Popen([DASK, *map(str, command)], cwd=here, stdout=log, stderr=subprocess.STDOUT)
            )
            stack.callback(process.terminate)
            deadline = time.monotonic() + 60
            while not file.exists():
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.05)
        yield file


def test_daemonic_workers_of_another_cluster_write_the_bytes_of_a_local_run(lab, cluster):
    """By scheduler file, then by address: the second run adds the stills to what the first one made of the videos."""
    from distributed import Client

    changes = {"encoders": ["languagebind"]}
    assert lab.extract(scheduler=str(cluster), kind="video", **changes).clips == 9
    with Client(scheduler_file=str(cluster)) as client:
        address = client.scheduler.address
        assert set(client.run(_is_daemonic()).values()) == {True}  # such a worker may have no multiprocessing children
    summary = lab.extract(scheduler=address, **changes)
    assert (summary.clips, summary.failed) == (5, 0)
    alone = lab.folder / "alone.zarr"
    lab.extract(store=alone, kind="video", **changes)
    lab.extract(store=alone, **changes)
    assert lab.hashes(lab.store) == lab.hashes(alone)


def _is_daemonic():
    """A function that travels by value: workers cannot import the tests."""
    return lambda: multiprocessing.current_process().daemon
