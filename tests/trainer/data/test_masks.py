"""Masks: how they are drawn, and what a batch makes of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from mervcache.errors import UserError
from trainer.data.batches import Batches, select
from trainer.data.collate import make_batch
from trainer.data.masks import draw_mask, mask_of
from trainer.data.prompts import IGNORE_INDEX, Rendered

HELLO = Rendered(input_ids=(1, 2, 3), labels=(IGNORE_INDEX, IGNORE_INDEX, 3), visual_at=1, is_cut=False)


def draws(rule, *, may_be_empty, count=4000):
    return Counter(draw_mask(rule, 3, 7, 0, f"s{index}", may_be_empty=may_be_empty) for index in range(count))


def test_subsets_are_equally_likely():
    assert {mask: round(n / 4000, 1) for mask, n in draws("subsets", may_be_empty=True).items()} == dict.fromkeys(
        [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)], 0.1
    )
    assert (False, False, False) not in draws("subsets", may_be_empty=False)


def test_sizes_are_equally_likely_and_subsets_of_one_size_too():
    counts = draws("sizes", may_be_empty=False)
    by_size = Counter()
    for mask, count in counts.items():
        by_size[sum(mask)] += count
    assert set(by_size) == {1, 2, 3}
    assert all(abs(count / 4000 - 1 / 3) < 0.03 for count in by_size.values())
    assert all(abs(count / 4000 - 1 / 9) < 0.03 for mask, count in counts.items() if sum(mask) < 3)


def test_a_mask_names_encoders_in_the_order_of_the_run():
    assert mask_of(["dinov2", "vivit"], ["vivit"]) == (False, True)
    with pytest.raises(UserError, match="the nearest known one is 'vivit'"):
        mask_of(["dinov2", "vivit"], ["vivt"])


def test_samples_of_one_clip_with_unlike_masks_have_rows_of_their_own(tokens, samples):
    clip = samples[0].clip_id
    masks = [(True, False), (True, True), (True, False), (False, False)]
    batch = make_batch([HELLO] * 4, [clip] * 4, tokens, 8, None, masks=masks)
    assert batch.clip_rows == (0, 1, 0, -1)
    assert batch.shown_CE.tolist() == [[True, False], [True, True]]
    expected = tokens.fetch([clip, clip])["dinov2"]
    assert torch.equal(batch.tokens["dinov2"], expected)
    assert batch.attention_mask_BS.sum(1).tolist() == [11, 11, 11, 3]


def test_left_out_tokens_make_shorter_sequences_with_labels_in_their_places(tokens, samples):
    masks = [(True, False), (True, True)]
    clips = [samples[0].clip_id, samples[1].clip_id]
    batch = make_batch([HELLO] * 2, clips, tokens, 8, None, masks=masks, leaves_out_masked=True)
    assert batch.attention_mask_BS.sum(1).tolist() == [3 + 4, 3 + 8]
    assert [(row != IGNORE_INDEX).nonzero().flatten().tolist() for row in batch.labels_BS] == [[6], [10]]


def test_masks_follow_from_seed_epoch_and_sample_alone(config, samples, tokens):
    """Whatever the number of ranks and the step: a resumed run draws the same."""
    config = replace(config, mask_encoders="subsets", epochs=3)
    data = select(samples, tokens, config)

    def masks_of(config, **ranks):
        batches = Batches(data, tokens, lambda *_, **__: HELLO, config, num_visual_tokens=8, context=None, **ranks)
        return [[batches.mask(index, epoch) for index in range(18)] for epoch in range(3)]

    first = masks_of(config)
    assert first == masks_of(config, rank=1, num_ranks=2)
    assert first[0] != first[1]
    assert first != masks_of(replace(config, seed=8))
    assert (False, False) not in masks_of(replace(config, llm="x", train_llm="none"))[0]
