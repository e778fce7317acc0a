"""One folder with every kind of broken media: a reason each, the neighbours as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import zlib
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from featurestore import FeatureStore, verify_store
from mervcache.errors import MediaError, RunStoppedError, UserError
from pipeline.decode.pool import DecodePool
from pipeline.media import DENIED_REASON
from pipeline.worker.block import extract_block
from pipeline.worker.engine import close_engines, engine_for

pytestmark = pytest.mark.slow

MOODY = (sys.executable, "-P", str(Path(__file__).with_name("moody_worker.py")))
ENCODERS = ("languagebind", "siglip")
FILM = ("libx264", 20, Fraction(10), 64, 48)


def cut_off(lab, path: Path) -> None:
    data = film_bytes(lab, path, options="+faststart")
    path.write_bytes(data[: len(data) * 2 // 3])


def film_bytes(lab, path: Path, options: str = "") -> bytes:
    """A whole film; with its index in front on request, so that cutting it off leaves something to read."""
    lab.film(path, *FILM)
    if options:
        moved = path.with_name("moved.mp4")
        with av.open(str(path)) as source, av.open(str(moved), "w", options={"movflags": options}) as copy:
            stream = copy.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    copy.mux(packet)
        moved.replace(path)
    return path.read_bytes()


def sound_alone(lab, path: Path) -> None:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        output.mux(stream.encode(sound))
        output.mux(stream.encode(None))


def too_many_samples(lab, path: Path) -> None:
    """The table of sample sizes declares 4,000 samples and lists 20: FFmpeg then ignores all of it."""
    data = bytearray(film_bytes(lab, path))
    at = data.index(b"stsz") + 12
    assert struct.unpack(">I", data[at : at + 4]) == (FILM[1],)
    data[at : at + 4] = struct.pack(">I", 4000)
    path.write_bytes(data)


def huge_frames(lab, path: Path) -> None:
    """Motion JPEG whose pictures say that they are 16,000 pixels wide and high."""
    with av.open(str(path), "w", format="avi") as output:
        stream = output.add_stream("mjpeg", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for _ in range(6):
            output.mux(stream.encode(av.VideoFrame(64, 48, "yuvj420p")))
        output.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    at, patched = data.find(b"\xff\xc0\x00\x11"), 0
    while at >= 0:
        data[at + 5 : at + 9] = struct.pack(">HH", 16000, 16000)
        at, patched = data.find(b"\xff\xc0\x00\x11", at + 1), patched + 1
    assert patched == 6
    at = data.index(b"strf") + 12  # behind its name, its size, and the size of the picture's header
    assert struct.unpack("<ii", data[at : at + 8]) == (64, 48)
    data[at : at + 8] = struct.pack("<ii", 16000, 16000)
    path.write_bytes(data)


def huge_png(lab, path: Path) -> None:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b""))
    data = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def link_out(lab, path: Path) -> None:
    outside = lab.folder / "outside.mp4"
    lab.film(outside, *FILM)
    path.symlink_to(outside)


def picture(lab, path: Path) -> None:
    Image.new("RGB", (30, 20), (200, 10, 10)).save(path, format="PNG")


def whole_film(lab, path: Path) -> None:
    lab.film(path, *FILM)


# name -> what makes it, and the one reason that it is quarantined for
BROKEN = {
    "valley/cut_off.mp4": (cut_off, "damaged file: a packet is corrupt"),
    "valley/empty.mp4": (lambda lab, path: path.write_bytes(b""), "media file is empty"),
    "valley/sound.mp4": (sound_alone, "file has no video stream"),
    "valley/words.mp4": (lambda lab, path: path.write_text("this is not a video" * 99), "not a video: Invalid data"),
    "valley/picture.mp4": (picture, "not a video: the file is a still image"),
    "valley/too_many.mp4": (too_many_samples, "video holds no frames"),
    "valley/huge.mp4": (huge_frames, "frames are larger than 67108864 pixels"),
    "valley/link.mp4": (whole_film, "media path leads out of the dataset root through a symbolic link"),
    "valley/hang.mp4": (whole_film, "decoding timed out twice"),
    "valley/crash.mp4": (whole_film, "decoder crashed: signal SIGSEGV"),
    "valley/gone.mp4": (whole_film, "media file is missing"),
    "llava_image/huge.png": (huge_png, "image is larger than Pillow's limit"),
    "llava_image/words.jpg": (lambda lab, path: path.write_text("no picture"), "not an image in a known format"),
    "llava_image/cut_off.png": (
        lambda lab, path: (picture(lab, path), path.write_bytes(path.read_bytes()[:50])),
        "damaged image",
    ),
}
UNSAFE = ("../outside.mp4", "/etc/hostname", "valley/../../outside.mp4", "file:///etc/hostname\0.mp4")


def woven(good: list[str], bad: list[str]) -> list[str]:
    """Good and bad clips in turn, so that a batch holds both."""
    pairs = [name for pair in zip(bad, good * len(bad), strict=False) for name in pair]
    return list(dict.fromkeys(pairs + good))


@pytest.fixture(scope="module")
def broken(media_root, extracted, tmp_path_factory):
    """(lab of the broken folder, its summary, lab of the same rows with every file whole)."""
    labs = []
    for name in ("broken", "whole"):
        lab = type(extracted)(media_root, tmp_path_factory.mktemp(name))
        lab.copy_of_root()
        for path in BROKEN:
            (lab.root / path).parent.mkdir(exist_ok=True)
            if path.endswith(".mp4"):
                whole_film(lab, lab.root / path)
            else:
                picture(lab, lab.root / path)
        videos = woven(list(lab.VIDEOS), [path for path in BROKEN if path.endswith(".mp4")])
        images = woven(list(lab.IMAGES), [path for path in BROKEN if not path.endswith(".mp4")])
        lab.annotate(lab.root, videos, images)
        labs.append(lab)
    spoilt, whole = labs
    for path, (make, _) in BROKEN.items():
        (spoilt.root / path).unlink()
        make(spoilt, spoilt.root / path)
    add_unsafe_records(spoilt.root)
    whole.extract(encoders=ENCODERS)
    settings = {"encoders": ENCODERS, "decode_timeout_s": 1.5, "decode_processes": 2}
    spoilt.plan(**settings)
    (spoilt.root / "valley/gone.mp4").unlink()  # between planning and decoding, as the next two lines
    (spoilt.root / "valley/link.mp4").unlink()
    link_out(spoilt, spoilt.root / "valley/link.mp4")
    engine = engine_for(spoilt.config(**settings).engine_settings)
    engine.pool.close()
    engine.pool = DecodePool(2, timeout_s=1.5, worker_command=MOODY)
    summary = spoilt.extract(**settings)
    close_engines()
    return spoilt, summary, whole


def add_unsafe_records(root: Path) -> None:
    file = root / "videochatgpt_llavaimage_tune.json"
    records = json.loads(file.read_text())
    turns = records[0]["conversations"]
    records += [{"id": f"u{n}", "video": path, "conversations": turns} for n, path in enumerate(UNSAFE)]
    file.write_text(json.dumps(records))


def test_each_broken_clip_has_one_row_per_encoder_in_the_quarantine_with_its_one_reason(broken):
    lab, summary, _ = broken
    quarantine = FeatureStore.open(lab.store).quarantine.to_pylist()
    assert sorted((row["path"], row["encoder"]) for row in quarantine) == sorted(
        (path, encoder) for path in BROKEN for encoder in ENCODERS
    )
    for path, (_, reason) in BROKEN.items():
        found = {row["reason"] for row in quarantine if row["path"] == path}
        assert len(found) == 1
        assert found.pop().startswith(reason), path
    assert {row["scope"] for row in quarantine} == {"clip"}
    assert summary.failed == len(BROKEN)
    assert sum(summary.reasons.values()) == len(BROKEN)


def test_a_reason_names_no_path_of_this_machine(broken):
    lab, *_ = broken
    for row in FeatureStore.open(lab.store).quarantine.to_pylist():
        assert str(lab.folder) not in row["reason"]
        assert "/" not in row["reason"], row


def test_every_other_clip_is_committed_with_the_bytes_it_has_beside_whole_files(broken):
    lab, _, whole = broken
    spoilt_store, whole_store = FeatureStore.open(lab.store), FeatureStore.open(whole.store)
    good = [f"videollava/{path}" for path in (*lab.VIDEOS, *lab.IMAGES)]
    for name in ENCODERS:
        assert set(spoilt_store.clips.filter(spoilt_store.clips[name])["clip_id"].to_pylist()) == set(good)
        for clip in good:
            assert spoilt_store.rows([clip], encoder=name) == whole_store.rows([clip], encoder=name)
        spoilt_tokens, whole_tokens = (s.read(good, encoder=name) for s in (spoilt_store, whole_store))
        assert np.array_equal(spoilt_tokens, whole_tokens)
    assert verify_store(lab.store, "full") == []


def test_paths_that_leave_the_root_are_refused_and_counted_and_never_become_clips(broken):
    lab, summary, _ = broken
    linked = {"a linked file whose target is outside the root": 1}  # listed again, after it became a link
    assert summary.rejected == {"media path is unsafe": len(UNSAFE), **linked}
    paths = FeatureStore.open(lab.store).clips["path"].to_pylist()
    assert not set(UNSAFE) & set(paths)


def test_a_count_that_lies_while_every_frame_is_there_fails_nothing(lab):
    """The clock's table claims 65,536 samples; the frames are found by their own times."""
    lab.copy_of_root()
    path = lab.root / "videochatgpt_tune/v0.mp4"
    before = lab.extract(encoders=("siglip",), limit=1, store=lab.folder / "before.zarr")
    data = bytearray(path.read_bytes())
    at = data.index(b"stts") + 12
    data[at : at + 4] = struct.pack(">I", 65536)
    path.write_bytes(data)
    after = lab.extract(encoders=("siglip",), limit=1)
    assert (before.failed, after.failed) == (0, 0)
    ids = ["videollava/videochatgpt_tune/v0.mp4"]
    tokens = [FeatureStore.open(s).read(ids, encoder="siglip") for s in (lab.store, lab.folder / "before.zarr")]
    assert np.array_equal(*tokens)


