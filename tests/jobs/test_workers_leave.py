"""A cluster that loses its workers: the run says so, waits for a stated time, and ends with the next step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from jobs import run
from jobs.clusters import ClusterError, ClusterRequest, ClusterSettings, connect
from jobs.run import Listener, Task, run_tasks


@pytest.fixture
def cluster(monkeypatch) -> Iterator:
    """A scheduler and one worker of somebody else; the run looks at it often."""
    from distributed import LocalCluster

    monkeypatch.setattr(run, "RECOUNT_S", 0.1)
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        yield cluster


def lose_the_worker(cluster) -> None:
    cluster.scale(0)
    deadline = time.monotonic() + 300
    while cluster.scheduler.workers:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_any_worker_the_run_ends_after_its_time_and_says_how_to_go_on(cluster):
    waited = []
    with connect(ClusterRequest(scheduler=cluster.scheduler_address)) as client:
        tasks = (Task(key=f"abs-{n}", arguments=(-n,)) for n in range(100))
        outcomes = run_tasks(client, abs, tasks, worker_wait_s=0.5, listener=Listener(waiting=waited.append))
        assert next(outcomes).error is None
        lose_the_worker(cluster)
        with pytest.raises(ClusterError, match=r"no worker for \d+ s; what was committed is kept: .*run the same comm"):
            list(outcomes)
    assert waited == sorted(waited)
    assert waited[-1] >= 0.5


def test_a_worker_that_comes_in_time_takes_the_work_up_again(cluster):
    waited, is_waiting = [], threading.Event()

    def on_wait(seconds: float) -> None:
        waited.append(seconds)
        is_waiting.set()

    def come_back() -> None:
        is_waiting.wait(300)
        cluster.scale(1)

    with connect(ClusterRequest(scheduler=cluster.scheduler_address)) as client:
        lose_the_worker(cluster)
        helper = threading.Thread(target=come_back)
        helper.start()
        tasks = [Task(key=f"abs-{n}", arguments=(-n,)) for n in range(5)]
        results = sorted(
            outcome.result for outcome in run_tasks(client, abs, tasks, listener=Listener(waiting=on_wait))
        )
        helper.join()
    assert results == [0, 1, 2, 3, 4]
    assert waited[0] > 0
    assert waited[-1] == 0 or len(waited) == 1  # the tasks may be done before the next look


@pytest.mark.parametrize(
    ("scheduler", "given", "seconds"),
    [("local", None, 600), ("slurm", None, 86_400), ("slurm", "0:30:00", 1800), ("tcp://h:1", "1-00:00:01", 86_401)],
)
def test_how_long_a_run_waits_is_ten_minutes_in_a_queue_a_day_or_what_the_settings_say(scheduler, given, seconds):
    settings = ClusterSettings.from_mapping({"worker_wait": given})
    assert ClusterRequest(scheduler=scheduler, settings=settings).worker_wait_s == seconds


def test_a_wait_that_is_no_time_is_refused():
    with pytest.raises(ClusterError, match=r"worker_wait must be \[D-\]HH:MM:SS, such as 12:00:00, got 'ten'"):
        ClusterSettings.from_mapping({"worker_wait": "ten"})


def test_workers_that_come_later_are_checked_and_may_end_the_run(cluster):
    asked = []

    def refuse(addresses: list[str]) -> None:
        asked.extend(addresses)
        raise ClusterError("shares a GPU")

    with connect(ClusterRequest(scheduler=cluster.scheduler_address)) as client:
        there = set(client.scheduler_info(n_workers=-1)["workers"])
        tasks = (Task(key=f"nap-{n}", arguments=(0.05,)) for n in range(10_000))
        outcomes = run_tasks(client, time.sleep, tasks, listener=Listener(workers_came=refuse))
        next(outcomes)
        cluster.scale(2)
        with pytest.raises(ClusterError, match="shares a GPU"):
            list(outcomes)
    assert len(asked) == 1
    assert not there & set(asked)
