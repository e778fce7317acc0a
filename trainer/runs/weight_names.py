"""Names of a model's tensors in files: a projector is named after its encoder, not after its place.

`VideoLLM` holds `projectors.0.head.weight`; files hold `projector.dinov2.head.weight`. LanguageBind and DINOv2 have one
width, ViViT and SigLIP another, so projectors that were read in another order would fit without an error. Files of
version 0.1 have the names of `VideoLLM`; which encoder is at which place is in the record of their run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from mervcache.errors import UserError

T = TypeVar("T")


def to_file_names(tensors: Mapping[str, T], encoders: Sequence[str]) -> dict[str, T]:
    """The same tensors by their names in files; `encoders` are the model's, in its order."""
    return _renamed(tensors, {f"projectors.{place}.": f"projector.{name}." for place, name in enumerate(encoders)})


def to_model_names(tensors: Mapping[str, T], encoders: Sequence[str]) -> dict[str, T]:
    """Inverse of `to_file_names`; names of version 0.1 stay as they are."""
    return _renamed(tensors, {f"projector.{name}.": f"projectors.{place}." for place, name in enumerate(encoders)})


def check_order(encoders: Sequence[str], recorded: Sequence[str], where: object) -> None:
    """Raise UserError unless the model has the encoders that were recorded, in the same order.

    The weights of a fusion may belong to places, and so may those of projectors in files of version 0.1.
    """
    if tuple(encoders) != tuple(recorded):
        raise UserError(
            f"{where} was trained with the encoders {', '.join(recorded) or 'none'}, in this order, and the model that"
            f" is built has {', '.join(encoders) or 'none'}; use the recorded ones"
        )


def _renamed(tensors: Mapping[str, T], prefixes: Mapping[str, str]) -> dict[str, T]:
    """Names with the longest prefix that fits replaced: an encoder may be called `a.b` and another one `a`."""
    ordered = sorted(prefixes, key=len, reverse=True)
    renamed = {}
    for name, value in tensors.items():
        prefix = next((prefix for prefix in ordered if name.startswith(prefix)), "")
        renamed[prefixes.get(prefix, "") + name.removeprefix(prefix)] = value
    return renamed
