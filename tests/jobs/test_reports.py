"""Reports of running tasks, through a real scheduler to the driver."""

import threading
import time

import pytest

from jobs.clusters import ClusterRequest, connect
from jobs.run import Listener, Task, TaskReporter, metered, run_tasks

heard = threading.Event()  # tasks run in this process: they may wait until the driver has heard them


def count_aloud(number: int) -> int:
    reporter = TaskReporter(interval_s=0.0)
    reporter.report(lambda: {"clips": number, "seconds": {"decode wait": 0.5}})
    assert heard.wait(120)
    return number


def tell_often(interval_s: float) -> int:
    reporter, asked = TaskReporter(interval_s=interval_s), []
    for number in range(1000):
        reporter.report(lambda number=number: asked.append(number) or {"clips": number})
    return len(asked)


def meter_a_stage() -> str:
    with metered("decode wait"):
        time.sleep(0.05)
    return "done"


@pytest.fixture(scope="module")
def client():
    with connect(ClusterRequest()) as client:
        yield client


def test_the_driver_hears_what_a_task_counts_while_it_runs(client):
    reports = []

    def hear(task, attempt, counts):
        reports.append((task.key, counts, len(attempt)))
        heard.set()

    heard.clear()
    (outcome,) = run_tasks(client, count_aloud, [Task(key="aloud", arguments=(7,))], listener=Listener(report=hear))
    assert outcome.result == 7
    assert reports == [("aloud", {"clips": 7, "seconds": {"decode wait": 0.5}}, 32)]


def test_reports_of_tasks_that_are_not_ours_are_not_passed_on(client):
    """Two drivers may share a scheduler."""
    all_keys, ours = [], []

    def tasks():
        handler = client._event_handlers["task-reports"]
        client._event_handlers["task-reports"] = lambda event: (all_keys.append(event[1]["key"]), handler(event))
        client.submit(tell_often, 0.0, key="somebody-else", pure=False).result()
        yield Task(key="ours", arguments=(2,))

    def hear(task, *_):
        ours.append(task.key)
        heard.set()

    heard.clear()
    list(run_tasks(client, count_aloud, tasks(), listener=Listener(report=hear)))
    assert all_keys.count("somebody-else") == 1000
    assert ours == ["ours"]


def test_a_task_that_tells_all_the_time_is_asked_now_and_then(client):
    assert client.submit(tell_often, 3600.0, pure=False).result() == 0
    assert client.submit(tell_often, 0.0, pure=False).result() == 1000


def test_outside_of_a_cluster_a_report_leads_nowhere():
    TaskReporter(interval_s=0.0).report(lambda: pytest.fail("nobody listens"))


def test_a_stage_is_seen_in_the_fine_metrics_of_the_dashboard(client):
    assert client.submit(meter_a_stage, key="metered-1", pure=False).result() == "done"

    def seconds(dask_scheduler):
        metrics = dask_scheduler.cumulative_worker_metrics
        return {key[2]: value for key, value in metrics.items() if key[:2] == ("execute", "metered")}

    deadline = time.monotonic() + 120
    while "decode wait" not in (found := client.run_on_scheduler(seconds)):  # they travel with the heartbeat
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    assert found["decode wait"] >= 0.05
