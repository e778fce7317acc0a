"""Clusters by name: `local`, `cuda` and `slurm` are started, an address or a scheduler file is an existing scheduler.

Each gives a Dask client whose workers run one task at a time. Dask places tasks, restarts workers and shows the
dashboard; it carries no frames or tokens, and its state never decides what is done. Before work starts, every worker
reports the UUID of the GPU that it would use: a worker that did not get its own runs on GPU 0 next to another one,
slowly and without a message.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from jobs.event_loop import event_loop
from jobs.run import check_workers
from jobs.security import LOOPBACK, temporary_security
from jobs.settings import DASK_SETTINGS, ClusterRequest, ClusterSettings
from jobs.slurm import slurm
from mervcache.errors import ClusterError, unknown_name

if TYPE_CHECKING:
    from distributed import Client, WorkerPlugin

__all__ = ["CLUSTERS", "ClusterError", "ClusterRequest", "ClusterSettings", "check_cluster", "connect"]

DISTRIBUTION = "merv-pipeline"  # every worker must have it, in the driver's version
_UUIDS: WeakKeyDictionary[Client, dict[str, str | None]] = WeakKeyDictionary()  # client -> worker -> its GPU

log = logging.getLogger(__name__)


@contextmanager
def connect(request: ClusterRequest) -> Iterator[Client]:
    """A client of the cluster of a `request`; one that was started is stopped at the end, an existing one is not.

    Raises `ClusterError` where it cannot be started or reached, for workers of another version, and for two workers on
    one GPU.
    """
    if request.num_workers < 0:
        raise ClusterError(f"a run needs at least one worker, got {request.num_workers}")
    check_scheduler(request.scheduler)
    import dask.config  # here, for --help: 0.1 s
    from distributed.gc import disable_gc_diagnosis  # loads Dask's defaults, which come before our settings

    with dask.config.set(DASK_SETTINGS), _cluster(request).open(request) as client:
        disable_gc_diagnosis(force=True)  # Ctrl-C within its callback would be swallowed (seen)
        check_cluster(client, request)
        yield client


def check_scheduler(scheduler: str) -> None:
    """Raise `ClusterError` unless it is a cluster's name, an address or a file."""
    if scheduler not in CLUSTERS and "://" not in scheduler and not Path(scheduler).is_file():
        raise ClusterError(
            f"{unknown_name('scheduler', scheduler, CLUSTERS)}; or give an address such as tcp://HOST:8786, or the "
            "path of a scheduler file"
        )


def check_cluster(client: Client, request: ClusterRequest, new: list[str] | None = None) -> None:
    """Raise `ClusterError` for workers of another version or that share a GPU; `new`: check only these."""
    check_workers(client, DISTRIBUTION, new)  # first: a worker that lacks a function would never answer
    if request.device.partition(":")[0] in ("auto", "cuda"):
        _check_gpus(client, request.device, required=_cluster(request).needs_gpu, workers=new)


def _check_gpus(client: Client, device: str, *, required: bool, workers: list[str] | None) -> None:
    """Raise `ClusterError` if two workers would compute on one GPU, or if one has none where `required`.

    `workers`: query only these; earlier answers are remembered, because a busy worker may not answer.
    """
    known = _UUIDS.setdefault(client, {})
    answers = client.run(device_uuid, device, workers=workers, on_error="return")
    for worker, uuid in cast("dict[str, Any]", answers).items():
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
    present, by_gpu = client.scheduler_info(n_workers=-1)["workers"], defaultdict(list)
    for worker, uuid in known.items():
        if uuid is not None and worker in present:
            by_gpu[uuid].append(worker)
    for uuid, sharing in by_gpu.items():
        if len(sharing) > 1:
            raise ClusterError(
                f"{len(sharing)} workers share the GPU {uuid}: {', '.join(sharing)}; give each its own: on one machine "
                "--scheduler cuda, elsewhere `dask worker --preload jobs.pin`; or fewer --workers, or --device cpu"
            )


def device_uuid(device: str) -> str | None:
    """UUID of a device such as "cuda:1" ("auto" and "cuda" are the first one); None where there is none."""
    number = device.partition(":")[2]
    index = int(number) if number.isdecimal() else 0
    if index >= device_count():
        return None
    import torch

    return str(torch.cuda.get_device_properties(index).uuid)


