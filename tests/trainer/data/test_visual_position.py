"""Visual tokens in the place of the placeholder: where that is in every prompt, and what cannot be placed."""

from collections import Counter
from dataclasses import replace

import pytest

from featurestore.clips import Turn
from mervcache.errors import UserError
from trainer.config import TrainConfig
from trainer.data.batches import select
from trainer.data.prompts import IGNORE_INDEX, LLAMA2_SYSTEM, VICUNA_SYSTEM, Renderer
from trainer.model.llm import word_tokenizer

TEMPLATE = (
    "<s>{% for m in messages %}<head>{{ m['role'] }}</head>{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<head>assistant</head>{% endif %}"
)
SIGN = "HERE"  # a word in the place of the visual tokens
CONVERSATIONS = ["pure", "vicuna", "llama2_chat", "chat_template"]


def conversation(*texts):
    return tuple(Turn(role="gpt" if index % 2 else "human", text=text) for index, text in enumerate(texts))


@pytest.fixture
def tokenizer():
    own = "In: Out: [INST] [/INST] <<SYS>> <</SYS>> USER: ASSISTANT: <head> </head> user assistant </s>"
    made = word_tokenizer(
        [own, VICUNA_SYSTEM, LLAMA2_SYSTEM, f"What is it? Where <?>. >? A cat. {SIGN} <video> <image>"]
    )
    made.chat_template = TEMPLATE
    return made


def two_parts(rendered, tokenizer):
    """Text before the visual tokens and behind them."""
    ids, at = list(rendered.input_ids), rendered.visual_at
    return tokenizer.decode(ids[:at]), tokenizer.decode(ids[at:])


@pytest.mark.parametrize("prompt", CONVERSATIONS)
@pytest.mark.parametrize(
    "questions",
    [
        ("<video>\nWhat is it?", "Where?"),
        ("What is it?\n<image>", "Where?"),
        ("What is <video> it?", "Where?"),
        ("What is it?", "Where <image>?"),
    ],
    ids=["start", "end", "middle", "second question"],
)
def test_visual_tokens_take_the_place_of_the_placeholder(prompt, questions, tokenizer):
    first, second = questions
    turns = conversation(first, "A <video> cat.", second, "A cat.")
    rendered = Renderer(prompt, tokenizer, position="placeholder")(turns)
    signed = [first.replace("<video>", SIGN).replace("<image>", SIGN), second.replace("<image>", SIGN)]
    text = conversation(signed[0], "A <video> cat.", signed[1], "A cat.")
    expected = Renderer(prompt, tokenizer, position="first")(text, has_clip=False)
    before, sign, behind = tokenizer.decode(list(expected.input_ids)).partition(f" {SIGN} ")
    assert sign
    assert "<unk>" not in before + behind
    assert two_parts(rendered, tokenizer) == (before, behind)
    assert [label for label in rendered.labels if label != IGNORE_INDEX] == [
        label for label in expected.labels if label != IGNORE_INDEX
    ]


@pytest.mark.parametrize("prompt", CONVERSATIONS)
def test_a_question_without_placeholder_begins_with_the_visual_tokens(prompt, tokenizer):
    renderer = Renderer(prompt, tokenizer, position="placeholder")
    written = renderer(conversation("<video>\nWhat is it?", "A cat.", "Where?", "A cat."))
    assert renderer(conversation("What is it?", "A cat.", "Where?", "A cat.")) == written
    question = renderer.question(conversation("What is it?", ""))
    assert question.visual_at == written.visual_at > 0
    assert written.input_ids[: len(question.input_ids)] == question.input_ids


@pytest.mark.parametrize("prompt", CONVERSATIONS)
def test_texts_without_a_clip_are_as_with_any_position(prompt, tokenizer):
    turns = conversation("What is <video>? <image>", "A <video>")
    made = [
        Renderer(prompt, tokenizer, position=position)(turns, has_clip=False) for position in ("first", "placeholder")
    ]
    assert made[0].input_ids == made[1].input_ids
    assert made[0].labels == made[1].labels


def test_a_caption_is_asked_for_by_the_visual_tokens_behind_the_bos(tokenizer):
    turns = conversation("What is it?\n<video>", "A cat.")
    assert two_parts(Renderer("caption", tokenizer, position="placeholder")(turns), tokenizer) == (
        "<s>",
        "A cat . </s>",
    )


def test_a_text_that_is_cut_before_the_placeholder_ends_with_the_visual_tokens(tokenizer):
    turns = conversation("What is it?\n<video>", "A cat.")
    cut = Renderer("pure", tokenizer, position="placeholder", max_tokens=4)(turns)
    assert (len(cut.input_ids), cut.visual_at, cut.num_supervised, cut.is_cut) == (4, 4, 0, True)


@pytest.mark.parametrize(
    "turns",
    [
        conversation("<video> <video>\nWhat is it?", "A cat."),
        conversation("<image>\nWhat is it <video>?", "A cat."),
        conversation("<video>\nWhat is it?", "A cat.", "<video> Where?", "A cat."),
    ],
)
def test_several_placeholders_have_no_one_place(turns, tokenizer, samples, tokens, config):
    with pytest.raises(UserError, match="takes one <video> or <image> in a conversation, its questions hold 2"):
        Renderer("pure", tokenizer, position="placeholder")(turns)
    samples[3] = replace(samples[3], turns=turns)
    reason = "visual_position placeholder: several media placeholders in the questions"
    assert select(samples, tokens, replace(config, visual_position="placeholder")).dropped == Counter({reason: 1})
    assert select(samples, tokens, config).dropped == {}


def test_a_placeholder_is_either_a_place_or_a_text():
    with pytest.raises(UserError, match="choose one of them"):
        TrainConfig(visual_position="placeholder", placeholder="as_released")
