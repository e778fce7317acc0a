"""Preload for `dask worker`: pins each worker to one of the GPUs that its job sees, by the number that ends its name.

    dask worker ADDRESS --nworkers 4 --name node7 --preload jobs.pin      # node7-0 ... node7-3, one GPU each

The number is counted from 0, modulo the GPUs in CUDA_VISIBLE_DEVICES (without it: all of the machine's). A job with one
GPU, or none, is left unchanged. It runs before CUDA is initialised. `MERV_GPUS_PER_WORKER=2` gives each worker two, for
tasks that start a process per GPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

GPUS_VARIABLE = "MERV_GPUS_PER_WORKER"


def dask_setup(worker: object) -> None:
    """Called by Dask in the worker's own process, before it takes tasks."""
    devices = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    os.environ |= pinned(str(getattr(worker, "name", "")), os.environ, sorted(devices, key=int))


def pinned(name: str, environ: Mapping[str, str], devices: Sequence[str] = ()) -> dict[str, str]:
    """Changes to the environment of the worker `name`; `devices` are the numbers of the machine's GPUs.

    >>> pinned("node7-3", {"CUDA_VISIBLE_DEVICES": "4,5,6,7"})
    {'CUDA_VISIBLE_DEVICES': '7'}
    >>> pinned("node7-1", {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "MERV_GPUS_PER_WORKER": "2"})
    {'CUDA_VISIBLE_DEVICES': '6,7'}
    """
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [gpu for gpu in listed.split(",") if gpu] if listed is not None else devices
    number = re.search(r"(\d+)$", name)
    each = int(environ.get(GPUS_VARIABLE, "1"))
    if len(gpus) <= each or number is None:
        return {}
    first = int(number[1]) % (len(gpus) // each) * each
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + each])}
