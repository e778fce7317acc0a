"""Run tasks over a cluster, a window of a few per worker at a time, and yield their outcomes as they finish.

When a worker dies, Dask blames every task assigned to it, and a million tasks must not sit in the scheduler: hence the
window, which follows the number of workers as they join and leave. A running task reports small counts to the driver as
events of Dask's scheduler, which keeps a bounded number of them; results do not depend on reports.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from jobs.settings import WORKER_WAIT_S
from mervcache.errors import ClusterError

if TYPE_CHECKING:
    from dask.typing import Key
    from distributed import Client, Future

TOPIC = "task-reports"  # of events in Dask's scheduler
INTERVAL_S = 3.0  # between the reports of one task
WINDOW_PER_WORKER = 2  # one that runs and one that waits
RECOUNT_S = 5.0  # between two counts of the workers
SCHEDULER_LOST = (
    "the scheduler is gone, or forgot this run's tasks; what was committed is kept: start the cluster again and run the"
    " same command again"
)

Report = Mapping[str, Any]  # plain values that msgpack can encode

_worker_s: WeakKeyDictionary[Client, float] = WeakKeyDictionary()


class TaskReporter:
    """Sends a running task's counts to its driver; outside of a Dask worker it does nothing.

    A report holds everything since the attempt began, and names the attempt: the driver replaces what it had and never
    adds, so that a report that is lost, late or of an abandoned attempt costs nothing.
    """

    def __init__(self, *, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._attempt = uuid.uuid4().hex
        self._due = time.monotonic() + interval_s  # a shorter task sends its result and nothing else
        self._worker, self._key = None, ""
        if "distributed" in sys.modules:
            from distributed import get_worker

            with suppress(ValueError, AttributeError):  # no worker, or a worker without a task
                worker = get_worker()
                self._worker, self._key = worker, worker.get_current_task()

    def report(self, counts: Callable[[], Report]) -> None:
        """Send `counts()`, the totals of this attempt, if the interval is over."""
        if self._worker is None or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + self._interval_s
        with suppress(TypeError, RuntimeError):  # a worker that is closing has no connection any more
            self._worker.log_event(TOPIC, {"key": self._key, "attempt": self._attempt, "counts": dict(counts())})


@contextmanager
def metered(label: str) -> Iterator[None]:
    """Time that Dask's dashboard shows as a part of the task (fine performance metrics), inside of a Dask worker."""
    metrics = sys.modules.get("distributed.metrics")
    if metrics is None or not hasattr(metrics, "context_meter"):
        yield
        return
    with metrics.context_meter.meter(label):
        yield


