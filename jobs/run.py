"""Run a list of tasks over a cluster: a window of them at a time, results as they finish.

Comes in: a function, and tasks with a stable key. Goes out: one `Outcome` per task, in the order of finishing. The room
knows nothing of what a task does. A window of a few tasks per worker instead of all at once: when a worker dies, Dask
blames every task assigned to it, so few should be; and a million tasks must not live in the scheduler. The window
follows the number of workers, which may join and leave; where all have left, the run waits for a stated time and stops.

Reports: what a running task tells its driver before it ends.

Comes in, on a worker: small counts, as often as the task likes. Goes out, at the driver: at most one message per task
every few seconds. A report holds everything since the attempt began and names the attempt, so one that is lost, late or
of an attempt that was given up costs nothing: the driver replaces, it never adds. Reports travel as events of Dask's
scheduler (`Worker.log_event`), which keeps a bounded number of them; results do not depend on them.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from jobs.settings import WORKER_WAIT_S
from mervcache.errors import ClusterError

if TYPE_CHECKING:
    from distributed import Client, Future

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


WINDOW_PER_WORKER = 2  # one that runs, one that waits beside it
RECOUNT_S = 5.0  # between two looks at how many workers there are


@dataclass(frozen=True, kw_only=True)
class Task:
    """One call: `key` names it in the dashboard and must be unique in the run."""

    key: str
    arguments: tuple[Any, ...]  # small and picklable: paths and numbers, never frames


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a task: its result, or the error of its last attempt."""

    task: Task
    result: Any = None
    error: BaseException | None = None
    failed_on: tuple[str, ...] = ()  # addresses of the workers that raised it


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """A task that a worker has, or will have soon."""

    task: Task
    function: Callable[..., Any]
    number: int  # 1 for the first
    future: Future


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Who hears what happens while tasks run."""

    report: Callable[[Task, str, Report], None] | None = None  # task, attempt, what it tells of itself; on a thread
    waiting: Callable[[float], None] = lambda seconds: None  # how long there has been no worker; 0 when one has come
    workers_came: Callable[[list[str]], None] = lambda addresses: None  # since the start; what it raises ends the run


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
) -> Iterator[Outcome]:
    """Yield every task's outcome as it finishes; a failed one is tried again unless `is_final` says not to.

    Another worker tries it again, if there is one: a device that has gone bad fails at once, is idle, and would be
    given everything. A task that Dask gave up because workers died under it is run once more by `after_deaths`, with
    the same arguments, when all the others are done: one at a time, so that nobody else is blamed for what it does.
    Without any worker for `worker_wait_s` the run ends with `ClusterError`. Closing the generator cancels what has not
    started, so that an interrupted driver leaves no work behind.
    """
    remaining, deadly = iter(tasks), deque[Task]()
    workers = _Workers(client, worker_wait_s, listener)
    with _Window(client, workers, listener.report) as window:
        while True:
            window.fill(function, remaining)
            if not window.running:
                if not deadly:
                    return
                window.submit(after_deaths, deadly.popleft(), attempts)
            if (ended := window.next()) is None:
                continue
            attempt, outcome = ended
            if outcome.error is None or is_final(outcome.error):
                pass
            elif after_deaths not in (None, attempt.function) and _killed_workers(outcome.error):
                deadly.append(attempt.task)
                continue
            elif attempt.number < attempts:
                window.submit(attempt.function, attempt.task, attempt.number + 1, avoid=outcome.failed_on)
                continue
            window.fill(function, remaining)  # before the caller takes its time over the outcome
            yield outcome


class _Workers:
    """Which workers there are, looked at now and then, and for how long there has been none."""

    def __init__(self, client: Client, wait_s: float, listener: Listener) -> None:
        self._client, self._wait_s, self._listener = client, wait_s, listener
        self._looked = self._seen = time.monotonic()
        self.addresses = _addresses(client)

    def look(self) -> None:
        """Look again where it is time to; raises `ClusterError` where nobody has come for too long."""
        now = time.monotonic()
        if now - self._looked < RECOUNT_S:
            return
        self._looked, before, self.addresses = now, self.addresses, _addresses(self._client)
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


class _Window:
    """The tasks that the cluster has just now."""

    def __init__(
        self, client: Client, workers: _Workers, on_report: Callable[[Task, str, Report], None] | None
    ) -> None:
        self._client, self._workers = client, workers
        self._finished: SimpleQueue[Future] = SimpleQueue()
        self.running: dict[str, _Attempt] = {}  # by the future's key
        self._listening = listening(client, on_report and (lambda *report: self._pass_on(on_report, *report)))

    def __enter__(self) -> _Window:
        self._listening.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.__exit__(None, None, None)
        if self._client.status == "running":
            self._client.cancel([attempt.future for attempt in self.running.values()], force=True)

    def fill(self, function: Callable[..., Any], remaining: Iterator[Task]) -> None:
        """Submit tasks until the window is full or none is left."""
        size = WINDOW_PER_WORKER * max(1, len(self._workers.addresses))
        while len(self.running) < size and (task := next(remaining, None)) is not None:
            self.submit(function, task, 1)

    def submit(self, function: Callable[..., Any], task: Task, number: int, avoid: Collection[str] = ()) -> None:
        """`avoid`: workers that are to get it only where no other is left."""
        key = f"{task.key}-{function.__name__}-try{number}"
        others = sorted(self._workers.addresses.difference(avoid)) if avoid else []
        where = {"workers": others, "allow_other_workers": True} if others else {}
        future = self._client.submit(function, *task.arguments, key=key, pure=False, **where)
        self.watch(_Attempt(task=task, function=function, number=number, future=future))

    def watch(self, attempt: _Attempt) -> None:
        """Wait for its end among the others; also for its second one, where its worker left with the result."""
        self.running[attempt.future.key] = attempt
        attempt.future.add_done_callback(self._finished.put)

    def next(self) -> tuple[_Attempt, Outcome] | None:
        """An attempt that has ended, and how; None now and then, when there may be room for more."""
        try:
            future = self._finished.get(timeout=RECOUNT_S)
        except Empty:
            future = None
        self._workers.look()
        if future is None:
            return None
        attempt = self.running.pop(future.key)
        outcome = _outcome(self._client, attempt)
        if outcome is None:
            self.watch(attempt)
            return None
        return attempt, outcome

    def _pass_on(self, on_report: Callable[[Task, str, Report], None], key: str, attempt: str, counts: Report) -> None:
        """Reports of other drivers' tasks come by as well."""
        if found := self.running.get(key):
            on_report(found.task, attempt, counts)


