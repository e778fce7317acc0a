"""Clusters by name: where the work of a run happens.

Comes in: a name (`local`, `cuda`, `slurm`), the address of a running scheduler, or a scheduler file. Goes out: a Dask
client whose workers run one task at a time. Dask places tasks, restarts workers and shows the dashboard; it carries no
frames and no tokens, and its state is never the truth about what is done.

The cluster on this machine: embedded for one worker, processes for more.

The cluster of this machine's GPUs: one process per GPU, each of which sees only its own.

dask-cuda starts them where it is installed (it also binds each to the cores beside its GPU). Its releases pin Dask to
one version, so where it is not, our own nannies do: what matters is that CUDA_VISIBLE_DEVICES is set before the worker
starts. `connect` then compares the UUIDs that the workers see.

A scheduler that somebody else runs, by address or by scheduler file: joined, and left running.

GPUs: which a process sees, and that no two workers share one.

A worker that should have been given its own GPU and was not runs on GPU 0 beside the others, at a fraction of the
speed and without a word (seen in many projects). So workers are asked for the UUID of the device that they would
compute on, before any work starts.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jobs.run import check_workers
from jobs.settings import DASK_SETTINGS, ClusterRequest, ClusterSettings
from jobs.slurm import slurm
from mervcache.errors import ClusterError, unknown_name

if TYPE_CHECKING:
    from distributed import Client, SpecCluster, WorkerPlugin


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
            client.register_plugin(ignore_sigint())
        yield client


def threads_environment(num_workers: int) -> dict[str, str]:
    """This machine's cores shared out; Dask's own default is one thread each."""
    threads = str(max(1, (os.cpu_count() or 1) // num_workers))
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)


def ignore_sigint() -> WorkerPlugin:
    """Ctrl-C reaches every process of the terminal; the driver stops its workers, they need not print how they die."""
    from distributed import WorkerPlugin

    class DeafToInterrupts(WorkerPlugin):
        def setup(self, worker: object) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    return DeafToInterrupts()


_UUIDS: WeakKeyDictionary[Client, dict[str, str | None]] = WeakKeyDictionary()  # client -> worker -> its GPU


def visible_gpus() -> list[str]:
    """This machine's GPUs as CUDA_VISIBLE_DEVICES names them."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu.strip() for gpu in listed.split(",") if gpu.strip() not in ("", "-1")]
    return [str(number) for number in range(device_count())]


def device_count() -> int:
    """GPUs that CUDA shows this process."""
    if not _has_driver():
        return 0
    import torch  # seconds: only where there may be a GPU

    return torch.cuda.device_count()


def device_uuid(device: str) -> str | None:
    """UUID of a device such as "cuda:1" ("auto" and "cuda" are the first one); None where there is none."""
    number = device.partition(":")[2]
    index = int(number) if number.isdecimal() else 0
    if index >= device_count():
        return None
    import torch

    return str(torch.cuda.get_device_properties(index).uuid)


def check_workers_gpus(
    client: Client, device: str = "auto", *, required: bool = False, workers: list[str] | None = None
) -> None:
    """Raise `ClusterError` if two workers would compute on one GPU, or if one has none where `required`.

    `workers`: those that have come since; the others' answers are remembered, for a busy worker may not answer.
    """
    known = _UUIDS.setdefault(client, {})
    for worker, uuid in client.run(device_uuid, device, workers=workers, on_error="return").items():
        if isinstance(uuid, OSError):
            continue  # it has just left
        if isinstance(uuid, Exception):
            raise uuid
        known[worker] = uuid
        if required and uuid is None:
            raise ClusterError(
                f"the worker {worker} sees no GPU: check the driver with `nvidia-smi` there, CUDA_VISIBLE_DEVICES, and "
                "that torch is a build for CUDA; or use --scheduler local"
            )
    _refuse_shared(known, present=client.scheduler_info(n_workers=-1)["workers"])


