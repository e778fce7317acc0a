"""How many clips a forward may hold: measured on the device with the encoders loaded, before a plan fixes the batch.

Comes in: a forward, the most that is asked for, the device's memory. Goes out: clips per forward. A device without a
meter of its own (a CPU, whose memory is the machine's) keeps what suits its kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

HEADROOM = 0.8  # of what is free: fragments, other kernels on real frames, and a neighbour's desktop need some


class DeviceMemory(Protocol):
    """The memory of a device, in bytes."""

    def free_bytes(self) -> int: ...

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most that `run` has held at once, above what was held before."""
        ...


class CudaMemory:
    """Memory of one CUDA device, as torch's allocator counts it."""

    def __init__(self, device: str) -> None:
        self._device = device

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()  # what this process keeps for itself is free to it
        return torch.cuda.mem_get_info(self._device)[0]

    def peak_bytes(self, run: Callable[[], object]) -> int:
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        return torch.cuda.max_memory_allocated(self._device) - before


MEMORIES: dict[str, Callable[[str], DeviceMemory]] = {"cuda": CudaMemory}


def device_memory(device: str) -> DeviceMemory | None:
    """The meter of a device such as "cuda:1", if it has one."""
    meter = MEMORIES.get(device.split(":")[0])
    return meter(device) if meter else None


def clips_that_fit(forward: Callable[[int], object], most: int, memory: DeviceMemory) -> int:
    """The largest of `most`, its half, its quarter ... whose forward fits; at least one clip.

    `forward(n)` encodes n clips. One and two clips are run; what the second one adds is what each further one will.
    Before them one is run unmeasured: a first forward also holds what libraries take once (cuBLAS's workspace), and a
    second clip would seem to add less than it does, or nothing.
    Halves of one number, so that devices of one model come to one batch although their free memory differs a little.
    """
    try:
        forward(1)
        one, two = (memory.peak_bytes(lambda n=n: forward(n)) for n in (1, 2))
    except torch.OutOfMemoryError:
        return 1
    per_clip = max(two - one, 1)
    room = HEADROOM * memory.free_bytes()
    clips = most
    while clips > 1 and one + (clips - 1) * per_clip > room:
        clips //= 2
    return clips