def device_count() -> int:
    """GPUs that CUDA shows this process."""
    devices = [*Path("/dev").glob("nvidia[0-9]*"), Path("/dev/dxg"), Path("/dev/kfd")]
    if sys.platform == "linux" and not any(device.exists() for device in devices):
        return 0  # without importing torch, which takes seconds
    import torch

    return torch.cuda.device_count()


def visible_gpus() -> list[str]:
    """This machine's GPUs as CUDA_VISIBLE_DEVICES names them."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu.strip() for gpu in listed.split(",") if gpu.strip() not in ("", "-1")]
    return [str(number) for number in range(device_count())]


@contextmanager
def local(request: ClusterRequest) -> Iterator[Client]:
    """Workers on this machine: one lives in this process, which costs no start-up time, more are processes."""
    import dask.config
    from distributed import Nanny, Worker

    num_workers = request.num_workers or 1
    if num_workers == 1:
        options = {"dashboard_address": request.settings.dashboard_address, "dashboard": False}
        with _start_cluster([(Worker, options)], request, in_process=True) as client:
            yield client
        return
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": _threads_environment(num_workers * request.ranks)}),
        _start_cluster([(Nanny, {})] * num_workers, request) as client,
    ):
        client.register_plugin(_ignore_terminal())
        yield client


@contextmanager
def cuda(request: ClusterRequest) -> Iterator[Client]:
    """One worker process per GPU of this machine, each of which sees only its own; or per group of `ranks` GPUs.

    dask-cuda starts them where it is installed, and binds each to the cores next to its GPU. Its releases pin Dask to
    one version, so where it is not installed, and for groups, nannies set CUDA_VISIBLE_DEVICES before a worker starts.
    """
    import dask.config
    from distributed import Client, Nanny

    gpus = _selected_gpus(request)
    groups = [",".join(gpus[first : first + request.ranks]) for first in range(0, len(gpus), request.ranks)]
    try:
        # optional, and slow to import
        from dask_cuda import LocalCUDACluster  # pyright: ignore[reportMissingImports]: goes with one Dask only
    except ImportError:
        LocalCUDACluster = None
        log.info("dask-cuda is not installed: %d worker processes, one pinned to each GPU, all cores shared", len(gpus))
    if request.ranks > 1:
        LocalCUDACluster = None  # its workers see all GPUs, their own first
    with ExitStack() as stack:
        environment = {"distributed.nanny.pre-spawn-environ": _threads_environment(len(gpus))}
        stack.enter_context(dask.config.set(environment))
        if LocalCUDACluster is None:
            folder = request.settings.local_directory
            workers = [(Nanny, {"env": {"CUDA_VISIBLE_DEVICES": own}, "local_directory": folder}) for own in groups]
            client = stack.enter_context(_start_cluster(workers, request))
        else:
            cluster = LocalCUDACluster(
                loop=stack.enter_context(event_loop()),
                CUDA_VISIBLE_DEVICES=gpus,
                threads_per_worker=1,
                memory_limit=None,
                device_memory_limit=None,  # no tokens stay in Dask: nothing to spill
                host=LOOPBACK,
                protocol="tls://",
                security=temporary_security(),
                dashboard_address=request.settings.dashboard_address,
                scheduler_kwargs={"dashboard": request.dashboard},
                local_directory=request.settings.local_directory,
                silence_logs=50,
            )
            client = stack.enter_context(Client(stack.enter_context(cluster)))
        client.register_plugin(_ignore_terminal())
        yield client


@contextmanager
def _start_cluster(
    workers: list[tuple[type, dict[str, Any]]], request: ClusterRequest, *, in_process: bool = False
) -> Iterator[Client]:
    """A client of a scheduler in this process and of the workers, classes with their options.

    All listen on the loopback interface, behind a certificate that only this cluster has: otherwise any user of
    the machine could connect to the scheduler and run code as this user. A worker in this process has no socket.
    """
    from distributed import Client, Scheduler, SpecCluster

    security = None if in_process else temporary_security()
    common = {"protocol": "inproc://"} if in_process else {"protocol": "tls://", "host": LOOPBACK, "security": security}
    each = common | {"nthreads": 1, "memory_limit": None, "silence_logs": 50}
    # Without `dashboard` bokeh is not loaded, which takes a second. A task's error is in its outcome: no logs.
    address = request.settings.dashboard_address
    scheduler = common | {"dashboard_address": address, "dashboard": request.dashboard}
    with (
        event_loop() as loop,
        SpecCluster(
            workers={number: {"cls": cls, "options": each | own} for number, (cls, own) in enumerate(workers)},
            scheduler={"cls": Scheduler, "options": scheduler},
            security=security,
            silence_logs=50,  # pyright: ignore[reportArgumentType]: a level of logging, as documented
            loop=loop,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def _selected_gpus(request: ClusterRequest) -> list[str]:
    """The GPUs to use, as CUDA_VISIBLE_DEVICES names them: the first ones, `ranks` for each of `num_workers`."""
    listed = request.settings.devices
    gpus = [gpu.strip() for gpu in listed.split(",")] if listed else visible_gpus()
    if not gpus:
        raise ClusterError(
            "--scheduler cuda found no GPU on this machine: check `nvidia-smi`, CUDA_VISIBLE_DEVICES and that torch is "
            "a build for CUDA; without a GPU use --scheduler local"
        )
    num_workers = request.num_workers or len(gpus) // request.ranks
    if len(set(gpus)) < len(gpus) or not 0 < num_workers * request.ranks <= len(gpus):
        wanted = f"{request.num_workers} workers" if request.num_workers else "one worker each"
        wanted += f" of {request.ranks} processes" if request.ranks > 1 else ""
        raise ClusterError(
            f"one process per GPU: {wanted} wanted of the GPUs {', '.join(gpus)}; "
            "give fewer --workers or name each GPU once"
        )
    return gpus[: num_workers * request.ranks]


def _threads_environment(num_workers: int) -> dict[str, str]:
    """This machine's cores shared among workers; Dask's own default is one thread each."""
    threads = str(max(1, (os.cpu_count() or 1) // num_workers))
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)


def _ignore_terminal() -> WorkerPlugin:
    """Ctrl-C and a hang-up reach every process of the terminal; the driver stops its workers, without tracebacks."""
    from distributed import WorkerPlugin

    class IgnoreTerminal(WorkerPlugin):
        def setup(self, worker: object) -> None:
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)

    return IgnoreTerminal()


@contextmanager
def attach(request: ClusterRequest) -> Iterator[Client]:
    """An existing scheduler, by address or scheduler file; waits until it has the requested number of workers."""
    from distributed import Client

    by_file = Path(request.scheduler).is_file()
    address: dict[str, Any] = {"scheduler_file": request.scheduler} if by_file else {"address": request.scheduler}
    with event_loop() as loop:
        try:
            client = Client(**address, loop=loop, timeout="10 s")
        except TypeError as error:  # of Dask, for tls:// without a certificate
            raise ClusterError(
                f"{request.scheduler} speaks TLS and this shell has no certificate for it: evaluate the lines that "
                "`python -m jobs.security FOLDER` printed for it, see jobs/README.md"
            ) from error
        except (OSError, TimeoutError, ValueError) as error:
            raise ClusterError(f"no Dask scheduler answers at {request.scheduler}: {error}") from error
        with client:
            wanted, wait_s = request.num_workers or 1, request.worker_wait_s
            if (found := len(client.scheduler_info(n_workers=-1)["workers"])) < wanted:
                log.info(
                    "%s has %d of %d workers; waiting %.0f s for the others", request.scheduler, found, wanted, wait_s
                )
            try:
                client.wait_for_workers(wanted, timeout=wait_s)
            except TimeoutError as error:
                found = len(client.scheduler_info(n_workers=-1)["workers"])
                raise ClusterError(
                    f"{request.scheduler} has {found} workers after {wait_s:.0f} s, the run wants {wanted}; "
                    "start more with `dask worker ADDRESS --nthreads 1`"
                ) from error
            yield client


Opener = Callable[[ClusterRequest], AbstractContextManager["Client"]]  # its workers have one thread each


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How to open a cluster, and whether each of its workers must see a GPU."""

    open: Opener
    needs_gpu: bool = False


CLUSTERS = {
    "local": Cluster(open=local),
    "cuda": Cluster(open=cuda, needs_gpu=True),
    "slurm": Cluster(open=slurm),
}


def _cluster(request: ClusterRequest) -> Cluster:
    return CLUSTERS.get(request.scheduler) or Cluster(open=attach)
