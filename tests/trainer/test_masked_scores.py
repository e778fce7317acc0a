"""Scores of one checkpoint with subsets of its encoders."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mervcache.errors import UserError
from trainer.evaluate import EvaluationRequest, evaluate_masked, evaluate_run
from trainer.loop.train import train
from trainer.runs.load import load_run
from trainer.runs.run_record import read_scores
from trainer.sources import open_store

pytestmark = pytest.mark.slow


def trained(config, store, out):
    samples, source = open_store(str(store), config)
    train(config, samples, source, out, store=str(store), quiet=True)
    return out


def by_question(answers):
    return {answer["sample_id"]: answer["scores"] for answer in answers}


def test_all_encoders_shown_is_the_ordinary_score_and_none_is_the_llm_alone(config, question_store, tmp_path):
    run = trained(replace(config, max_steps=3), question_store, tmp_path / "run")
    ordinary = evaluate_run(run, EvaluationRequest())
    masked = evaluate_masked(run, EvaluationRequest(), [("dinov2", "vivit"), ("vivit",), ()])
    assert masked["method"] == "post-hoc"
    whole, vivit, empty = (by_question(masked["subsets"][name]) for name in ("dinov2+vivit", "vivit", ""))
    for sample_id, scores in by_question(ordinary["answers"]).items():
        torch.testing.assert_close(torch.tensor(whole[sample_id]), torch.tensor(scores))
        assert vivit[sample_id] != pytest.approx(scores)
    assert len({tuple(scores) for scores in empty.values()}) == 1  # one question text, and nothing else is read
    assert json.loads((run / "scores" / "heldout-masked.json").read_text()) == json.loads(json.dumps(masked))
    assert [record["split"] for record in read_scores(run)] == ["heldout"]


def test_fewer_questions_and_another_protocol_never_replace_the_scores_on_all(config, question_store, tmp_path):
    run = trained(replace(config, max_steps=1), question_store, tmp_path / "run")
    evaluate_masked(run, EvaluationRequest(), [("dinov2",)])
    evaluate_masked(run, EvaluationRequest(limit=2), [("dinov2",)])
    evaluate_masked(run, EvaluationRequest(protocol="letters"), [("dinov2",)])
    counts = {
        path.name: len(json.loads(path.read_text())["subsets"]["dinov2"]) for path in (run / "scores").glob("*masked*")
    }
    assert counts == {"heldout-masked.json": 3, "heldout-first-2-masked.json": 2, "heldout-letters-masked.json": 3}
    masked = json.loads((run / "scores" / "heldout-letters-masked.json").read_text())
    assert masked["protocol"] == "letters"


def test_a_run_trained_with_masks_says_so_and_resumes_to_the_same_losses(config, question_store, tmp_path):
    config = replace(config, mask_encoders="subsets", fusion=replace(config.fusion, name="concat_sequence"))
    whole = trained(config, question_store, tmp_path / "whole")
    samples, source = open_store(str(question_store), config)
    for stop in (3, None):
        train(
            config, samples, source, tmp_path / "cut", store=str(question_store), resume=True, stop_at=stop, quiet=True
        )
    first, second = (load_run(run).built.model.state_dict() for run in (whole, tmp_path / "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert evaluate_masked(whole, EvaluationRequest(), [("dinov2",)])["method"] == "one-shot"


def test_a_text_only_run_has_nothing_to_mask(config, question_store, tmp_path):
    run = trained(replace(config, mode="text-only", max_steps=1), question_store, tmp_path / "run")
    with pytest.raises(UserError, match="no encoders to mask"):
        evaluate_masked(run, EvaluationRequest(), [()])
