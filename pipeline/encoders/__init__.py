"""Frozen encoders: uint8 frames in, features on each encoder's own grid out.

    spec = encoder_spec("dinov2")
    encoder = load_encoder(spec, "random:0", compute_dtype="bfloat16")
    features_BTHWD, _ = encoder.encode(frames_BTHWC)

Importing this package is cheap; `load_encoder` imports torch and transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.encoders.base import EncoderSpec
from pipeline.encoders.registry import ENCODERS, MERV_ENCODERS, encoder_spec

if TYPE_CHECKING:
    from pipeline.encoders.loading import Encoder

__all__ = ["ENCODERS", "MERV_ENCODERS", "EncoderSpec", "encoder_spec", "load_encoder"]


def load_encoder(spec: EncoderSpec, weights: str, *, device: str = "cpu", compute_dtype: str = "float32") -> Encoder:
    """An encoder ready to run.

    Parameters
    ----------
    spec
        The encoder, such as `ENCODERS["dinov2"]`.
    weights
        "hub", a folder, or "random:SEED".
    device
        "cpu", "cuda", "cuda:1", ...
    compute_dtype
        "float32" or "bfloat16".

    Raises
    ------
    UserError
        Weights that are missing or of another architecture, and a device that cannot be used.
    """
    from pipeline.encoders.loading import Encoder  # torch

    return Encoder.load(spec, weights, device=device, compute_dtype=compute_dtype)
