"""What `plan` predicts beside what `extract` then writes."""

from __future__ import annotations

import statistics

import pytest

from pipeline.forecast import ForecastRow, balance, forecast, standard_error, total_seconds
from pipeline.worker.forwards import SharedForwards
from pipeline.worker.reports import EncoderProbe, ProbeRecord

TWO = ("languagebind", "siglip")


@pytest.mark.parametrize("storage", ["float16", "uint8"])
def test_predicted_bytes_are_within_a_tenth_of_what_is_then_written(storage, lab):
    settings = {"encoders": TWO, "storage_dtype": storage}
    predicted = forecast(lab.config(**settings), probe=3)
    assert not lab.store.exists()
    written = lab.extract(**settings).bytes
    assert abs(predicted.bytes - written) < 0.1 * written


def test_rows_are_by_stage_kind_and_encoder(lab):
    result = forecast(lab.config(encoders=TWO, batch={"video": 3}), probe=1)
    rows = {(row.stage, row.kind, row.encoder): row for row in result.rows}
    # three clips have a caption and a question, the other six films and five stills a question
    counts = {("align+finetune", "video"): 3, ("finetune", "video"): 6, ("finetune", "image"): 5}
    assert {key: row.clips for key, row in rows.items()} == {
        (*key, name): number for key, number in counts.items() for name in TWO
    }
    assert all(row.to_do == row.clips for row in rows.values())
    assert {key[:2]: row.files for key, row in rows.items()} == {
        ("align+finetune", "video"): 2,  # one block of 4: a shard and its receipt
        ("finetune", "video"): 4,
        ("finetune", "image"): 4,
    }
    assert result.probed == 2
    assert result.batch == {"video": 3, "image": 8}  # the second is the default of a CPU
    assert all(row.seconds > 0 for row in rows.values())
    assert 0 < result.startup_s < result.seconds
    low, high = result.interval_s
    assert low <= result.seconds <= high
    assert result.to_dict()["bytes"] == sum(row.bytes for row in rows.values())


def test_what_is_committed_or_quarantined_is_not_forecast_again(lab):
    lab.copy_of_root()
    (lab.root / "videochatgpt_tune/v0.mp4").write_bytes(b"not a film")
    lab.extract(encoders=("siglip",), limit=2)
    result = forecast(lab.config(encoders=TWO, block_rows={}), probe=0)
    to_do = {(row.encoder, row.stage, row.kind): row.to_do for row in result.rows}
    assert to_do["siglip", "align+finetune", "video"] == 1
    assert to_do["languagebind", "align+finetune", "video"] == 3
    files = {row.kind: row.files for row in result.rows if row.stage == "finetune"}
    assert files == {"video": 4, "image": 4}  # the store's own blocks of 4, not the default
    assert result.seconds is None
    again = forecast(lab.config(encoders=("siglip",), retry_quarantine=True), probe=0)
    assert sum(row.to_do for row in again.rows) == 13


def test_without_a_probe_bytes_are_those_before_compression(lab):
    result = forecast(lab.config(encoders=("siglip",), kind="video"), probe=0)
    assert result.bytes == 9 * 8 * 3 * 3 * 32 * 2
    assert result.probed == 0


def test_a_cluster_is_probed_on_all_of_its_workers_each_with_clips_of_its_own(lab):
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        result = forecast(lab.config(encoders=("languagebind",), scheduler=cluster.scheduler_address), probe=2)
    assert (result.workers, result.probed_workers, result.probed) == (2, 2, 8)  # two videos and two stills each
    low, high = result.interval_s
    assert low < result.seconds < high
    assert result.to_dict()["interval"].startswith("two standard errors of the mean")


def probed(worker: int, seconds: float) -> ProbeRecord:
    return ProbeRecord(decode_s=0.1, wall_s=seconds, encoders={}, worker=worker)


