import json
from dataclasses import replace

import pytest

from featurestore import FeatureStore
from mervcache.errors import UserError
from trainer.evaluate import EvaluationRequest, evaluate_run
from trainer.loop.train import train
from trainer.runs.run_record import ScoreSource, read_scores, write_scores
from trainer.sources import open_store

RESULT = {"data_digest": "d" * 64, "step": 3, "scores": [], "beside": {}, "answers": []}


@pytest.fixture
def source():
    return ScoreSource(split="heldout", limit=None, store="/somewhere/features/toy.zarr", snapshot="1-abc")


@pytest.fixture
def run(tmp_path, config, question_store):
    """A run of one step on a real store."""
    samples, tokens = open_store(str(question_store), config)
    config = replace(config, max_steps=1, encoders=("dinov2",))
    train(config, samples, tokens, tmp_path / "run", store=str(question_store), quiet=True)
    return tmp_path / "run"


def test_an_evaluation_keeps_its_result_in_the_run_with_split_and_snapshot(run, question_store):
    result = evaluate_run(run, EvaluationRequest())
    (record,) = read_scores(run)
    assert record == {
        "split": "heldout",
        "limit": None,
        "store": "toy.zarr",
        "snapshot": FeatureStore.open(question_store).snapshot,
        **json.loads(json.dumps(result)),
    }
    assert record["scores"][0]["questions"] == 3


def test_a_part_of_the_questions_does_not_replace_the_whole(run):
    evaluate_run(run, EvaluationRequest())
    evaluate_run(run, EvaluationRequest(limit=2))
    assert [path.name for path in sorted((run / "scores").iterdir())] == ["heldout-first-2.json", "heldout.json"]
    assert [record["scores"][0]["questions"] for record in read_scores(run)] == [2, 3]


def test_the_newest_evaluation_of_a_split_is_kept(tmp_path, source):
    write_scores(tmp_path, RESULT, source)
    write_scores(tmp_path, {**RESULT, "step": 9}, source)
    assert [record["step"] for record in read_scores(tmp_path)] == [9]
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["heldout.json"]


def test_a_split_of_any_name_stays_in_the_folder(tmp_path, source):
    path = write_scores(tmp_path, RESULT, replace(source, split="../../etc/x y"))
    assert path == tmp_path / "scores" / "______etc_x_y.json"
    assert read_scores(tmp_path)[0]["split"] == "../../etc/x y"


def test_scores_that_cannot_be_kept_are_reported_and_returned(run, caplog):
    (run / "scores").write_text("a file where the folder should be")
    assert evaluate_run(run, EvaluationRequest())["scores"]
    assert "the scores were not saved" in caplog.text


@pytest.mark.parametrize("text", ["{}", "[]", "{", "3"])
def test_a_file_of_another_kind_is_named(tmp_path, text):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores/odd.json").write_text(text)
    with pytest.raises(UserError, match=r"odd.json holds no scores of this version"):
        read_scores(tmp_path)


def test_a_run_without_scores_has_none(tmp_path):
    assert read_scores(tmp_path) == []
