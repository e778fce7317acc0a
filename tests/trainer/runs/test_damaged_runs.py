"""Missing and damaged files of a run: every command names the file and the next step, without a traceback."""

import json
import shutil

import pytest
import yaml
from click.testing import CliRunner

from trainer.cli import train_main
from trainer.cli_eval import eval_main
from trainer.runs import checkpoint
from trainer.runs.export import export_run
from trainer.runs.run_record import read_metrics
from trainer.runs.stage_folders import METRICS_FILE

pytestmark = pytest.mark.slow

SETTINGS = {
    "llm": "fresh:mini",
    "projector": {"grid": [2, 2, 2]},
    "max_steps": 4,
    "batch_size": 6,
    "micro_batch_size": 6,
    "checkpoint_every": 2,
}
NEWEST = "checkpoints/step-00000002"
FILES = {  # of a run -> what an error names
    f"{NEWEST}/model.safetensors": "model.safetensors",
    f"{NEWEST}/optimizer.safetensors": "optimizer.safetensors",
    f"{NEWEST}/state.json": "step-00000002",
    "run.json": "run.json",
    "config.yaml": "config.yaml",
    "llm/tokenizer.json": "llm",
    "llm/config.json": "llm",
    "llm": "llm",
}


@pytest.fixture
def whole(tmp_path, question_store):
    """A run killed behind its second step of four, by the command."""
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SETTINGS))
    store, out = str(question_store), tmp_path / "whole"
    command = ["--from-cache", store, "--recipe", "demo", "--config", str(tmp_path / "small.yaml"), "--out", str(out)]
    done = CliRunner().invoke(train_main, command)
    assert done.exit_code == 0, done.output
    shutil.rmtree(checkpoint.newest(out))
    return out


def forget_digests(run):
    """As version 0.1 wrote a run."""
    path = checkpoint.newest(run) / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({name: state[name] for name in state if name not in ("files", "digest", "skipped")}))


def commands(run):
    store, settings = str(run.parent / "features/toy.zarr"), str(run.parent / "small.yaml")
    new = ["--from-cache", store, "--recipe", "demo", "--config", settings]
    return {
        "resume": (train_main, ["--resume", str(run)]),
        "eval": (eval_main, ["run", "--checkpoint", str(run)]),
        "export": (eval_main, ["export", "--checkpoint", str(run), "--out", f"{run}-export"]),
        "init": (train_main, [*new, "--init", str(run), "--out", f"{run}-next"]),
    }


def damage(path, how):
    if how == "missing":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif path.is_dir():
        pytest.skip("a folder is there or not")
    else:
        data = {"empty": b"", "cut": path.read_bytes()[: path.stat().st_size // 2], "other": b"\xff\x00{]" * 9}[how]
        path.write_bytes(data)


def assert_is_said(run, name, expected):
    for use, (command, arguments) in commands(run).items():
        if use != "resume" and "optimizer" in name:
            continue  # only a resumed run needs it
        done = CliRunner().invoke(command, arguments)
        assert isinstance(done.exception, SystemExit), (use, done.exception)
        assert done.exit_code == 1, (use, done.output)
        assert done.stderr.startswith("Error: ") or "\nError: " in done.stderr
        assert expected in done.stderr.rpartition("Error: ")[2], (use, done.stderr)


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "other"])
def test_a_file_of_a_run_that_is_missing_or_damaged_is_named_by_every_command(tmp_path, whole, how):
    for name, expected in FILES.items():
        if (how == "missing" and name.endswith("state.json")) or (how != "missing" and name == "llm"):
            continue  # without its state a checkpoint is not complete; a folder is there or not
        for is_old in (False, True):
            run = shutil.copytree(whole, tmp_path / "run")
            if is_old:
                forget_digests(run)
            damage(run / name, how)
            assert_is_said(run, name, expected)
            shutil.rmtree(run)


def test_without_any_checkpoint_a_run_starts_again(tmp_path, whole):
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    done = CliRunner().invoke(train_main, ["--resume", str(run)])
    assert done.exit_code == 0, done.output
    assert checkpoint.newest(run).name == "step-00000004"


def test_a_finished_run_is_swept_and_one_whose_weights_are_damaged_is_not_called_finished(tmp_path, whole):
    assert CliRunner().invoke(train_main, ["--resume", str(whole)]).exit_code == 0
    (whole / "checkpoints/.tmp-step-00000004-9").mkdir()
    assert CliRunner().invoke(train_main, ["--resume", str(whole)]).exit_code == 0
    assert not (whole / "checkpoints/.tmp-step-00000004-9").exists()
    damage(checkpoint.newest(whole) / "model.safetensors", "cut")
    done = CliRunner().invoke(train_main, ["--resume", str(whole)])
    assert (done.exit_code, "differs from its digest" in done.stderr) == (1, True)


def test_a_run_whose_metrics_end_in_half_a_line_is_exported(tmp_path, whole):
    with (whole / METRICS_FILE).open("a") as file:
        file.write('{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(whole)] == [0, 1, 2, 3]
    done = CliRunner().invoke(eval_main, ["export", "--checkpoint", str(whole), "--out", str(tmp_path / "given")])
    assert done.exit_code == 0, done.output
    (whole / METRICS_FILE).unlink()
    assert export_run(whole, tmp_path / "again")["step"] == 2


def test_an_odd_line_among_the_metrics_is_named(whole, tmp_path):
    text = (whole / METRICS_FILE).read_text()
    (whole / METRICS_FILE).write_text("\0\0\n" + text)
    done = CliRunner().invoke(eval_main, ["export", "--checkpoint", str(whole), "--out", str(tmp_path / "given")])
    assert done.exit_code == 1
    assert "line 1 of" in done.stderr
    assert not (tmp_path / "given").exists()
