import math
from dataclasses import replace

import pytest
import torch

from featurestore.clips import Turn
from mervcache.errors import UserError
from trainer.loop.train import train
from trainer.model.multiple_choice import (
    BEYOND_LIMIT,
    OPEN_ENDED,
    WITHOUT_TOKENS,
    Answer,
    answer_all,
    answer_batch,
    batch_of,
    coverage,
    questions,
    summarise,
    with_answer,
)
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


@pytest.mark.parametrize(
    ("predicted", "tied", "credit"),
    [(0, (), 1.0), (1, (), 0.0), (0, (1,), 1 / 2), (1, (2,), 0.0), (0, (1, 2), 1 / 3), (None, (), 0.0)],
)
def test_the_right_one_of_k_equal_options_counts_1_over_k(predicted, tied, credit):
    facts = {"sample_id": "s", "category": "a", "num_options": 3, "correct": 0}
    answer = Answer(**facts, predicted=predicted, tied=tied)
    overall = summarise([answer, answer])[0]
    assert (answer.credit, overall.accuracy) == pytest.approx((credit, credit))
    assert (overall.tied, overall.unreadable) == (2 * bool(tied), 2 * (predicted is None))


def test_a_score_that_is_not_finite_predicts_nothing(brief, samples, tokens):
    """Of one option alone: the words of the others are as they were."""
    word = brief.built.renderer.tokenizer.convert_tokens_to_ids("green")
    with torch.no_grad():
        brief.built.model.llm.get_input_embeddings().weight[word] = float("nan")
    (answer,) = answer_batch(brief.built, samples[:1], tokens, "cpu")
    assert [math.isfinite(score) for score in answer.scores] == [True, False, True]
    assert answer.predicted is None
    assert math.isnan(answer.credit)


def test_options_that_the_model_reads_as_one_are_equally_good(brief, samples, tokens):
    unknown = replace(samples[0], options=("zebra", "red", "giraffe", "green red blue", "ostrich"), answer_index=4)
    (answer,) = answer_all(brief.built, [unknown], tokens)  # three of them are <unk>
    assert answer.scores[0] == answer.scores[2] == answer.scores[4]
    alike = replace(samples[0], options=("zebra", "giraffe"), answer_index=1)
    (answer,) = answer_all(brief.built, [alike], tokens)
    assert (answer.predicted, answer.tied, answer.credit) == (0, (1,), 0.5)


def test_a_model_that_cannot_tell_options_apart_scores_chance(brief, samples, tokens):
    """Equal logits for all words: options of one, two and three tokens have one mean, up to the rounding of sums."""
    with torch.no_grad():
        brief.built.model.llm.lm_head.weight.zero_()
    asked = [replace(sample, options=("red", "green red", "red green blue")) for sample in samples]
    overall = summarise(list(answer_all(brief.built, asked, tokens)))[0]
    assert (overall.accuracy, overall.tied) == (pytest.approx(1 / 3), 18)


def test_scores_of_two_protocols_are_not_added_up():
    facts = {"sample_id": "s", "category": "a", "num_options": 2, "predicted": 0, "correct": 0}
    with pytest.raises(ValueError, match="protocols letters, likelihood"):
        summarise([Answer(**facts), Answer(**facts, protocol="letters")])


def test_what_was_not_scored_is_counted_by_benchmark_and_reason(samples, tokens, make_sample):
    def question(index, source, **changes):
        return replace(make_sample(index, split="heldout"), stage="eval", source=source, **changes)

    open_ended = {"options": (), "answer_index": None}
    held = [
        *(question(index, "Perception") for index in range(3)),
        question(40, "Perception"),  # its clip has no tokens
        *(question(index, "MSVD", **open_ended) for index in (4, 5)),
        replace(question(6, "toy", **open_ended), stage="align"),  # a caption asks nothing
        *samples,
    ]
    asked = questions(held, tokens, split="heldout", has_visual=True)
    assert coverage(held, asked, asked[:2], "heldout") == {
        "MSVD": {"scored": 0, OPEN_ENDED: 2},
        "Perception": {"scored": 2, WITHOUT_TOKENS: 1, BEYOND_LIMIT: 1},
    }
    with pytest.raises(UserError, match=r"store holds none; MSVD has 2 open-ended of split 'heldout', .* not scored"):
        questions(held[4:6], tokens, split="heldout", has_visual=True)


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
    conversation = replace(samples[0], options=(), answer_index=None)
    command = r"1 conversations of split 'train', which the run was trained on, are asked with --split train --open-en"
    with pytest.raises(UserError, match=command):
        questions([conversation], tokens, split="heldout", has_visual=True)
    benchmark = replace(open_ended, stage="eval")
    for none_held_out in (samples, [benchmark]):
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