def _refuse_shared(uuids: Mapping[str, str | None], present: Collection[str]) -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for worker, uuid in uuids.items():
        if uuid is not None and worker in present:
            found[uuid].append(worker)
    for uuid, workers in found.items():
        if len(workers) > 1:
            raise ClusterError(
                f"{len(workers)} workers share the GPU {uuid}: {', '.join(workers)}; give each its own: on one machine "
                "--scheduler cuda, elsewhere `dask worker --preload jobs.pin`; or fewer --workers, or --device cpu"
            )


def _has_driver() -> bool:
    """A look at the devices spares machines without a GPU the import of torch."""
    if sys.platform != "linux":
        return True
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists() or Path("/dev/kfd").exists()


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
            client.register_plugin(ignore_sigint())
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


@contextmanager
def join(request: ClusterRequest, say: Callable[[str], None]) -> Iterator[Client]:
    """Its workers are what they are; the run starts when as many are there as it wants."""
    from distributed import Client

    by_file = Path(request.scheduler).is_file()
    address = {"scheduler_file": request.scheduler} if by_file else {"address": request.scheduler}
    try:
        client = Client(**address, timeout="10 s")
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(f"no Dask scheduler answers at {request.scheduler}: {error}") from error
    with client:
        wanted, wait_s = request.num_workers or 1, request.worker_wait_s
        if (found := len(client.scheduler_info(n_workers=-1)["workers"])) < wanted:
            say(f"{request.scheduler}: {found} of {wanted} workers are there, waiting {wait_s:.0f} s for the others")
        try:
            client.wait_for_workers(wanted, timeout=wait_s)
        except TimeoutError as error:
            found = len(client.scheduler_info(n_workers=-1)["workers"])
            raise ClusterError(
                f"{request.scheduler} has {found} workers after {wait_s:.0f} s, the run wants {wanted}; "
                "start more with `dask worker ADDRESS --nthreads 1`"
            ) from error
        yield client


__all__ = ["CLUSTERS", "ClusterError", "ClusterRequest", "ClusterSettings", "check_cluster", "connect"]

DISTRIBUTION = "merv-pipeline"  # what every worker must have, in the driver's version
CLUSTERS: dict[str, Callable[..., object]] = {"local": local, "cuda": cuda, "slurm": slurm}


def check_scheduler(scheduler: str) -> None:
    """Raise `ClusterError` for what is neither a cluster's name, nor an address, nor a file."""
    if scheduler in CLUSTERS or "://" in scheduler or Path(scheduler).is_file():
        return
    raise ClusterError(
        f"{unknown_name('scheduler', scheduler, CLUSTERS)}; or give an address such as tcp://HOST:8786, or the path of "
        "a scheduler file"
    )


@contextmanager
def connect(request: ClusterRequest, *, say: Callable[[str], None] = lambda line: None) -> Iterator[Client]:
    """A client of the cluster asked for; what we started is stopped at the end, what we joined is left running.

    `say` hears what a person may want to know meanwhile, such as that jobs wait in a queue.
    """
    if request.num_workers < 0:
        raise ClusterError(f"a run needs at least one worker, got {request.num_workers}")
    check_scheduler(request.scheduler)
    opener = CLUSTERS.get(request.scheduler, join)
    import dask  # 0.1 s: not at the top, --help reads this room
    from distributed.gc import disable_gc_diagnosis  # its defaults, too, must be there before ours are laid over them

    with dask.config.set(DASK_SETTINGS), opener(request, say) as client:
        disable_gc_diagnosis(force=True)  # Ctrl-C within its callback would be swallowed and the run go on (seen)
        check_cluster(client, request)
        yield client


def check_cluster(client: Client, request: ClusterRequest, new: list[str] | None = None) -> None:
    """Raise `ClusterError` for workers of another version, or that share a GPU; `new`: those that have come since."""
    check_workers(client, DISTRIBUTION, new)  # first: a worker that lacks a function would never answer
    if request.device.partition(":")[0] in ("auto", "cuda"):
        check_workers_gpus(client, request.device, required=request.scheduler == "cuda", workers=new)
