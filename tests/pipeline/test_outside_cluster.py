"""Extraction through a scheduler and workers that somebody started with `dask scheduler` and `dask worker`."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from featurestore import FeatureStore
from jobs import run
from mervcache.errors import ClusterError

pytestmark = pytest.mark.slow

DASK = Path(sys.executable).with_name("dask")


class Cluster:
    """A scheduler with its file, and the processes of both programs."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.file, self._folder, self._stack = folder / "scheduler.json", folder, stack
        self._log = stack.enter_context((folder / "log").open("w"))
        self.scheduler = self.start("scheduler", "--port", "0")
        until(self.file.exists, self.said)
        self.worker = self.start_worker()

    def start_worker(self) -> subprocess.Popen:
        return self.start("worker", "--nthreads", "1", "--local-directory", self._folder)

    def start(self, program: str, *options: object) -> subprocess.Popen:
        words = [DASK, program, "--scheduler-file", self.file, "--no-dashboard", *options]
        process = self._stack.enter_context(
            subprocess.Popen(
                list(map(str, words)), cwd=self._folder / "here", stdout=self._log, stderr=subprocess.STDOUT
            )
        )
        self._stack.callback(process.terminate)
        return process

    def said(self) -> str:
        return (self._folder / "log").read_text()


def until(condition: Callable[[], bool], said: Callable[[], str], within_s: float = 300.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    """A scheduler and a worker that run in a folder with rooms of the project's names."""
    here = tmp_path / "here"
    for name in ("featurestore", "jobs", "pipeline", "trainer"):
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text("raise ImportError('not the installed one')")
    with ExitStack() as stack:
        yield Cluster(tmp_path, stack)


def test_daemonic_workers_of_another_cluster_write_the_bytes_of_a_local_run(lab, cluster, monkeypatch, capsys):
    """The videos by scheduler file; the stills by address, until the only worker leaves, then with another one."""
    from distributed import Client

    from pipeline import extract

    run_blocks = extract.run_blocks
    changes = {"encoders": ["languagebind"]}
    assert lab.extract(scheduler=str(cluster.file), kind="video", **changes).clips == 9
    with Client(scheduler_file=str(cluster.file)) as client:
        address = client.scheduler.address
        assert set(client.run(_is_daemonic()).values()) == {True}  # such a worker may have no multiprocessing children

    def leave_first(*arguments, quiet: bool, **options) -> None:
        cluster.worker.terminate()
        cluster.worker.wait()
        run_blocks(*arguments, quiet=False, **options)

    with monkeypatch.context() as patch:
        patch.setattr(extract, "run_blocks", leave_first)
        patch.setattr(run, "RECOUNT_S", 0.2)
        with pytest.raises(ClusterError, match=r"no worker for .* what was committed is kept"):
            lab.extract(scheduler=address, cluster={"worker_wait": "00:00:01"}, **changes)
    assert "extract: no worker for 1 s, stops after 1 s, 0/5 clips" in capsys.readouterr().err
    assert sum(FeatureStore.open(lab.store).clips["languagebind"].to_pylist()) == 9
    cluster.start_worker()
    summary = lab.extract(scheduler=address, **changes)
    assert (summary.clips, summary.failed) == (5, 0)
    alone = lab.folder / "alone.zarr"
    lab.extract(store=alone, kind="video", **changes)
    lab.extract(store=alone, **changes)
    assert lab.hashes(lab.store) == lab.hashes(alone)


def _is_daemonic():
    """A function that travels by value: workers cannot import the tests."""
    return lambda: multiprocessing.current_process().daemon
