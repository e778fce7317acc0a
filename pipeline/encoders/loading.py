"""An encoder with weights: frames in, features out.

Pixels are (x / 255 - mean) / std in float32 on the device, then cast to the compute dtype; with bfloat16 all weights
and activations are bfloat16 (as in MERV), norms and softmax accumulate in float32 inside their kernels, position
embeddings are resampled in float32 before the cast. With one batch shape the features of a clip do not depend on its
neighbours; other shapes may pick other kernels and round differently, so identical bytes need one fixed batch shape.

B batch, T frames or time steps, H W C rows, columns and channels, K prefix tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from mervcache.errors import UserError
from pipeline.align import DEFAULT_GRID, Grid, align, align_time
from pipeline.encoders.base import EncoderSpec, Layer
from pipeline.encoders.network import EncoderNetwork, build_network
from pipeline.encoders.weights import fill_weights, parse_weights, weights_sha256

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Frames = np.ndarray | torch.Tensor


class Encoder:
    """A frozen encoder on a device; make one with `load`."""

    def __init__(
        self,
        network: EncoderNetwork,
        *,
        weights_sha256: str,
        weights_label: str,
        device: torch.device,
        compute_dtype: str,
        spec: EncoderSpec | None = None,  # with another layer than the network's own, of those that it computes
    ) -> None:
        self.spec: EncoderSpec = spec or network.spec
        self.weights_sha256, self.weights_label = weights_sha256, weights_label
        self.device, self.compute_dtype = device, compute_dtype
        self.network = network.to(device=device, dtype=COMPUTE_DTYPES[compute_dtype]).eval().requires_grad_(False)
        self._mean_C11, self._std_C11 = (
            torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
            for values in (self.spec.mean, self.spec.std)
        )

    @classmethod
    def load(cls, spec: EncoderSpec, weights: str, *, device: str = "cpu", compute_dtype: str = "float32") -> Encoder:
        """Build, fill and hash in float32 on the CPU, then cast and move."""
        (encoder,) = cls.load_layers([spec], weights, device=device, compute_dtype=compute_dtype)
        return encoder

    @classmethod
    def load_layers(
        cls, specs: Sequence[EncoderSpec], weights: str, *, device: str = "cpu", compute_dtype: str = "float32"
    ) -> list[Encoder]:
        """Encoders that differ in their layers only: one network, with the blocks that any of them needs.

        The digest of each is over the weights that it uses, as if it were loaded by itself. A family whose layers share
        no forward gets a network for each.
        """
        if compute_dtype not in COMPUTE_DTYPES:
            raise UserError(f"compute dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {compute_dtype!r}")
        source = parse_weights(weights)
        skipped, has_norm = min(spec.skipped_blocks for spec in specs), any(spec.final_norm for spec in specs)
        network = build_network(replace(specs[0], skipped_blocks=skipped, final_norm=has_norm))
        if len({spec.chosen_layer for spec in specs}) > 1 and network.blocks is None:
            return [cls.load(spec, weights, device=device, compute_dtype=compute_dtype) for spec in specs]
        fill_weights(network, source)
        held = {network.weight_name(name): w for name, w in network.state_dict().items()}
        digests: dict[Layer, str] = {}
        for spec in specs:
            if spec.chosen_layer not in digests:
                digests[spec.chosen_layer] = weights_sha256(_used_weights(spec, network, held))
        network.finish()
        return [
            cls(
                network,
                weights_sha256=digests[spec.chosen_layer],
                weights_label=source.label,
                device=torch.device(device),
                compute_dtype=compute_dtype,
                spec=spec,
            )
            for spec in specs
        ]

    def encode(self, frames_BTHWC: Frames, *, prefix_tokens: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """RGB frames, 0 to 255 -> (features_BTHWD, prefix_BTKD or None) on the device, in the compute dtype.

        T is the spec's num_frames for videos. T = 1 is a still image: it is repeated to one period, and the features
        have the spec's still_period time steps.
        """
        layer = self.spec.chosen_layer
        return self.encode_layers(frames_BTHWC, [layer], prefix_tokens=prefix_tokens)[layer]

    def encode_layers(
        self, frames_BTHWC: Frames, layers: Sequence[Layer], *, prefix_tokens: bool = False
    ) -> dict[Layer, tuple[torch.Tensor, torch.Tensor | None]]:
        """`encode` for several layers of the network, which runs once."""
        frames_BTHWC = self._check_frames(frames_BTHWC)
        # cudnn would run float32 convolutions in TF32 and choose kernels by timing them
        deterministic = torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), deterministic:
            pixels_BTCHW = self._normalise(frames_BTHWC.to(self.device))
            found: dict[Layer, tuple[torch.Tensor, torch.Tensor | None]]
            if tuple(layers) == (self.network.spec.chosen_layer,):
                found = {layers[0]: self.network(pixels_BTCHW)}
            else:
                found = self.network.forward_layers(pixels_BTCHW, layers)
        kept = {layer: keep_steps(self.spec, *features) for layer, features in found.items()}
        return {layer: (features, prefix if prefix_tokens else None) for layer, (features, prefix) in kept.items()}

    def encode_tokens(
        self, frames_BTHWC: Frames, *, grid: Grid | None = DEFAULT_GRID, prefix_tokens: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`encode`, then `align`, for videos and stills alike: float32 (tokens_BTHWD, prefix_BTKD or None).

        The time steps are those that are stored: `grid_of(kind)` of the identity.
        """
        return self.align_features(*self.encode(frames_BTHWC, prefix_tokens=prefix_tokens), grid=grid)

    def align_features(
        self, features_BTHWD: torch.Tensor, prefix_BTKD: torch.Tensor | None, *, grid: Grid | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features of `encode` -> float32 tokens on the grid, and prefix tokens of as many time steps."""
        native_time = self.spec.grid[0]
        with torch.inference_mode():
            tokens_BTHWD = align(features_BTHWD, grid, native_time=native_time)
            if prefix_BTKD is not None:
                time = native_time if grid is None else grid[0]
                prefix_BTKD = align_time(prefix_BTKD, time, native_time=native_time)
        return tokens_BTHWD, prefix_BTKD

    def _check_frames(self, frames: Frames) -> torch.Tensor:
        if isinstance(frames, np.ndarray):  # which may be read-only (shared memory): torch would warn
            frames = torch.from_numpy(np.require(frames, requirements=["C", "W"]))
        size, dtype = self.spec.resize.size, self.spec.resize.dtype
        if str(frames.dtype) != f"torch.{dtype}" or frames.ndim != 5 or tuple(frames.shape[2:]) != (size, size, 3):
            raise UserError(
                f"{self.spec.name} wants {dtype} frames [batch, time, {size}, {size}, 3], got "
                f"{str(frames.dtype).removeprefix('torch.')} {list(frames.shape)}"
            )
        if frames.shape[1] not in (1, self.spec.num_frames):
            raise UserError(
                f"{self.spec.name} wants {self.spec.num_frames} frames of a video or 1 of a still, "
                f"got {frames.shape[1]}"
            )
        return frames

    def _normalise(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        """0..255 -> float32 normalised -> compute dtype; a still is repeated to one period."""
        scaled_BTCHW = frames_BTHWC.permute(0, 1, 4, 2, 3).contiguous().float() / 255
        pixels_BTCHW = ((scaled_BTCHW - self._mean_C11) / self._std_C11).to(COMPUTE_DTYPES[self.compute_dtype])
        if frames_BTHWC.shape[1] == 1:
            pixels_BTCHW = pixels_BTCHW.expand(-1, self.spec.still_frames, -1, -1, -1).contiguous()
        return pixels_BTCHW


def _used_weights(
    spec: EncoderSpec, network: EncoderNetwork, held: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Of a network's weights, those that the encoder alone would have."""
    if spec.chosen_layer == network.spec.chosen_layer:
        return held
    alone = build_network(spec)
    return {name: held[name] for name in map(alone.weight_name, alone.state_dict())}


def keep_steps(
    spec: EncoderSpec, features_BTHWD: torch.Tensor, prefix_BTKD: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The time steps that the spec's frame rule keeps: all, or every n-th."""
    every = spec.chosen_frames.every_step
    if every == 1:
        return features_BTHWD, prefix_BTKD
    return features_BTHWD[:, ::every], None if prefix_BTKD is None else prefix_BTKD[:, ::every]
