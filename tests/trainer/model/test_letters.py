"""Multiple choice by letters: prompts by hand, answers by plain greedy decoding of one sample at a time."""

from dataclasses import replace

import pytest
import torch

from featurestore.clips import Turn
from mervcache.errors import UserError
from trainer.loop.train import train
from trainer.model.letters import DEFAULT_TEMPLATE, Template, read_letter
from trainer.model.multiple_choice import answer_all, default_protocol, summarise
from trainer.runs.load import load_run

SHORT = Template(name="short.txt", text="{question} One of {letters}?\n\n{options}")


def test_the_template_that_comes_along_has_the_published_structure():
    text = Template.read().fill("What colour is it?", ("red", "green", "blue"))
    first, blank, *lines = text.split("\n")
    assert first.startswith("What colour is it? ")
    assert "A, B, C" in first
    assert "D" not in first
    assert blank == ""
    assert lines == ["A. red", "B. green", "C. blue"]


def test_a_template_is_a_file_and_is_filled_in_one_pass(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("{question} Pick from {letters}.\n\n    {options}\n")
    assert Template.read(path).fill("Is it {options}?", ("{letters}", "no")) == (
        "Is it {options}? Pick from A, B.\n\n    A. {letters}\nB. no"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{question}", r"has no \{options\}"),
        ("", r"has no \{question\} and no \{options\}"),
        ("{question} {option}", "unknown place 'option', the nearest known one is 'options'"),
    ],
)
def test_a_template_that_shows_no_options_is_refused(tmp_path, text, message):
    (tmp_path / "odd.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        Template.read(tmp_path / "odd.txt")
    with pytest.raises(UserError, match=r"none\.txt cannot be read"):
        Template.read(tmp_path / "none.txt")
    assert DEFAULT_TEMPLATE.is_file()


@pytest.mark.parametrize(
    ("text", "num_options", "index"),
    [("B", 3, 1), ("b. green", 3, 1), ("(B)", 3, None), ("The B", 3, None), ("D", 3, None), ("D", 4, 3), ("", 3, None)],
)
def test_the_first_character_is_compared(text, num_options, index):
    assert read_letter(text, num_options) == index


def test_a_fresh_llm_is_scored_by_likelihood_and_a_pretrained_one_by_letters(config):
    assert default_protocol(config) == "likelihood"
    assert default_protocol(replace(config, llm="HuggingFaceTB/SmolLM2-135M")) == "letters"
    assert default_protocol(replace(config, protocol="letters")) == "letters"


@pytest.fixture
def lettered(samples):
    """The same questions with the options in the prompt; two of three are answered by a letter, one by a word."""
    return [
        replace(
            sample,
            turns=(
                Turn(role="human", text=SHORT.fill(sample.turns[0].text, sample.options)),
                Turn(role="gpt", text=("A", "B. green", "the last")[index % 3]),
            ),
        )
        for index, sample in enumerate(samples)
    ]


@pytest.fixture
def trained(tmp_path, config, lettered, tokens):
    """A run that has learned its letters."""
    train(replace(config, max_steps=100, checkpoint_every=100), lettered, tokens, tmp_path / "run", quiet=True)
    return load_run(tmp_path / "run")


@torch.no_grad()
def greedy(run, sample, tokens, count):
    """Token after token from whole forwards without a cache."""
    model, tokenizer = run.built.model.eval(), run.built.renderer.tokenizer
    text = SHORT.fill(sample.turns[0].text.replace("<video>\n", ""), sample.options)
    embed = model.llm.get_input_embeddings()
    prompt = embed(torch.tensor(tokenizer(f"In: {text}\nOut:")["input_ids"]))
    visual = model.visual_tokens(tokens.fetch([sample.clip_id]))[0][0]
    found = []
    for _ in range(count):
        rest = embed(torch.tensor(found, dtype=torch.long))
        logits = model.llm(inputs_embeds=torch.cat([prompt[:1], visual, prompt[1:], rest])[None]).logits[0, -1]
        found.append(int(logits.argmax()))
        if found[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(found, skip_special_tokens=True).strip()


def test_answers_are_those_of_greedy_decoding_and_unreadable_ones_are_wrong(trained, samples, tokens):
    answers = list(answer_all(trained.built, samples, tokens, batch_size=4, template=SHORT))
    wanted = [greedy(trained, sample, tokens, 8) for sample in samples]
    assert [answer.text for answer in answers] == wanted
    assert {text[:1] for text in wanted} == {"A", "B", "t"}  # it does look
    letters = {"A": 0, "B": 1, "t": None}
    assert [answer.predicted for answer in answers] == [letters[text[:1]] for text in wanted]
    overall = summarise(answers)[0]
    right = sum(letters[text[:1]] == sample.answer_index for text, sample in zip(wanted, samples, strict=True))
    assert (overall.protocol, overall.accuracy) == ("letters", right / 18)
    assert overall.unreadable == sum(text[:1] == "t" for text in wanted)
    assert overall.tied == 0


def test_output_that_is_not_finite_is_an_error_that_names_run_and_question(brief, samples, tokens):
    head = brief.built.model.llm.lm_head.weight
    with torch.no_grad():
        head[3] = float("nan")
    for template in (SHORT, None):
        with pytest.raises(UserError, match=r"^runs/x: .* not finite .* question s000"):
            list(answer_all(brief.built, samples, tokens, template=template, run="runs/x"))


def test_a_prompt_without_room_is_said_before_any_question_is_asked(brief, samples, tokens):
    long = replace(samples[2], options=tuple(f"option {index} of many" for index in range(26)))
    with pytest.raises(UserError, match=r"1 of 3 questions are longer than the 120 tokens .*s002"):
        next(answer_all(brief.built, [*samples[:2], long], tokens, template=SHORT))
    many = replace(samples[0], options=tuple(map(str, range(27))))
    with pytest.raises(UserError, match="27 options, and there are 26 letters"):
        next(answer_all(brief.built, [many], tokens, template=SHORT))


def test_a_run_of_captions_has_read_no_question(tmp_path, config, samples, tokens):
    captions = [replace(sample, stage="align", options=(), answer_index=None) for sample in samples]
    settings = replace(config, stage="align", prompt="caption", max_steps=1)
    train(settings, captions, tokens, tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="prompt caption, which shows no question: give --protocol likelihood"):
        next(answer_all(load_run(tmp_path / "run").built, samples[:1], tokens, template=SHORT))
