"""From when on a touched file is suspect: the store's journal tells which run made which block."""

from __future__ import annotations

import os

import pytest

from featurestore.clips import Clip
from featurestore.records import driver_runs
from featurestore.writer import StoreWriter
from pipeline.media import Source, newest_touch_s
from pipeline.media_cache import MediaCache
from pipeline.plan import StoreView
from pipeline.refresh import CLOCK_SLACK_S, RunStarts, _file_touch_s, _NewestRows
from pipeline.summary import ExtractSummary
from pipeline.worker.reports import BlockReport, EncoderWork

ROWS = 4


@pytest.fixture
def store(tmp_path) -> StoreWriter:
    made = StoreWriter.open_or_create(tmp_path / "s.zarr", block_rows={"video": ROWS, "image": ROWS})
    made.add_clips(Clip(dataset="d", path=f"{n}.mp4", kind="video") for n in range(3 * ROWS))
    return made


def note(store: StoreWriter, name: str, started: float, **record) -> None:
    store.journal(f"{name}-driver", run_of(started) | record)


def run_of(started: float) -> dict:
    summary = {"run": "r", "clips": 0, "failed": 0, "bytes": 0, "elapsed_s": 0.0, "stage_s": {}}
    return {"started": started, "root": "r", "encoders": {}, "summary": summary, "config": {"dataset": "d"}}


def suspect_from(store: StoreWriter, *rows: int) -> float:
    rows_by_encoder = {f"e{n}": _NewestRows(row, -1) for n, row in enumerate(rows)}
    return RunStarts(StoreView(store)).unchanged_before("video", rows_by_encoder) + CLOCK_SLACK_S


def test_a_clip_is_as_old_as_the_earliest_run_of_its_blocks(store):
    note(store, "one", 100.0, blocks={"video": [[0, 1]]})
    note(store, "two", 200.0, blocks={"video": [[0, 2]]})
    assert suspect_from(store, 1) == 100  # another encoder's block 0 may be of run two
    assert suspect_from(store, 5) == 200
    assert suspect_from(store, 5, 3) == 100


def test_blocks_of_no_run_in_the_journal_are_suspect_from_the_beginning(store):
    assert suspect_from(store, 1) == 0
    note(store, "one", 100.0, blocks={"video": [[0, 1]]})  # whoever made block 1 was killed
    assert suspect_from(store, 5) == 0


def test_runs_of_versions_that_noted_no_blocks_count_for_all_that_are_unknown(store):
    note(store, "old", 50.0)
    note(store, "new", 100.0, blocks={"video": [[1, 2]]})
    assert (suspect_from(store, 1), suspect_from(store, 5)) == (50, 100)


def test_the_blocks_of_the_stores_that_a_union_was_laid_from_are_not_its_own(store):
    note(store, "a", 300.0, blocks={"video": [[0, 1]]})
    note(store, "b", 200.0, blocks={"video": [[0, 3]]})
    store.journal("combine-0123456789ab", {"combined from": []})
    assert suspect_from(store, 1) == suspect_from(store, 9) == 200


@pytest.mark.parametrize(
    "blocks", [{"video": [[0, 10**15], [5], "x", [1, "2"], [-3, 2], [True, 2]]}, [], "x", {"video": 3}]
)
def test_a_strangers_journal_makes_no_error_and_no_array_of_its_size(store, blocks):
    note(store, "one", 100.0, blocks=blocks)
    assert suspect_from(store, 9) in (0, 100)


NO_RUNS = (
    {"started": None},
    {"started": "now"},
    {"encoders": [1]},
    {"encoders": {"a": 1}},
    {"root": 1},
    {"config": {}},
)


@pytest.mark.parametrize("change", NO_RUNS)
def test_what_is_no_record_of_a_run_is_left_aside(store, change):
    note(store, "one", 100.0)
    store.journal("two-driver", run_of(200.0) | change)
    assert [run["started"] for run in driver_runs(store.objects)] == [100.0]


def test_the_record_of_a_run_names_its_blocks_as_spans():
    summary = ExtractSummary(store="", run="")
    counts = dict.fromkeys(("clips", "failed", "frames", "bytes", "reused", "halvings"), 0)
    made = {"x": EncoderWork(clips=2, seconds=0.5, bytes=8)}
    for kind, number in (("video", 4), ("video", 2), ("image", 0), ("video", 3), ("video", 7), ("video", 3)):
        summary.add(BlockReport(kind=kind, block=number, made=made, reasons={}, seconds={}, **counts))
    assert summary.block_spans == {"image": [[0, 1]], "video": [[2, 5], [7, 8]]}
    assert summary.to_dict()["made"]["video/x"] == {"clips": 10, "seconds": 2.5, "bytes": 40}
    assert "blocks_of" not in summary.to_dict()


def test_a_link_put_on_another_file_is_touched_though_the_file_is_old(tmp_path):
    (tmp_path / "old.mp4").write_bytes(b"old")
    (tmp_path / "clip.mp4").symlink_to("old.mp4")
    os.utime(tmp_path / "clip.mp4", (4e9, 4e9), follow_symlinks=False)
    assert _file_touch_s(str(tmp_path), "clip.mp4") == 4e9
    assert _file_touch_s(str(tmp_path), ".") is None
    assert _file_touch_s(str(tmp_path), "absent.mp4") is None


def test_a_folder_of_frames_is_remembered_until_one_of_them_is_touched(tmp_path):
    (tmp_path / "frames").mkdir()
    for number in range(3):
        (tmp_path / "frames" / f"{number}.png").write_bytes(b"%d" % number)
    with MediaCache(tmp_path / "m.sqlite") as cache:
        source = Source.find(str(tmp_path), "frames")
        assert newest_touch_s(source) > 0
        assert cache.known(source) is None
        assert cache.sha256(source) == source.sha256()
    with MediaCache(tmp_path / "m.sqlite") as cache:
        assert cache.known(source) == source.sha256()
        os.utime(tmp_path / "frames" / "1.png", (5, 5))
        assert cache.known(source) is None


def test_a_memory_that_is_no_database_remembers_nothing_and_ends_nothing(tmp_path):
    (tmp_path / "m.sqlite").write_bytes(b"no database at all" * 100)
    (tmp_path / "a.mp4").write_bytes(b"a")
    source = Source.find(str(tmp_path), "a.mp4")
    with MediaCache(tmp_path / "m.sqlite") as cache:
        assert cache.sha256(source) == source.sha256()
