"""Shards: tensors that lie cut up on several ranks (FSDP's `DTensor`), and the same tensors whole.

A checkpoint holds whole tensors, so it can be read by one process or by any other number of ranks. On one rank and
under DDP every tensor is whole already, and these functions change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def whole(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Tensors put together from all ranks, one at a time, and onto the CPU where they are kept.

    Every rank must call it with the same names in the same order; those that write nothing say keep=False.
    """
    found = {}
    for name, value in tensors.items():
        full = plain(value.detach())
        if keep:
            found[name] = full.cpu()
    return found


def plain(value: Tensor) -> Tensor:
    """The tensor itself, put together where it is cut up."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor on the device of `parameter`, cut up as it is; every rank brings the same value."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
