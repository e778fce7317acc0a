"""Nested grids: which grid a step has, and what its batches hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from trainer.data.batches import Batches, select
from trainer.data.grids import draw_grid
from trainer.data.prompts import IGNORE_INDEX, Rendered

HELLO = Rendered(input_ids=(1, 2, 3), labels=(IGNORE_INDEX, IGNORE_INDEX, 3), visual_at=1, is_cut=False)


@pytest.fixture
def nested(config):
    return replace(config, projector=replace(config.projector, nested_grids=(4, 1)))


def batches_of(config, samples, tokens, **ranks):
    data = select(samples, tokens, config)
    return Batches(data, tokens, lambda *_, **__: HELLO, config, num_visual_tokens=8, context=None, **ranks)


def test_grids_are_equally_likely_and_a_run_of_one_grid_has_none():
    counts = Counter(draw_grid((64, 16, 4, 1), 7, step) for step in range(4000))
    assert set(counts) == {64, 16, 4, 1}
    assert all(abs(count - 1000) < 100 for count in counts.values())
    assert draw_grid((), 7, 0) is None


def test_the_grid_follows_from_seed_and_step_alone(nested, samples, tokens):
    """Whatever the rank, the samples and the batch size: ranks agree, and a resumed run draws the same."""
    fewer = replace(nested, batch_size=3, micro_batch_size=1)

    def grids_of(config, count=18, **ranks):
        batches = batches_of(config, samples[:count], tokens, **ranks)
        return [batches.tokens_per_frame(step) for step in range(40)]

    first = grids_of(nested)
    assert set(first) == {4, 1}
    assert first == grids_of(nested, rank=1, num_ranks=2) == grids_of(fewer, count=9)
    assert first != grids_of(replace(nested, seed=8))


def test_batches_have_the_places_of_their_grid(nested, samples, tokens):
    batches = batches_of(nested, samples, tokens)
    steps = {batches.tokens_per_frame(number): batches.step(number) for number in range(12)}
    for tokens_per_frame, step in steps.items():
        num_visual = 2 * tokens_per_frame  # two time steps
        assert step.tokens_per_frame == tokens_per_frame
        assert step.num_tokens == 6 * (3 + num_visual)
        for batch in step.micro_batches:
            assert batch.tokens_per_frame == tokens_per_frame
            assert set(batch.attention_mask_BS.sum(1).tolist()) == {3 + num_visual}
            assert batch.labels_BS.shape[1] == 3 + num_visual


def test_text_only_runs_have_no_grids(nested, samples, tokens):
    batches = batches_of(replace(nested, mode="text-only"), samples, tokens)
    assert batches.step(0).tokens_per_frame is None
