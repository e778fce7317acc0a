"""Open-ended questions: matches by hand, answers by plain greedy decoding of one sample at a time."""

from dataclasses import replace

import pytest
import torch

from mervcache.errors import UserError
from trainer.loop.train import train
from trainer.model.open_ended import (
    OpenAnswer,
    answer_batch,
    check_fits,
    is_open_question,
    normalise,
    summarise,
)
from trainer.runs.load import load_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  A Red   car. ", "red car"),
        ("the man's two dogs", "mans 2 dogs"),
        ("theatre", "theatre"),  # an article is a whole word
        ("2.5 metres, about", "2.5 metres about"),
        ("Yes!", "yes"),
        ("guitar/piano", "guitar piano"),
        ("don\u2019t", "dont"),
        ("\uff12", "2"),  # full-width digit
        ("TEN", "10"),
        ("The", ""),
        ("...", ""),
    ],
)
def test_what_is_compared_after_normalising(text, expected):
    assert normalise(text) == expected


def answer(text, correct, **changes):
    values = {"sample_id": "s", "category": "what", "question": "What?", "is_finished": True}
    return OpenAnswer(**{**values, "text": text, "correct": correct, **changes})


def test_exact_and_normalised_matches_and_cut_answers_are_counted_by_category():
    answers = [
        answer("red", "red"),
        answer("The red.", "red"),
        answer("", "the", category="who"),  # nothing matches nothing
        answer("a red car", "red", category="who", is_finished=False),
    ]
    table = {score.category: (score.questions, score.exact, score.normalised) for score in summarise(answers)}
    assert table == {"all": (4, 0.25, 0.5), "what": (2, 0.5, 1.0), "who": (2, 0.0, 0.0)}
    assert [score.unfinished for score in summarise(answers)] == [1, 0, 1]


@pytest.fixture
def asked(samples):
    """Open-ended questions of a benchmark, the answers being of one to three words."""
    words = ("red", "a green shape", "blue there")
    return [
        replace(
            sample,
            options=(),
            answer_index=None,
            turns=(sample.turns[0], replace(sample.turns[1], text=words[index % 3])),
        )
        for index, sample in enumerate(samples)
    ]


@pytest.fixture
def trained(tmp_path, config, asked, tokens):
    train(replace(config, max_steps=100, checkpoint_every=100), asked, tokens, tmp_path / "run", quiet=True)
    return load_run(tmp_path / "run")


@torch.no_grad()
def greedy(run, sample, tokens, count):
    """Token after token from whole forwards without a cache: the text, and whether it came to an end."""
    model, tokenizer = run.built.model.eval(), run.built.renderer.tokenizer
    embed = model.llm.get_input_embeddings()
    prompt = embed(torch.tensor(tokenizer("In: What colour is it?\nOut:")["input_ids"]))
    visual = model.visual_tokens(tokens.fetch([sample.clip_id]))[0][0]
    found = []
    while len(found) < count and tokenizer.eos_token_id not in found:
        rest = embed(torch.tensor(found, dtype=torch.long))
        logits = model.llm(inputs_embeds=torch.cat([prompt[:1], visual, prompt[1:], rest])[None]).logits[0, -1]
        found.append(int(logits.argmax()))
    return tokenizer.decode(found, skip_special_tokens=True).strip(), tokenizer.eos_token_id in found


@pytest.mark.parametrize("count", [2, 12])
def test_answers_are_those_of_greedy_decoding_and_it_is_known_which_were_cut(trained, asked, tokens, count):
    found = [
        one
        for start in range(0, 18, 6)
        for one in answer_batch(trained.built, asked[start : start + 6], tokens, "cpu", max_new_tokens=count)
    ]
    wanted = [greedy(trained, sample, tokens, count) for sample in asked]
    assert [(one.text, one.is_finished) for one in found] == wanted
    assert len({text for text, _ in wanted}) > 1  # it does look
    assert {one.question for one in found} == {"What colour is it?"}
    if count == 12:
        assert sum(one.is_match for one in found) > 9
    else:
        assert not all(one.is_finished for one in found)


def test_output_that_is_not_finite_names_run_and_question(brief, asked, tokens):
    with torch.no_grad():
        brief.built.model.llm.lm_head.weight[3] = float("nan")
    with pytest.raises(UserError, match=r"^runs/x: .* not finite .* question s000"):
        answer_batch(brief.built, asked[:2], tokens, "cpu", max_new_tokens=2, run="runs/x")


def test_a_question_that_the_model_cannot_read_whole_is_named_before_any_is_asked(brief, asked):
    long = replace(asked[2], turns=(replace(asked[2].turns[0], text="What colour is it? " * 40), asked[2].turns[1]))
    with pytest.raises(UserError, match=r"1 of 3 open-ended questions are longer .*: s002"):
        check_fits(brief.built, [*asked[:2], long])


def test_only_benchmarks_are_asked_by_default_and_captions_never(asked):
    of_benchmark = replace(asked[0], stage="eval")
    assert is_open_question(of_benchmark)
    assert not is_open_question(asked[0])
    assert is_open_question(asked[0], every_stage=True)
    assert not is_open_question(replace(asked[0], stage="align"), every_stage=True)
    assert not is_open_question(replace(of_benchmark, options=("red", "blue"), answer_index=0))