def test_media_that_are_absent_are_counted_by_folder_and_join_when_they_appear(lab):
    lab.copy_of_root()
    hidden = lab.root / "valley-hidden"
    (lab.root / "valley").rename(hidden)
    summary = lab.extract(encoders=("siglip",))
    assert (summary.clips, summary.failed, summary.missing) == (10, 0, {"valley": 4})
    hidden.rename(lab.root / "valley")
    summary = lab.extract(encoders=("siglip",))
    assert (summary.clips, summary.failed, summary.missing) == (4, 0, {})


def test_when_all_media_vanish_the_run_stops_and_nothing_is_quarantined(lab):
    lab.copy_of_root()
    *_, tasks = lab.plan(encoders=("siglip",))
    for path in (*lab.VIDEOS, *lab.IMAGES):
        (lab.root / path).unlink()
    with pytest.raises(RunStoppedError, match=r"all 4 media files of a block .*mount the share again"):
        extract_block(tasks[0])
    assert not list(lab.store.glob("receipts/*/*/*"))
    with pytest.raises(UserError, match=r"lists no clip under .*\n.*absent: media of 5 clips"):
        lab.extract(encoders=("siglip",))


def test_when_a_folder_of_media_is_unmounted_the_run_stops_though_others_are_there(lab):
    """Block 1 of the films holds one of videochatgpt_tune and three of valley."""
    lab.copy_of_root()
    *_, tasks = lab.plan(encoders=("siglip",))
    for file in (lab.root / "valley").iterdir():
        file.unlink()
    with pytest.raises(RunStoppedError, match=r"the folder of valley/v5.mp4 under .* is missing or empty"):
        extract_block(tasks[1])
    assert not list(lab.store.glob("receipts/*/*/*"))


