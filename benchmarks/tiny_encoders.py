"""Encoders that cost next to nothing, as plug-ins for benchmarks of everything around the encoders.

`tiny` is one convolution, and sleeps TINY_DELAY_S per forward; once the store TINY_GATE_STORE has a receipt and one
more forward is done, it makes the file TINY_GATE.reached and waits for the file TINY_GATE, so that a fault happens at a
known place. `crashing` is the same, and brings its process down (SIGABRT) when a clip is white all over, unless
TINY_HARMLESS is set.
`install(folder)` makes a folder that, on PYTHONPATH, makes both known to the driver and to its workers.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from pipeline.encoders.base import HALF, EncoderSpec
from pipeline.views import ResizeRule

TINY = EncoderSpec(
    name="tiny",
    summary="one convolution, for benchmarks",
    model="tiny",
    hub_id="none",
    builder="tiny_encoders:build",
    architecture={"image_size": 8, "patch_size": 4, "num_frames": 4, "tubelet_frames": 1}
    | {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "mlp_size": 8}
    | {"activation": "gelu", "norm_eps": 1e-6},
    temporal_reach="frame",
    resize=ResizeRule(filter="bilinear"),
    mean=HALF,
    std=HALF,
)
CRASHING = replace(TINY, name="crashing", model="crashing", builder="tiny_encoders:build_crashing")


forwards = itertools.count(1)  # of this process, since something was committed


def pass_gate() -> None:
    """Wait where somebody put a gate, until it is opened."""
    gate = os.environ.get("TINY_GATE")
    if gate is None or not any(Path(os.environ["TINY_GATE_STORE"]).glob("receipts/*/*/*.json")) or next(forwards) == 1:
        return
    Path(f"{gate}.reached").touch()
    while not os.path.exists(gate):
        time.sleep(0.005)


def build(spec):
    import torch
    from torch import nn

    from pipeline.encoders.network import EncoderNetwork

    class TinyNetwork(EncoderNetwork):
        def __init__(self, spec: EncoderSpec) -> None:
            super().__init__(spec)
            patch = spec.architecture["patch_size"]
            self.patches = nn.Conv2d(3, spec.width, patch, stride=patch)

        def forward(self, pixels_BTCHW: torch.Tensor) -> tuple[torch.Tensor, None]:
            time.sleep(float(os.environ.get("TINY_DELAY_S", "0")))
            pass_gate()
            features = self.patches(pixels_BTCHW.flatten(0, 1))  # [B*T, D, H, W]
            return features.permute(0, 2, 3, 1).unflatten(0, pixels_BTCHW.shape[:2]), None

        def load_published(self, folder: Path) -> None:
            raise NotImplementedError("nobody publishes it; give random:SEED")

    return TinyNetwork(spec)


def build_crashing(spec):
    network = build(spec)

    def die_of_white(module, inputs) -> None:
        if "TINY_HARMLESS" not in os.environ and (inputs[0].flatten(1).amin(1) > 0.99).any():
            os.abort()  # in this thread, at once: a signal to the process may come after the block is committed

    network.register_forward_pre_hook(die_of_white)
    return network


def install(folder: Path) -> None:
    """A distribution of this module, for PYTHONPATH."""
    metadata = folder / "tiny_encoders-1.dist-info"
    metadata.mkdir(parents=True)
    shutil.copy(__file__, folder / "tiny_encoders.py")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-encoders\nVersion: 1\n")
    entries = "tiny = tiny_encoders:TINY\ncrashing = tiny_encoders:CRASHING\n"
    (metadata / "entry_points.txt").write_text(f"[merv.encoders]\n{entries}")
