from operator import attrgetter

import pytest

from mervcache.errors import UserError
from trainer.recipes import FULL_RECIPE, MODE_FULL, RECIPES, get_recipe, get_stages

# MERV_SPEC section 5 (training), 3 (fusion) and 4 (prompt, cut) by hand: dotted setting -> value.
SHARED = {
    "llm": "meta-llama/Llama-2-7b-hf",
    "train_llm": "full",
    "mode": "frozen",
    "train_encoders": (),
    "visual_position": "after_bos",
    "max_text_tokens": 2048,
    "exceed_context": False,
    "fraction": 1.0,
    "limit": None,
    "epochs": 1.0,
    "max_steps": None,
    "seed": 7,
    "precision": "bf16",
    "activation_checkpointing": True,
    "llm_quant": None,
    "source_weights": {},
    "optimizer.betas": (0.9, 0.999),
    "optimizer.eps": 1e-8,
    "optimizer.warmup_ratio": 0.03,
    "optimizer.clip_norm": 1.0,
    "projector.resampler": "average",
    "projector.grid": None,  # the 8 x 8 of the store, or 8 x 8 of a raw one
    "projector.frame_divisor": 1,
    "projector.head": "linear",
    "projector.pre_layer_norm": False,
    "projector.standardise": False,
}
ALIGN = SHARED | {
    "stage": "align",
    "prompt": "caption",
    "batch_size": 256,
    "micro_batch_size": 16,
    "sampler": "shuffled",
    "optimizer.projector_lr": 1e-4,
    "optimizer.fusion_lr": 1e-4,
    "optimizer.llm_lr": 1e-4,
    "optimizer.weight_decay": 0.0,
}
FINETUNE = SHARED | {
    "stage": "finetune",
    "prompt": "pure",
    "batch_size": 128,
    "micro_batch_size": 8,
    "sampler": "split_modality",
    "optimizer.projector_lr": 2e-5,
    "optimizer.fusion_lr": 2e-5,
    "optimizer.llm_lr": 2e-5,
}
RELEASED = {
    "fusion.name": "cross_attention_released",
    "fusion.query_width": 3072,
    "loss": "micro_batch_means",
}
PAPER = {"fusion.name": "cross_attention", "loss": "per_token"}
SOURCES = {
    "merv-frozen-released": [FINETUNE | RELEASED | {"optimizer.weight_decay": 0.1}],
    "merv-full-released": [ALIGN | RELEASED, FINETUNE | RELEASED | {"optimizer.weight_decay": 0.1}],
    "merv-full": [ALIGN | PAPER, FINETUNE | PAPER | {"optimizer.weight_decay": 0.0}],  # what the paper's GPUs had
    # The LLM frozen, as the name says, at rates that move a projector under one.
    "merv-frozen": [
        FINETUNE
        | PAPER
        | {
            "train_llm": "none",
            "sampler": "shuffled",
            "activation_checkpointing": None,  # on: its LLM has 7B parameters
            "optimizer.projector_lr": 1e-3,
            "optimizer.fusion_lr": 1e-3,
            "optimizer.weight_decay": 0.0,
        }
    ],
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_recipe_that_names_a_source_has_its_values_field_by_field(name):
    stages = get_stages(name)
    assert len(stages) == len(SOURCES[name])
    for stage, wanted in zip(stages, SOURCES[name], strict=True):
        found = {setting: attrgetter(setting)(stage.config) for setting in wanted}
        assert found == wanted


def test_every_recipe_but_the_small_ones_names_a_source():
    assert set(RECIPES) == {*SOURCES, "demo", "small"}


def test_a_chain_is_not_one_config():
    with pytest.raises(UserError, match="recipe merv-full has stages align, finetune"):
        get_recipe("merv-full")


def test_the_full_mode_names_a_recipe():
    assert MODE_FULL == "full"
    assert len(get_stages(FULL_RECIPE)) == 2


@pytest.mark.parametrize("name", RECIPES)
def test_stage_names_can_be_folders_and_differ(name):
    names = [stage.name for stage in get_stages(name)]
    assert len(set(names)) == len(names)
    assert all(stage.isidentifier() for stage in names)
