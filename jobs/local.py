"""The cluster on this machine: embedded for one worker, processes for more."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jobs.request import ClusterRequest

if TYPE_CHECKING:
    from distributed import Client, WorkerPlugin


@contextmanager
def local(request: ClusterRequest, say: Callable[[str], None]) -> Iterator[Client]:
    """One worker lives in this process (no start-up cost), more are processes of their own."""
    import dask
    from distributed import Client, LocalCluster

    num_workers = request.num_workers or 1
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": threads_environment(num_workers)}),
        LocalCluster(
            n_workers=num_workers,
            threads_per_worker=1,
            processes=num_workers > 1,
            memory_limit=None,
            dashboard_address=":0",  # any free port: two runs on one machine must not quarrel over 8787
            scheduler_kwargs={"dashboard": request.dashboard},  # without it bokeh is not loaded: a second less
            silence_logs=50,  # a task's error reaches its outcome; the worker need not print it as well
        ) as cluster,
        Client(cluster) as client,
    ):
        if num_workers > 1:
            client.register_plugin(deaf_to_interrupts())
        yield client


def threads_environment(num_workers: int) -> dict[str, str]:
    """This machine's cores shared out; Dask's own default is one thread each."""
    threads = str(max(1, (os.cpu_count() or 1) // num_workers))
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)


def deaf_to_interrupts() -> WorkerPlugin:
    """Ctrl-C reaches every process of the terminal; the driver stops its workers, they need not print how they die."""
    from distributed import WorkerPlugin

    class DeafToInterrupts(WorkerPlugin):
        def setup(self, worker: object) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    return DeafToInterrupts()
