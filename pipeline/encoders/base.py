"""What an encoder is, before any weights are loaded, and the identity of its tokens.

The sizes are in one dict, `architecture`; grid, width, view and layer follow from it, so a toy or a larger model of the
same family is one `with_architecture` away. No torch here: plan, status and the driver read specs, and apart from the
weights' digest an identity needs nothing of the weights.

T time steps, H W patch rows and columns, D width, K prefix tokens (class and register tokens).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from featurestore.identity import FeatureIdentity
from mervcache.errors import UserError, unknown_name
from pipeline.align import DEFAULT_GRID, aligned_period, check_grid
from pipeline.views import BASE_FRAMES, FrameRule, ResizeRule, View, every_nth

Grid = tuple[int, int, int]
Layer = tuple[int, bool]  # number of the block, and whether the final norm follows
TemporalReach = Literal["frame", "chunk", "clip"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu")
_REQUIRED = ("image_size", "patch_size", "num_frames", "tubelet_frames", "hidden_size")
_OPTIONAL = ("num_layers", "num_heads", "mlp_size", "frames_per_chunk", "position_grid")
_BLOCK = ("num_heads", "mlp_size", "activation", "norm_eps")  # of transformer blocks: all of them, or none


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """One frozen encoder: its input frames, its output grid, and where its weights are."""

    name: str  # "dinov2"
    summary: str  # one line for lists
    model: str  # the network's kind, part of the identity: "dinov2-with-registers"
    hub_id: str  # where `hub` weights come from
    builder: str  # "module:function", EncoderSpec -> EncoderNetwork; resolved only when weights are loaded
    architecture: Mapping[str, Any] = field(hash=False)
    # image_size, patch_size in pixels; num_frames seen; tubelet_frames per time step; hidden_size D; of transformers
    # num_layers as published; num_heads; mlp_size; activation (one of ACTIVATIONS); norm_eps; and what a family needs
    temporal_reach: TemporalReach  # which frames see each other: one, architecture["frames_per_chunk"], or all
    resize: ResizeRule  # its size follows image_size
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    prefix_tokens: int = 0  # K, in front of the patches
    skipped_blocks: int = 0  # blocks at the end that are never run (1: features are the second to last block's)
    final_norm: bool = False  # whether the network's last LayerNorm is applied
    frames: FrameRule | None = None  # how frames are chosen; None: those of a model with several encoders
    licence: str = ""  # of the weights at `hub_id`; "": not stated
    gated: bool = False  # whether the Hub gives the weights only to accounts that accepted the licence

    def __post_init__(self) -> None:
        object.__setattr__(self, "architecture", dict(self.architecture))
        _check_architecture(self)
        object.__setattr__(self, "resize", replace(self.resize, size=self.architecture["image_size"]))

    @property
    def width(self) -> int:
        """D."""
        return self.architecture["hidden_size"]

    @property
    def num_frames(self) -> int:
        """Frames of a video that the encoder sees."""
        return self.architecture["num_frames"]

    @property
    def grid(self) -> Grid:
        """Native T, H, W of a video; T counts the time steps that the frame rule keeps."""
        side = self.architecture["image_size"] // self.architecture["patch_size"]
        steps = self.num_frames // self.architecture["tubelet_frames"]
        return (steps // self.chosen_frames.every_step, side, side)

    @property
    def still_period(self) -> int:
        """Time steps after which a still image's features repeat: only these are computed."""
        if self.temporal_reach == "frame":
            return 1
        return self.still_frames // self.architecture["tubelet_frames"] // self.chosen_frames.every_step

    @property
    def still_frames(self) -> int:
        """How often a still image is repeated to give one period."""
        if self.temporal_reach == "frame":
            return 1
        return self.architecture["frames_per_chunk"] if self.temporal_reach == "chunk" else self.num_frames

    @property
    def used_layers(self) -> int:
        """Blocks that are run."""
        return self.architecture["num_layers"] - self.skipped_blocks

    @property
    def chosen_layer(self) -> Layer:
        """The block that features are read behind, (0, False) for a network without numbered blocks."""
        return (self.used_layers, self.final_norm) if "num_layers" in self.architecture else (0, False)

    @property
    def layer(self) -> str:
        """Which output the features are, in words."""
        if "num_layers" not in self.architecture:
            return "last feature map"
        norm = "then the final norm" if self.final_norm else "no final norm"
        return f"output of block {self.used_layers} of {self.architecture['num_layers']}, {norm}"

    @property
    def view(self) -> View:
        """The frames that the decoder has to make."""
        decoded = replace(self.chosen_frames, every_step=1)  # time steps are no concern of the decoder
        return View(rule=self.resize, num_frames=self.num_frames, frame_rule=str(decoded))

    @property
    def chosen_frames(self) -> FrameRule:
        """How the frames are chosen."""
        return every_nth(self.num_frames) if self.frames is None else self.frames

    @property
    def frame_rule(self) -> str:
        """How the frames are chosen, as written in the identity."""
        return str(self.chosen_frames)

    def preprocessing(self) -> dict[str, Any]:
        """Resize rule, mean and std, as written in the identity."""
        return self.resize.to_dict() | {"mean": list(self.mean), "std": list(self.std)}

    def with_architecture(self, overrides: Mapping[str, Any]) -> EncoderSpec:
        """The same family at the sizes of `overrides`; grid, width, view, layer follow, mlp_size follows hidden_size.

        >>> from pipeline.encoders import ENCODERS
        >>> toy = ENCODERS["vivit"].with_architecture({"image_size": 64, "hidden_size": 48, "num_layers": 2})
        >>> toy.grid, toy.width, toy.architecture["mlp_size"]
        ((16, 4, 4), 48, 192)
        """
        for key in overrides:
            if key not in self.architecture:
                raise UserError(unknown_name(f"architecture key of {self.name}", key, sorted(self.architecture)))
        merged = {**self.architecture, **overrides}
        has_mlp = "mlp_size" in self.architecture and "mlp_size" not in overrides
        if "hidden_size" in overrides and has_mlp and _is_size(merged["hidden_size"]):
            ratio = self.architecture["mlp_size"] / self.architecture["hidden_size"]
            merged["mlp_size"] = round(merged["hidden_size"] * ratio)
        return replace(self, architecture=merged)

    def with_crop(self, fit: str) -> EncoderSpec:
        """The same encoder with frames made square by `fit`; with `squash` all grids cover the same pixels."""
        if fit not in ("squash", "centre-crop"):
            raise UserError(f"crop of {self.name} must be squash or centre-crop, got {fit!r}")
        return self if fit == self.resize.fit else replace(self, resize=replace(self.resize, fit=fit, crop_pct=1.0))

    def with_frame_rule(self, text: str) -> EncoderSpec:
        """The same encoder with frames chosen by the rule of `text`; "+times" alone is added to its own."""
        rule = replace(self.chosen_frames, by_times=True) if text == "+times" else FrameRule.parse(text)
        if rule.num_frames != self.num_frames:
            raise UserError(
                f"frame rule {text!r} gives {rule.num_frames} frames, {self.name} sees {self.num_frames}; set its"
                " num_frames under architecture, or choose another rule"
            )
        return replace(self, frames=rule)

    def with_layer(self, text: str) -> EncoderSpec:
        """The same encoder read behind the block of `text`: `12`, `-1` (the last), `12+norm` for the norm after it.

        UserError for a block that it does not have.
        """
        match = re.fullmatch(r"(-?[1-9]\d{0,3})(\+norm)?", text)
        if match is None:
            raise UserError(f"layer {text!r} of {self.name} is no block such as 12, -1 (the last), or -1+norm")
        if "num_layers" not in self.architecture:
            raise UserError(f"{self.name} has no numbered blocks of tokens, so no layer of it can be chosen")
        num_layers, block = self.architecture["num_layers"], int(match[1])
        block = block if block > 0 else num_layers + 1 + block
        if not 1 <= block <= num_layers:
            raise UserError(f"layer {text} of {self.name}: it has {num_layers} blocks, 1 to {num_layers}")
        return replace(self, skipped_blocks=num_layers - block, final_norm=match[2] is not None)

    def with_frame_dtype(self, dtype: str) -> EncoderSpec:
        """The same encoder with small frames of `dtype`.

        uint8 rounds them; float32 leaves them as they are where no antialias is used.
        """
        return replace(self, resize=replace(self.resize, dtype=dtype))

    def with_exif(self, exif: str) -> EncoderSpec:
        """The same encoder with stills as they are stored, or with `exif="apply"` turned by their EXIF orientation."""
        return replace(self, resize=replace(self.resize, exif=exif))


