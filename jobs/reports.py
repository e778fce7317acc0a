"""Reports: what a running task tells its driver before it ends.

Comes in, on a worker: small counts, as often as the task likes. Goes out, at the driver: at most one message per task
every few seconds. A report holds everything since the attempt began and names the attempt, so one that is lost, late or
of an attempt that was given up costs nothing: the driver replaces, it never adds. Reports travel as events of Dask's
scheduler (`Worker.log_event`), which keeps a bounded number of them; results do not depend on them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Client

TOPIC = "task-reports"
INTERVAL_S = 3.0  # between the reports of one task

Report = Mapping[str, Any]  # plain values that msgpack knows
OnReport = Callable[[str, str, Report], None]  # key of the future, id of the attempt, counts


class TaskReporter:
    """A task's line to its driver; outside of a Dask worker it leads nowhere."""

    def __init__(self, *, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._attempt = uuid.uuid4().hex
        self._due = time.monotonic() + interval_s  # a task that is over sooner sends its result and nothing else
        self._worker, self._key = _running_task()

    def tell(self, counts: Callable[[], Report]) -> None:
        """Send what `counts` says since the attempt began, if it is time again."""
        if self._worker is None or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + self._interval_s
        with suppress(TypeError, RuntimeError):  # a worker that is closing has no line any more
            self._worker.log_event(TOPIC, {"key": self._key, "attempt": self._attempt, "counts": dict(counts())})


def _running_task() -> tuple[Any, str]:
    import sys

    if "distributed" not in sys.modules:
        return None, ""
    from distributed import get_worker

    try:
        worker = get_worker()
        return worker, worker.get_current_task()
    except (ValueError, AttributeError):  # nobody's worker, or no task of its own
        return None, ""


@contextmanager
def listening(client: Client, on_report: OnReport | None) -> Iterator[None]:
    """Call `on_report` on the client's own thread for every report of any task of the scheduler."""
    if on_report is None:
        yield
        return

    def handle(event: tuple[float, Any]) -> None:
        _, message = event
        on_report(message["key"], message["attempt"], message["counts"])

    client.subscribe_topic(TOPIC, handle)
    try:
        yield
    finally:
        with suppress(Exception):  # the scheduler may be gone, and with it the subscription
            client.unsubscribe_topic(TOPIC)


@contextmanager
def metered(label: str) -> Iterator[None]:
    """Time that Dask's dashboard shows as a part of the task (fine performance metrics), where it runs in Dask."""
    import sys

    metrics = sys.modules.get("distributed.metrics")
    if metrics is None or not hasattr(metrics, "context_meter"):
        yield
        return
    with metrics.context_meter.meter(label):
        yield
