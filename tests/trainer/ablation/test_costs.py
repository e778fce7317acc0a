"""Costs and break-even by hand; and of a real run on a store that the pipeline has made."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from featurestore import FeatureStore, StoreWriter
from mervcache.errors import UserError
from trainer.ablation.costs import (
    Rates,
    StepTime,
    Workload,
    break_even,
    clip_bytes,
    extraction_cost,
    live_seconds_per_clip,
    run_costs,
    step_reading,
    step_time,
)
from trainer.config import OptimizerConfig, TrainConfig
from trainer.loop.train import train
from trainer.main import eval_main
from trainer.runs.run_record import read_metrics
from trainer.sources import open_store

RATES = Rates(extract_s_per_clip=3.0, step_s=2.0, live_s_per_clip=0.5)
WORK = Workload(clips=100, steps_per_epoch=10, clips_per_step=4)  # 300 s; a pass of 20 s, end to end 10 x (2 + 4 x 0.5)


@pytest.mark.parametrize(
    ("runs", "epochs", "cached_s", "live_s", "pays"),
    [(3, 2, 300 + 6 * 20, 6 * 40, False), (5, 3, 600, 600, True), (10, 2, 300 + 20 * 20, 20 * 40, True)],
)
def test_a_store_pays_once_passes_have_saved_its_extraction(runs, epochs, cached_s, live_s, pays):
    found = break_even(RATES, replace(WORK, runs=runs, epochs=epochs))
    assert (found.extraction_s, found.cached_pass_s, found.live_pass_s, found.passes) == (300, 20, 40, 15)
    assert (found.cached_s, found.live_s, found.pays) == (cached_s, live_s, pays)
    assert "from 15 runs x epochs on" in found.describe()
    assert ("has not paid" in found.describe()) is not pays


def test_shared_clips_are_extracted_once_and_encoded_for_every_sample():
    """13 clips behind 100 samples a pass: encoding them live costs more than the extraction in the first pass."""
    found = break_even(
        Rates(extract_s_per_clip=1.0, step_s=1.0, live_s_per_clip=1.0),
        Workload(clips=13, steps_per_epoch=25, clips_per_step=4),
    )
    assert (found.passes, found.pays) == (0.13, True)


@pytest.mark.parametrize(
    ("rates", "overlapped"),
    [
        (replace(RATES, live_s_per_clip=0.0), False),
        (RATES, True),  # encoding takes 2 s in the shadow of a step of 2 s
        (replace(RATES, live_s_per_clip=0.25), True),
    ],
)
def test_where_it_never_pays_it_says_so(rates, overlapped):
    found = break_even(rates, replace(WORK, runs=1000), overlapped=overlapped)
    assert (found.passes, found.pays) == (None, False)
    assert "never pays" in found.describe()


def test_encoding_that_outlasts_the_steps_counts_where_both_overlap():
    found = break_even(replace(RATES, live_s_per_clip=1.25), WORK, overlapped=True)  # 5 s of encoding a step
    assert (found.live_pass_s, found.passes) == (50, 10)


def rows(*stretches):
    return [
        {"samples": 4, "samples_per_s": speed, "wait_share": waits} for n, speed, waits in stretches for _ in range(n)
    ]


def test_the_mean_step_without_the_first_stretch():
    found = step_time(rows((2, 2.0, 0.9), (2, 4.0, 0.25), (1, 8.0, 0.5)))  # 2 s each, then 1 s, 1 s and 0.5 s
    assert found == StepTime(seconds=2.5 / 3, wait_share=(0.25 + 0.25 + 0.25) / 2.5, steps=3, warmup=2)
    assert step_time(rows((3, 2.0, 0.1))) == StepTime(seconds=2.0, wait_share=pytest.approx(0.1), steps=3, warmup=0)


@pytest.mark.parametrize("metrics", [[], [{"step": 0, "loss": 1.0}]])
def test_metrics_without_speeds_are_refused(metrics):
    with pytest.raises(UserError, match="no step times"):
        step_time(metrics)


@pytest.mark.parametrize(
    ("fields", "kind", "parts", "expected"),
    [
        ({}, "video", ("tokens",), 16 * 8 * 8 * 1024 * 2),
        ({}, "image", ("tokens",), 2 * 8 * 8 * 1024 * 2),  # one period
        ({"storage_dtype": "uint8"}, "video", ("tokens",), 16 * 8 * 8 * 1024 + 2 * 1024 * 4),  # scale and offset
        ({"prefix_tokens": 5}, "video", ("prefix",), 16 * 5 * 1024 * 2),
        ({"prefix_tokens": 1}, "video", ("tokens", "prefix"), 16 * 65 * 1024 * 2),
        ({"storage_dtype": "uint8", "prefix_tokens": 1}, "image", ("prefix",), 2 * 1024 * 2),  # kept as float16
    ],
)
def test_bytes_of_a_clip(toy_identity, fields, kind, parts, expected):
    identity = toy_identity(grid=(16, 8, 8), width=1024, still_period=2, **fields)
    assert clip_bytes(identity, kind, parts) == expected


def test_the_four_encoders_take_seven_mebibytes_a_clip(toy_identity):
    widths = (1024, 1024, 768, 768)
    assert sum(clip_bytes(toy_identity(grid=(16, 8, 8), width=w), "video") for w in widths) == 7 * 2**20


def journal(host, elapsed_s, made, stages, **summary):
    clips = max((work["clips"] for work in made.values()), default=0)
    facts = {"clips": clips, "elapsed_s": elapsed_s, "made": made, "stage_s": stages}
    return {"host": host, "summary": facts | summary}


def test_an_extraction_by_its_journal():
    stages = {"total": 50.0, "write wait": 4.0, "commit": 1.0, "encode:a": 30.0, "decode (in its processes)": 99.0}
    first = {"video/a": {"clips": 8}, "video/b": {"clips": 8}, "image/a": {"clips": 2}}
    runs = [
        journal("here", 40.0, first, stages),
        journal("here", 20.0, {"video/c": {"clips": 8}}, {"total": 10.0}),  # an encoder that was added
        journal("here", 5.0, {}, {}),  # found nothing to do
    ]
    found = extraction_cost(runs, host="here")
    assert (found.seconds, found.clips, found.runs, found.notes) == (60.0, 10, 2, ())
    assert (found.seconds_per_clip, found.worker_s_per_clip) == (6.0, 5.5)  # 45 s and 10 s of a worker
    assert extraction_cost(runs, encoders=["b", "c"], host="here").worker_s_per_clip == 2.5  # without the 30 s of a


def test_what_a_journal_does_not_say_is_noted():
    runs = [journal("there", 40.0, {"video/a": {"clips": 8}}, {"total": 40.0}, reused=3)]
    copied, elsewhere = extraction_cost(runs, host="here").notes
    assert "3 (clip, encoder) pairs copied" in copied
    assert "there" in elsewhere
    with pytest.raises(UserError, match="records no extraction"):
        extraction_cost([])


def test_live_encoding_is_what_the_steps_take_longer():
    cached, live = (StepTime(seconds=s, wait_share=0.0, steps=9, warmup=0) for s in (1.0, 3.0))
    assert live_seconds_per_clip(cached, live, 4) == 0.5
    assert live_seconds_per_clip(live, cached, 4) == 0.0


@pytest.fixture
def run(tmp_path, config, question_store):
    samples, source = open_store(str(question_store), config)
    train(config, samples, source, tmp_path / "run", store=str(question_store), quiet=True)
    return tmp_path / "run"


def test_a_run_reads_the_arrays_of_its_samples(run, question_store):
    found = step_reading(run)
    stored = [entry["stored_bytes"] for entry in FeatureStore.open(question_store).info()["groups"].values()]
    assert (found.clips, found.distinct_clips, found.steps_per_epoch) == (6, 6, 3)
    assert found.array_bytes == 6 * (4 * 2 * 2 * 8 * 2 + 4 * 2 * 2 * 6 * 2)
    assert found.stored_bytes == pytest.approx(6 * sum(stored) / 21)


def test_a_clip_of_several_samples_is_counted_for_each(tmp_path, config, question_store):
    samples, _ = open_store(str(question_store), config)
    shared = [replace(sample, clip_id=f"set/clip{index % 2}.mp4") for index, sample in enumerate(samples)]
    writer = StoreWriter.open_or_create(question_store)
    writer.add_samples("shared", shared)
    writer.publish_snapshot()
    named = replace(config, samples=("shared",))
    samples, source = open_store(str(question_store), named)
    train(named, samples, source, tmp_path / "run", store=str(question_store), quiet=True)
    found = step_reading(tmp_path / "run")
    assert found.clips == 6
    assert 1 <= found.distinct_clips <= 2


def test_runs_that_do_not_read_the_store_are_refused(run, tmp_path, make_question_store, config, samples, tokens):
    other = make_question_store(tmp_path / "other.zarr", range(12))
    with pytest.raises(UserError, match="other samples or tokens"):
        step_reading(run, str(other))
    train(replace(config, max_steps=1), samples, tokens, tmp_path / "memory", quiet=True)
    with pytest.raises(UserError, match="end to end"):
        step_reading(tmp_path / "memory")
    words = replace(config, max_steps=1, mode="text-only")
    train(words, samples, tokens, tmp_path / "words", quiet=True)
    with pytest.raises(UserError, match="text-only"):
        step_reading(tmp_path / "words")


def test_a_store_without_a_journal_has_no_price(run):
    with pytest.raises(UserError, match="records no extraction"):
        run_costs(run)


@pytest.mark.slow
def test_the_costs_of_a_real_store(tmp_path, extracted):
    config = TrainConfig(
        llm="fresh:mini",
        train_llm="full",
        encoders=("dinov2", "vivit"),
        optimizer=OptimizerConfig(projector_lr=1e-3),
        batch_size=6,
        micro_batch_size=6,
        max_steps=4,
        precision="fp32",
        log_every=2,
    )
    samples, source = open_store(str(extracted), config)
    train(config, samples, source, tmp_path / "run", store=str(extracted), quiet=True)
    result = CliRunner().invoke(eval_main, ["costs", str(tmp_path / "run"), "--runs", "7", "--json"])
    found = json.loads(result.stdout)
    summary = FeatureStore.open(extracted).runs()[0]["summary"]
    assert found["extraction"]["seconds"] == summary["elapsed_s"]
    assert found["extraction"]["clips"] == summary["clips"]
    last = read_metrics(tmp_path / "run")[-1]
    assert found["step"]["seconds"] == pytest.approx(6 / last["samples_per_s"])  # the second stretch
    assert found["break_even"]["planned_passes"] == pytest.approx(7 * 4 / found["reading"]["steps_per_epoch"])
    stages = summary["stage_s"]
    others = stages["encode:languagebind"] + stages["encode:siglip"] + stages["write wait"]
    assert found["live_s_per_clip"] == pytest.approx((stages["total"] - others) / summary["clips"])
    printed = CliRunner().invoke(eval_main, ["costs", str(tmp_path / "run")]).stdout
    assert "against" in printed or "never pays" in printed
    refused = CliRunner().invoke(eval_main, ["costs", str(tmp_path / "run"), "--live", str(tmp_path / "run")])
    assert refused.exit_code == 1
    assert "--end-to-end" in refused.stderr
