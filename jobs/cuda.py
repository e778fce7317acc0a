"""The cluster of this machine's GPUs: one process per GPU, each of which sees only its own.

dask-cuda starts them where it is installed (it also binds each to the cores beside its GPU). Its releases pin Dask to
one version, so where it is not, our own nannies do: what matters is that CUDA_VISIBLE_DEVICES is set before the worker
starts. `connect` then compares the UUIDs that the workers see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jobs.gpus import visible_gpus
from jobs.local import deaf_to_interrupts, threads_environment
from jobs.request import ClusterError, ClusterRequest

if TYPE_CHECKING:
    from distributed import Client, SpecCluster

INSTALL = "pip install dask-cuda"


@contextmanager
def cuda(request: ClusterRequest, say: Callable[[str], None]) -> Iterator[Client]:
    """One worker per GPU; `num_workers` takes the first so many."""
    import dask
    from distributed import Client

    gpus = _chosen(request)
    scheduler = {"dashboard_address": ":0", "dashboard": request.dashboard}
    try:
        from dask_cuda import LocalCUDACluster  # optional, and slow to import
    except ImportError:
        LocalCUDACluster = None
        say(f"dask-cuda is not installed: {len(gpus)} worker processes, one pinned to each GPU, all cores shared")
    with dask.config.set({"distributed.nanny.pre-spawn-environ": threads_environment(len(gpus))}):
        if LocalCUDACluster is None:
            cluster = _pinned_processes(gpus, scheduler, request.settings.local_directory)
        else:
            cluster = LocalCUDACluster(
                CUDA_VISIBLE_DEVICES=gpus,
                threads_per_worker=1,
                memory_limit=None,
                device_memory_limit=None,  # no tokens stay in Dask: nothing to spill
                dashboard_address=scheduler["dashboard_address"],
                scheduler_kwargs={"dashboard": request.dashboard},
                local_directory=request.settings.local_directory,
                silence_logs=50,
            )
        with cluster, Client(cluster) as client:
            client.register_plugin(deaf_to_interrupts())
            yield client


def _chosen(request: ClusterRequest) -> list[str]:
    """The GPUs to use, in the words of CUDA_VISIBLE_DEVICES."""
    listed = request.settings.devices
    gpus = [gpu.strip() for gpu in listed.split(",")] if listed else visible_gpus()
    if not gpus:
        raise ClusterError(
            "--scheduler cuda found no GPU on this machine: check `nvidia-smi`, CUDA_VISIBLE_DEVICES and that torch is "
            "a build for CUDA; without a GPU use --scheduler local"
        )
    if len(set(gpus)) < len(gpus) or request.num_workers > len(gpus):
        wanted = f"{request.num_workers} workers" if request.num_workers else "one worker each"
        raise ClusterError(
            f"one process per GPU: {wanted} wanted of the GPUs {', '.join(gpus)}; "
            "give fewer --workers or name each GPU once"
        )
    return gpus[: request.num_workers or None]


def _pinned_processes(gpus: list[str], scheduler: dict[str, Any], local_directory: str | None) -> SpecCluster:
    """A nanny per GPU, whose worker is born seeing that GPU alone."""
    from distributed import Nanny, Scheduler, SpecCluster

    def worker(gpu: str) -> dict[str, Any]:
        environment = {"CUDA_VISIBLE_DEVICES": gpu}
        options = {"nthreads": 1, "memory_limit": None, "env": environment, "local_directory": local_directory}
        return {"cls": Nanny, "options": options | {"host": "127.0.0.1", "silence_logs": 50}}

    return SpecCluster(
        workers={number: worker(gpu) for number, gpu in enumerate(gpus)},
        scheduler={"cls": Scheduler, "options": scheduler | {"host": "127.0.0.1"}},
        silence_logs=50,
    )
