"""What `plan` predicts beside what `extract` then writes."""

from __future__ import annotations

import pytest

from pipeline.forecast import forecast

TWO = ("languagebind", "siglip")


@pytest.mark.parametrize("storage", ["float16", "uint8"])
def test_predicted_bytes_are_within_a_tenth_of_what_is_then_written(storage, lab):
    settings = {"encoders": TWO, "storage_dtype": storage}
    predicted = forecast(lab.config(**settings), probe=3)
    assert not lab.store.exists()
    written = lab.extract(**settings).bytes
    assert abs(predicted.bytes - written) < 0.1 * written


def test_rows_are_by_stage_kind_and_encoder(lab):
    result = forecast(lab.config(encoders=TWO), probe=1)
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
    assert all(row.seconds > 0 for row in rows.values())
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
