"""Clusters by name: where the work of a run happens.

Comes in: a name (`local`, `cuda`, `slurm`), the address of a running scheduler, or a scheduler file. Goes out: a Dask
client whose workers run one task at a time. Dask places tasks, restarts workers and shows the dashboard; it carries no
frames and no tokens, and its state is never the truth about what is done.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.cuda import cuda
from jobs.gpus import check_workers_gpus
from jobs.join import join
from jobs.local import local
from jobs.request import DASK_SETTINGS, ClusterError, ClusterRequest, ClusterSettings
from jobs.run import check_workers
from jobs.slurm import slurm

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["CLUSTERS", "ClusterError", "ClusterRequest", "ClusterSettings", "check_cluster", "connect"]

DISTRIBUTION = "merv-pipeline"  # what every worker must have, in the driver's version
CLUSTERS: dict[str, Callable[..., object]] = {"local": local, "cuda": cuda, "slurm": slurm}


def check_scheduler(scheduler: str) -> None:
    """Raise `ClusterError` for what is neither a cluster's name, nor an address, nor a file."""
    if scheduler in CLUSTERS or "://" in scheduler or Path(scheduler).is_file():
        return
    nearest = difflib.get_close_matches(scheduler, CLUSTERS, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise ClusterError(
        f"unknown scheduler {scheduler!r}{hint}: give one of {', '.join(CLUSTERS)}, an address such as "
        "tcp://HOST:8786, or the path of a scheduler file"
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
