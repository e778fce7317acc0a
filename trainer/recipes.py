"""Recipes: whole training configurations by name; a config file or options may change any of their settings."""

from __future__ import annotations

from featurestore.errors import UserError, unknown_name
from trainer.config import OptimizerConfig, ProjectorConfig, TrainConfig

RECIPES: dict[str, TrainConfig] = {
    # Projectors and fusion trained under a frozen LLM, with the batch and rate of arXiv 2501.01426's second stage.
    "merv-frozen": TrainConfig(),
    # What the released code does under the same name: the LLM is trained too, from the same first step.
    "merv-frozen-released": TrainConfig(train_llm="full", optimizer=OptimizerConfig(weight_decay=0.1)),
    # A small fresh LLM that learns synthetic clips on two CPU cores; see the docstring of trainer/standardise.py.
    "demo": TrainConfig(
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
}


def get_recipe(name: str) -> TrainConfig:
    """The recipe of that name."""
    if name not in RECIPES:
        raise UserError(unknown_name("recipe", name, list(RECIPES)))
    return RECIPES[name]
