"""Chat templates in the shapes of published ones: where answers begin and end, and which day it is."""

from datetime import datetime

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from featurestore.clips import Turn
from mervcache.errors import UserError
from trainer.config import TrainConfig
from trainer.data.prompts import IGNORE_INDEX, Renderer

# The day in a system turn, by a variable or by the clock, and trimmed contents.
LLAMA_3_2 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "1 Jan 2024" %}
{%- endif %}
{{- "<|head|>system<|/head|>\\n\\nKnowledge: December 2023\\nToday: " + date_string + "\\n\\n<|eot|>" }}
{%- for message in messages %}
    {{- "<|head|>" + message.role + "<|/head|>\\n\\n" + message.content | trim + "<|eot|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|head|>assistant<|/head|>\\n\\n" }}{% endif %}
"""
# A block of reasoning in the newest answer alone, taken out of earlier ones; a switch that closes it in the prompt.
QWEN_3 = """\
{%- set ns = namespace(last_query=0) %}
{%- for message in messages if message.role == "user" %}{% set ns.last_query = messages.index(message) %}{% endfor %}
{%- for message in messages %}
    {%- set content, reasoning = message.content, "" %}
    {%- if message.role == "assistant" and "</think>" in content %}
        {%- set reasoning = content.split("</think>")[0].split("<think>")[-1].strip("\\n") %}
        {%- set content = content.split("</think>")[-1].lstrip("\\n") %}
    {%- endif %}
    {{- "<|im_start|>" + message.role + "\\n" }}
    {%- if message.role == "assistant" and loop.index0 > ns.last_query %}
        {{- "<think>\\n" + reasoning + "\\n</think>\\n\\n" }}
    {%- endif %}
    {{- content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- "<think>\\n\\n</think>\\n\\n" }}{% endif %}
{%- endif %}
"""
# A block that the generation prompt opens, as models have that always reason.
THINKS_ALWAYS = QWEN_3.replace('"<|im_start|>assistant\\n" }}', '"<|im_start|>assistant\\n<think>\\n" }}')
# Answers end with a token of no role; a finished conversation ends with that of the text.
PHI_3 = """\
{% for message in messages %}{{ "<|" + message.role + "|>\\n" + message.content + "<|end|>\\n" }}{% endfor %}\
{% if add_generation_prompt %}{{ "<|assistant|>\\n" }}{% else %}{{ eos_token }}{% endif %}"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}\
{% if message.role == "user" %}{{ "[INST] " + message.content + " [/INST]" }}\
{% else %}{{ " " + message.content + eos_token }}{% endif %}{% endfor %}"""


def conversation(*texts):
    return tuple(Turn(role="gpt" if index % 2 else "human", text=text) for index, text in enumerate(texts))


ONE = conversation("What is it?", "A cat.")
THREE = conversation("What is it?", "A cat.", "Where?", "On a mat.", "Why?", "It naps.")


def messages_of(turns):
    return [{"role": "user" if turn.role == "human" else "assistant", "content": turn.text} for turn in turns]


def byte_tokenizer(template, *, bos=None, eos, added=()):
    """One token per byte, and added tokens."""
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    made.chat_template = template
    return made


def special(*tokens, rstrip=False):
    return [AddedToken(token, special=True, normalized=False, rstrip=rstrip) for token in tokens]


def llama():
    return byte_tokenizer(LLAMA_3_2, bos="<|begin|>", eos="<|eot|>", added=special("<|head|>", "<|/head|>"))


