"""Run a list of tasks over a cluster: a window of them at a time, results as they finish.

Comes in: a function, and tasks with a stable key. Goes out: one `Outcome` per task, in the order of finishing. The room
knows nothing of what a task does. A window of a few tasks per worker instead of all at once: when a worker dies, Dask
blames every task assigned to it, so few should be; and a million tasks must not live in the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from jobs.request import ClusterError

if TYPE_CHECKING:
    from distributed import Client, Future

WINDOW_PER_WORKER = 2  # one that runs, one that waits beside it


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


def run_tasks(
    client: Client,
    function: Callable[..., Any],
    tasks: Iterable[Task],
    *,
    attempts: int = 2,
    is_final: Callable[[BaseException], bool] = lambda error: False,
) -> Iterator[Outcome]:
    """Yield every task's outcome as it finishes; a failed one is tried again unless `is_final` says not to.

    Closing the generator cancels what has not started, so that an interrupted driver leaves no work behind.
    """
    from distributed import as_completed

    remaining = iter(tasks)
    running: dict[str, tuple[Task, int]] = {}  # future key -> task and attempt
    window = as_completed(with_results=False)

    def submit(task: Task, attempt: int) -> None:
        future = client.submit(function, *task.arguments, key=f"{task.key}-try{attempt}", pure=False)
        running[future.key] = (task, attempt)
        window.add(future)

    try:
        for task in islice(remaining, WINDOW_PER_WORKER * max(1, _num_workers(client))):
            submit(task, 1)
        while running:
            future = next(window)
            task, attempt = running.pop(future.key)
            outcome = _outcome(task, future)
            if outcome.error is not None and attempt < attempts and not is_final(outcome.error):
                submit(task, attempt + 1)
                continue
            for following in islice(remaining, 1):
                submit(following, 1)
            yield outcome
    finally:
        client.cancel(list(window.futures), force=True)


def check_workers(client: Client, distribution: str) -> None:
    """Raise `ClusterError` unless every worker has the distribution in the driver's version.

    A worker that cannot import a task's function never answers: distributed loses the task and the driver would wait
    for ever (seen with 2026.8). Only the standard library is asked here, which every worker can import.
    """
    from importlib.metadata import version

    ours = version(distribution)
    for worker, theirs in client.run(version, distribution, on_error="return").items():
        if theirs != ours:
            found = f"has version {theirs}" if isinstance(theirs, str) else "does not have it"
            raise ClusterError(
                f"the driver runs {distribution} {ours}, the worker {worker} {found}: "
                "start the workers from the same environment"
            )


def _outcome(task: Task, future: Future) -> Outcome:
    error = future.exception()
    result = None if error is not None else future.result()
    future.release()
    return Outcome(task=task, result=result, error=error)


def _num_workers(client: Client) -> int:
    return len(client.scheduler_info(n_workers=-1)["workers"])
