"""The index from an MP4 file's own tables: equal to the packet scan, or not used; and what it saves in bytes read."""

from __future__ import annotations

import tarfile
from dataclasses import fields
from pathlib import Path

import av
import numpy as np
import pytest

from featurestore.clips import Clip
from mervcache.errors import MediaError
from pipeline.decode import pyav
from pipeline.decode.container import open_video
from pipeline.decode.decoders import decode_clip
from pipeline.decode.packet_index import PacketIndex, index_from_tables, read_moov, scan_packets
from pipeline.decode.pyav import read_frames
from pipeline.decode.sampling import DecodeJob, FrameCollector
from pipeline.media import Source
from pipeline.views import ResizeRule, View

VIEW = View(rule=ResizeRule(size=224), num_frames=32)
GOP_12 = {"g": "12", "x264-params": "b-adapt=0:bframes=3"}
OPEN_GOP = {"x264-params": "keyint=12:min-keyint=12:open-gop=1:bframes=3:b-adapt=0:scenecut=0"}
HEVC = {"x265-params": "log-level=none:keyint=12:bframes=3:pools=none:frame-threads=1"}
SLOWING = np.cumsum([0, *[20] * 30, *[120] * 29]).tolist()  # ms


def both_indexes(path: Path) -> tuple[PacketIndex | None, PacketIndex]:
    source = Source.find(str(path.parent), path.name)
    with source.open() as file:
        moov = read_moov(file)
    with open_video(source) as video:
        return None if moov is None else index_from_tables(video, moov), scan_packets(video)


def assert_equal(tables: PacketIndex, scanned: PacketIndex) -> None:
    for field in fields(PacketIndex):
        assert np.array_equal(getattr(tables, field.name), getattr(scanned, field.name)), field.name


FILMS = {
    "b_frames.mp4": {"options": {"g": "250", "x264-params": "b-adapt=0:bframes=3"}},
    "open_gop.mp4": {"options": OPEN_GOP},
    "no_b_frames.mp4": {"options": {"g": "12", "bf": "0"}},
    "intra.mp4": {"options": {"g": "1"}},
    "uneven.mp4": {"options": GOP_12, "pts": SLOWING},
    "tables_first.mp4": {"options": GOP_12, "muxing": {"movflags": "faststart"}},
    "negative_offsets.mp4": {"options": GOP_12, "muxing": {"movflags": "negative_cts_offsets"}},
    "quicktime.mov": {"options": GOP_12},
    "no_edit_list.mp4": {"options": GOP_12, "muxing": {"use_editlist": "0"}},
    "hevc.mp4": {"codec": "libx265", "options": HEVC},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "prores.mov": {"codec": "prores", "pixels": "yuv422p10le"},
    "vp9.mp4": {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime"}},
    "one_frame.mp4": {"frames": 1},
}


@pytest.mark.parametrize("name", FILMS)
def test_tables_give_the_index_that_the_packets_give(name, studio) -> None:
    tables, scanned = both_indexes(studio.film(name, **FILMS[name]))
    assert tables is not None
    assert_equal(tables, scanned)


def test_hidden_frames_of_a_cut_clip_are_in_the_tables(studio) -> None:
    whole = studio.film("a.mp4", options={"g": "250", "x264-params": "b-adapt=0:bframes=3"})
    tables, scanned = both_indexes(studio.remux(whole, "cut.mp4", shift=-20 * 512))
    assert tables is not None
    assert (~tables.is_shown).sum() == 20
    assert_equal(tables, scanned)


def test_every_real_file_has_tables_equal_to_its_packets_or_is_scanned(real_media) -> None:
    folders = [real_media / "hazard_clips", real_media / "videollava_mini" / "videochatgpt_tune"]
    paths = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in (".mp4", ".mov")]
    assert len(paths) == 37
    for path in paths:
        tables, scanned = both_indexes(path)
        assert tables is not None, path.name
        assert_equal(tables, scanned)


UNTRUSTED = {
    "fragmented.mp4": lambda studio: studio.film(
        "fragmented.mp4", options=GOP_12, muxing={"movflags": "frag_keyframe+empty_moov"}
    ),
    "matroska named as MP4": lambda studio: studio.film("a.mp4", options=GOP_12, container="matroska"),
    "edit list that drops samples": lambda studio: studio.remux(
        studio.film("a.mp4", options=GOP_12), "cut.mp4", shift=-20 * 512
    ),
    "more samples in the time table than there are": lambda studio: studio.patched(
        studio.film("a.mp4", options=GOP_12), "b.mp4", b"stts", 8, b"\0\0\1\0"
    ),
    "offsets of fewer samples than there are": lambda studio: studio.patched(
        studio.film("a.mp4", options=GOP_12), "b.mp4", b"ctts", 4, b"\0\0\0\1"
    ),
    "cut off behind its tables": lambda studio: studio.bytes(
        "b.mp4",
        studio.film("a.mp4", options=GOP_12, muxing={"movflags": "faststart"}).read_bytes()[:-40],
    ),
}


@pytest.mark.parametrize("name", UNTRUSTED)
def test_tables_are_not_used_for(name, studio) -> None:
    tables, _ = both_indexes(UNTRUSTED[name](studio))
    assert tables is None


