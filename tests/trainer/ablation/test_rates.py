"""The check of learning rates: which runs it makes, on which clips it validates, and what it concludes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from mervcache.errors import UserError
from trainer.ablation.execute import open_sweep
from trainer.ablation.rates import CHECK_SPLIT, RateResult, best_by_size, check_rates, held_back
from trainer.ablation.sweep import SweepConfig
from trainer.config import read_config
from trainer.main import train_main
from trainer.recipes import Stage
from trainer.runs.run_record import RunRecord, read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture
def stages(config):
    return (Stage(name="finetune", config=replace(config, max_steps=10)),)


def result(size, factor, loss):
    return RateResult(encoders=tuple("abcd"[:size]), factor=factor, run="", steps=1, val_loss=loss)


def test_the_lowest_finite_loss_of_each_size_wins():
    results = [result(1, 0.5, 2.0), result(1, 1, 1.5), result(1, 2, None), result(2, 0.5, 1.0), result(2, 1, 1.25)]
    assert best_by_size([*results, result(3, 1, None)]) == {1: 1, 2: 0.5}


def test_spans_of_one_video_are_held_back_together_and_questions_that_score_never(make_sample):
    training = [make_sample(index // 3, clip_id=f"set/{index // 3}.mp4#t={index}.0,9.0") for index in range(300)]
    scored = [make_sample(index, clip_id=f"set/{index}.mp4", split="heldout") for index in range(100)]
    found = held_back([*training, *scored], "train", 7)
    assert [sample.split for sample in found[300:]] == ["heldout"] * 100
    by_video = {}
    for sample in found[:300]:
        by_video.setdefault(sample.clip_id.partition("#")[0], set()).add(sample.split)
    assert all(len(splits) == 1 for splits in by_video.values())
    held = {video for video, splits in by_video.items() if splits == {CHECK_SPLIT}}
    assert len(held) == 10  # a tenth of a hundred
    assert [s.split for s in held_back([*training, *scored], "train", 7)] == [s.split for s in found]
    assert [s.split for s in held_back([*training, *scored], "train", 8)] != [s.split for s in found]


def test_too_few_clips_are_refused(make_sample):
    with pytest.raises(UserError, match="there are 1 of split 'train'"):
        held_back([make_sample(0), make_sample(1, clip_id=None), make_sample(2, split="heldout")], "train", 7)


def test_the_first_subset_of_each_size_is_trained_with_each_factor_for_a_share_of_the_steps(
    question_store, stages, tmp_path
):
    sweep = open_sweep(SweepConfig(), stages, str(question_store), tmp_path / "sweep")
    results = check_rates(sweep, (0.5, 1.0), share=0.3)
    assert [(r.encoders, r.factor, r.steps) for r in results] == [
        (("dinov2",), 0.5, 3),
        (("dinov2",), 1.0, 3),
        (("dinov2", "vivit"), 0.5, 3),
        (("dinov2", "vivit"), 1.0, 3),
    ]
    for found in results:
        config, record = read_config(Path(found.run)), RunRecord.read(Path(found.run))
        assert config.optimizer.projector_lr == pytest.approx(3e-3 * found.factor)
        assert config.eval_split == CHECK_SPLIT
        held = len(sweep.samples) - record.num_samples
        assert held == 2  # a tenth of 18, rounded up
        assert found.val_loss == read_metrics(Path(found.run))[-1]["val_loss"]
    before = {path: path.stat().st_mtime_ns for path in sweep.out.rglob("checkpoints/**/*")}
    assert check_rates(sweep, (0.5, 1.0), share=0.3) == results
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not (sweep.out / "sweep.json").exists()


def test_a_rate_that_is_too_high_loses_and_is_named(question_store, stages, tmp_path):
    short = (replace(stages[0], config=replace(stages[0].config, max_skipped_in_row=1)),)
    sweep = open_sweep(SweepConfig(subsets=("dinov2",)), short, str(question_store), tmp_path / "sweep")
    low, high = check_rates(sweep, (1.0, 1e30), share=1.0)
    assert low.val_loss is not None
    assert high.val_loss is None
    assert best_by_size([low, high]) == {1: 1.0}


def test_the_command(question_store, config, tmp_path):
    (tmp_path / "base.yaml").write_text(replace(config, max_steps=10).to_yaml())
    command = ["sweep", "--from-cache", str(question_store), "--config", str(tmp_path / "base.yaml")]
    command += ["--out", str(tmp_path / "sweep"), "--check-rates", "0.5,1", "--check-share", "0.2"]
    found = json.loads(CliRunner().invoke(train_main, [*command, "--json"]).stdout)
    assert {int(size) for size in found["best"]} == {1, 2}
    printed = CliRunner().invoke(train_main, command)
    assert printed.exit_code == 0, printed.output
    assert "at an end of the factors" in printed.stdout  # of two factors either is
    refused = CliRunner().invoke(train_main, [*command[:-3], "0,1"])
    assert refused.exit_code == 1
    assert "above 0; got 0.0" in refused.output
