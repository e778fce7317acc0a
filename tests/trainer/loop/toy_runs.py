"""Samples, tokens and stages for trainings by several processes, whose scripts import this file by its name."""

from __future__ import annotations

from dataclasses import replace

import torch

from featurestore.clips import Sample, Turn
from mervcache.config import overlay
from trainer.config import TrainConfig
from trainer.data.tokens import MemoryTokens
from trainer.recipes import Stage, Stages, get_recipe


def toy_config(**changes: object) -> TrainConfig:
    """The demo's recipe for steps of four samples, each forward a sample."""
    small = {"projector": {"grid": [1, 2, 2]}, "batch_size": 4, "micro_batch_size": 1}
    return overlay(get_recipe("demo"), small | changes)


def toy_tokens(count: int, odd: int | None = None) -> MemoryTokens:
    """Of as many clips; those of the clip `odd` hold an infinite value."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(count, 2, 2, 2, 8, generator=random)
    if odd is not None:
        values[odd, 0, 0, 0, 0] = torch.inf
    return MemoryTokens(clip_ids(count), {"dinov2": values})


def toy_questions(count: int, num_trained: int | None = None) -> list[Sample]:
    """A question per clip; those behind the first `num_trained` are held out."""
    return [
        Sample(
            sample_id=f"s{index:02d}",
            clip_id=clip if index % 3 else None,  # every third is text only
            turns=(Turn(role="human", text="What?"), Turn(role="gpt", text="red green blue"[: 3 + index % 2 * 6])),
            stage="finetune",
            split="train" if num_trained is None or index < num_trained else "heldout",
            source="toy",
            options=("red", "red green"),
            answer_index=index % 2,
        )
        for index, clip in enumerate(clip_ids(count))
    ]


def as_captions(questions: list[Sample]) -> list[Sample]:
    """The same texts as captions of every clip, in the stage before."""
    return [
        replace(sample, sample_id=f"c-{sample.sample_id}", clip_id=clip, stage="align")
        for sample, clip in zip(questions, clip_ids(len(questions)), strict=True)
    ]


def two_stages(config: TrainConfig, *, align_steps: int) -> Stages:
    """Captions first, then the stage of the config."""
    align = replace(config, stage="align", prompt="caption", max_steps=align_steps)
    return (Stage(name="align", config=align), Stage(name="finetune", config=config))


def clip_ids(count: int) -> list[str]:
    return [f"set/clip{index}.mp4" for index in range(count)]