def test_media_that_a_worker_may_not_read_are_no_broken_clips(lab, monkeypatch):
    """A node whose account lacks the group's rights; root may read everything, so the refusal itself is made up."""

    def refuse(self, job):
        future = Future()
        future.set_exception(MediaError(DENIED_REASON))
        return future

    def deny(root, path):
        raise MediaError(DENIED_REASON)

    *_, tasks = lab.plan(encoders=("siglip",))
    monkeypatch.setattr(DecodePool, "submit", refuse)
    monkeypatch.setattr("pipeline.worker.block.resolve_media", deny)
    with pytest.raises(RunStoppedError, match=r"all 4 media files .* or may not be read by this worker"):
        extract_block(tasks[0])
    assert not list(lab.store.glob("receipts/*/*/*"))


def test_when_the_root_is_empty_the_run_stops_and_nothing_is_quarantined(lab):
    lab.copy_of_root()
    *_, tasks = lab.plan(encoders=("siglip",))
    shutil.rmtree(lab.root)
    lab.root.mkdir()
    with pytest.raises(RunStoppedError, match=r"dataset root .* is empty; check that its disk is mounted"):
        extract_block(tasks[0])
    assert not list(lab.store.glob("receipts/*/*/*"))


def test_a_run_in_which_most_clips_fail_stops_with_the_commonest_reason(lab):
    lab.copy_of_root()
    names = [f"valley/no{number}.mp4" for number in range(40)]
    for name in names:
        (lab.root / name).write_text("not a film")
    lab.annotate(lab.root, names, [])
    with pytest.raises(RunStoppedError, match=r"of \d+ clips failed, more than --max-failed 0.5: \d+ x not a video"):
        lab.extract(encoders=("siglip",))
    assert lab.extract(encoders=("siglip",), max_failed=1.0).failed < 40  # what was quarantined stays so
