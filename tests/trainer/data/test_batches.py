from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featurestore.clips import Turn
from mervcache.errors import UserError
from trainer.data.batches import Batches, lies_in_fraction, select
from trainer.data.prompts import IGNORE_INDEX
from trainer.model.video_llm import build, new_llm


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


@pytest.mark.parametrize("train_llm", ["full", "lora"])
def test_text_only_samples_stay_where_the_llm_learns(samples, tokens, config, make_sample, train_llm):
    mixed = [*samples, make_sample(51, clip_id=None)]
    assert len(select(mixed, tokens, replace(config, train_llm=train_llm, allow_fresh_frozen=True)).samples) == 19


def test_the_order_of_the_store_does_not_matter(samples, tokens, config):
    assert select(samples[::-1], tokens, config) == select(samples, tokens, config)


def test_a_limit_takes_the_first_by_id(samples, tokens, config):
    data = select(samples[::-1], tokens, replace(config, limit=2))
    assert [sample.sample_id for sample in data.samples] == ["s000", "s001"]
    assert data.dropped == {"beyond the limit of 2": 16}


def test_no_samples_of_that_stage_is_an_error_that_says_what_to_type(samples, tokens, config, make_sample):
    mixed = [*samples, make_sample(50, split="heldout")]
    there = "there are 1 of finetune/heldout, 18 of finetune/train"
    with pytest.raises(UserError, match=f"stage 'align' and split 'train'; {there}; type --stage finetune"):
        select(mixed, tokens, replace(config, stage="align"))
    with pytest.raises(UserError, match=r"split 'test'; .*; set `split: heldout` in a config file"):
        select(mixed, tokens, replace(config, split="test"))
    with pytest.raises(UserError, match="there are none at all; add some with `merv-pipeline extract"):
        select([], tokens, config)


def test_a_source_is_read_as_often_as_its_weight_says(samples, tokens, config, make_sample):
    names = {**dict.fromkeys(range(6), "half"), **dict.fromkeys(range(6, 8), "twice"), 17: "never"}
    mixed = [replace(sample, source=names.get(index, "once")) for index, sample in enumerate(samples)]
    weighted = replace(config, source_weights={"half": 0.5, "twice": 2, "never": 0}, batch_size=16, max_steps=None)
    batches = batches_of(mixed, tokens, weighted)
    assert batches.data.dropped == {"its source has weight 0": 1}
    assert (batches.order.num_per_epoch, batches.num_steps) == (3 + 4 + 9, 1)
    epochs = [Counter(batches.order.batch(step)) for step in (0, 1)]
    by_source = [Counter({name: 0}) for name in ("epoch 0", "epoch 1")]
    for counts, sums in zip(epochs, by_source, strict=True):
        for index, count in counts.items():
            sums[batches.data.samples[index].source] += count
        assert (sums["half"], sums["twice"], sums["once"], sums["never"]) == (3, 4, 9, 0)
    halves = [{i for i in counts if batches.data.samples[i].source == "half"} for counts in epochs]
    assert len(halves[0] | halves[1]) == 6


def test_a_weight_for_an_unknown_source_names_the_nearest(samples, tokens, config):
    with pytest.raises(UserError, match=r"unknown source in source_weights 'toys', the nearest known one is 'toy'"):
        select(samples, tokens, replace(config, source_weights={"toys": 2.0}))


@given(
    sample_id=st.text(max_size=20),
    shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
)
def test_a_smaller_share_lies_inside_a_larger_one(sample_id, shares):
    smaller, larger = (lies_in_fraction(sample_id, share) for share in shares)
    assert larger or not smaller
    assert lies_in_fraction(sample_id, 1.0)


def test_a_fraction_is_about_that_share_and_counts_the_rest(tokens, config, make_sample):
    many = [replace(make_sample(0), sample_id=f"q{index}") for index in range(2000)]
    data = select(many, tokens, replace(config, fraction=0.25))
    assert 450 < len(data.samples) < 550
    assert data.dropped == {"outside the fraction of 0.25": 2000 - len(data.samples)}


def test_captions_take_one_question_and_one_plain_answer_about_a_clip(samples, tokens, config, make_sample):
    long, odd = samples[0], samples[1]
    mixed = [
        replace(long, turns=long.turns * 2),
        replace(odd, turns=(odd.turns[0], Turn(role="gpt", text="see <image>"))),
        make_sample(51, clip_id=None),
        *samples[2:],
    ]
    data = select(mixed, tokens, replace(config, prompt="caption"))
    assert len(data.samples) == 16
    assert data.dropped == {
        "caption prompt: not one question and one answer": 1,
        "caption prompt: the answer holds a media placeholder": 1,
        "caption prompt: nothing to describe": 1,
    }


def test_a_tag_is_a_placeholder_only_in_a_question_about_a_clip(samples, tokens, config, make_sample):
    batches = batches_of([*samples, make_sample(51, clip_id=None)], tokens, config)
    by_id = {sample.sample_id: index for index, sample in enumerate(batches.data.samples)}
    with_clip, text_only = (len(batches.rendered(by_id[name]).input_ids) for name in ("s000", "s051"))
    assert text_only > with_clip


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


def test_expected_batches_of_one_modality_hold_it_alone(samples, tokens, config, make_sample):
    mixed = [*samples, *(make_sample(index, clip_id=None) for index in range(50, 60))]
    split = replace(config, sampler="split_modality", max_steps=None)
    batches = batches_of(mixed, tokens, split)
    assert batches.num_steps == 18 // 6 + 10 // 6
    kinds = []
    for step in range(batches.num_steps):
        rows = [row for batch in batches.step(step).micro_batches for row in batch.clip_rows]
        assert len(rows) == 6
        kinds.append({row >= 0 for row in rows})
    assert sorted(kinds, key=str) == [{False}, {True}, {True}, {True}]