def qwen(template=QWEN_3):
    plain = [AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")]
    return byte_tokenizer(template, eos="<|im_end|>", added=[*special("<|im_start|>"), *plain])


def phi(*, is_special=True):
    end = AddedToken("<|end|>", special=is_special, normalized=False, rstrip=True)
    roles = special("<|user|>", "<|assistant|>", rstrip=True)
    return byte_tokenizer(PHI_3, bos="<s>", eos="<|endoftext|>", added=[*roles, end])


def supervised(rendered, tokenizer):
    return tokenizer.decode([label for label in rendered.labels if label != IGNORE_INDEX])


def text_of(rendered, tokenizer):
    return tokenizer.decode(list(rendered.input_ids))


def move_clock(monkeypatch, *moment):
    """The clock that transformers gives to templates."""

    class Then(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(*moment)

    monkeypatch.setattr(chat_template_utils, "datetime", Then)


def test_a_template_reads_the_day_of_the_run_whatever_the_clock_says(monkeypatch):
    tokenizer, ids = llama(), []
    for moment in ((2025, 3, 5, 12), (2031, 12, 24, 23)):
        move_clock(monkeypatch, *moment)
        ids.append(Renderer("chat_template", tokenizer, template_date="2025-03-05")(THREE).input_ids)
    assert ids[0] == ids[1]
    move_clock(monkeypatch, 2025, 3, 5, 12)  # the day itself, by transformers alone
    assert list(ids[0]) == tokenizer.apply_chat_template(messages_of(THREE), return_dict=False)
    assert "Today: 05 Mar 2025\n" in tokenizer.decode(list(ids[0]))


def test_without_a_day_of_its_own_a_run_reads_the_one_in_its_settings():
    assert "Today: 26 Jul 2024\n" in text_of(Renderer("chat_template", llama())(ONE), llama())
    assert TrainConfig().template_date == "2024-07-26"
    with pytest.raises(UserError, match="template_date is a day as YYYY-MM-DD, got '24th of July'"):
        TrainConfig(template_date="24th of July")


@pytest.mark.parametrize("form", ["%d %b %Y", "%A, %-d %B %y", "100%% %j %%d", "%Y-%m-%dT%H:%M:%S", "%D %p", "no day"])
def test_every_form_of_a_date_is_that_of_strftime(form):
    tokenizer = byte_tokenizer("{{ strftime_now(" + repr(form) + ") }}" + PHI_3, eos="<|endoftext|>")
    rendered = Renderer("chat_template", tokenizer, template_date="2025-03-05")(ONE)
    assert text_of(rendered, tokenizer).startswith(datetime(2025, 3, 5).strftime(form) + "<|user|>")


def test_a_template_in_front_of_which_a_date_is_set_keeps_its_first_characters():
    tokenizer = byte_tokenizer("\n  <{{ strftime_now('%Y') }}>\n" + PHI_3, eos="<|endoftext|>")
    text = text_of(Renderer("chat_template", tokenizer, template_date="2025-03-05")(ONE), tokenizer)
    assert text.startswith("\n  <2025>\n<|user|>")


def test_a_block_of_reasoning_is_a_part_of_the_prompt_of_every_answer():
    tokenizer = qwen()
    renderer = Renderer("chat_template", tokenizer)
    whole, prompts = renderer(THREE), []
    assert supervised(whole, tokenizer) == "A cat.<|im_end|>On a mat.<|im_end|>It naps.<|im_end|>"
    for length in (2, 4, 6):  # as the model is prompted where the template closes the block itself
        messages, options = messages_of(THREE[: length - 1]), {"add_generation_prompt": True, "enable_thinking": False}
        expected = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        prompts.append(expected)
        newest = expected[expected.rindex("<|im_start|>user") :]
        assert newest + THREE[length - 1].text + "<|im_end|>\n" in text_of(whole, tokenizer)
    question = renderer.question(THREE)
    assert whole.input_ids[: len(question.input_ids)] == question.input_ids
    assert text_of(renderer.question(THREE[:2]), tokenizer) == prompts[0]


def test_one_question_and_its_answer_are_those_of_transformers(monkeypatch):
    move_clock(monkeypatch, 2025, 3, 5)
    for tokenizer in (llama(), qwen(), qwen(THINKS_ALWAYS), phi()):
        rendered = Renderer("chat_template", tokenizer, template_date="2025-03-05")(ONE)
        assert list(rendered.input_ids) == tokenizer.apply_chat_template(messages_of(ONE), return_dict=False)


def test_a_block_that_the_generation_prompt_opens_is_closed_in_the_prompt():
    tokenizer = qwen(THINKS_ALWAYS)
    renderer = Renderer("chat_template", tokenizer)
    assert supervised(renderer(THREE), tokenizer) == "A cat.<|im_end|>On a mat.<|im_end|>It naps.<|im_end|>"
    assert text_of(renderer.question(ONE), tokenizer).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_reasoning_in_an_answer_is_supervised_in_the_block():
    tokenizer = qwen()
    rendered = Renderer("chat_template", tokenizer)(conversation("What?", "<think>\nIt purrs.\n</think>\n\nA cat."))
    assert list(rendered.input_ids) == tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "<think>\nIt purrs.\n</think>\n\nA cat."},
        ],
        return_dict=False,
    )
    assert supervised(rendered, tokenizer) == "It purrs.\n</think>\n\nA cat.<|im_end|>"


