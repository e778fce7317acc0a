"""Options behind one prompt have the scores that they have as whole sequences."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, MistralConfig

from featurestore.clips import Turn
from trainer.data.prompts import IGNORE_INDEX, Rendered
from trainer.model.multiple_choice import answer_all, answer_batch
from trainer.model.shared_prefix import can_share, split

N = IGNORE_INDEX


@pytest.fixture
def asked(samples):
    """Questions of unlike length, options of one to five words, one of them twice; one without a clip."""
    options = ("red", "green blue red green blue", "blue", "red")
    changed = [
        replace(
            sample,
            options=options[: 2 + index % 3],
            turns=(replace(sample.turns[0], text=sample.turns[0].text + " colour" * (index % 4)), sample.turns[1]),
            answer_index=0,
        )
        for index, sample in enumerate(samples[:6])
    ]
    changed[2] = replace(changed[2], clip_id=None)
    earlier = (Turn(role="human", text="<video>\nWhat is it?"), Turn(role="gpt", text="red blue"))
    changed[3] = replace(changed[3], turns=(*earlier, *changed[3].turns))  # its first answer is scored as well
    return changed


def scores(built, asked, tokens, **options):
    return [answer.scores for answer in answer_batch(built, asked, tokens, "cpu", **options)]


@pytest.mark.parametrize("shown", [None, ("vivit",), ()])
def test_scores_are_those_of_whole_sequences(brief, asked, tokens, shown):
    built = replace(brief.built, shown=shown)
    whole = scores(built, asked, tokens)
    shared = scores(built, asked, tokens, shares_prompt=True)
    for one, other in zip(whole, shared, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert len({score for found in whole for score in found}) > 6


def test_a_prompt_is_read_once_for_all_of_its_options(brief, asked, tokens, monkeypatch):
    decoder = brief.built.model.llm.model
    read, forward = [], decoder.forward

    def counted(*arguments, inputs_embeds, **options):
        read.append(inputs_embeds.shape[:2].numel())
        return forward(*arguments, inputs_embeds=inputs_embeds, **options)

    monkeypatch.setattr(decoder, "forward", counted)
    list(answer_all(brief.built, asked[:1], tokens))
    once = sum(read)
    read.clear()
    scores(brief.built, asked[:1], tokens)
    prompt, options = 8 + len(brief.built.renderer.question(asked[0].turns).input_ids), 2
    assert once == prompt + options * 5  # the longer option has five words, and its end predicts nothing
    assert sum(read) == options * (prompt + 6)


def test_scores_in_half_precision_are_equal_to_its_rounding(brief, asked, tokens):
    built = replace(brief.built, config=replace(brief.built.config, precision="bf16"))
    whole, shared = scores(built, asked, tokens), scores(built, asked, tokens, shares_prompt=True)
    for one, other in zip(whole, shared, strict=True):
        assert one == pytest.approx(other, abs=2e-2)


def test_a_cache_of_another_kind_is_not_shared():
    def model(config):
        return SimpleNamespace(keeps_logits=True, llm=SimpleNamespace(config=config))

    assert can_share(model(LlamaConfig(num_hidden_layers=2)))
    assert not can_share(model(MistralConfig(num_hidden_layers=2, sliding_window=8)))


def test_where_prompts_cannot_be_shared_whole_sequences_are_scored(brief, asked, tokens):
    whole = scores(brief.built, asked, tokens)
    brief.built.model.llm.config.layer_types = ["sliding_attention"] * 2
    brief.built.model.llm.config.sliding_window = 512
    assert not can_share(brief.built.model)
    assert scores(brief.built, asked, tokens, shares_prompt=True) == whole


def rendered(ids, labels, visual_at=1):
    return Rendered(input_ids=tuple(ids), labels=tuple(labels), visual_at=visual_at)


def test_what_is_shared_ends_where_the_first_answer_begins():
    found = split([rendered([1, 2, 3, 4, 9], [N, N, 3, 4, N]), rendered([1, 2, 5, 9], [N, N, 5, N])])
    assert found.prefix == rendered([1, 2], [N, N])
    assert (found.ids, found.labels) == (((3, 4), (5,)), ((3, 4), (5,)))


@pytest.mark.parametrize(
    "others",
    [
        rendered([1, 7, 5], [N, N, 5]),  # another prompt
        rendered([1, 2, 2, 5], [N, N, N, 5]),  # a longer one
        rendered([1, 2, 5], [N, N, 5], visual_at=0),
    ],
)
def test_unlike_prompts_are_not_shared(others):
    assert split([rendered([1, 2, 3], [N, N, 3]), others]) is None


def test_visual_tokens_behind_the_first_answer_are_not_shared():
    assert split([rendered([1, 2, 3], [N, N, 3], visual_at=3)]) is None
    assert split([rendered([1, 2, 3], [1, 2, 3], visual_at=0)]) is None