def test_workers_that_differ_widen_the_interval_though_each_is_sure_of_itself():
    """By hand: means 1 and 3 s of two workers differ by a standard error of sqrt(2) / sqrt(2) = 1."""
    records = [probed(worker, seconds) for worker, seconds in ((0, 1.0), (1, 3.0)) for _ in range(8)]
    assert standard_error(records) == pytest.approx(1.0)
    alike = [probed(worker, seconds) for worker in (0, 1) for seconds in (1.0, 3.0)]
    assert standard_error(alike) == pytest.approx(statistics.stdev([1, 3, 1, 3]) / 2)
    assert standard_error(records[:1]) == 0


def row(**changes) -> ForecastRow:
    return ForecastRow(**{"stage": "-", "kind": "video", "reusable": 0, "bytes": 0, "files": 0} | changes)


def test_a_shared_forward_is_counted_once_in_the_total():
    """By hand: a forward takes 2 s and the pooling of the second grid 0.5 s; six of ten clips have the first grid."""
    encoders = {name: EncoderProbe(seconds=s, stored_bytes=0) for name, s in (("a@4x4", 2.0), ("a@2x2", 0.5))}
    records = {"video": [ProbeRecord(decode_s=0.1, wall_s=2.5, encoders=encoders)]}
    forwards = [["a@4x4", "a@2x2"]]
    shared = SharedForwards(forwards)
    clips = {f"v{number}" for number in range(10)}
    to_do = {"a@4x4": clips - {f"v{number}" for number in range(6)}, "a@2x2": clips}
    rows = []
    for name, ids in to_do.items():
        count = shared.add(name, ids)
        seconds = shared.seconds(records["video"][0], name, forwards=count, clips=len(ids))
        rows.append(row(encoder=name, clips=10, to_do=len(ids), forwards=count, seconds=seconds))
    assert [(one.forwards, one.seconds, one.is_shared) for one in rows] == [(4, 8.0, False), (6, 17.0, True)]
    assert total_seconds(rows, records, forwards) == (pytest.approx(25.0), 0.0)  # 10 x 2.0 + 10 x 0.5


def test_the_total_is_without_encoders_that_are_stored():
    """By hand: one encoder of 3 s is stored, the other takes 1 s; decoding takes 0.5 s on each of two processes."""
    encoders = {name: EncoderProbe(seconds=s, stored_bytes=0) for name, s in (("a", 3.0), ("b", 1.0))}
    record = ProbeRecord(decode_s=1.0, wall_s=4.0, encoders=encoders, decoders=2)
    rows = [row(encoder="a", clips=10, to_do=0, forwards=0, seconds=0.0)]
    rows += [row(encoder="b", clips=10, to_do=10, forwards=10, seconds=10.0)]
    assert total_seconds(rows, {"video": [record]}, [["a"], ["b"]]) == (pytest.approx(10.0), 0.0)


@pytest.mark.parametrize(("decoders", "is_bound"), [(8, True), (18, True), (19, False), (24, False)])
def test_a_run_is_bound_by_decoding_where_its_decoders_give_less_than_its_encoders_take(decoders, is_bound):
    """By hand: 100 videos take 1.7 s of a GPU, 31.6 core seconds of decoding and 2.1 of compressing."""
    encoders = {
        "languagebind": EncoderProbe(seconds=0.010, stored_bytes=0, write_s=0.011),
        "siglip": EncoderProbe(seconds=0.007, stored_bytes=0, write_s=0.010),
    }
    record = ProbeRecord(decode_s=0.316, wall_s=0.04, encoders=encoders, decoders=decoders)
    rows = [
        row(encoder=name, clips=120, to_do=100, forwards=100, seconds=100 * probe.seconds)
        for name, probe in encoders.items()
    ]
    found = balance(rows, {"video": [record, record], "image": []})
    assert (found.decoders, found.decode_bound) == (decoders, is_bound)
    assert found.cores_wanted == 20  # 33.7 / 1.7 = 19.8


def test_without_a_probe_nothing_is_known_about_decoding():
    assert balance([], {"video": [], "image": []}) is None
