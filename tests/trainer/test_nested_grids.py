"""A run of several grids: each is the model of that grid alone, with the same weights; and the scores at each."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from mervcache.errors import UserError
from trainer.config import ProjectorConfig, TrainConfig
from trainer.data.tokens import MemoryTokens, TokenShape
from trainer.evaluate import EvaluationRequest, evaluate_grids, evaluate_run
from trainer.loop.plan import fit_standardisation, make_plan
from trainer.loop.train import train
from trainer.main import eval_main
from trainer.model import open_ended
from trainer.model.projectors import Projector
from trainer.runs.load import load_run
from trainer.runs.run_record import read_metrics, read_scores
from trainer.sources import open_store

pytestmark = pytest.mark.slow


def at_grid(config, tokens_per_frame):
    """The settings of a run of this grid alone."""
    side = {4: 2, 1: 1}[tokens_per_frame]
    return replace(config, projector=replace(config.projector, nested_grids=(), grid=(2, side, side)))


@pytest.fixture
def nested(config):
    return replace(config, projector=replace(config.projector, grid=None, nested_grids=(4, 1)))


@pytest.fixture
def halved(tokens, samples):
    """The tokens with two time steps: a run without a grid of its own keeps them."""
    clips = [sample.clip_id for sample in samples]
    return MemoryTokens(clips, {name: value[:, ::2] for name, value in tokens.fetch(clips).items()})


@pytest.mark.parametrize("fusion", ["cross_attention", "concat_sequence"])
@pytest.mark.parametrize("head", ["linear", "gelu-mlp"])
def test_the_loss_at_a_grid_is_that_of_a_model_of_this_grid_with_the_same_weights(
    nested, samples, halved, fusion, head
):
    projector = replace(nested.projector, head=head)
    nested = replace(nested, fusion=replace(nested.fusion, name=fusion), projector=projector)
    plan = make_plan(nested, samples, halved)
    fit_standardisation(plan, halved)
    weights = {name: value for name, value in plan.built.model.state_dict().items() if "standardise" not in name}
    for tokens_per_frame in (4, 1):
        alone = make_plan(at_grid(nested, tokens_per_frame), samples, halved)
        alone.built.model.load_state_dict(weights, strict=False)
        fit_standardisation(alone, halved)
        step = next(number for number in range(20) if plan.batches.tokens_per_frame(number) == tokens_per_frame)
        ours, theirs = plan.batches.step(step), alone.batches.step(step)
        assert ours.num_tokens == theirs.num_tokens
        for one, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            with torch.no_grad():
                losses = plan.built.model.sample_losses(one), alone.built.model.sample_losses(other)
            assert torch.equal(*losses)


def test_standardisation_at_each_grid_is_that_of_a_run_of_this_grid(nested, samples, halved):
    plan = make_plan(nested, samples, halved)
    fit_standardisation(plan, halved)
    for index, projector in enumerate(plan.built.model.projectors):
        constants = {tokens or 4: module for tokens, module in projector.standardisations().values()}
        assert set(constants) == {4, 1}
        for tokens_per_frame, found in constants.items():
            alone = make_plan(at_grid(nested, tokens_per_frame), samples, halved)
            fit_standardisation(alone, halved)
            expected = alone.built.model.projectors[index].standardise
            assert torch.equal(found.mean_D, expected.mean_D)
            assert torch.equal(found.std_D, expected.std_D)
        assert (constants[1].std_D < constants[4].std_D).all()  # means of four vary less


def test_a_run_resumes_to_the_same_losses_and_names_the_grid_of_every_step(nested, samples, halved, tmp_path):
    train(nested, samples, halved, tmp_path / "whole", quiet=True)
    for stop in (3, None):
        train(nested, samples, halved, tmp_path / "cut", resume=True, stop_at=stop, quiet=True)
    rows = [read_metrics(tmp_path / name) for name in ("whole", "cut")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert {row["tokens_per_frame"] for row in rows[0]} == {4, 1}
    first, second = (load_run(tmp_path / name).built.model.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_grid_must_be_exact():
    def projector(grids, native):
        shape = TokenShape(grid=(4, 8, 8), width=8, is_pooled=True, identity="x", native_grid=native)
        return Projector(ProjectorConfig(nested_grids=grids), shape, 16)

    assert projector((64, 16, 4, 1), (4, 16, 16)).num_tokens_at(16) == 4 * 16
    with pytest.raises(UserError, match=r"grid 4x4x4 is not exact from the stored grid 4x8x8.*4x14x14"):
        projector((64, 16), (4, 14, 14))
    with pytest.raises(UserError, match="grid 4x16x16 is finer than the stored grid"):
        projector((256, 64), (4, 16, 16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resampler": "attention"}, "resampler attention"),
        ({"frame_divisor": 2}, "frame_divisor 2"),
        ({"nested_grids": (64, 8)}, "squares such as 64, 16, 4, 1; got 8"),
        ({"nested_grids": (64,)}, "two or more different grids"),
        ({"nested_grids": (64, 64)}, "two or more different grids"),
        ({"grid": (16, 4, 4)}, r"8 x 8, got projector.grid \[16, 4, 4\] too; set it to null, or to \[16, 8, 8\]"),
    ],
)
def test_settings_that_cannot_be_nested_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ProjectorConfig(**{"nested_grids": (64, 16), **settings})


def test_one_shot_methods_are_not_mixed():
    with pytest.raises(UserError, match="one-shot methods of their own"):
        TrainConfig(mask_encoders="subsets", projector=ProjectorConfig(nested_grids=(64, 16)))


@pytest.fixture
def run(nested, question_store, tmp_path):
    nested = replace(nested, projector=replace(nested.projector, grid=(2, 2, 2)))
    samples, source = open_store(str(question_store), nested)
    train(nested, samples, source, tmp_path / "run", store=str(question_store), quiet=True)
    return tmp_path / "run"


def test_scores_at_each_grid(run):
    ordinary = evaluate_run(run, EvaluationRequest())
    found = evaluate_grids(run, EvaluationRequest())
    assert (found["method"], list(found["grids"])) == ("one-shot", ["4", "1"])
    scores = {name: [answer["scores"] for answer in answers] for name, answers in found["grids"].items()}
    for fine, expected in zip(scores["4"], ordinary["answers"], strict=True):
        assert fine == pytest.approx(expected["scores"])
    assert list(scores["1"][0]) != pytest.approx(list(scores["4"][0]))
    path = run / "scores" / "heldout-grids.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    assert len(read_scores(run)) == 1
    with pytest.raises(UserError, match="trained at 4, 1 tokens per frame, not at 16"):
        evaluate_grids(run, EvaluationRequest(), [16])
    result = CliRunner().invoke(eval_main, ["grids", "--checkpoint", str(run), "--grids", "1", "--json"])
    assert json.loads(result.stdout)["grids"] == json.loads(json.dumps({"1": found["grids"]["1"]}))


def test_answers_by_letters_are_generated_at_each_grid(run):
    found = evaluate_grids(run, EvaluationRequest(protocol="letters"))
    assert [len(answers) for answers in found["grids"].values()] == [3, 3]


def test_open_questions_are_answered_at_each_grid(run, question_store):
    built = load_run(run).built
    samples, source = open_store(str(question_store), built.config)
    for tokens_per_frame in (4, 1):
        view = replace(built, tokens_per_frame=tokens_per_frame)
        answers = open_ended.answer_batch(view, samples[:2], source, "cpu", max_new_tokens=3)
        assert [answer.sample_id for answer in answers] == ["s000", "s001"]


def test_a_run_of_one_grid_has_no_others(brief, tmp_path):
    with pytest.raises(UserError, match="trained at one grid"):
        evaluate_grids(tmp_path / "run", EvaluationRequest())