def numbered(index):
    """A question that no other sample has: its number in base 3."""
    return Turn(role="human", text=" ".join(("red", "green", "blue")[index // 3**place % 3] for place in range(4)))


def texts_of(step):
    """The token ids of every sample of a step."""
    return [
        tuple(ids[:length])
        for batch in step.micro_batches
        for ids, length in zip(batch.input_ids_BL.tolist(), batch.lengths, strict=True)
    ]


@pytest.mark.parametrize("sampler", ["shuffled", "split_modality"])
@pytest.mark.parametrize("num_ranks", [2, 3, 6])
def test_any_number_of_ranks_reads_the_same_global_batches(samples, tokens, config, make_sample, sampler, num_ranks):
    mixed = [*samples, *(make_sample(index, clip_id=None) for index in range(50, 60))]
    mixed = [replace(sample, turns=(numbered(index), sample.turns[1])) for index, sample in enumerate(mixed)]
    config = replace(config, sampler=sampler)
    alone = batches_of(mixed, tokens, config)
    ranks = [batches_of(mixed, tokens, config, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for step in range(8):
        shares = [texts_of(batches.step(step)) for batches in ranks]
        indices = alone.order.batch(step)
        expected = [alone.rendered(index).input_ids for index in indices]
        assert sorted(ids for share in shares for ids in share) == sorted(expected)
        assert len(set(expected)) == len(set(indices))
        assert {len(share) for share in shares} == {6 // num_ranks}


def answers_of_unlike_length(samples):
    """Answers of one to five words."""
    return [
        replace(sample, turns=(sample.turns[0], Turn(role="gpt", text=" ".join(["red"] * (1 + index % 5)))))
        for index, sample in enumerate(samples)
    ]


def step_loss(samples, tokens, config):
    """The loss of step 0 as the loop adds it up, and the batches."""
    data = select(samples, tokens, config)
    built = build(config, tokens.shapes, new_llm(config, data.samples))
    batches = Batches(data, tokens, built.renderer, config, num_visual_tokens=8, context=128)
    step = batches.step(0)
    with torch.no_grad():
        parts = [built.model(batch).item() for batch in step.micro_batches]
    return sum(part / divisor for part, divisor in zip(parts, step.divisors, strict=True)), built, step


def test_the_mean_of_micro_batch_means_equals_a_plain_computation(samples, tokens, config):
    config = replace(config, loss="micro_batch_means", micro_batch_size=4)
    found, built, step = step_loss(answers_of_unlike_length(samples), tokens, config)
    means = []
    for batch in step.micro_batches:
        embeddings = built.model.splice(batch)
        logits = built.model.llm(inputs_embeds=embeddings, attention_mask=batch.attention_mask_BS).logits
        means.append(
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels_BS[:, 1:].flatten()).item()
        )
    assert len(means) == 2
    assert found == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_the_loss_per_token_does_not_depend_on_micro_batches_and_the_mean_of_means_does(samples, tokens, config):
    unlike = answers_of_unlike_length(samples)
    losses = {
        (loss, size): step_loss(unlike, tokens, replace(config, loss=loss, micro_batch_size=size))[0]
        for loss in ("per_token", "micro_batch_means")
        for size in (1, 6)
    }
    assert losses["per_token", 1] == pytest.approx(losses["per_token", 6], rel=1e-5)
    assert losses["micro_batch_means", 6] == pytest.approx(losses["per_token", 6], rel=1e-5)
    assert losses["micro_batch_means", 1] != pytest.approx(losses["per_token", 1], rel=1e-4)


def test_means_of_micro_batches_are_shared_among_ranks(samples, tokens, config):
    config = replace(config, loss="micro_batch_means", micro_batch_size=2)
    unlike = answers_of_unlike_length(samples)
    for rank in range(3):
        step = batches_of(unlike, tokens, config, rank=rank, num_ranks=3).step(0)
        assert step.divisors == tuple(3 * batch.num_supervised for batch in step.micro_batches)


def test_tokens_of_a_step_are_those_of_text_and_of_every_clip_shown(samples, tokens, config, make_sample):
    mixed = [*samples[:3], *(make_sample(index, clip_id=None) for index in range(50, 53))]
    batches = batches_of(mixed, tokens, config)
    step = batches.step(0)
    assert step.num_tokens == sum(len(batches.rendered(index).input_ids) for index in range(6)) + 3 * 8
    assert batches_of(mixed, tokens, replace(config, mode="text-only")).step(0).num_tokens == step.num_tokens - 3 * 8


def test_of_a_large_set_only_what_a_few_batches_need_stays_rendered(samples, tokens, config, monkeypatch):
    monkeypatch.setattr("trainer.data.batches.KEPT_SAMPLES", 2)
    batches = batches_of(samples, tokens, replace(config, batch_size=2))
    for step in range(9):  # all 18
        batches.step(step)
    kept = batches.rendered.cache_info()
    assert kept.currsize == 8
    assert kept.misses == 20  # what a step looks ahead at, the next one does not render again


def test_a_small_set_stays_rendered_from_epoch_to_epoch(samples, tokens, config):
    batches = batches_of(samples, tokens, config)
    for step in range(6):
        batches.step(step)
    assert batches.rendered.cache_info().misses == 18
