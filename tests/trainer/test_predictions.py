"""Predictions of a run as JSON lines: what they hold, and an evaluation that is killed and goes on."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from featurestore import FeatureStore, StoreWriter
from mervcache.errors import StoreDamagedError, UserError
from trainer.cli_eval import eval_main
from trainer.evaluate import EvaluationRequest, evaluate_run
from trainer.model import multiple_choice, open_ended
from trainer.runs.predictions import RecordLog

pytestmark = pytest.mark.slow

REQUEST = EvaluationRequest(batch_size=1, max_new_tokens=3)


def lines(run, benchmark):
    (path,) = (run / "predictions").glob(f"{benchmark}-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prediction_is_a_line_with_its_prompt_and_the_conditions(benchmark_run):
    result = evaluate_run(benchmark_run, REQUEST)
    head, *rows = lines(benchmark_run, "MSVD")
    assert (head["benchmark"], head["protocol"], head["max_new_tokens"], head["step"]) == ("MSVD", "open-ended", 3, 1)
    assert {"torch", "transformers"} <= head["versions"].keys()
    assert [row["answer"]["sample_id"] for row in rows] == ["s000", "s001", "s002"]
    assert {row["prompt_sha256"] for row in rows} == {rows[0]["prompt_sha256"]}  # the same question
    assert [row["answer"]["clip_id"] for row in rows] == [f"set/clip{index}.mp4" for index in range(3)]
    head, *rows = lines(benchmark_run, "NExT_QA")
    assert (head["protocol"], head["template"], len(rows)) == ("likelihood", None, 2)
    assert len(rows[0]["answer"]["scores"]) == 3
    assert result["questions"] == {"MSVD": {"scored": 3}, "NExT/QA": {"scored": 2}, "toy": {"scored": 3}}


def test_there_is_a_row_per_benchmark_and_category(benchmark_run):
    shown = CliRunner().invoke(eval_main, ["run", "--checkpoint", str(benchmark_run), "--max-new-tokens", "3"])
    assert shown.exit_code == 0, shown.output
    first = [line.split("  ")[0].strip() for line in shown.stdout.splitlines()]
    wanted = ["all", "NExT/QA", "NExT/QA: causal", "NExT/QA: temporal", "toy", "toy: colour", "MSVD", "MSVD: what"]
    assert [line for line in first if line in wanted] == wanted


def test_only_multiple_choice_on_request(benchmark_run):
    result = evaluate_run(benchmark_run, replace(REQUEST, open_ended=False))
    assert "open_ended" not in result
    assert result["questions"]["MSVD"] == {"scored": 0, "open-ended, which are not scored": 3}


def test_the_conversations_of_a_store_are_asked_one_by_one(benchmark_run, question_store):
    """Those of its training, whose right answers are their own."""
    writer = StoreWriter.open_or_create(question_store)
    trained = FeatureStore.open(question_store).samples("toy-finetune")[:2]
    own = [replace(one, source="own", options=(), answer_index=None) for one in trained]
    writer.add_samples("own", own)
    writer.publish_snapshot()
    words = ["run", "--checkpoint", str(benchmark_run), "--split", "train", "--open-ended", "--max-new-tokens", "3"]
    result = json.loads(CliRunner().invoke(eval_main, [*words, "--json"]).stdout)
    answers = result["open_ended"]["answers"]
    assert [answer["correct"] for answer in answers] == [one.turns[-1].text for one in own]
    score = result["open_ended"]["scores"]["own"][0]
    assert score["normalised"] == sum(answer["normalised"] for answer in answers) / 2
    shown = CliRunner().invoke(eval_main, words).stdout.splitlines()
    marks = [line.split()[-1] for line in shown if answers[0]["question"] in line]
    assert marks == ["right" if answer["normalised"] else "wrong" for answer in answers]
    assert any(line.startswith("Split train: runs are trained on these questions") for line in shown)


def test_scores_of_open_ended_answers_are_kept_apart(benchmark_run):
    result = evaluate_run(benchmark_run, REQUEST)
    record = json.loads((benchmark_run / "scores/open-ended/heldout.json").read_text())
    assert record["scores"] == json.loads(json.dumps(result["open_ended"]["scores"]))
    assert (record["split"], record["judge"]) == ("heldout", None)
    assert "open_ended" not in json.loads((benchmark_run / "scores/heldout.json").read_text())


class Counter:
    """Counts the questions that are computed, and may kill the process after some."""

    def __init__(self, monkeypatch, dies_after=None):
        self.asked, self.dies_after = [], dies_after
        for module, name in ((open_ended, "answer_batch"), (multiple_choice, "answer_part")):
            monkeypatch.setattr(module, name, self.counted(getattr(module, name)))

    def counted(self, function):
        def call(built, samples, *arguments, **options):
            if self.dies_after is not None and len(self.asked) >= self.dies_after:
                os.kill(os.getpid(), 9)
            self.asked += [(sample.source, sample.sample_id) for sample in samples]
            return function(built, samples, *arguments, **options)

        return call


def die(run, after):
    """An evaluation in a process of its own that is killed while it answers."""
    code = (
        "import sys; from tests.trainer.test_predictions import Counter, REQUEST, evaluate_run\n"
        "import pytest, torch; from pathlib import Path\n"
        "torch.set_num_threads(1)\n"
        "Counter(pytest.MonkeyPatch(), int(sys.argv[2])); evaluate_run(Path(sys.argv[1]), REQUEST)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code, str(run), str(after)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_killed_evaluation_goes_on_with_the_next_question_and_ends_alike(benchmark_run, monkeypatch):
    done = die(benchmark_run, 6)
    assert done.returncode == -9, done.stderr
    torn = next((benchmark_run / "predictions").glob("MSVD-*.jsonl"))
    whole = torn.read_text()
    with torn.open("a") as file:
        file.write(whole.splitlines()[-1][:40])  # what a kill in the middle of a write leaves
    count = Counter(monkeypatch)
    resumed = evaluate_run(benchmark_run, REQUEST)
    assert len(count.asked) == 8 - 6
    assert whole == torn.read_text()[: len(whole)]
    assert len(lines(benchmark_run, "MSVD")) == 4
    fresh = evaluate_run(benchmark_run, replace(REQUEST, resumes=False))
    assert len(count.asked) == 2 + 8
    assert resumed == fresh
    evaluate_run(benchmark_run, REQUEST)
    assert len(count.asked) == 2 + 8  # nothing is left


def command(run, *arguments):
    program = [sys.executable, "-P", "-m", "trainer.main", "eval", "run", "--checkpoint", str(run), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*program, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # printed once


@pytest.mark.slow
def test_several_processes_share_the_questions_and_answer_alike(benchmark_run):
    alone = command(benchmark_run, "--max-new-tokens", "3", "--batch-size", "1")
    names = sorted(path.name for path in (benchmark_run / "predictions").iterdir())
    texts = [(benchmark_run / "predictions" / name).read_text() for name in names]
    options = ("--max-new-tokens", "3", "--batch-size", "1", "--no-resume", "--processes", "2")
    assert command(benchmark_run, *options) == alone
    assert sorted(path.name for path in (benchmark_run / "predictions").iterdir()) == names
    assert [(benchmark_run / "predictions" / name).read_text() for name in names] == texts


def test_other_conditions_are_another_file(benchmark_run, monkeypatch):
    count = Counter(monkeypatch)
    evaluate_run(benchmark_run, REQUEST)
    evaluate_run(benchmark_run, replace(REQUEST, max_new_tokens=2))
    assert count.asked.count(("MSVD", "s000")) == 2
    assert count.asked.count(("toy", "s018")) == 1
    assert len(list((benchmark_run / "predictions").glob("MSVD-*.jsonl"))) == 2


def test_a_changed_question_is_asked_again(benchmark_run, question_store, make_sample, monkeypatch):
    evaluate_run(benchmark_run, REQUEST)
    (path,) = (benchmark_run / "predictions").glob("MSVD-*.jsonl")
    rows = path.read_text().splitlines()
    rows[2] = json.dumps({**json.loads(rows[2]), "question": "0" * 32})  # what an older question has left
    path.write_text("\n".join(rows) + "\n")
    count = Counter(monkeypatch)
    evaluate_run(benchmark_run, REQUEST)
    assert count.asked == [("MSVD", "s001")]


def test_a_run_that_nothing_can_be_kept_in_is_scored_all_the_same(benchmark_run, caplog):
    (benchmark_run / "predictions").write_text("a file where the folder should be")
    assert evaluate_run(benchmark_run, REQUEST)["scores"]
    assert "a killed command would begin again" in caplog.text


def test_a_line_that_is_no_record_is_named_and_zeros_at_the_end_are_dropped(tmp_path):
    path, facts = tmp_path / "x.jsonl", {"a": 1}
    with RecordLog(path, facts, key="k") as log:
        log.add([{"k": "one"}, {"k": "two"}])
    with path.open("ab") as file:
        file.write(bytes(20) + b"\n")
    with RecordLog(path, facts, key="k") as log:
        assert set(log.records) == {"one", "two"}
        log.add([{"k": "three"}])
    assert set(RecordLog(path, facts, key="k").records) == {"one", "two", "three"}
    text = path.read_text().replace('{"k": "one"}', "one")
    path.write_text(text)
    with pytest.raises(StoreDamagedError, match=r"line 2 of .*x\.jsonl is no record"):
        RecordLog(path, facts, key="k")
    path.write_text('{"format": 1, "a": 2}\n{"k": "one"}\n')
    with pytest.raises(UserError, match="other conditions"):
        RecordLog(path, facts, key="k")


def test_two_processes_never_write_one_file_and_several_share_it_by_rank(tmp_path):
    path = tmp_path / "x.jsonl"
    with RecordLog(path, {}, key="k") as first:
        with pytest.raises(UserError, match="another process writes"):
            RecordLog(path, {}, key="k").__enter__()
        with RecordLog(path, {}, key="k", rank=1) as second:
            second.add([{"k": "b"}])
            first.add([{"k": "c"}, {"k": "a"}])
    first.read()
    first.merge(["a", "b", "c"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
    assert [json.loads(line).get("k") for line in path.read_text().splitlines()] == [None, "a", "b", "c"]