def _check_architecture(spec: EncoderSpec) -> None:
    """Refuse sizes that the network cannot have."""
    sizes = spec.architecture
    has_blocks = any(key in sizes for key in _BLOCK)
    required = (*_REQUIRED, "num_layers", *_BLOCK) if has_blocks else _REQUIRED
    if missing := [key for key in required if key not in sizes]:
        raise UserError(f"architecture of {spec.name} lacks {', '.join(missing)}")
    for key in (*_REQUIRED, *(key for key in _OPTIONAL if key in sizes)):
        if not _is_size(sizes[key]):
            raise UserError(f"{key} of {spec.name} must be a whole number >= 1, got {sizes[key]!r}")
    _check_multiple(spec, "image_size", "patch_size", "so that patches tile the image")
    if has_blocks:
        _check_blocks(spec)
    if sizes["num_frames"] > BASE_FRAMES or BASE_FRAMES % sizes["num_frames"]:
        raise UserError(
            f"num_frames of {spec.name} must divide the {BASE_FRAMES} frames sampled per clip, got "
            f"{sizes['num_frames']}; use 1, 2, 4, 8, 16 or 32"
        )
    _check_multiple(spec, "num_frames", "tubelet_frames", "so that every time step is whole")
    steps, kept = spec.num_frames // sizes["tubelet_frames"], spec.chosen_frames.every_step
    if steps % kept or (spec.temporal_reach != "frame" and spec.still_frames // sizes["tubelet_frames"] % kept):
        raise UserError(f"frame rule {spec.frame_rule} keeps every {kept}-th of {steps} time steps of {spec.name}")
    if spec.temporal_reach == "chunk":
        reason = "because it attends within chunks of that many frames; a partial chunk has no meaning"
        _check_multiple(spec, "num_frames", "frames_per_chunk", reason)
    if "num_layers" in sizes and sizes["num_layers"] <= spec.skipped_blocks:
        raise UserError(
            f"num_layers of {spec.name} must be at least {spec.skipped_blocks + 1}, got {sizes['num_layers']}: its "
            f"last {spec.skipped_blocks} are never run"
        )


def _check_blocks(spec: EncoderSpec) -> None:
    """Refuse sizes that transformer blocks cannot have."""
    sizes = spec.architecture
    if not isinstance(sizes["norm_eps"], float) or not (math.isfinite(sizes["norm_eps"]) and sizes["norm_eps"] > 0):
        raise UserError(f"norm_eps of {spec.name} must be a number > 0 such as 1e-6, got {sizes['norm_eps']!r}")
    if sizes["activation"] not in ACTIVATIONS:
        raise UserError(
            f"activation of {spec.name} must be one of {', '.join(ACTIVATIONS)}, got {sizes['activation']!r}"
        )
    _check_multiple(spec, "hidden_size", "num_heads", "so that heads have equal width")


def _check_multiple(spec: EncoderSpec, whole: str, part: str, reason: str) -> None:
    value, divisor = spec.architecture[whole], spec.architecture[part]
    if value % divisor:
        below = max(value // divisor, 1) * divisor
        raise UserError(
            f"{whole} of {spec.name} must be a multiple of {part} {reason}, got {whole}={value}, {part}={divisor}; "
            f"use {whole}={below} or {below + divisor}"
        )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def layer_text(layer: str) -> str | None:
    """An identity's layer as `with_layer` takes it; None for one that is not in these words.

    >>> layer_text("output of block 23 of 24, no final norm"), layer_text("last feature map")
    ('23', None)
    """
    match = re.fullmatch(r"output of block (\d+) of \d+, (no final norm|then the final norm)", layer)
    return match and match[1] + ("+norm" if match[2].startswith("then") else "")


def feature_identity(
    spec: EncoderSpec,
    *,
    weights_sha256: str,
    compute_dtype: str,
    decode: str,
    grid: Grid | None = DEFAULT_GRID,  # None: the encoder's own
    prefix_tokens: bool = False,  # whether class and register tokens are stored too
    storage_dtype: str = "float16",
) -> FeatureIdentity:
    """Everything that decides the bytes, and nothing else."""
    stored_grid = spec.grid if grid is None else cast("Grid", tuple(grid))
    check_grid(spec.grid, stored_grid)
    if prefix_tokens and not spec.prefix_tokens:
        raise UserError(f"{spec.name} has no class or register tokens to store; leave them out for this encoder")
    return FeatureIdentity(
        encoder=spec.name,
        architecture={"model": spec.model, **spec.architecture},
        weights_sha256=weights_sha256,
        layer=spec.layer,
        num_frames=spec.num_frames,
        frame_rule=spec.frame_rule,
        decode=decode,
        preprocessing=spec.preprocessing(),
        still_period=aligned_period(spec.still_period, spec.grid[0], stored_grid[0]),
        grid=stored_grid,
        pooling="none" if grid is None else "adaptive-avg",
        width=spec.width,
        prefix_tokens=spec.prefix_tokens if prefix_tokens else 0,
        compute_dtype=compute_dtype,
        storage_dtype=storage_dtype,
    )
