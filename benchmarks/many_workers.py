"""Many Dask workers in one process that is not the driver's, and what each side costs.

`cost(tasks, workers)` runs a scheduler beside the driver, as a run on one machine does, and all workers in a process of
their own: so the processor time of the driver with its scheduler, and that of the workers, are known apart. Tasks
return at once. `python many_workers.py ADDRESS NUMBER` is the workers' process.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Client


def return_at_once(store: str, block: int, first: int, stop: int) -> dict:
    """A block that costs a worker nothing."""
    return {"clips": stop - first}


def processor_s() -> float:
    """Seconds of processor time that this process has used."""
    return time.process_time()


@contextmanager
def cluster(workers: int) -> Iterator[Client]:
    """A client of a scheduler in this process with `workers` workers in another."""
    import dask
    from distributed import Client, LocalCluster

    from jobs.security import LOOPBACK, private_folder, write_credentials
    from jobs.settings import DASK_SETTINGS, dask_environment

    here = str(Path(__file__).parent)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    options = {"n_workers": 0, "processes": False, "host": LOOPBACK, "dashboard_address": f"{LOOPBACK}:0"}
    with (
        private_folder(Path(tempfile.gettempdir())) as folder,
        dask.config.set(DASK_SETTINGS | (credentials := write_credentials(folder))),
        LocalCluster(**options) as local,
        Client(local) as client,
        subprocess.Popen(
            [sys.executable, __file__, local.scheduler_address, str(workers)],
            env=environment | dask_environment(credentials),
            **quiet,
        ) as others,
    ):
        try:
            client.wait_for_workers(workers)
            yield client
        finally:
            others.kill()


def cost(tasks: Sequence[tuple], workers: int) -> dict[str, float]:
    """Processor seconds of `driver` (with its scheduler) and `workers`, and the `wall` time of all tasks."""
    from many_workers import processor_s, return_at_once  # by its importable name: workers unpickle it

    from jobs.run import Task, run_tasks

    with cluster(workers) as client:

        def run(name: str, arguments: Sequence[tuple]) -> None:
            named = (Task(key=f"{name}-{values[1]}", arguments=values) for values in arguments)
            for outcome in run_tasks(client, return_at_once, named):
                assert outcome.error is None, outcome.error

        def theirs() -> float:
            return client.submit(processor_s, pure=False).result()

        run("warm", [("", n, 0, 1) for n in range(2 * workers)])
        before, began, start = theirs(), time.process_time(), time.perf_counter()
        run("block", tasks)
        return {
            "driver": time.process_time() - began,
            "wall": time.perf_counter() - start,
            "workers": theirs() - before,
        }


async def serve(address: str, number: int) -> None:
    """`number` workers of one task each, until the process is ended."""
    import dask
    from distributed import Worker

    from jobs.settings import DASK_SETTINGS

    with dask.config.set(DASK_SETTINGS):
        workers = [Worker(address, nthreads=1, memory_limit=0) for _ in range(number)]
        await asyncio.gather(*workers)
        await asyncio.gather(*(worker.finished() for worker in workers))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
