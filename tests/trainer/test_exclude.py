"""Clips that a list leaves out of training: the run is the one of a store that never had their samples."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from click.testing import CliRunner

from mervcache.errors import UserError
from trainer.ablation.execute import open_sweep
from trainer.ablation.sweep import SweepConfig
from trainer.cli_eval import eval_main
from trainer.config import TrainConfig, read_config
from trainer.loop.stages import merge_settings
from trainer.loop.train import train
from trainer.main import train_main
from trainer.recipes import Stage, get_stages
from trainer.runs import checkpoint
from trainer.runs.run_record import RunRecord, read_metrics

SMALL = {"llm": "fresh:mini", "projector": {"grid": [2, 2, 2]}, "max_steps": 2, "batch_size": 6, "checkpoint_every": 1}
LISTED = ("set/clip0.mp4", "set/clip7.mp4", "set/gone.mp4")


@pytest.fixture
def here(tmp_path, monkeypatch, question_store):
    """A working folder with a store of 18 training questions, settings of some seconds and a list of clips."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    (tmp_path / "exclude.txt").write_text("".join(f"{clip_id}\n" for clip_id in (*LISTED[::-1], "", LISTED[0])))
    return tmp_path


def call(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def train_without(*arguments, exclude="exclude.txt"):
    start = ("--from-cache", "--recipe", "demo", "--config", "small.yaml", "--exclude", exclude)
    return call(train_main, *start, *arguments)


@pytest.mark.slow
def test_a_run_is_the_one_of_data_that_never_had_the_samples(tmp_path, config, samples, tokens):
    train(replace(config, exclude=LISTED), samples, tokens, tmp_path / "excluded", quiet=True)
    fewer = [sample for sample in samples if sample.clip_id not in LISTED]
    train(config, fewer, tokens, tmp_path / "fewer", quiet=True)
    rows = [
        [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(tmp_path / name)]
        for name in ("excluded", "fewer")
    ]
    assert rows[0] == rows[1]
    weights = [checkpoint.newest(tmp_path / name) / checkpoint.MODEL_FILE for name in ("excluded", "fewer")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    records = [RunRecord.read(tmp_path / name) for name in ("excluded", "fewer")]
    assert records[0].data_digest == records[1].data_digest
    assert [record.num_samples for record in records] == [16, 16]
    assert records[0].dropped == {"clip listed in exclude": 2}


@pytest.mark.slow
def test_the_command_counts_what_it_leaves_out_and_a_moved_run_resumes_without_the_file(here):
    result = train_without("--out", "run", "--json")
    assert result.exit_code == 0, result.output
    assert "left out 2 samples of 2 clips; not found among the samples: 1 of 3 listed" in result.stderr
    assert read_config(here / "run").exclude == tuple(sorted(LISTED))
    rows = read_metrics(here / "run")
    (here / "exclude.txt").unlink()
    checkpoints = sorted((here / "run" / "checkpoints").iterdir())
    for path in checkpoints[-1].iterdir():
        path.unlink()
    (here / "run").rename(here / "moved")
    resumed = call(train_main, "--resume", "moved", "--json")
    assert json.loads(resumed.stdout)["steps"] == 2, resumed.output
    assert [row["loss"] for row in read_metrics(here / "moved")] == [row["loss"] for row in rows]


@pytest.mark.slow
def test_a_run_is_not_continued_under_another_list(here):
    train_without("--out", "run")
    assert json.loads(train_without("--out", "run", "--resume", "auto", "--json").stdout)["steps"] == 2
    (here / "exclude.txt").write_text("set/clip0.mp4\n")
    refused = train_without("--out", "run", "--resume", "auto")
    assert refused.exit_code == 1
    assert "exclude was ('set/clip0.mp4', 'set/clip7.mp4', 'set/gone.mp4'), is ('set/clip0.mp4',)" in refused.stderr


def test_a_file_that_is_gone_is_an_error_that_says_how_to_resume(here):
    refused = train_without("--out", "run", exclude="gone.txt")
    assert refused.exit_code == 1
    assert "gone.txt cannot be read: No such file or directory" in refused.stderr
    assert "merv-train --resume RUN" in refused.stderr


def test_a_file_that_is_no_text_is_an_error(here):
    (here / "exclude.txt").write_bytes(b"PAR1\xff\xfe")
    refused = train_without("--out", "run")
    assert refused.exit_code == 1
    assert "exclude.txt is not text: give one clip id a line" in refused.stderr


def test_a_list_of_nothing_leaves_nothing_out(here):
    (here / "exclude.txt").write_text("\n")
    assert yaml.safe_load(train_without("--print-config").stdout)["exclude"] == []


@pytest.mark.slow
def test_a_list_of_every_clip_is_an_error_before_the_first_step(here):
    (here / "exclude.txt").write_text("".join(f"set/clip{index}.mp4\n" for index in range(18)))
    refused = train_without("--out", "run")
    assert refused.exit_code == 1
    assert "no sample is left to train on: {'clip listed in exclude': 18}; shorten the list" in refused.stderr
    assert not (here / "run" / "config.yaml").exists()


def test_a_config_file_names_the_file_or_the_clips_for_a_chain_or_a_stage(here):
    chain = get_stages("merv-full")
    found = merge_settings(chain, {"exclude": "exclude.txt", "stages": {"align": {"exclude": ["set/a.mp4"]}}}, {})
    assert [stage.config.exclude for stage in found] == [("set/a.mp4",), tuple(sorted(LISTED))]
    (here / "other.txt").write_text("set/b.mp4\n")
    found = merge_settings(chain, {"exclude": ["set/a.mp4"]}, {"exclude": "other.txt"})
    assert [stage.config.exclude for stage in found] == [("set/b.mp4",)] * 2


def test_a_path_is_no_list_of_clips_in_python():
    with pytest.raises(UserError, match=r"exclude must be a list of clip ids, got the text 'exclude\.txt'"):
        TrainConfig(exclude="exclude.txt")


@pytest.mark.slow
def test_every_run_of_a_sweep_leaves_the_clips_out(here, config, question_store):
    result = call(train_main, "sweep", "--recipe", "demo", "--exclude", "exclude.txt", "--print-config")
    assert yaml.safe_load(result.stdout)["exclude"] == sorted(LISTED), result.output
    stages = (Stage(name="finetune", config=replace(config, exclude=LISTED)),)
    sweep = open_sweep(SweepConfig(subsets=("alone",)), stages, str(question_store), here / "sweep")
    assert len(sweep.samples) == 16
    assert len(sweep.questions) == 3
    assert {run.stages[-1].config.exclude for run in sweep.runs} == {LISTED}


@pytest.mark.slow
def test_the_model_card_has_the_counts_and_the_export_the_list(here):
    train_without("--out", "run")
    result = call(eval_main, "export", "--checkpoint", "run", "--out", "exported")
    assert result.exit_code == 0, result.output
    card = (here / "exported" / "README.md").read_text()
    assert "Samples: 16; dropped: 2 clip listed in exclude" in card
    assert "exclude: 3 clips, listed in config.yaml" in card
    assert not [clip_id for clip_id in LISTED if clip_id in card]
    assert read_config(here / "exported").exclude == tuple(sorted(LISTED))
