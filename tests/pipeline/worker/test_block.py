"""One block as a worker computes it: what it writes, what it reports, what it refuses."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from featurestore import FeatureStore
from featurestore.writer import StoreWriter
from mervcache.errors import RunStoppedError, StoreNotFoundError
from pipeline.extract import extract
from pipeline.worker.block import extract_block
from pipeline.worker.engine import close_engines, engine_for
from pipeline.worker.reports import BlockReport

TWO = ("languagebind", "siglip")


def receipts_of(lab, task):
    store = StoreWriter.open(lab.store)
    return {name: store.open_group(task.kind, task.groups[name]).receipt(task.block) for name in task.wanted}


def test_a_block_commits_a_shard_and_receipt_per_encoder_and_reports_counts_and_seconds(lab):
    *_, tasks = lab.plan(encoders=TWO)
    report = extract_block(tasks[0])
    assert (report.kind, report.block, report.clips, report.failed, report.reasons) == ("video", 0, 4, 0, {})
    assert (report.frames, report.halvings) == (4 * 16, 0)  # the most that any of the two sees
    stages = {
        "decode wait",
        "decode (in its processes)",
        "compress (in its threads)",
        "encode:languagebind",
        "encode:siglip",
        "write wait",
        "commit (in its thread)",
    }
    assert stages | {"total"} == set(report.seconds)
    assert report.bytes == sum(path.stat().st_size for path in (lab.store / "video").glob("*/tokens/c/0/*/*/*/*"))
    for receipt in receipts_of(lab, tasks[0]).values():
        assert receipt.counts == {"ok": 4, "failed": 0, "skipped": 0, "empty": 0}
        assert {row.decoder for row in receipt.rows} == {"frames/1"}
        assert len({row.media_sha256 for row in receipt.rows}) == 4


def test_tasks_and_reports_are_small(lab):
    """They travel through the scheduler for every block; frames and tokens never do."""
    *_, tasks = lab.plan(encoders=TWO)
    assert len(pickle.dumps(tasks[0])) < 5000
    report = extract_block(tasks[0])
    assert len(pickle.dumps(report)) < 2000
    assert BlockReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report  # as a suspect's comes


def test_a_clip_that_fails_is_named_with_the_digest_of_the_bytes_that_failed(lab):
    lab.copy_of_root()
    (lab.root / "videochatgpt_tune/v1.mp4").write_bytes(b"not a film")
    *_, tasks = lab.plan(encoders=TWO)
    report = extract_block(tasks[0])
    assert (report.failed, sum(report.reasons.values())) == (1, 1)
    for receipt in receipts_of(lab, tasks[0]).values():
        row = receipt.rows[1]
        assert (row.state, row.scope) == ("failed", "clip")
        assert row.media_sha256 == hashlib.sha256(b"not a film").hexdigest()
        assert [r.state for r in receipt.rows] == ["ok", "failed", "ok", "ok"]


def test_rows_that_an_encoder_does_not_want_are_skipped_and_the_others_keep_their_bits(lab, extracted):
    *_, tasks = lab.plan(encoders=TWO)
    extract_block(replace(tasks[0], wanted={"siglip": frozenset({1, 2})}))
    (receipt,) = receipts_of(lab, replace(tasks[0], wanted={"siglip": frozenset()})).values()
    assert [row.state for row in receipt.rows] == ["skipped", "ok", "ok", "skipped"]
    whole = StoreWriter.open(extracted.store).open_group("video", tasks[0].groups["siglip"]).receipt(0)
    assert [receipt.rows[n].digest for n in (1, 2)] == [whole.rows[n].digest for n in (1, 2)]


def test_a_block_that_somebody_committed_meanwhile_stays_as_it_is(lab):
    *_, tasks = lab.plan(encoders=TWO)
    first = extract_block(tasks[0])
    before = lab.hashes(lab.store)
    again = extract_block(tasks[0])
    assert lab.hashes(lab.store) == before
    assert (again.clips, again.bytes) == (first.clips, first.bytes)


def test_a_worker_with_other_weights_than_the_plan_writes_nothing(lab):
    *_, tasks = lab.plan(encoders=("siglip",))
    other = replace(tasks[0].engine.encoders[0], weights="random:1")
    strange = replace(tasks[0], engine=replace(tasks[0].engine, encoders=(other,)))
    with pytest.raises(RunStoppedError, match=r"loads siglip as siglip-\w{12}, the plan has siglip-"):
        extract_block(strange)
    assert not list(lab.store.glob("video/*/tokens/c"))


def test_a_worker_that_does_not_see_the_store_makes_no_other(lab):
    *_, tasks = lab.plan(encoders=("siglip",))
    lab.store.rename(lab.folder / "moved.zarr")
    with pytest.raises(StoreNotFoundError, match="mount the share that holds it"):
        extract_block(tasks[0])
    assert not lab.store.exists()


def test_tokens_too_large_for_half_precision_fail_that_encoder_alone(lab):
    """The network's output is finite and its half-precision copy is not: the clip is whole, the encoder is not."""
    *_, tasks = lab.plan(encoders=TWO)
    network = engine_for(tasks[0].engine).encoders["siglip"].loaded.network
    bias = next(weight for name, weight in network.named_parameters() if name.endswith("mlp.fc2.bias"))
    bias.data += 1e6
    try:
        report = extract_block(tasks[0])
    finally:
        close_engines()
    assert report.failed == 4
    assert all(reason.startswith("siglip: ") for reason in report.reasons)
    found = receipts_of(lab, tasks[0])
    assert found["languagebind"].counts["ok"] == 4
    assert {(row.state, row.scope) for row in found["siglip"].rows} == {("failed", "encoder")}
    assert "bfloat16" in found["siglip"].rows[0].reason
    lab.extract(encoders=TWO)
    assert set(FeatureStore.open(lab.store).quarantine["encoder"].to_pylist()) == {"siglip"}


