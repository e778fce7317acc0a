from dataclasses import replace

import pytest

from trainer.config import LoraConfig
from trainer.loop.plan import describe, make_plan


def test_memory_is_told_by_part_and_equals_a_hand_computation(config, samples, tokens):
    plan = make_plan(config, samples, tokens)
    told = describe(plan)
    memory = told["memory_bytes"]
    parameters = sum(part["total"] for part in told["parameters"].values())
    assert memory["parameters"] == memory["gradients"] == 4 * parameters  # all of it is trained, in fp32
    assert memory["moments"] == 8 * parameters
    assert memory["tokens"] == 4 * (4 * 2 * 2 * (8 + 6)) * 4  # clips, grid, widths, float32
    text, vocabulary = told["text_tokens"]["longest"], len(plan.built.llm.tokenizer)
    layers = 2 * 34 * 2 * 4 * (text + 8) * 32  # twice 16 bits, 34 bytes, layers, B, S, M
    logits, visual = 4 * 3 * 4 * text * vocabulary, 4 * 2 * 4 * 2 * 8 * 32
    assert memory["activations"] == layers + logits + visual
    assert (
        memory["total"]
        == sum(memory[name] for name in ("parameters", "gradients", "moments", "tokens")) + (memory["activations"])
    )
    assert f"136 B S M + 4 x 3 B L V + 4 x 2 B E N M bytes; B 4, S {text + 8}, M 32" in memory["activations_formula"]


def test_what_is_frozen_has_neither_gradients_nor_moments(config, samples, tokens):
    plan = make_plan(replace(config, train_llm="none", allow_fresh_frozen=True), samples, tokens)
    trained = sum(p.numel() for p in plan.built.model.parameters() if p.requires_grad)
    memory = describe(plan)["memory_bytes"]
    assert (memory["gradients"], memory["moments"]) == (4 * trained, 8 * trained)
    assert memory["gradients"] < memory["parameters"]


def test_checkpointing_layers_saves_activations(config, samples, tokens):
    full, less = (
        describe(make_plan(replace(config, activation_checkpointing=is_on), samples, tokens))["memory_bytes"]
        for is_on in (False, True)
    )
    assert less["activations"] < full["activations"]
    assert less["parameters"] == full["parameters"]


@pytest.mark.parametrize("sampler", ["shuffled", "split_modality"])
def test_what_fills_no_batch_is_told(config, samples, tokens, make_sample, sampler):
    mixed = [*samples, *(make_sample(index, clip_id=None) for index in range(50, 54))]
    plan = make_plan(replace(config, sampler=sampler, max_steps=None, batch_size=5), mixed, tokens)
    told = describe(plan)
    assert told["unread"] == ({"all": 2} if sampler == "shuffled" else {"text": 4, "visual": 3})
    assert told["steps"] == (4 if sampler == "shuffled" else 3)
    assert told["steps"] * 5 + sum(told["unread"].values()) == told["samples_per_epoch"] == 22


def test_adapters_learn_from_text_too(config, samples, tokens, make_sample):
    mixed = [*samples, make_sample(50, clip_id=None)]
    lora = replace(config, train_llm="lora", lora=LoraConfig(rank=2), allow_fresh_frozen=True)
    assert describe(make_plan(lora, mixed, tokens))["samples"] == 19