def test_a_file_cut_off_behind_its_tables_keeps_its_reason(studio) -> None:
    with pytest.raises(MediaError, match=r"^damaged file: a packet is corrupt$"):
        decode_clip(studio.job(UNTRUSTED["cut off behind its tables"](studio)))


@pytest.mark.parametrize("cut", range(0, 60, 4))
def test_moov_cut_anywhere_is_no_table(cut, studio) -> None:
    path = studio.film("a.mp4", frames=2, muxing={"movflags": "faststart"})
    data = path.read_bytes()
    with open(studio.bytes("b.mp4", data[: data.index(b"moov") - 4 + cut]), "rb") as file:
        assert read_moov(file) is None


def test_packets_are_not_scanned_where_tables_are_trusted(studio, monkeypatch) -> None:
    path = studio.film("a.mp4", options=GOP_12)
    expected = studio.numbers(decode_clip(studio.job(path)))
    monkeypatch.setattr(pyav, "scan_packets", lambda _: pytest.fail("packets were scanned"))
    assert studio.numbers(decode_clip(studio.job(path))) == expected == np.linspace(0, 59, 32, dtype=int).tolist()


@pytest.mark.parametrize("column", ["pts", "is_key", "is_shown"])
def test_tables_that_packets_contradict_give_way_to_the_scan(column, studio, monkeypatch) -> None:
    """The third entry is wrong; the packets that decode the first frames are compared with it."""
    path = studio.film("a.mp4", options=GOP_12)

    def contradicted(video, moov):
        index = index_from_tables(video, moov)
        values = getattr(index, column)
        values[3] = ~values[3] if values.dtype == bool else values[3] + 7
        return index

    scans = []
    monkeypatch.setattr(pyav, "index_from_tables", contradicted)
    monkeypatch.setattr(pyav, "scan_packets", lambda video: scans.append(1) or scan_packets(video))
    decoded = decode_clip(studio.job(path))
    assert len(scans) == 1
    assert decoded.decoder == "frames/1"
    assert studio.numbers(decoded) == np.linspace(0, 59, 32, dtype=int).tolist()


def test_every_hazard_clip_is_read_as_by_the_ffmpeg_program(real_media) -> None:
    """Another build of FFmpeg that decodes from the start to the end."""
    for path in sorted((real_media / "hazard_clips").iterdir()):
        clip = Clip(dataset="d", path=path.name, kind="video")
        outcomes = []
        for decoder in ("frames/1", "ffmpeg"):
            try:
                job = DecodeJob(root=str(path.parent), clip=clip, views=(VIEW,), decoder=decoder)
                outcomes.append(decode_clip(job).frames[VIEW])
            except MediaError:
                outcomes.append(np.zeros(0))
        assert np.array_equal(*outcomes), path.name
        assert outcomes[0].size or path.name == "decord_corrupted.mp4"


def bytes_read() -> int:
    """What this process has read by system calls, cached or not."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


@pytest.fixture(scope="module")
def ten_minutes(shared_studio) -> Path:
    """600 s at 5 frames per second: noise that fills 20 MB, a keyframe every 6 s."""
    path, part = shared_studio.folder / "long.mp4", shared_studio.folder / "part.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (300, 96, 192, 3), dtype=np.uint8)
    with av.open(str(part), "w") as output:
        stream = output.add_stream("libx264", rate=5, options={"g": "30", "preset": "ultrafast", "crf": "30"})
        stream.width, stream.height, stream.pix_fmt = 192, 96, "yuv420p"
        for frame_HWC in noise:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        output.mux(stream.encode(None))
    with av.open(str(path), "w") as output:
        stream = None
        for copy in range(10):
            with av.open(str(part)) as original:
                video = original.streams.video[0]
                stream = stream or output.add_stream_from_template(video)
                shift = round(copy * 60 / video.time_base)
                for packet in original.demux(video):
                    if packet.size:
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                        output.mux(packet)
    return path


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="bytes are counted by Linux")
@pytest.mark.parametrize("num_frames", [8, 16])
@pytest.mark.parametrize("is_in_tar", [False, True])
def test_a_long_file_is_not_read_whole(num_frames, is_in_tar, ten_minutes) -> None:
    path = ten_minutes.name
    if is_in_tar:
        path = f"long.tar/{ten_minutes.name}"
        with tarfile.open(ten_minutes.with_suffix(".tar"), "w") as tar:
            tar.add(ten_minutes, ten_minutes.name)
    job = DecodeJob(
        root=str(ten_minutes.parent),
        clip=Clip(dataset="d", path=path, kind="video"),
        views=(View(rule=ResizeRule(size=16), num_frames=num_frames),),
    )
    source, shares = Source.find(job.root, path), []
    for _ in range(2):  # the first one also reads code
        before, collector = bytes_read(), FrameCollector(job)
        reading = read_frames(source, collector, accept_damaged=False)
        shares.append((bytes_read() - before) / source.num_bytes)
    assert (reading.num_frames, reading.decoder) == (3000, "frames/1")
    # at most one of the 100 groups per frame, and what FFmpeg reads to open the file
    assert shares[1] < num_frames / 100 + 0.05
