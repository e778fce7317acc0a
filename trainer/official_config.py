"""Settings of a checkpoint of princetonvisualai/merv, under their official names, and ours for the same model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import isqrt
from pathlib import Path
from typing import Any

from mervcache.config import load_yaml, overlay
from mervcache.errors import UserError, unknown_name
from trainer.config import FusionConfig, ProjectorConfig, PromptName, TrainConfig


@dataclass(frozen=True, kw_only=True)
class OfficialEncoder:
    """An encoder of the released code."""

    name: str  # ours
    frames_per_step: int = 1  # frames behind one time step of its output
    every_step: int = 1  # of its time steps, every n-th is used
    fit: str = "squash"  # how frames become square


RESIZE = "resize-naive"  # the strategy of all released models, and LanguageBind knows no other
SHARED_FRAMES = 32  # of a model with several encoders; identities of such tokens are called linspace-32/K
ENCODERS: dict[str, OfficialEncoder] = {  # by id in video_backbone_ids
    "languagebind-video-noclass": OfficialEncoder(name="languagebind", fit="centre-crop"),
    "dinov2-video-all-tokens": OfficialEncoder(name="dinov2"),
    "vivit-google-b-all-no-cls-16frames": OfficialEncoder(name="vivit", frames_per_step=2),
    "vivit-google-b-all-no-cls": OfficialEncoder(name="vivit", frames_per_step=2, every_step=2),
    "siglip-vit-b16-224px-all-no-cls": OfficialEncoder(name="siglip"),
}
HEAD_LAYERS: dict[str, tuple[str, ...]] = {
    "linear": ("",),
    "gelu-mlp": ("0.", "2."),
    "fused-gelu-mlp": ("0.", "2.", "4."),
}
AVERAGES = ("avg", "3davg")  # the resamplers without weights
FUSION_NAMES: dict[str, str] = {
    "cross_attention_avg_lq": "cross_attention_released",
    "concat": "concat_sequence",
    "concat_channel": "concat_channel",
    "concat_channel_ln": "concat_channel_ln",
    "scalar": "learnable_weights",
    "first": "first",
}
# The formats that a checkpoint was trained with; `pure` and `vicuna` are the released ones where </s> is the end token.
PROMPT_NAMES: dict[str, PromptName] = {
    "llama2-7b-pure": "pure",
    "llama2-13b-pure": "pure",
    "llama3-8b-pure": "pure_released",
    "vicuna-v15-7b": "vicuna",
    "vicuna-v15-13b": "vicuna",
    "llama2-7b-chat": "llama2_chat_released",
    "llama2-13b-chat": "llama2_chat_released",
    "llama3-8b-chat": "llama2_chat_released",
    "llama3.1-8b-chat": "llama3_released",
    "qwen2.5-7b-instruct": "qwen2_released",
    "qwen2.5-3b-instruct": "qwen2_released",
}


@dataclass(frozen=True, kw_only=True)
class OfficialConfig:
    """The official settings that shape the model, under their official names."""

    arch_specifier: str = ""  # resampler, "frameK" and head, joined by "+"
    feature_fusion: str = "cross_attention_avg_lq"
    video_backbone_ids: tuple[str, ...] = ()  # the order of the projectors
    llm_backbone_id: str = ""
    llm_max_length: int = 2048  # tokens of text
    num_frames: tuple[int, ...] = ()  # of every encoder
    projector_token_length: int = 64  # per time step, a square
    image_resize_strategy: str = RESIZE

    def __post_init__(self) -> None:
        for encoder in self.video_backbone_ids:
            _check("video_backbone_id", encoder, ENCODERS)
        _check("feature_fusion", self.feature_fusion, FUSION_NAMES)
        if len(self.num_frames) != len(self.video_backbone_ids):
            raise UserError(
                f"official config: {len(self.video_backbone_ids)} video_backbone_ids need as many num_frames,"
                f" got {len(self.num_frames)}"
            )
        if odd := [frames for frames in self.num_frames if frames < 1 or max(self.num_frames) % frames]:
            raise UserError(
                f"official config: num_frames must divide the largest of them, {max(self.num_frames)}, got {odd[0]}"
            )
        if self.image_resize_strategy != RESIZE:
            raise UserError(
                f"image_resize_strategy {self.image_resize_strategy!r} cannot be imported: the encoders here see frames"
                f" as {RESIZE} makes them (squashed to a square, LanguageBind's cropped), and the checkpoint would be"
                " shown others than it was trained with"
            )
        if isqrt(max(self.projector_token_length, 0)) ** 2 != self.projector_token_length:
            raise UserError(
                f"official config: projector_token_length must be a square, got {self.projector_token_length}"
            )

    @property
    def encoders(self) -> tuple[str, ...]:
        """Our names, in the order of the projectors."""
        return tuple(ENCODERS[encoder].name for encoder in self.video_backbone_ids)

    @property
    def fusion(self) -> str:
        return FUSION_NAMES[self.feature_fusion]

    @property
    def head(self) -> str:
        return _check("head in arch_specifier", self.arch_specifier.split("+")[-1], HEAD_LAYERS)

    @property
    def frame_divisor(self) -> int:
        """K of "frameK", which the 3D average reads and the 2D average does not."""
        found = re.search(r"frame([1-9]\d*)", self.arch_specifier)
        return int(found[1]) if found and "3davg" in self.arch_specifier.split("+") else 1

    @property
    def num_used(self) -> int:
        """Encoders whose tokens reach the LLM."""
        return 1 if self.fusion == "first" else len(self.encoders)

    @property
    def prompt(self) -> PromptName:
        return PROMPT_NAMES[self.llm_backbone_id]

    def grid(self, index: int) -> tuple[int, int, int]:
        """T, H, W of encoder `index`, before the frames are divided."""
        side = isqrt(self.projector_token_length)
        encoder = self._encoder(index)
        return self.num_frames[index] // encoder.frames_per_step // encoder.every_step, side, side

    def wanted(self, index: int) -> dict[str, str]:
        """What the identity of encoder `index`'s tokens must hold, by dotted names.

        As many frames as the encoder with most of them sees are sampled evenly, and every k-th of these is taken.
        """
        samples, encoder = max(self.num_frames), self._encoder(index)
        every = samples // self.num_frames[index]
        rule = f"linspace-{samples}" + (f"/{every}" if every > 1 or samples == SHARED_FRAMES else "")
        rule += f"+steps/{encoder.every_step}" if encoder.every_step > 1 else ""
        return {"frame_rule": rule, "preprocessing.fit": encoder.fit}

    def _encoder(self, index: int) -> OfficialEncoder:
        return ENCODERS[self.video_backbone_ids[index]]


def read_settings(path: Path) -> dict[str, Any]:
    """The model's settings in config.json (or YAML), with or without the training settings around them."""
    settings = load_yaml(path)
    return settings["model"] if isinstance(settings.get("model"), dict) else settings


