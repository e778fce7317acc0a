"""What a dry run of a sweep predicts, from steps that were measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from mervcache.errors import UserError
from trainer.ablation.execute import open_sweep, run_sweep
from trainer.ablation.forecast import TIMED_STEPS, WARMUP_STEPS, Measured, forecast, seconds_of, steps_to_time
from trainer.ablation.sweep import SweepConfig, SweepRun
from trainer.config import OptimizerConfig, ProjectorConfig, Stage, TrainConfig
from trainer.loop.plan import make_plan
from trainer.loop.train import time_steps
from trainer.main import train_main
from trainer.sources import open_store


@pytest.fixture
def stages(config):
    return (Stage(name="finetune", config=replace(config, max_steps=9)),)


def one(encoders, seconds):
    return Measured(
        run="x",
        encoders=encoders,
        steps=10,
        seconds=seconds,
        reads=False,
        steps_per_epoch=5,
        clips_per_step=4,
        memory_bytes={"total": 1},
    )


def test_sizes_between_those_measured_lie_on_the_line():
    found = (one(1, 10.0), one(4, 40.0))
    runs = [SweepRun(name="r", encoders=tuple("abcd"[:size])) for size in range(1, 5)]
    assert [seconds_of(run, found) for run in runs] == [10.0, 20.0, 30.0, 40.0]
    assert seconds_of(runs[3], found[:1]) == 10.0


def test_the_smallest_and_the_largest_subset_of_every_setting_are_measured(question_store, stages, tmp_path):
    axes = SweepConfig(fusions=("cross_attention", "concat_sequence"), seeds=(0, 1))
    sweep = open_sweep(axes, stages, str(question_store), tmp_path / "sweep")
    found = forecast(sweep)
    assert [(m.run.split("__")[:2], m.steps) for m in found.measured] == [
        (["text-only", "seed0"], 9),
        (["dinov2", "cross_attention"], 9),
        (["dinov2+vivit", "cross_attention"], 9),
        (["dinov2", "concat_sequence"], 9),
        (["dinov2+vivit", "concat_sequence"], 9),
    ]
    assert (found.runs, found.finished) == (len(sweep.runs), 0) == (14, 0)
    text, *rest = [m.seconds for m in found.measured]
    # per seed: text only, two runs of one encoder and one of both at each fusion
    assert found.seconds == pytest.approx(2 * (text + 2 * rest[0] + rest[1] + 2 * rest[2] + rest[3]))
    assert found.largest.run.startswith("dinov2+vivit")
    parts = dict(found.largest.memory_bytes)
    assert parts.pop("total") == sum(value for name, value in parts.items() if name != "activations_formula")
    assert found.break_even is None
    assert "records no extraction" in found.no_break_even
    assert not (tmp_path / "sweep").exists()


def test_finished_runs_are_not_counted(question_store, stages, tmp_path):
    axes = SweepConfig(subsets=("alone",), text_only=False)
    run_sweep(open_sweep(axes, stages, str(question_store), tmp_path / "sweep"))
    more = open_sweep(replace(axes, seeds=(0, 1)), stages, str(question_store), tmp_path / "sweep")
    found = forecast(more)
    assert (found.runs, found.finished) == (2, 2)
    assert found.seconds == pytest.approx(2 * found.measured[0].seconds)


def test_a_frozen_llm_alone_trains_nothing_to_predict(question_store, stages, pretrained, tmp_path):
    frozen = (replace(stages[0], config=replace(stages[0].config, llm=pretrained, train_llm="none")),)
    axes = SweepConfig(fusions=("first",), subsets=("dinov2+vivit",))  # a fusion of one encoder: no run has it
    with pytest.raises(UserError, match="no run of this sweep is trained"):
        forecast(open_sweep(axes, frozen, str(question_store), tmp_path / "sweep"))


def test_timed_steps_are_those_of_the_run_and_write_nothing(question_store, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples, source = open_store(str(question_store), config)
    plan = make_plan(config, samples, source)
    before = set(tmp_path.rglob("*"))
    weight = plan.built.model.projectors[0].head.weight
    first = weight.detach().clone()
    timed = time_steps(plan, source, range(2))
    assert len(timed) == 2
    assert all(reading > 0 and computing > 0 for reading, computing in timed)
    assert not torch.equal(weight, first)  # real steps
    assert set(tmp_path.rglob("*")) == before
    assert steps_to_time(plan) == [0, 1, 2, 3]
    assert steps_to_time(make_plan(replace(config, max_steps=1), samples, source)) == [0]


@pytest.mark.slow
def test_break_even_of_a_sweep_on_a_real_store(tmp_path, extracted):
    config = TrainConfig(
        llm="fresh:mini",
        train_llm="full",
        projector=ProjectorConfig(standardise=True),
        optimizer=OptimizerConfig(projector_lr=1e-3),
        batch_size=6,
        micro_batch_size=6,
        max_steps=WARMUP_STEPS + TIMED_STEPS,
        precision="fp32",
    )
    (tmp_path / "base.yaml").write_text(config.to_yaml())
    command = ["sweep", "--from-cache", str(extracted), "--config", str(tmp_path / "base.yaml"), "--recipe", "demo"]
    command += ["--subsets", "dinov2,dinov2+vivit", "--out", str(tmp_path / "sweep"), "--dry-run"]
    result = CliRunner().invoke(train_main, [*command, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["forecast"]
    even = found["break_even"]
    saved = even["live_pass_s"] - even["cached_pass_s"]
    assert even["passes"] == pytest.approx(even["extraction_s"] / saved)
    one, both = found["measured"][-2:]
    assert even["cached_pass_s"] == pytest.approx(
        (one["seconds"] + both["seconds"]) / 2 / one["steps"] * one["steps_per_epoch"]
    )
    printed = CliRunner().invoke(train_main, command).stdout
    assert "hours of training" in printed
    assert "pays" in printed
    assert not (tmp_path / "sweep").exists()
