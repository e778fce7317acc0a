import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from featurestore import FeatureStore, StoreWriter
from mervcache.errors import UserError
from mervcache.files import file_sha256
from trainer.cli_eval import eval_main
from trainer.evaluate import EvaluationRequest, evaluate_run
from trainer.loop.train import train
from trainer.runs import checkpoint
from trainer.runs.run_record import ScoreSource, read_scores, write_scores
from trainer.sources import open_store

RESULT = {"data_digest": "d" * 64, "step": 3, "scores": [], "beside": {}, "answers": []}

VERSION_01 = ("step", "data_digest", "identities", "sha256", "validation")  # entries of its state.json


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


@pytest.fixture
def by_letters(tmp_path, config, question_store, pretrained):
    """A run of one step with an LLM that is not fresh, on the same store."""
    config = replace(config, llm=pretrained, max_steps=1)
    samples, tokens = open_store(str(question_store), config)
    train(config, samples, tokens, tmp_path / "lettered", store=str(question_store), quiet=True)
    return tmp_path / "lettered"


def cli(*arguments):
    return CliRunner().invoke(eval_main, ["run", *(str(argument) for argument in arguments)])


def test_every_result_names_its_protocol_and_those_of_two_lie_apart(run, by_letters):
    assert evaluate_run(run, EvaluationRequest())["protocol"] == "likelihood"  # its LLM is fresh
    by_default = evaluate_run(by_letters, EvaluationRequest())
    assert by_default["protocol"] == by_default["scores"][0]["protocol"] == "letters"
    assert "{options}" in by_default["template"]["text"]
    assert all(answer["text"] is not None for answer in by_default["answers"])
    evaluate_run(by_letters, EvaluationRequest(protocol="likelihood"))
    evaluate_run(by_letters, EvaluationRequest(limit=2))
    found = {path.name: json.loads(path.read_text())["protocol"] for path in (by_letters / "scores").iterdir()}
    assert found == {
        "heldout.json": "likelihood",
        "heldout-letters.json": "letters",
        "heldout-letters-first-2.json": "letters",
    }


def test_scores_of_version_01_are_likelihoods(tmp_path, source):
    write_scores(tmp_path, RESULT, source)
    assert read_scores(tmp_path)[0]["protocol"] == "likelihood"


def test_a_baseline_is_scored_by_the_same_protocol_or_refused(run, by_letters):
    with pytest.raises(UserError, match=r"lettered by letters; .*run by likelihood; give --protocol letters or --prot"):
        evaluate_run(by_letters, EvaluationRequest(), [run])
    for protocol in ("letters", "likelihood"):
        result = evaluate_run(by_letters, EvaluationRequest(protocol=protocol), [run])
        rows = [*result["scores"], *result["beside"][str(run)]]
        assert {row["protocol"] for row in rows} == {protocol}


def test_a_template_is_an_option_a_setting_and_in_the_result(tmp_path, by_letters):
    (tmp_path / "own.txt").write_text("{question}\n{options}\n")
    result = evaluate_run(by_letters, EvaluationRequest(letters_template=tmp_path / "own.txt"))
    assert result["template"] == {"name": "own.txt", "text": "{question}\n{options}"}
    settings = by_letters / "config.yaml"
    own = f"letters_template: {tmp_path / 'own.txt'}"
    settings.write_text(settings.read_text().replace("letters_template: null", own))
    assert evaluate_run(by_letters, EvaluationRequest())["template"]["name"] == "own.txt"
    with pytest.raises(UserError, match="--letters-template is the prompt of protocol letters"):
        evaluate_run(by_letters, EvaluationRequest(protocol="likelihood", letters_template=tmp_path / "own.txt"))


def test_questions_without_a_score_are_in_the_last_lines_and_in_the_exit_code(
    tmp_path, run, question_store, make_sample
):
    assert cli("--checkpoint", run).exit_code == 0
    writer = StoreWriter.open_or_create(question_store)
    lost = [replace(make_sample(50, split="heldout"), source="TVQA")]
    open_ended = [
        replace(make_sample(index, split="heldout"), source="MSVD", options=(), answer_index=None) for index in (18, 19)
    ]
    writer.add_samples("more", [*lost, *open_ended])
    writer.publish_snapshot()
    shown = cli("--checkpoint", run)
    assert shown.exit_code == 3
    last = shown.stdout.splitlines()[-2:]
    assert last == [
        "MSVD: 0 of 2 questions scored; 2 open-ended, which are not scored.",
        "TVQA: 0 of 1 questions scored; 1 without tokens of their clips.",
    ]
    result = json.loads(cli("--checkpoint", run, "--json").stdout)
    assert result["questions"]["toy"] == {"scored": 3}
    assert (result["lost"], result["scores"][0]["questions"]) == (1, 3)


def test_a_run_whose_output_is_not_finite_is_named_with_the_question(run):
    folder = checkpoint.newest(run)
    weights = load_file(folder / checkpoint.MODEL_FILE)
    weights["llm.model.norm.weight"][:] = 3e38  # finite, and the output is not
    save_file(weights, folder / checkpoint.MODEL_FILE)
    state = json.loads((folder / checkpoint.STATE_FILE).read_text())
    state = {name: state[name] for name in VERSION_01 if name in state}
    state["sha256"][checkpoint.MODEL_FILE] = file_sha256(folder / checkpoint.MODEL_FILE)
    (folder / checkpoint.STATE_FILE).write_text(json.dumps(state))
    result = cli("--checkpoint", run)
    assert result.exit_code == 1
    assert f"{run}: the model's output is not finite (NaN or infinite) at question s018" in " ".join(
        result.stderr.split()
    )
