from dataclasses import replace

import pytest
import torch

from featurestore.clips import Turn
from mervcache.errors import UserError
from trainer.loop.train import train
from trainer.model.multiple_choice import Answer, answer_all, batch_of, questions, summarise, with_answer
from trainer.runs.load import load_run


@pytest.fixture
def trained(tmp_path, config, samples, tokens):
    train(replace(config, max_steps=60, checkpoint_every=60), samples, tokens, tmp_path / "run", quiet=True)
    return load_run(tmp_path / "run")


def test_a_model_that_knows_its_samples_answers_them(trained, samples, tokens):
    answers = list(answer_all(trained.built, samples, tokens, batch_size=5))
    assert [answer.sample_id for answer in answers] == [sample.sample_id for sample in samples]
    overall, colour = summarise(answers)
    assert (overall.category, colour.category, overall.questions) == ("all", "colour", 18)
    assert overall.accuracy > 0.9
    assert overall.chance == pytest.approx(1 / 3)


def test_scores_do_not_depend_on_the_batch(brief, samples, tokens):
    one_by_one = [a.scores for a in answer_all(brief.built, samples[:4], tokens, batch_size=1)]
    together = [a.scores for a in answer_all(brief.built, samples[:4], tokens, batch_size=4)]
    for alone, batched in zip(one_by_one, together, strict=True):
        assert alone == pytest.approx(batched, abs=1e-4)


def test_accuracy_and_chance_by_category_by_hand():
    def answer(category, num_options, predicted):
        return Answer(
            sample_id="s", category=category, num_options=num_options, predicted=predicted, correct=1, scores=()
        )

    scores = summarise([answer("b", 2, 1), answer("a", 4, 1), answer("b", 2, 0), answer("b", 4, 0)])
    assert [(s.category, s.questions, s.accuracy) for s in scores] == [("all", 4, 0.5), ("a", 1, 1.0), ("b", 3, 1 / 3)]
    assert [s.chance for s in scores] == pytest.approx([1.5 / 4, 0.25, 1.25 / 3])


def test_questions_without_category_have_a_line_only_beside_others(brief, samples, tokens):
    unnamed = [replace(sample, category=None) for sample in samples[:2]]
    answers = [*answer_all(brief.built, [*unnamed, samples[2]], tokens)]
    found = [(score.category, score.questions) for score in summarise(answers)]
    assert found == [("all", 3), ("colour", 1), ("no category", 2)]
    assert [score.category for score in summarise(answers[:2])] == ["all"]


def test_questions_are_those_of_the_split_with_options_and_tokens(samples, tokens, make_sample):
    heldout = [make_sample(1, split="heldout"), make_sample(60, split="heldout")]
    open_ended = replace(make_sample(2, split="heldout"), options=(), answer_index=None)
    everything = [*samples, *heldout, open_ended]
    assert questions(everything, tokens, split="heldout", has_visual=True) == heldout[:1]
    assert questions(everything, tokens, split="heldout", has_visual=False) == heldout
    with pytest.raises(UserError, match=r"no multiple-choice question of split 'test'.* Use --split heldout$"):
        questions(everything, tokens, split="test", has_visual=True)
    for none_held_out in (samples, [open_ended]):
        with pytest.raises(UserError, match=r"again without --limit.*add questions with `merv-pipeline extract --data"):
            questions(none_held_out, tokens, split="test", has_visual=True)


def test_an_option_replaces_the_last_answer_only(make_sample):
    changed = with_answer(make_sample(0), "blue")
    assert [turn.text for turn in changed.turns] == ["<video>\nWhat colour is it?", "blue"]


def test_a_question_that_would_be_cut_is_said_before_any_is_answered(brief, samples, tokens):
    long = replace(samples[2], turns=(Turn(role="human", text="What? " * 70), samples[2].turns[1]))
    with pytest.raises(UserError, match=r"1 of 3 questions are longer than the 120 tokens .*options off: s002"):
        next(answer_all(brief.built, [*samples[:2], long], tokens))


def test_a_run_is_scored_in_the_precision_it_was_trained_in(tmp_path, config, samples, tokens):
    train(replace(config, max_steps=2, precision="bf16"), samples, tokens, tmp_path / "run", quiet=True)
    built = load_run(tmp_path / "run").built
    (found,) = answer_all(built, samples[:1], tokens)
    batch = batch_of(built, [with_answer(samples[0], option) for option in samples[0].options], tokens)
    exact = built.model.score(batch).tolist()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert list(found.scores) == built.model.score(batch).tolist() != exact
