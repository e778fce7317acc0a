"""Keeping a store in order from the command line: media that changed, blocks computed again, retries, removals."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from featurestore.maintenance.verify import verify_store
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter
from pipeline.cli import render
from pipeline.cli.extract import main
from pipeline.quarantine import quarantined, retry, retry_configs
from pipeline.recompute import verify_media

BROKEN = "videochatgpt_tune/v1.mp4"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def result_of(*arguments: object, code: int = 0):
    result = call(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def store(extracted, tmp_path) -> Path:
    shutil.copytree(extracted.store, tmp_path / "store.zarr")
    return tmp_path / "store.zarr"


@pytest.fixture
def media(media_root, tmp_path) -> Path:
    shutil.copytree(media_root, tmp_path / "media", symlinks=True)
    return tmp_path / "media"


def shard_of(store: Path, encoder: str = "siglip") -> Path:
    return next((store / "video").glob(f"{encoder}-*/tokens/c/0/0/0/0/0"))


def wreck(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for place in (len(data) // 3, len(data) // 2, len(data) - 9):
        data[place] ^= 0x55
    file.write_bytes(data)


def tree_of(store: Path) -> dict[str, bytes]:
    """Every file but journals and what is temporary."""
    files = {file.relative_to(store): file for file in store.rglob("*") if file.is_file()}
    return {str(key): file.read_bytes() for key, file in files.items() if key.parts[0] not in ("journal", "tmp")}


def overwrite(file: Path, data: bytes, mtime: float = 0.0) -> None:
    file.write_bytes(data)
    os.utime(file, (mtime, mtime))


def test_media_that_changed_are_found_by_quick_and_full(store, media):
    sound = result_of("verify", store, "--media", "full", "--root", media)
    assert sound == {"store": str(store), "mode": "quick", "media": "full", "findings": [], "parity": None}
    changed, gone = media / "videochatgpt_tune/v0.mp4", media / "valley/v5.mp4"
    overwrite(changed, changed.read_bytes() + b"x")  # under an old date: the file system's change time tells
    gone.unlink()
    for level in ("quick", "full"):
        found = result_of("verify", store, "--media", level, "--root", media, code=1)["findings"]
        assert {(entry["key"], entry["severity"]) for entry in found} == {
            ("videollava/videochatgpt_tune/v0.mp4", "damage"),
            ("videollava/valley/v5.mp4", "notice"),
        }
    assert "its media are not those that its tokens were made from" in found[0]["problem"]


def test_quick_reads_no_file_that_is_older_than_the_first_run(store, media, monkeypatch):
    from pipeline.media import Source

    read: list[str] = []
    monkeypatch.setattr(Source, "sha256", lambda self: read.append(self.path) or "0" * 64)
    monkeypatch.setattr("pipeline.recompute.newest_touch_s", lambda source: 1.0 if "v0" in source.path else 9e9)
    verify_media(store, "quick", root=str(media))
    assert "videochatgpt_tune/v0.mp4" not in read
    assert "videochatgpt_tune/v1.mp4" in read


def test_a_damaged_block_is_computed_again_to_the_byte_that_block_and_encoder_only(store, media):
    before = shard_of(store).read_bytes()
    wreck(shard_of(store))
    left = result_of("repair", store, code=1)["repaired"]
    assert "--from OTHER_STORE, or --root DIR to compute it" in left[0]["done"]
    done = result_of("repair", store, "--recompute", "--root", media)
    assert (done["store"], done["from"], done["recompute"], done["new_bytes"]) == (str(store), None, True, False)
    assert [entry["done"] for entry in done["repaired"]] == ["computed again from the media, the same bytes"]
    assert shard_of(store).read_bytes() == before
    assert verify_store(store, "full") == []


def test_a_block_whose_media_changed_is_not_put_back(store, media):
    wreck(shard_of(store))
    damaged = shard_of(store).read_bytes()
    shutil.copy(media / "valley/v6.mp4", media / "videochatgpt_tune/v0.mp4")
    (left,) = result_of("repair", store, "--root", media, "--new-bytes", code=1)["repaired"]
    assert "1 of its media changed since: not put back" in left["done"]
    assert shard_of(store).read_bytes() == damaged


def test_a_store_without_a_journal_says_what_to_do(store, media):
    wreck(shard_of(store))
    shutil.rmtree(store / "journal")
    (left,) = result_of("repair", store, "--root", media, code=1)["repaired"]
    assert "fetch the block with --from OTHER_STORE" in left["done"]


def test_the_quarantine_is_listed_and_tried_again_by_reason(lab):
    media = lab.copy_of_root()
    good = (media / BROKEN).read_bytes()
    (media / BROKEN).write_bytes(good[: len(good) // 2])
    (media / "valley/v5.mp4").write_bytes(b"")
    lab.extract(encoders=["siglip"])
    rows = result_of("quarantine", "list", lab.store)
    assert {row["path"] for row in rows} == {BROKEN, "valley/v5.mp4"}
    reason = next(row["reason"] for row in rows if row["path"] == BROKEN)
    assert [row["path"] for row in quarantined(lab.store, reason=reason.upper())] == [BROKEN]
    assert quarantined(lab.store, encoder="siglip", reason="no such reason") == []
    (media / BROKEN).write_bytes(good)
    (media / "valley/v5.mp4").write_bytes(good)  # mended as well, and not asked for
    (summary,) = retry(lab.store, reason=reason, quiet=True)
    assert (summary.clips, summary.failed) == (1, 0)
    assert [row["path"] for row in quarantined(lab.store)] == ["valley/v5.mp4"]
    assert retry(lab.store, reason="no such reason", quiet=True) == []
    assert (
        "encoder 'vivit' is not in this store; it has: siglip"
        in call("quarantine", "list", lab.store, "--encoder", "vivit").stderr
    )


def test_a_summary_names_a_clip_of_each_reason_and_the_command_that_lists_all(lab, capsys):
    media = lab.copy_of_root()
    (media / BROKEN).write_bytes(b"not a film")
    summary = lab.extract(encoders=["siglip"])
    summary.elapsed_s, summary.startup_s = 3.0, 22.0
    render.summary(summary)
    (reason,) = summary.reasons
    shown = capsys.readouterr().out
    assert f"{reason}; such as videollava/{BROKEN}" in shown
    assert f" in 3.0 s after a start of 22.0 s: {summary.clips / 3:.2f} clips/s" in shown
    assert f"each clip: merv-pipeline quarantine list {lab.store}\n" in shown


def test_a_store_in_place_of_a_command_of_the_quarantine_is_explained():
    failed = call("quarantine", "features/lab.zarr", "--json")
    assert failed.exit_code == 2
    assert "No such command 'features/lab.zarr'" in failed.stderr
    assert "quarantine list features/lab.zarr --json" in failed.stderr


def test_a_retry_that_fails_as_before_writes_nothing_but_its_journal(lab, caplog):
    media = lab.copy_of_root()
    good = (media / BROKEN).read_bytes()
    (media / BROKEN).write_bytes(good[: len(good) // 2])
    lab.extract(encoders=["siglip"])
    before = tree_of(lab.store)
    caplog.set_level(logging.INFO, logger="pipeline")
    (summary,) = retry(lab.store, quiet=True)
    assert (summary.unchanged, summary.clips, summary.blocks) == (1, 0, 0)
    assert any(message.startswith("1 of 1 quarantined clips fail as before") for message in caplog.messages)
    assert tree_of(lab.store) == before
    (media / BROKEN).write_bytes(good)
    (summary,) = retry(lab.store, quiet=True)
    assert (summary.unchanged, summary.clips, summary.failed) == (0, 1, 0)


def test_a_removed_clip_stays_away_from_every_later_run(lab):
    lab.extract(encoders=["siglip"], limit=4)
    gone = "videollava/videochatgpt_tune/v1.mp4"
    result = result_of("tombstone", lab.store, "v1.mp4", "--reason", "the licence was withdrawn")
    assert (result["clips"], result["blocks rewritten"]) == ([gone], 1)
    lab.extract(encoders=["siglip", "dinov2"], limit=5, retry_quarantine=True)
    store = FeatureStore.open(lab.store)
    assert gone not in store.clips["clip_id"].to_pylist()
    assert len(store) == 4
    assert all(all(store.clips[key].to_pylist()) for key in store.encoders)
    assert gone not in {sample.clip_id for sample in store.samples()}
    assert verify_store(lab.store, "full") == []
    status = result_of("status", lab.store)
    assert [(stone["clips"], stone["reason"]) for stone in status["tombstones"]] == [(1, "the licence was withdrawn")]
    assert "1 clip removed on" in call("status", lab.store).stdout


def test_orphans_alone_are_no_failure(store):
    (store / "notes.txt").write_text("x")
    (found,) = result_of("verify", store)["findings"]
    assert (found["key"], found["severity"], found["advice"]) == (
        "notes.txt",
        "orphan",
        "delete it, or keep it elsewhere",
    )
    assert "no damage found, 1 orphan" in call("verify", store).stdout


def test_a_retry_asks_for_no_forecast_and_overwrites_no_report_of_the_run_that_failed(store):
    (name,) = (name for name, _ in FeatureStore.open(store).journal() if name.endswith("-driver"))
    record = dict(FeatureStore.open(store).journal(name))[name]
    files = {"forecast": "gone/plan.json", "performance_report": "theirs.html"}
    place = {"scheduler": "slurm", "workers": 64, "cluster": {"gpus": 8}, "reuse": "theirs.zarr"}
    later = {"started": record["started"] + 1, "config": record["config"] | files | place}
    StoreWriter.open(store).journal("later-driver", record | later)
    failed = {"clip_id": FeatureStore.open(store).clips["clip_id"][0].as_py(), "encoder": "siglip"}
    (config,) = retry_configs(store, [failed], None, {})
    assert (config.forecast, config.performance_report) == (None, None)
    assert (config.scheduler, config.workers, config.cluster, config.reuse) == ("local", 0, {}, "theirs.zarr")


FAILED = [
    {"clip_id": "d/v1.mp4", "encoder": "siglip", "scope": "clip", "reason": "not a video"},
    {"clip_id": "d/v1.mp4", "encoder": "vivit", "scope": "clip", "reason": "not a video"},
    {"clip_id": "d/v2.mp4", "encoder": "siglip", "scope": "encoder", "reason": "overflow"},
    {"clip_id": "d/v2.mp4", "encoder": "vivit", "scope": "encoder", "reason": "overflow"},
]


def test_a_clip_that_failed_is_a_line_per_reason_whatever_the_number_of_encoders(capsys):
    render.quarantined(FAILED)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["clip", "encoders", "reason"],
        ["d/v1.mp4", "all", "encoders", "not", "a", "video"],
        ["d/v2.mp4", "siglip,", "vivit", "overflow"],
        ["reason", "clips"],
        ["not", "a", "video", "1"],
        ["overflow", "1"],
    ]


def test_status_counts_clips_and_not_cells_that_failed(lab):
    media = lab.copy_of_root()
    (media / BROKEN).write_bytes(b"")
    lab.extract(encoders=["siglip", "vivit"], limit=4)
    assert sorted(result_of("status", lab.store)["quarantine"].values()) == [1, 1]
    told = call("status", lab.store).stdout
    head, line = told[told.index("quarantined") :].splitlines()[:2]
    assert head.split() == ["quarantined", "encoders", "clips"]
    assert line.endswith("  all encoders      1")


def test_a_table_prints_a_strangers_brackets_as_they_are(capsys):
    render.table(("clip",), [("d/x[/bar].mp4",), ("d/[bold].mp4",)])
    render.details({"reason": "[/] gone"})
    printed = capsys.readouterr().out
    assert [words for words in ("d/x[/bar].mp4", "d/[bold].mp4", "[/] gone") if words not in printed] == []