def check_workers(client: Client, distribution: str, workers: list[str] | None = None) -> None:
    """Raise `ClusterError` unless every worker, or those given, has the distribution in the driver's version.

    A worker that cannot import a task's function never answers: distributed loses the task and the driver would wait
    for ever (seen with 2026.8). Only the standard library is asked here, which every worker can import.
    """
    from importlib.metadata import version

    ours = version(distribution)
    for worker, theirs in client.run(version, distribution, on_error="return", workers=workers).items():
        if theirs != ours and not isinstance(theirs, OSError):  # that one has just left
            found = f"has version {theirs}" if isinstance(theirs, str) else "does not have it"
            raise ClusterError(
                f"the driver runs {distribution} {ours}, the worker {worker} {found}: "
                "start the workers from the same environment"
            )


def _outcome(client: Client, attempt: _Attempt) -> Outcome | None:
    """What came of it; None where the worker has left that had the result, and Dask has to compute it once more."""
    future = attempt.future
    if future.cancelled():  # not by us: we do not ask for what we cancelled
        raise ClusterError(
            "the scheduler is gone, or forgot this run's tasks; what was committed is kept: start the cluster again "
            "and run the same command again"
        )
    try:
        error = future.exception(timeout=RECOUNT_S)
        result = None if error is not None else future.result(timeout=RECOUNT_S)
    except OSError:  # too slow, or the way to it is cut: the next look tells whether the scheduler is gone
        return None
    failed_on = _failed_on(client, future.key) if error is not None else ()
    future.release()
    return Outcome(task=attempt.task, result=result, error=error, failed_on=failed_on)


def _failed_on(client: Client, key: str) -> tuple[str, ...]:
    """Addresses of the workers that raised the task's error; none for a task that died with its workers."""

    def erred_on(dask_scheduler: Any, key: str) -> tuple[str, ...]:
        task = dask_scheduler.tasks.get(key)
        return tuple(task.erred_on or ()) if task else ()

    with suppress(OSError):  # the scheduler has gone meanwhile
        return client.run_on_scheduler(erred_on, key=key)
    return ()


def _killed_workers(error: BaseException) -> bool:
    """Did Dask give the task up because too many workers died while they had it?"""
    from distributed import KilledWorker

    return isinstance(error, KilledWorker)


def _addresses(client: Client) -> frozenset[str]:
    return frozenset(client.scheduler_info(n_workers=-1)["workers"])