def parse_settings(settings: Mapping[str, Any]) -> OfficialConfig:
    """The settings that shape the model; UserError where it cannot be imported."""
    found = {field.name: settings[field.name] for field in fields(OfficialConfig) if field.name in settings}
    needed = ("arch_specifier", "video_backbone_ids", "llm_backbone_id")
    if missing := [name for name in needed if not found.get(name)]:
        raise UserError(f"the official config has no {', '.join(missing)}; give the config.json of the checkpoint")
    frames = found.setdefault("num_frames", 16)
    if isinstance(frames, int):
        found["num_frames"] = [frames] * len(found["video_backbone_ids"])
    config = overlay(OfficialConfig(), found, where="official config: ")
    if not set(AVERAGES) & set(config.arch_specifier.split("+")):
        raise UserError(
            f"arch_specifier {config.arch_specifier!r} cannot be imported: only projectors that average"
            f" ({', '.join(AVERAGES)}) are"
        )
    _check("llm_backbone_id", config.llm_backbone_id, PROMPT_NAMES)
    return config


def _check(what: str, name: str, table: Mapping[str, Any]) -> str:
    if name not in table:
        raise UserError(unknown_name(what, name, table))
    return name


def run_config(
    official: OfficialConfig, settings: Mapping[str, Any], *, llm: str, query_width: int | None
) -> TrainConfig:
    """Our settings of the same model, with the numbers of the second stage that trained it."""
    lr = settings.get("finetune_learning_rate", 2e-5)
    changes = {
        "encoders": official.encoders[: official.num_used],
        "prompt": official.prompt,
        "max_text_tokens": official.llm_max_length,
        "exceed_context": official.fusion == "concat_sequence",  # the reference does not check it, and fills LLaMA-2's
        "optimizer": {
            "projector_lr": lr,
            "fusion_lr": lr,
            "llm_lr": lr,
            "weight_decay": settings.get("finetune_weight_decay", 0.1),
            "warmup_ratio": settings.get("finetune_warmup_ratio", 0.03),
            "clip_norm": settings.get("finetune_max_grad_norm", 1.0),
        },
        "batch_size": settings.get("finetune_global_batch_size", 128),
        "micro_batch_size": settings.get("finetune_per_device_batch_size", 8),
    }
    time, height, width = official.grid(0)
    fusion = FusionConfig(name=official.fusion)
    return replace(
        overlay(TrainConfig(llm=llm, train_llm="full"), changes),
        projector=ProjectorConfig(grid=(time // official.frame_divisor, height, width), head=official.head),
        fusion=fusion if query_width is None else replace(fusion, query_width=query_width),
    )