def test_a_block_reports_its_counts_with_the_keys_of_its_final_report(lab, monkeypatch):
    """Clips are their share of all forwards; counts only grow, and end as the receipts say."""
    reports = []
    *_, tasks = lab.plan(encoders=TWO)  # which loads the encoders, and reports that
    monkeypatch.setattr("pipeline.worker.block.TaskReporter.report", lambda self, counts: reports.append(counts()))
    end = extract_block(tasks[0])
    clips = [report["clips"] for report in reports if report["clips"]]
    assert list(dict.fromkeys(clips)) == [1, 2, 3, 4]  # two batches of two clips, two encoders
    frames = [report["frames"] for report in reports]
    assert frames == sorted(frames)
    assert frames[-1] == 64
    assert all(set(report) <= set(end.to_dict()) and report["failed"] == 0 for report in reports)
    assert reports[0]["bytes"] <= reports[-1]["bytes"] < end.bytes  # a shard has an index besides
    assert set(reports[-1]["seconds"]) < set(end.seconds)


def test_a_forward_in_progress_is_reported_as_encoding(lab, monkeypatch):
    """With a slow encoder a forward takes minutes: it ends here when a report has shown it."""
    *_, tasks = lab.plan(encoders=("siglip",))
    encoder = engine_for(tasks[0].engine).encoders["siglip"]
    launch, is_shown = encoder.launch, threading.Event()

    def report(self, counts):
        if counts()["seconds"].get("encode:siglip", 0) > 0:
            is_shown.set()

    def launch_once_shown(frames_BTHWC, staging):
        assert is_shown.wait(60)
        return launch(frames_BTHWC, staging)

    monkeypatch.setattr("pipeline.worker.block.TaskReporter.report", report)
    monkeypatch.setattr(encoder, "launch", launch_once_shown)
    assert extract_block(tasks[0]).clips == 4


def test_an_encoder_short_of_device_memory_halves_its_batches_and_every_account_says_so(lab, extracted, monkeypatch):
    """The network itself refuses more than one clip, as CUDA's allocator would."""
    from pipeline.cli import render
    from pipeline.encoders.loading import Encoder

    whole = Encoder.encode_tokens

    def short_of_memory(self, frames_BTHWC, **settings):
        if len(frames_BTHWC) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return whole(self, frames_BTHWC, **settings)

    monkeypatch.setattr(Encoder, "encode_tokens", short_of_memory)
    lines = io.StringIO()
    monkeypatch.setattr("sys.stderr", lines)
    summary = extract(lab.config(encoders=["siglip"]))
    monkeypatch.undo()
    assert (summary.clips, summary.failed, summary.halvings) == (
        14,
        0,
        8,
    )  # of two clips each
    assert "14/14 clips, 8 batches halved" in lines.getvalue()
    store = FeatureStore.open(lab.store)
    (_, record), *_ = store.journal()
    assert record["summary"]["halvings"] == 8
    printed = io.StringIO()
    monkeypatch.setattr("sys.stdout", printed)
    render.summary(summary)
    assert "8 batches were halved for lack of device memory; see what else" in printed.getvalue()
    ids = store.clips["clip_id"].to_pylist()
    ours, theirs = (FeatureStore.open(place).read(ids, encoder="siglip") for place in (lab.store, extracted.store))
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
