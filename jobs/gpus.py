"""GPUs: which a process sees, and that no two workers share one.

A worker that should have been given its own GPU and was not runs on GPU 0 beside the others, at a fraction of the
speed and without a word (seen in many projects). So workers are asked for the UUID of the device that they would
compute on, before any work starts.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from jobs.request import ClusterError

if TYPE_CHECKING:
    from distributed import Client


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
