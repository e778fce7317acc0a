"""The cores that a worker may use: its affinity, its cgroup's quota, and its share beside other workers of its host."""

from __future__ import annotations

import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

CGROUPS = Path("/sys/fs/cgroup")
_PROCESS_CGROUPS = Path("/proc/self/cgroup")


def free_cores(sharers: int = 1) -> int:
    """Cores of one of `sharers` processes of this host that use the cores of this process; at least one."""
    cores = float(len(os.sched_getaffinity(0)))
    return max(1, math.floor(min(cores, cgroup_cores()) / sharers))


def cgroup_cores(process: Path = _PROCESS_CGROUPS, root: Path = CGROUPS) -> float:
    """Cores that the cgroups of this process allow, its own and those around it; infinity without a quota.

    `cpu.max` holds "QUOTA PERIOD" or "max PERIOD" (cgroup v2); v1 has one file for each.
    """
    allowed = [math.inf]
    with suppress(OSError, ValueError):
        for line in process.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                folders, quota = _ancestors(root, path), _quota_v2
            elif "cpu" in controllers.split(","):
                folders, quota = _ancestors(root / "cpu", path), _quota_v1
            else:
                continue
            for folder in folders:
                with suppress(OSError, ValueError):
                    allowed.append(quota(folder))
    return min(allowed)


def _ancestors(root: Path, path: str) -> list[Path]:
    folder = root / path.lstrip("/")
    return [parent for parent in (folder, *folder.parents) if parent == root or root in parent.parents]


def _quota_v2(folder: Path) -> float:
    quota, period = (folder / "cpu.max").read_text().split()
    return math.inf if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return math.inf if quota < 0 else quota / int((folder / "cpu.cfs_period_us").read_text())


def sharing_workers() -> int:
    """Dask workers on this host that share this worker's cores, itself included; 1 outside of Dask.

    A worker that was bound to a part of its host's cores (dask-cuda binds it to those next to its GPU) shares them with
    that part of the workers.
    """
    if "distributed" not in sys.modules:
        return 1
    from distributed import get_worker
    from distributed.utils import sync

    try:
        worker = get_worker()
        identity: Any = worker.scheduler.identity
        info = cast("dict[str, Any]", sync(worker.loop, identity, n_workers=-1, callback_timeout=10))
        host = info["workers"][worker.address]["host"]
        workers = sum(other["host"] == host for other in info["workers"].values())
        bound = len(os.sched_getaffinity(0)) / len(os.sched_getaffinity(os.getppid()))
    except (ValueError, AttributeError, KeyError, OSError, TimeoutError):  # no worker; or a scheduler that is leaving
        return 1
    return max(1, round(workers * min(1.0, bound)))
