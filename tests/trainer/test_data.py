from dataclasses import replace

import pytest
import torch

from featurestore.errors import UserError
from trainer.build import build, new_llm
from trainer.data import Batches, select
from trainer.prompts import IGNORE_INDEX


def batches_of(samples, tokens, config, **options):
    data = select(samples, tokens, config)
    built = build(config, tokens.shapes, new_llm(config, data.samples))
    return Batches(data, tokens, built.renderer, config, num_visual_tokens=8, context=128, **options)


def test_samples_are_dropped_with_a_reason_and_never_replaced(samples, tokens, config, make_sample):
    extra = [make_sample(50), make_sample(51, clip_id=None), make_sample(52, split="heldout")]
    data = select([*samples, *extra], tokens, replace(config, llm="x", train_llm="none"))
    assert [sample.sample_id for sample in data.samples] == [sample.sample_id for sample in samples]
    assert data.dropped == {
        "clip without tokens of every encoder": 1,
        "text only under a frozen LLM: no gradient": 1,
    }


def test_text_only_samples_stay_where_the_llm_is_trained(samples, tokens, config, make_sample):
    assert len(select([*samples, make_sample(51, clip_id=None)], tokens, config).samples) == 19


def test_the_order_of_the_store_does_not_matter(samples, tokens, config):
    assert select(samples[::-1], tokens, config) == select(samples, tokens, config)


def test_a_limit_takes_the_first_by_id(samples, tokens, config):
    data = select(samples[::-1], tokens, replace(config, limit=2))
    assert [sample.sample_id for sample in data.samples] == ["s000", "s001"]


def test_no_samples_of_that_stage_is_an_error_that_lists_what_there_is(samples, tokens, config):
    with pytest.raises(UserError, match="stage 'align'; found train/finetune"):
        select(samples, tokens, replace(config, stage="align"))


def test_all_samples_dropped_is_an_error(tokens, config, make_sample):
    with pytest.raises(UserError, match="no sample is left to train on"):
        select([make_sample(50)], tokens, config)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_read_the_same_global_batch(samples, tokens, config, num_ranks):
    parts = [batches_of(samples, tokens, config, rank=r, num_ranks=num_ranks).step(4) for r in range(num_ranks)]
    assert len({part.num_supervised for part in parts}) == 1
    found = sum(batch.num_supervised for part in parts for batch in part.micro_batches)
    assert found == parts[0].num_supervised == 6 * 2  # six answers of one word and an end token
    read = [tuple(clip.flatten().tolist()) for part in parts for b in part.micro_batches for clip in b.tokens["dinov2"]]
    alone = batches_of(samples, tokens, config).step(4)
    assert sorted(read) == sorted(tuple(c.flatten().tolist()) for b in alone.micro_batches for c in b.tokens["dinov2"])


def test_every_sample_stands_beside_the_tokens_of_its_own_clip(samples, tokens, config):
    batches = batches_of(samples, tokens, config)
    words = batches.rendered.__wrapped__  # the renderer behind the cache
    for batch in batches.step(0).micro_batches:
        for labels, row in zip(batch.labels_BS, batch.clip_rows, strict=True):
            answer = labels[labels != IGNORE_INDEX][0].item()
            same = [
                index
                for index, sample in enumerate(batches.data.samples)
                if torch.equal(tokens.fetch([sample.clip_id])["vivit"][0], batch.tokens["vivit"][row])
            ]
            assert len(same) == 1
            assert answer in words(same[0]).labels


def test_text_only_training_reads_the_same_samples_and_no_tokens(samples, tokens, config):
    with_video = batches_of(samples, tokens, config)
    text = batches_of(samples, tokens, replace(config, mode="text-only"))
    assert text.data == with_video.data
    batch = text.step(3).micro_batches[0]
    assert batch.tokens == {}
    assert set(batch.clip_rows) == {-1}
    assert text.step(3).num_supervised == with_video.step(3).num_supervised
