"""What a dry run of a sweep predicts, from steps that were measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from featurestore import FeatureStore, StoreWriter
from mervcache.errors import UserError
from trainer.ablation.costs import extraction_cost, run_step_time
from trainer.ablation.execute import open_sweep, run_sweep
from trainer.ablation.forecast import TIMED_STEPS, WARMUP_STEPS, Measured, forecast, seconds_of, steps_to_time
from trainer.ablation.sweep import SweepConfig, SweepRun
from trainer.config import LiveRequest, OptimizerConfig, TrainConfig
from trainer.loop.plan import make_plan
from trainer.loop.stages import train_in_stages
from trainer.loop.train import time_steps
from trainer.main import train_main
from trainer.recipes import Stage
from trainer.sources import open_store

pytestmark = pytest.mark.slow

PAIR = ("dinov2", "vivit")


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
        batch_size=4,
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


@pytest.fixture
def colours(tmp_path, extracted):
    """A store that the pipeline has made, with its journal, and a question about each of its clips."""
    shutil.copytree(extracted, tmp_path / "colours.zarr")
    store = FeatureStore.open(tmp_path / "colours.zarr")
    asked = [
        replace(sample, sample_id=f"q{number}", split="heldout", options=("red", "blue"), answer_index=0)
        for number, sample in enumerate(sample for sample in store.samples() if sample.clip_id is not None)
    ]
    writer = StoreWriter.open_or_create(tmp_path / "colours.zarr")
    writer.add_samples("questions", asked)
    writer.publish_snapshot()
    return tmp_path / "colours.zarr"


@pytest.mark.slow
def test_break_even_of_a_sweep_on_a_real_store_by_its_journal_and_by_a_run_end_to_end(
    tmp_path, colours, media_lab, media_root
):
    config = TrainConfig(
        llm="fresh:mini",
        train_llm="full",
        optimizer=OptimizerConfig(projector_lr=1e-3),
        batch_size=6,
        micro_batch_size=6,
        max_steps=WARMUP_STEPS + TIMED_STEPS,
        precision="fp32",
        log_every=1,
    )
    (tmp_path / "base.yaml").write_text(config.to_yaml())
    command = ["sweep", "--from-cache", str(colours), "--config", str(tmp_path / "base.yaml"), "--recipe", "demo"]
    command += ["--subsets", "dinov2,dinov2+vivit", "--out", str(tmp_path / "sweep"), "--dry-run"]

    def predict(*options):
        result = CliRunner().invoke(train_main, [*command, *options, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["forecast"]

    def live_seconds(found):
        """Of a clip, on average over the two runs that read tokens."""
        even, first = found["break_even"], found["measured"][-1]
        return (even["live_pass_s"] - even["cached_pass_s"]) / first["steps_per_epoch"] / first["clips_per_step"]

    found = predict()
    even, (one, both) = found["break_even"], found["measured"][-2:]
    assert even["passes"] == pytest.approx(even["extraction_s"] / (even["live_pass_s"] - even["cached_pass_s"]))
    step_s = (one["seconds"] + both["seconds"]) / 2 / one["steps"]
    assert even["cached_pass_s"] == pytest.approx(step_s * one["steps_per_epoch"])
    journal = FeatureStore.open(colours).runs()
    alone, pair = (extraction_cost(journal, encoders=names).worker_s_per_clip for names in (["dinov2"], PAIR))
    assert live_seconds(found) == pytest.approx((alone + pair) / 2)

    end_to_end = (Stage(name="finetune", config=replace(config, encoders=PAIR)),)
    train_in_stages(end_to_end, LiveRequest(settings=media_lab.settings(media_root)), tmp_path / "live")
    found = predict("--live", str(tmp_path / "live"))
    both = found["measured"][-1]
    live = max(0, run_step_time(tmp_path / "live").seconds - both["seconds"] / both["steps"]) / both["clips_per_step"]
    assert live_seconds(found) == pytest.approx((live + live * alone / pair) / 2)

    printed = CliRunner().invoke(train_main, command).stdout
    assert "hours of training" in printed
    assert "the store" in printed
    assert not (tmp_path / "sweep").exists()
