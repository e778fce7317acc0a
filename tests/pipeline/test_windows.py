"""Videos extracted as windows: what is stored, what stays as it was, and what a bad window costs."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from featurestore import FeatureStore, verify_store
from featurestore.maintenance.tombstone import tombstone
from featurestore.transfer.export import ExportCells, export
from featurestore.transfer.merge import StoreCells, combine
from featurestore.transfer.selection import Selection
from mervcache.errors import ClipUnavailableError, IdentityConflictError, UserError
from pipeline.config import ExtractConfig
from pipeline.datasets import list_clips
from pipeline.media import Source
from pipeline.media_cache import MediaCache
from pipeline.status import inspect_store
from pipeline.worker.block import extract_block

TWO = ("siglip", "vivit")  # 16 and 32 frames
WINDOWS = {"fps": 8, "window": 4}  # half a second each
V3 = "videollava/videochatgpt_tune/v3.mp4"  # 77 frames at 29.97 per second: 2.57 s


@pytest.fixture(scope="module")
def windowed(media_root, tmp_path_factory):
    from tests.pipeline.conftest import Lab

    lab = Lab(media_root, tmp_path_factory.mktemp("windowed"))
    lab.summary = lab.extract(encoders=TWO, **WINDOWS)
    return lab


def test_a_video_is_stored_as_windows_that_read_back_in_their_order(windowed):
    store = FeatureStore.open(windowed.store)
    assert {name: identity.frame_rule for name, identity in store.encoders.items()} == {
        "siglip": "rate-32x16",
        "vivit": "rate-64x32",
    }
    windows = store.windows(V3, encoder="siglip")
    assert windows["start_s"].to_pylist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert windows["end_s"].to_pylist() == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert windows["window"].to_pylist() == list(range(6))
    assert all(windows["has_tokens"].to_pylist())
    for name in TWO:
        tokens = store.read_windows(V3, encoder=name)
        assert tokens.shape == (6, 8, 3, 3, 32)
        assert np.array_equal(tokens, store.read(windows["clip_id"].to_pylist(), encoder=name))
        assert len({row.tobytes() for row in tokens}) == 6  # the block in the picture moves
        assert np.array_equal(store.read_windows(V3, encoder=name, limit=2), tokens[[1, 4]])
        assert store.read_windows(V3, encoder=name, frames=slice(0, 2), dtype="float32").shape == (6, 2, 3, 3, 32)
    assert verify_store(windowed.store, "full") == []


def test_every_video_ends_in_its_last_window_and_images_are_as_ever(windowed):
    store, seconds = FeatureStore.open(windowed.store), {}
    for path, (_, frames, rate, _, _) in windowed.VIDEOS.items():
        seconds[path] = float(frames / rate)
    expected = {f"videollava/{path}": max(1, int(np.ceil(s / 0.5 - 1e-9))) for path, s in seconds.items()}
    found = {video: store.windows(video, encoder="siglip").num_rows for video in expected}
    assert found == expected
    assert windowed.summary.clips == sum(expected.values()) + len(windowed.IMAGES)
    images = store.clips.filter(np.array(store.clips["kind"].to_pylist()) == "image")["clip_id"].to_pylist()
    assert images == [f"videollava/{path}" for path in windowed.IMAGES]
    assert store.read(images, encoder="siglip").shape == (5, 8, 3, 3, 32)


def test_samples_go_on_naming_the_video(windowed, extracted):
    assert FeatureStore.open(windowed.store).samples() == FeatureStore.open(extracted.store).samples()


def test_the_same_command_again_does_nothing(windowed):
    before = windowed.hashes(windowed.store)
    summary = windowed.extract(encoders=TWO, **WINDOWS)
    assert (summary.clips, summary.blocks) == (0, 0)
    assert windowed.hashes(windowed.store) == before


@contextmanager
def opened_files(root: Path) -> Iterator[list[str]]:
    """Names of the files below `root` that any process opens in the block, filled at its end (inotify)."""
    libc = ctypes.CDLL(None, use_errno=True)
    events, names = libc.inotify_init1(os.O_NONBLOCK), []
    assert events >= 0
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        assert libc.inotify_add_watch(events, os.fsencode(folder), 0x20) >= 0  # IN_OPEN
    try:
        yield names
        with suppress(BlockingIOError):
            while data := os.read(events, 1 << 16):
                while data:
                    _, mask, _, length = struct.unpack_from("iIII", data)
                    if not mask & 0x40000000:  # IN_ISDIR: a listed folder
                        names.append(os.fsdecode(data[16 : 16 + length].rstrip(b"\0")))
                    data = data[16 + length :]
    finally:
        os.close(events)


def test_a_repeated_run_opens_no_video_that_was_not_touched(lab):
    lab.copy_of_root()
    videos = {path.name for path in lab.root.rglob("*.mp4")}
    with opened_files(lab.root) as opened:
        first = list_clips(lab.config(encoders=TWO, **WINDOWS))
    assert videos <= set(opened)
    with opened_files(lab.root) as opened:
        assert list_clips(lab.config(encoders=TWO, **WINDOWS)) == first
    assert not videos & set(opened)

    lab.film(lab.root / "videochatgpt_tune/v3.mp4", "libx264", 30, 25, 48, 48)  # 1.2 s in place of 2.57 s
    with opened_files(lab.root) as opened:
        again = list_clips(lab.config(encoders=TWO, **WINDOWS))
    assert videos & set(opened) == {"v3.mp4"}
    assert (len(first.videos[V3]), len(again.videos[V3])) == (6, 3)


def test_a_removed_video_leaves_no_length_behind(lab):
    lab.copy_of_root()
    list_clips(lab.config(encoders=TWO, **WINDOWS))
    source = Source.find(str(lab.root), "videochatgpt_tune/v3.mp4")
    with MediaCache() as cache:
        assert cache.known_length_s(source) == pytest.approx(2.57, abs=0.01)
        cache.forget([os.path.realpath(lab.root / source.path)])
        assert cache.known_length_s(source) is None


def test_whole_clips_and_windows_are_two_identities(windowed):
    with pytest.raises(IdentityConflictError, match="rate-32x16"):
        windowed.extract(encoders=TWO)
    with pytest.raises(IdentityConflictError, match="rate-32x16"):
        windowed.extract(encoders=TWO, fps=4, window=4)


def test_an_interrupted_run_goes_on_to_the_same_bytes(lab, windowed):
    _, _, tasks = lab.plan(encoders=TWO, **WINDOWS)
    extract_block(tasks[1])
    lab.extract(encoders=TWO, **WINDOWS)
    assert lab.hashes(lab.store) == windowed.hashes(windowed.store)


def test_a_window_that_cannot_be_decoded_costs_itself_alone(lab):
    lab.copy_of_root()
    path = lab.root / "videochatgpt_tune/v3.mp4"
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 8
    span = slice(at + (len(data) - at) // 2, at + (len(data) - at) // 2 + 400)
    data[span] = bytes(400)
    path.write_bytes(bytes(data))
    (lab.root / "valley/v5.mp4").write_bytes(b"no film")
    summary = lab.extract(encoders=("siglip",), kind="video", **WINDOWS)
    store = FeatureStore.open(lab.store)
    has_tokens = store.windows(V3, encoder="siglip")["has_tokens"].to_pylist()
    failed = len(has_tokens) - sum(has_tokens)
    assert 0 < failed < len(has_tokens)
    assert summary.failed == failed + 1  # of v5 the first window stands for all: its length is unknown
    assert store.windows("videollava/valley/v5.mp4", encoder="siglip")["has_tokens"].to_pylist() == [False]
    with pytest.raises(ClipUnavailableError, match="no committed tokens"):
        store.read_windows(V3, encoder="siglip")
    assert len(store.read_windows(V3, encoder="siglip", skip_failed=True)) == sum(has_tokens)


def test_videos_in_tar_shards_have_windows_too(lab):
    lab.root = lab.folder / "shards"
    lab.root.mkdir()
    with tarfile.open(lab.root / "0.tar", "w") as archive:
        for number in range(2):
            film = lab.film(lab.folder / f"{number}.mp4", "libx264", 30, 25, 48, 48)
            archive.add(film, f"{number}.mp4")
    lab.extract(dataset="webdataset", encoders=("siglip",), **WINDOWS)
    store = FeatureStore.open(lab.store)
    assert store.read_windows("webdataset/0.tar/1.mp4", encoder="siglip").shape == (3, 8, 3, 3, 32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fps": 0.0}, "above 0"),
        ({"fps": 0.12345678}, "6 decimals"),
        ({"window": 8}, "give fps too"),
        ({"fps": 1.0, "window": 0}, "from 1"),
        ({"fps": 1.0, "frame_rule": "linspace-16"}, "leave one of them out"),
        ({"frame_rule": "rate-1x16"}, "--fps 1 --window 16"),
    ],
)
def test_settings_that_make_no_windows_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        ExtractConfig(dataset="demo", encoders="dinov2", **wrong)


def test_an_encoder_sees_its_own_number_of_frames_over_the_length_of_a_window():
    config = ExtractConfig(dataset="demo", encoders="siglip,vivit", fps=1, architecture={"siglip": {"num_frames": 8}})
    assert config.window_length == 16
    assert [settings.frame_rule for settings in config.encoder_settings] == ["rate-1/2x8", "rate-2x32"]
    assert [settings.spec.grid[0] for settings in config.encoder_settings] == [8, 16]


def test_a_video_is_inspected_and_removed_by_its_own_name(lab, windowed):
    shutil.copytree(windowed.store, lab.store)
    details = inspect_store(lab.store, "v3.mp4")
    assert details["siglip"] == "6 of 6 windows of 0.5 s have tokens"
    assert len(details["samples"]) == 1
    done = tombstone(lab.store, ["v3.mp4"], reason="consent withdrawn")
    assert len(done["clips"]) == 6
    store = FeatureStore.open(lab.store)
    assert V3 not in {sample.clip_id for sample in store.samples()}
    assert not any(store.windows(V3, encoder="siglip")["has_tokens"].to_pylist())
    assert verify_store(lab.store, "full") == []
    window = "videollava/videochatgpt_tune/v0.mp4#t=0.5,1.0"
    tombstone(lab.store, [window], reason="by mistake", all_copies=False)
    assert "videollava/videochatgpt_tune/v0.mp4" in {s.clip_id for s in FeatureStore.open(lab.store).samples()}
    tombstone(lab.store, ["v0.mp4"], reason="consent withdrawn", all_copies=False)
    assert "videollava/videochatgpt_tune/v0.mp4" not in {s.clip_id for s in FeatureStore.open(lab.store).samples()}


def test_conversations_are_copied_with_the_windows_of_their_video(lab, windowed):
    few = Selection(clips=frozenset({f"{V3}#t=0.0,0.5", f"{V3}#t=0.5,1.0"}))
    combine([StoreCells(windowed.store)], lab.store, selection=few)
    store = FeatureStore.open(lab.store)
    assert [sample.clip_id for sample in store.samples()] == [V3]
    assert store.read_windows(V3, encoder="siglip").shape[0] == 2
    export(StoreCells(windowed.store), lab.folder / "files", format="safetensors", selection=few)
    combine([ExportCells(lab.folder / "files")], lab.folder / "back.zarr")
    back = FeatureStore.open(lab.folder / "back.zarr").samples()
    assert [sample for sample in back if sample.clip_id] == store.samples()
    of_split = Selection(split="train")
    combine([StoreCells(windowed.store)], lab.folder / "split.zarr", selection=of_split)
    assert len(FeatureStore.open(lab.folder / "split.zarr")) == len(FeatureStore.open(windowed.store))
