"""The window of tasks, over a real embedded cluster and over worker processes."""

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.clusters import CLUSTERS, ClusterError, ClusterRequest, connect
from jobs.run import WINDOW_PER_WORKER, Task, check_workers, run_tasks

pytestmark = pytest.mark.slow


def square(number: int) -> int:
    return number * number


def fail_on_three(number: int, marks: str) -> int:
    (Path(marks) / f"{number}-{time.monotonic_ns()}").touch()
    if number == 3:
        raise ValueError("three is refused")
    return number


def fail_on_the_first_worker(mark: str) -> str:
    from distributed import get_worker

    here = get_worker().address
    if not Path(mark).exists():
        Path(mark).write_text(here)
    if Path(mark).read_text() == here:
        raise ValueError("this device has gone bad")
    return here


KILLER = """
import os, pathlib, signal

def kill_own_worker_once(mark):
    if not pathlib.Path(mark).exists():
        pathlib.Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "second life"

def always_die(mark):
    os.kill(os.getpid(), signal.SIGKILL)

def bear_it(mark):
    (pathlib.Path(mark).parent / "alone").touch()
    return "borne"
"""


@pytest.fixture(scope="module")
def client():
    with connect(ClusterRequest()) as client:
        yield client


def test_every_task_gives_one_outcome_with_its_own_result(client):
    tasks = [Task(key=f"square-{n}", arguments=(n,)) for n in range(20)]
    outcomes = list(run_tasks(client, square, tasks))
    assert {o.task.key: o.result for o in outcomes} == {f"square-{n}": n * n for n in range(20)}
    assert all(o.error is None for o in outcomes)


def test_no_task_is_no_outcome(client):
    assert list(run_tasks(client, square, [])) == []


def test_a_task_that_fails_is_tried_again_and_then_reported_beside_the_others(client, tmp_path):
    tasks = [Task(key=f"fail-{n}", arguments=(n, str(tmp_path))) for n in range(6)]
    outcomes = {o.task.key: o for o in run_tasks(client, fail_on_three, tasks, attempts=3)}
    assert str(outcomes["fail-3"].error) == "three is refused"
    assert len(list(tmp_path.glob("3-*"))) == 3
    assert sorted(o.result for o in outcomes.values() if o.error is None) == [0, 1, 2, 4, 5]


def test_another_worker_tries_again_what_failed_on_one(tmp_path):
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=3, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        connect(ClusterRequest(scheduler=cluster.scheduler_address)) as client,
    ):
        for n in range(5):  # the idle worker that has just failed would be Dask's first choice now and then
            task = Task(key=f"bad-{n}", arguments=(str(tmp_path / f"bad-{n}"),))
            (outcome,) = run_tasks(client, fail_on_the_first_worker, [task])
            assert outcome.error is None
            assert outcome.result != (tmp_path / f"bad-{n}").read_text()


def test_a_final_error_is_not_tried_again(client, tmp_path):
    task = Task(key="final-3", arguments=(3, str(tmp_path)))
    (outcome,) = run_tasks(client, fail_on_three, [task], attempts=5, is_final=lambda e: isinstance(e, ValueError))
    assert isinstance(outcome.error, ValueError)
    assert len(list(tmp_path.iterdir())) == 1


def test_tasks_are_taken_as_workers_become_free_and_not_all_at_once(client):
    taken = []

    def tasks():
        for n in range(50):
            taken.append(n)
            yield Task(key=f"lazy-{n}", arguments=(n,))

    outcomes = run_tasks(client, square, tasks())
    next(outcomes)
    assert len(taken) <= WINDOW_PER_WORKER + 1
    outcomes.close()


def test_a_worker_killed_at_work_costs_no_task(tmp_path, monkeypatch):
    (tmp_path / "killer_of_workers.py").write_text(KILLER)  # worker processes cannot import the tests
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    kill_own_worker_once = importlib.import_module("killer_of_workers").kill_own_worker_once
    with connect(ClusterRequest(num_workers=2)) as client:
        tasks = [Task(key="killer", arguments=(str(tmp_path / "died"),))]
        (outcome,) = run_tasks(client, kill_own_worker_once, tasks)
    assert outcome.result == "second life"


def test_a_task_that_kills_every_worker_is_left_for_last_and_then_run_by_another_function(tmp_path, monkeypatch):
    (tmp_path / "killer_for_good.py").write_text(KILLER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    killer = importlib.import_module("killer_for_good")
    with connect(ClusterRequest(num_workers=2)) as client:
        client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 0))
        task = Task(key="deadly", arguments=(str(tmp_path / "mark"),))
        (outcome,) = run_tasks(client, killer.always_die, [task], after_deaths=killer.bear_it)
        assert (outcome.result, outcome.task.key) == ("borne", "deadly")
        (outcome,) = run_tasks(client, killer.always_die, [task], attempts=1)
        assert type(outcome.error).__name__ == "KilledWorker"


def test_a_scheduler_that_dies_ends_the_run_with_the_next_step(tmp_path):
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard"]
    file = tmp_path / "scheduler.json"
    scheduler = subprocess.Popen([*command, "--scheduler-file", str(file)], stderr=subprocess.DEVNULL)
    worker = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file), "--no-nanny"],
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with connect(ClusterRequest(scheduler=str(file))) as client:
            outcomes = run_tasks(client, time.sleep, [Task(key=f"nap-{n}", arguments=(0.2 * n,)) for n in range(50)])
            next(outcomes)
            scheduler.kill()
            with pytest.raises(ClusterError, match=r"the scheduler is gone.*run the same command again"):
                list(outcomes)
    finally:
        scheduler.kill()
        worker.kill()
        scheduler.wait()
        worker.wait()


def test_a_scheduler_that_others_run_is_joined_by_address():
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        with connect(ClusterRequest(scheduler=cluster.scheduler_address)) as client:
            (outcome,) = run_tasks(client, square, [Task(key="joined", arguments=(7,))])
        assert outcome.result == 49
        assert len(cluster.workers) == 1  # leaving does not stop what we did not start


def test_an_unknown_scheduler_names_the_nearest_and_lists_the_known_ones():
    told = f"unknown scheduler 'slrum', the nearest known one is 'slurm'; known: {', '.join(CLUSTERS)}; or give"
    with pytest.raises(ClusterError, match=told):
        connect(ClusterRequest(scheduler="slrum")).__enter__()


def test_a_scheduler_that_does_not_answer_is_an_error_with_its_address():
    with pytest.raises(ClusterError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        connect(ClusterRequest(scheduler="tcp://127.0.0.1:9")).__enter__()


def test_workers_of_another_version_are_refused_before_any_task_is_lost(client):
    check_workers(client, "distributed")
    with pytest.raises(ClusterError, match=r"the driver runs pytest .* does not have it"):
        check_workers(_WorkersWithout(client), "pytest")


class _WorkersWithout:
    """A client whose workers answer as those of an environment without the distribution do."""

    def __init__(self, client):
        self._client = client

    def run(self, function, distribution, **options):
        return self._client.run(function, f"{distribution}-absent", **options)