@pytest.mark.parametrize("is_special", [True, False])
def test_an_end_token_without_a_role_ends_answers(is_special):
    tokenizer = phi(is_special=is_special)
    renderer = Renderer("chat_template", tokenizer)
    rendered = renderer(THREE)
    assert [tokenizer.decode([label]) for label in rendered.labels if label != IGNORE_INDEX].count("<|end|>") == 3
    assert supervised(rendered, tokenizer) == "A cat.<|end|>On a mat.<|end|>It naps.<|end|>"
    assert list(rendered.input_ids) == tokenizer.apply_chat_template(messages_of(THREE), return_dict=False)
    assert renderer.end_ids == tuple(sorted(tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])))


def test_a_plain_word_that_generation_ends_with_ends_answers():
    tokenizer = byte_tokenizer(PHI_3.replace("<|end|>", "~").replace("{{ eos_token }}", ""), eos="<|endoftext|>")
    with pytest.raises(UserError, match="writes no end token behind an answer"):
        Renderer("chat_template", tokenizer)
    end = tokenizer.convert_tokens_to_ids("~")
    renderer = Renderer("chat_template", tokenizer, end_ids=[end])
    assert supervised(renderer(ONE), tokenizer) == "A cat.~"
    assert end in renderer.end_ids


@pytest.mark.parametrize("answer", ["assistant", "user", "think", "end", "|", "e"])
@pytest.mark.parametrize("make", [llama, qwen, phi])
def test_an_answer_that_a_template_spells_too_is_found(make, answer):
    tokenizer = make()
    rendered = Renderer("chat_template", tokenizer)(conversation(answer, answer, answer, answer))
    end = {"llama": "<|eot|>", "qwen": "<|im_end|>", "phi": "<|end|>"}[make.__name__]
    assert supervised(rendered, tokenizer) == f"{answer}{end}{answer}{end}"


def test_a_blank_in_front_of_an_answer_is_generated_with_it():
    tokenizer = byte_tokenizer(MISTRAL, bos="<s>", eos="</s>")
    renderer = Renderer("chat_template", tokenizer)
    assert supervised(renderer(THREE), tokenizer) == " A cat.</s> On a mat.</s> It naps.</s>"
    assert text_of(renderer.question(ONE), tokenizer) == "<s>[INST] What is it? [/INST]"


def test_an_empty_answer_is_its_end_token():
    tokenizer = qwen()
    assert supervised(Renderer("chat_template", tokenizer)(conversation("What?", "")), tokenizer) == "<|im_end|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system prompt') }}", "fails: no system prompt"),
        ({"tools": PHI_3, "documents": PHI_3}, "cannot be chosen: "),
        (
            PHI_3.replace("{% if add_generation_prompt %}", "<|assistant|>{% if add_generation_prompt %}<think>"),
            "rewrites",
        ),
        (PHI_3.replace("message.content", "message.content + message.content"), "does not write every answer once"),
        (PHI_3.replace("message.content", "''"), "does not write every answer once"),
    ],
)
def test_a_template_that_answers_cannot_be_told_from_is_refused_before_any_sample(template, reason):
    tokenizer = byte_tokenizer(template, eos="<|endoftext|>")
    with pytest.raises(UserError, match=rf"{reason}.*choose another prompt"):
        Renderer("chat_template", tokenizer)