@dataclass(frozen=True, kw_only=True)
class Task:
    """One call: `key` names it in the dashboard and must be unique in the run."""

    key: str
    arguments: tuple[Any, ...]  # small and picklable: paths and numbers, never frames


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A task's result, or the error of its last attempt."""

    task: Task
    result: Any = None
    error: BaseException | None = None
    failed_on: tuple[str, ...] = ()  # addresses of the workers that raised it


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Callbacks of a run."""

    report: Callable[[Task, str, Report], None] | None = None  # task, attempt, counts; on the client's own thread
    waiting: Callable[[float], None] = lambda seconds: None  # time without any worker; 0 when one has joined
    workers_came: Callable[[list[str]], None] = lambda addresses: None  # those that joined; an error ends the run


def run_tasks(
    client: Client,
    function: Callable[..., Any],
    tasks: Iterable[Task],
    *,
    attempts: int = 2,
    is_final: Callable[[BaseException], bool] = lambda error: False,
    after_deaths: Callable[..., Any] | None = None,
    worker_wait_s: float = WORKER_WAIT_S[""],
    listener: Listener = Listener(),
    per_worker: int = WINDOW_PER_WORKER,
) -> Generator[Outcome]:
    """Yield every task's outcome as it finishes; a failed task is tried again unless `is_final(error)`.

    Another worker tries it again, if there is one: a broken device fails at once, is idle and would be given every
    task. A task that Dask gave up because workers died under it is run by `after_deaths` with the same arguments after
    all others, one at a time, so that no other task is blamed for it. Raises `ClusterError` after `worker_wait_s`
    without any worker. A worker has at most `per_worker` tasks, those that wait included. Closing the generator cancels
    what has not started.
    """
    from distributed import KilledWorker

    remaining, deadly = iter(tasks), deque[Task]()
    with _Window(client, _Workers(client, worker_wait_s, listener), listener, per_worker) as window:
        while True:
            window.fill(function, remaining)
            if not window.running:
                if not deadly or after_deaths is None:
                    return
                window.submit(after_deaths, deadly.popleft(), attempts)
            if (ended := window.next()) is None:
                continue
            attempt, outcome = ended
            if outcome.error is None or is_final(outcome.error):
                pass
            elif after_deaths not in (None, attempt.function) and isinstance(outcome.error, KilledWorker):
                deadly.append(attempt.task)
                continue
            elif attempt.number < attempts:
                window.submit(attempt.function, attempt.task, attempt.number + 1, avoid=outcome.failed_on)
                continue
            window.fill(function, remaining)  # before the caller takes its time over the outcome
            yield outcome


def worker_seconds(client: Client) -> float:
    """Time that workers were held while this client's tasks ran, idle time included, summed over the workers."""
    return _worker_s.get(client, 0.0)


class _Workers:
    """Addresses of the workers, counted every `RECOUNT_S`, and for how long there has been none."""

    def __init__(self, client: Client, wait_s: float, listener: Listener) -> None:
        self._client, self._wait_s, self._listener = client, wait_s, listener
        self._counted = self._seen = time.monotonic()
        self.addresses = _addresses(client)

    def recount(self) -> None:
        """Count again if it is time to; raises `ClusterError` after too long without any worker."""
        now = time.monotonic()
        if now - self._counted < RECOUNT_S:
            return
        self.add_time(now)
        self._counted, before, self.addresses = now, self.addresses, _addresses(self._client)
        if new := sorted(self.addresses - before):
            self._listener.workers_came(new)
        if self.addresses:
            self._seen = now
            if not before:
                self._listener.waiting(0.0)
            return
        self._listener.waiting(now - self._seen)
        if now - self._seen >= self._wait_s:
            raise ClusterError(
                f"the cluster has had no worker for {now - self._seen:.0f} s; what was committed is kept: start "
                "workers again and run the same command again (to wait longer: --cluster worker_wait=HH:MM:SS)"
            )

    def add_time(self, now: float) -> None:
        """Count the time since the last count, for `worker_seconds`."""
        _worker_s[self._client] = worker_seconds(self._client) + (now - self._counted) * len(self.addresses)
        self._counted = now


def _addresses(client: Client) -> frozenset[str]:
    return frozenset(client.scheduler_info(n_workers=-1)["workers"])


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """A task that a worker has, or will have soon."""

    task: Task
    function: Callable[..., Any]
    number: int  # 1 for the first
    future: Future


