"""Clusters by name: where the work of a run happens.

Comes in: a name (`local`), the address of a running scheduler, or a scheduler file. Goes out: a Dask client whose
workers run one task at a time. Dask places tasks, restarts workers and shows the dashboard; it carries no frames and
no tokens, and its state is never the truth about what is done.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Client, WorkerPlugin

DASK_SETTINGS = {
    "distributed.scheduler.allowed-failures": 2,  # worker deaths before a task is given up
    "distributed.scheduler.worker-ttl": "30 minutes",  # a long native call must not look like a dead worker
    "distributed.scheduler.work-stealing": False,  # a window of two or three tasks leaves nothing worth stealing
    "distributed.worker.memory.target": False,  # results are small: spilling would only hide a leak
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.worker.daemon": False,  # workers start decode processes
    "distributed.admin.tick.limit": "30 s",  # loading weights holds the loop; a warning each time teaches nobody
}


class ClusterError(Exception):
    """The cluster asked for cannot be started or reached; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class ClusterRequest:
    """What a run wants of a cluster."""

    scheduler: str = "local"  # name in CLUSTERS, tcp://HOST:PORT, or the path of a scheduler file
    num_workers: int = 1
    dashboard: bool = False  # starting it costs about a second and needs bokeh


@contextmanager
def connect(request: ClusterRequest) -> Iterator[Client]:
    """A client of the cluster asked for; what we started is stopped at the end, what we joined is left running."""
    if request.num_workers < 1:
        raise ClusterError(f"a run needs at least one worker, got {request.num_workers}")
    if request.scheduler in CLUSTERS:
        opener = CLUSTERS[request.scheduler]
    elif "://" in request.scheduler or Path(request.scheduler).is_file():
        opener = _join
    else:
        raise ClusterError(
            f"unknown scheduler {request.scheduler!r}: give one of {', '.join(CLUSTERS)}, an address such as "
            "tcp://HOST:8786, or the path of a scheduler file"
        )
    import dask  # 0.1 s: not at the top, --help reads this room
    import distributed  # noqa: F401  its defaults must be in place before settings are laid over them

    with dask.config.set(DASK_SETTINGS), opener(request) as client:
        yield client


@contextmanager
def _local(request: ClusterRequest) -> Iterator[Client]:
    """Embedded: one worker lives in this process (no start-up cost), more are processes of their own."""
    import dask
    from distributed import Client, LocalCluster

    threads = str(max(1, (os.cpu_count() or 1) // request.num_workers))
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": environment}),
        LocalCluster(
            n_workers=request.num_workers,
            threads_per_worker=1,
            processes=request.num_workers > 1,
            memory_limit=None,
            dashboard_address=":0",  # any free port: two runs on one machine must not quarrel over 8787
            scheduler_kwargs={"dashboard": request.dashboard},  # without it bokeh is not loaded: a second less
            silence_logs=50,  # a task's error reaches its outcome; the worker need not print it as well
        ) as cluster,
        Client(cluster) as client,
    ):
        if request.num_workers > 1:
            client.register_plugin(_deaf_to_interrupts())
        yield client


def _deaf_to_interrupts() -> WorkerPlugin:
    """Ctrl-C reaches every process of the terminal; the driver stops its workers, they need not print how they die."""
    from distributed import WorkerPlugin

    class DeafToInterrupts(WorkerPlugin):
        def setup(self, worker: object) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    return DeafToInterrupts()


@contextmanager
def _join(request: ClusterRequest) -> Iterator[Client]:
    """A scheduler that somebody else runs; its workers are what they are."""
    from distributed import Client

    by_file = Path(request.scheduler).is_file()
    address = {"scheduler_file": request.scheduler} if by_file else {"address": request.scheduler}
    try:
        client = Client(**address, timeout="10 s")
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(f"no Dask scheduler answers at {request.scheduler}: {error}") from error
    with client:
        try:
            client.wait_for_workers(request.num_workers, timeout=60)
        except TimeoutError as error:
            found = len(client.scheduler_info()["workers"])
            raise ClusterError(
                f"{request.scheduler} has {found} workers after 60 s, the run wants {request.num_workers}; "
                "start more with `dask worker ADDRESS --nthreads 1`"
            ) from error
        yield client


CLUSTERS: dict[str, Callable[[ClusterRequest], object]] = {"local": _local}