class _Window:
    """The tasks that the cluster has now."""

    def __init__(self, client: Client, workers: _Workers, listener: Listener, per_worker: int) -> None:
        self._client, self._workers, self._on_report = client, workers, listener.report
        self._per_worker = per_worker
        self._finished: SimpleQueue[Future] = SimpleQueue()
        self.running: dict[Key, _Attempt] = {}  # by the future's key

    def __enter__(self) -> _Window:
        if self._on_report is not None:
            self._client.subscribe_topic(TOPIC, self._handle_event)
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.add_time(time.monotonic())
        if self._on_report is not None:
            with suppress(Exception):  # the scheduler may be gone, and the subscription with it
                self._client.unsubscribe_topic(TOPIC)
        if self._client.status == "running":
            self._client.cancel([attempt.future for attempt in self.running.values()], force=True)

    def _handle_event(self, event: tuple[float, Any]) -> None:
        _, message = event
        found = self.running.get(message["key"])  # None: a task of another driver
        if found is not None and self._on_report is not None:
            self._on_report(found.task, message["attempt"], message["counts"])

    def fill(self, function: Callable[..., Any], remaining: Iterator[Task]) -> None:
        """Submit tasks until the window is full or none is left."""
        size = self._per_worker * max(1, len(self._workers.addresses))
        while len(self.running) < size and (task := next(remaining, None)) is not None:
            self.submit(function, task, 1)

    def submit(self, function: Callable[..., Any], task: Task, number: int, avoid: Collection[str] = ()) -> None:
        """Submit an attempt; workers in `avoid` get it only where there is no other."""
        key = f"{task.key}-{function.__name__}-try{number}"
        others = sorted(self._workers.addresses.difference(avoid)) if avoid else []
        where = {"workers": others, "allow_other_workers": True} if others else {}
        future = self._client.submit(function, *task.arguments, key=key, pure=False, **where)
        self._watch(_Attempt(task=task, function=function, number=number, future=future))

    def _watch(self, attempt: _Attempt) -> None:
        self.running[attempt.future.key] = attempt
        attempt.future.add_done_callback(self._finished.put)

    def next(self) -> tuple[_Attempt, Outcome] | None:
        """An attempt that has ended and its outcome; None every `RECOUNT_S`, when there may be room for more."""
        try:
            future = self._finished.get(timeout=RECOUNT_S)
        except Empty:
            future = None
        self._workers.recount()
        if future is None:
            return None
        attempt = self.running.pop(future.key)
        if future.cancelled():  # not by us: cancelled futures are not watched
            raise ClusterError(SCHEDULER_LOST)
        try:
            error = cast("BaseException | None", future.exception(timeout=RECOUNT_S))  # a coroutine elsewhere
            result = None if error is not None else future.result(timeout=RECOUNT_S)
        except CancelledError:  # between the look above and this one
            raise ClusterError(SCHEDULER_LOST) from None
        except (OSError, UnboundLocalError):
            # Its worker left with the result and Dask computes it again, or the connection is slow or cut. The second
            # error is what `distributed.utils.sync` makes of a cancellation in its event loop, seen under heavy load.
            self._watch(attempt)
            return None
        failed_on = _failed_on(self._client, future.key) if error is not None else ()
        future.release()
        return attempt, Outcome(task=attempt.task, result=result, error=error, failed_on=failed_on)


def _failed_on(client: Client, key: Key) -> tuple[str, ...]:
    """Addresses of the workers that raised the task's error; none for a task whose workers died."""

    def erred_on(dask_scheduler: Any, key: Key) -> tuple[str, ...]:
        task = dask_scheduler.tasks.get(key)
        return tuple(task.erred_on or ()) if task else ()

    with suppress(OSError):  # the scheduler has gone meanwhile
        return cast("tuple[str, ...]", client.run_on_scheduler(erred_on, key=key))
    return ()


def check_workers(client: Client, distribution: str, workers: list[str] | None = None) -> None:
    """Raise `ClusterError` unless every worker, or those given, has the distribution in the driver's version.

    A worker that cannot import a task's function never answers: distributed loses the task and the driver would wait
    forever (seen with 2026.8). This check needs nothing but the standard library on the worker.
    """
    from importlib.metadata import version

    expected = version(distribution)
    answers = client.run(version, distribution, on_error="return", workers=workers)
    for worker, found in cast("dict[str, Any]", answers).items():
        if found != expected and not isinstance(found, OSError):  # an OSError: it has just left
            problem = f"has version {found}" if isinstance(found, str) else "does not have it"
            raise ClusterError(
                f"the driver runs {distribution} {expected}, the worker {worker} {problem}: "
                "start the workers from the same environment"
            )
