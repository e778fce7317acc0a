"""What each decoder makes of difficult files: the default is right on every one that can be decoded at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mervcache.errors import MediaError
from pipeline.decode import container
from pipeline.decode.decoders import decode_clip
from pipeline.views import ResizeRule, View

INDEXED, SEQUENTIAL, PILLOW = "frames/1", "frames/1+sequential", "pillow"
RIGHT, WRONG, REFUSED = "right", "wrong", "refused"
FRAMES = 60
B_FRAMES = {"g": "250", "x264-params": "b-adapt=0:bframes=3"}
SHORT_GOP = {"g": "12", "x264-params": "b-adapt=0:bframes=3"}
OPEN_GOP = {"x264-params": "keyint=12:min-keyint=12:open-gop=1:bframes=3:b-adapt=0:scenecut=0"}
HEVC = {"x265-params": "log-level=none:keyint=12:min-keyint=12:bframes=3:open-gop=1:pools=none:frame-threads=1"}
CUT = -20 * 512  # ticks of 1 / 15360 s: 20 frames lie before time 0, and an edit list hides them
UNEVEN = np.cumsum(np.random.default_rng(0).integers(5, 120, FRAMES)).tolist()  # ms between frames: 5 to 119


@dataclass(frozen=True)
class Hazard:
    """A file, and what the decoders make of it."""

    film: tuple | dict  # arguments of Studio.film, or of a change to another hazard's file
    decoder: str = INDEXED  # the reader that the default decoder reports
    decord: str | None = RIGHT  # decord2 3.4.0: wrong frames come without an error
    first: int = 0  # stamp of the first frame shown
    num_frames: int = FRAMES


HAZARDS = {
    "b_frames.mp4": Hazard({"options": B_FRAMES}),
    "short_gop.mp4": Hazard({"options": SHORT_GOP}),
    "intra.mp4": Hazard({"options": {"g": "1"}}),
    "open_gop.mp4": Hazard({"options": OPEN_GOP}, decord=WRONG),
    "open_gop.mkv": Hazard({"options": OPEN_GOP}, decord=WRONG),
    "hevc.mp4": Hazard({"codec": "libx265", "options": HEVC}, decord=WRONG),
    "mpeg4.mp4": Hazard({"codec": "mpeg4", "options": {"bf": "2", "g": "12"}}, decord=WRONG),
    "mpeg4.avi": Hazard({"codec": "mpeg4", "options": {"bf": "2", "g": "12"}}, SEQUENTIAL, decord=WRONG),
    "mpeg4_no_b.avi": Hazard({"codec": "mpeg4", "options": {"g": "12"}}, SEQUENTIAL),
    "mjpeg.avi": Hazard({"codec": "mjpeg", "pixels": "yuvj420p"}, SEQUENTIAL),
    "h264.avi": Hazard({"options": B_FRAMES}, SEQUENTIAL, decord=None),  # 30 to 32 of 32 right, it varies
    "h264.ts": Hazard({"options": SHORT_GOP}, SEQUENTIAL, decord=WRONG),
    "mpeg2.mpg": Hazard({"codec": "mpeg2video", "options": {"bf": "2", "g": "12"}}, SEQUENTIAL, decord=WRONG),
    "mpeg2.ts": Hazard({"codec": "mpeg2video", "options": {"bf": "2", "g": "12"}}, SEQUENTIAL, decord=WRONG),
    "h264.mkv": Hazard({"options": SHORT_GOP}),
    "h264.flv": Hazard({"options": SHORT_GOP}, SEQUENTIAL),
    "vp9.webm": Hazard({"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime"}}),
    "vp8.webm": Hazard(
        {"codec": "libvpx", "options": {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "10", "cpu-used": "5"}},
        SEQUENTIAL,
    ),
    "raw.h264": Hazard({"options": B_FRAMES}, SEQUENTIAL, decord=REFUSED),
    "wmv2.wmv": Hazard({"codec": "wmv2"}, SEQUENTIAL, decord=WRONG),
    "prores.mov": Hazard({"codec": "prores", "pixels": "yuv422p10le"}),
    "ten_bit.mkv": Hazard({"codec": "ffv1", "pixels": "yuv420p10le"}),
    "fragmented.mp4": Hazard({"options": SHORT_GOP, "muxing": {"movflags": "frag_keyframe+empty_moov"}}),
    "uneven.mp4": Hazard({"options": B_FRAMES, "pts": UNEVEN}),
    "uneven.mkv": Hazard({"options": SHORT_GOP, "pts": UNEVEN}),
    "one_frame.mp4": Hazard({"frames": 1}, num_frames=1),
    "five_frames.mp4": Hazard({"frames": 5, "options": B_FRAMES}, num_frames=5),
    "animation.gif": Hazard({"codec": "gif", "pixels": "rgb8"}, PILLOW),
    "mkv_named.mp4": Hazard({"options": SHORT_GOP, "container": "matroska"}),
    "mp4_named.avi": Hazard({"options": SHORT_GOP, "container": "mp4"}),
    "late_start.mp4": Hazard(("remux", "short_gop.mp4", {"shift": 25 * 15360})),
    "late_start.mkv": Hazard(("remux", "h264.mkv", {"shift": 25_000})),
    "cut_long_gop.mp4": Hazard(("remux", "b_frames.mp4", {"shift": CUT}), first=20, num_frames=40, decord=WRONG),
    "cut_short_gop.mp4": Hazard(("remux", "short_gop.mp4", {"shift": CUT}), first=20, num_frames=40, decord=WRONG),
    "cut_open_gop.mp4": Hazard(("remux", "open_gop.mp4", {"shift": CUT}), first=20, num_frames=40, decord=WRONG),
    "long_duration.mp4": Hazard(("patched", "b_frames.mp4", {"box": b"mdhd", "offset": 16, "data": b"\0\1\0\0"})),
    "many_samples.mp4": Hazard(("patched", "b_frames.mp4", {"box": b"stts", "offset": 8, "data": b"\0\0\1\0"})),
}


@pytest.fixture(scope="module")
def film(shared_studio):
    """Make a hazard's file by name, once."""

    def make(name: str) -> Path:
        path, recipe = shared_studio.folder / name, HAZARDS[name].film
        if path.exists():
            return path
        if isinstance(recipe, dict):
            return shared_studio.film(name, **{"frames": FRAMES, **recipe})
        change, source, arguments = recipe
        return getattr(shared_studio, change)(make(source), name, **arguments)

    return make


def outcome(studio, path: Path, hazard: Hazard, decoder: str) -> str:
    try:
        decoded = decode_clip(studio.job(path, decoder=decoder))
    except MediaError:
        return REFUSED
    wanted = hazard.first + np.linspace(0, hazard.num_frames - 1, 32, dtype=int)
    return RIGHT if studio.numbers(decoded) == wanted.tolist() else WRONG


@pytest.mark.parametrize("name", HAZARDS)
def test_default_gives_the_right_frames_of(name, film, shared_studio) -> None:
    hazard = HAZARDS[name]
    decoded = decode_clip(shared_studio.job(film(name)))
    wanted = hazard.first + np.linspace(0, hazard.num_frames - 1, 32, dtype=int)
    assert shared_studio.numbers(decoded) == wanted.tolist()
    assert (decoded.decoder, decoded.num_frames) == (hazard.decoder, hazard.num_frames)


@pytest.mark.parametrize("name", [name for name, hazard in HAZARDS.items() if hazard.decord])
def test_decord_is_as_right_or_wrong_as_stated_on(name, film, shared_studio) -> None:
    assert outcome(shared_studio, film(name), HAZARDS[name], "decord") == HAZARDS[name].decord


@pytest.mark.parametrize(("degrees", "turns"), [(90, 3), (180, 2), (270, 1)])
def test_rotation_of_the_track_is_applied(degrees, turns, film, shared_studio) -> None:
    path = shared_studio.rotated(film("short_gop.mp4"), f"turned_{degrees}.mp4", degrees)
    decoded = decode_clip(shared_studio.job(path))
    (frames_THWC,) = decoded.frames.values()
    assert shared_studio.stamps(frames_THWC, turns) == np.linspace(0, FRAMES - 1, 32, dtype=int).tolist()


def test_of_two_video_streams_the_one_marked_as_default_is_read_though_it_is_second(studio) -> None:
    import av
    from av.stream import Disposition

    small, large = studio.film("small.mp4", size=(96, 48), frames=30), studio.film("large.mp4", size=(384, 192))

    path = studio.folder / "two.mkv"
    with av.open(str(path), "w") as output:
        inputs = [av.open(str(source)) for source in (small, large)]
        streams = [output.add_stream_from_template(source.streams.video[0]) for source in inputs]
        streams[0].disposition, streams[1].disposition = Disposition.captions, Disposition.default
        for source, stream in zip(inputs, streams, strict=True):
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    output.mux(packet)
            source.close()
    assert decode_clip(studio.job(path)).num_frames == 60


def cut_off(studio, source: Path, name: str, share: float = 0.6) -> Path:
    data = source.read_bytes()
    return studio.bytes(name, data[: int(len(data) * share)])


def overwritten(studio, source: Path, name: str) -> Path:
    """A hole of 40 bytes in the middle of the coded pictures."""
    data = bytearray(source.read_bytes())
    at = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[at : at + 40] = bytes(range(100, 140))
    return studio.bytes(name, bytes(data))


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("front.mp4", {"options": SHORT_GOP, "muxing": {"movflags": "faststart"}}),
        ("a.mkv", {"options": SHORT_GOP}),
        ("a.webm", {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime"}}),
        ("a.avi", {"codec": "mpeg4", "options": {"g": "12"}}),
        ("a.flv", {"options": SHORT_GOP}),
    ],
)
def test_file_that_was_cut_off_is_damaged_and_its_rest_can_be_accepted(source, options, studio) -> None:
    path = cut_off(studio, studio.film(source, **options), "cut." + source)
    with pytest.raises(MediaError, match="damaged file"):
        decode_clip(studio.job(path))
    decoded = decode_clip(studio.job(path, accept_damaged=True))
    wanted = np.linspace(0, decoded.num_frames - 1, 32, dtype=int)
    assert 5 < decoded.num_frames < FRAMES
    assert np.abs(np.array(studio.numbers(decoded)) - wanted).max() <= 1  # the last frame may be its neighbour


def test_hole_in_the_middle_is_damage_and_the_nearest_frames_stand_in(studio) -> None:
    path = overwritten(studio, studio.film("a.mp4", options={**SHORT_GOP, "g": "6"}), "hole.mp4")
    with pytest.raises(MediaError, match="damaged file: Invalid data found"):
        decode_clip(studio.job(path))
    decoded = decode_clip(studio.job(path, accept_damaged=True))
    assert decoded.num_frames == FRAMES
    assert decoded.decoder.startswith("frames/1+sequential+damaged:")
    assert decoded.decoder.endswith("-substituted")
    differing = np.array(studio.numbers(decoded)) - np.linspace(0, FRAMES - 1, 32, dtype=int)
    assert (differing == 0).mean() > 0.7


def still(folder: Path, suffix: str) -> bytes:
    path = folder / f"still{suffix}"
    Image.new("RGB", (30, 20), (200, 10, 10)).save(path)
    return path.read_bytes()


BAD_FILES = {
    "noise.mp4": (lambda _: np.random.default_rng(1).bytes(5000), "not a video"),
    "words.mp4": (lambda _: b"this is not a video" * 100, "not a video"),
    "png.mp4": (lambda folder: still(folder, ".png"), "not a video: the file is a still image"),
    "jpeg.mp4": (lambda folder: still(folder, ".jpg"), "not a video: the file is a still image"),
    "playlist.mp4": (
        lambda folder: f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{folder}/a.mp4\n".encode(),
        "not a video",
    ),
    "concat.mp4": (lambda _: b"ffconcat version 1.0\nfile a.mp4\n", "not a video"),
    "no_index.mp4": (lambda folder: (folder / "a.mp4").read_bytes()[:2000], "not a video"),
    "empty.mp4": (lambda _: b"", "media file is empty"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_no_video_fails_the_clip_with_a_reason_without_its_path(name, studio) -> None:
    studio.film("a.mp4", options=B_FRAMES)
    content, reason = BAD_FILES[name]
    path = studio.bytes(name, content(studio.folder))
    for accept_damaged in (False, True):
        with pytest.raises(MediaError, match=reason) as caught:
            decode_clip(studio.job(path, accept_damaged=accept_damaged))
        assert str(studio.folder) not in str(caught.value)
        assert name not in str(caught.value)


def test_sound_alone_is_no_video(studio) -> None:
    import av

    path = studio.folder / "sound.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        output.mux(stream.encode(sound))
        output.mux(stream.encode(None))
    with pytest.raises(MediaError, match="no video stream"):
        decode_clip(studio.job(path))


def test_cover_art_of_a_song_is_no_video(studio) -> None:
    import av
    from av.stream import Disposition

    path = studio.folder / "song.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 192, 96, "yuvj420p"
        stream.disposition = Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(studio.stamped_frame(3), format="rgb24")
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with pytest.raises(MediaError, match="no video stream"):
        decode_clip(studio.job(path))


def test_frames_past_the_pixel_cap_are_refused_before_decoding(studio, monkeypatch) -> None:
    path = studio.film("a.mp4")
    monkeypatch.setattr(container, "MAX_PIXELS", 192 * 96 - 1)
    monkeypatch.setattr(container.OpenVideo, "packets", lambda _: pytest.fail("packets were read"))
    with pytest.raises(MediaError, match="frames are larger than"):
        decode_clip(studio.job(path))


def test_ten_bit_and_odd_sized_video_has_the_colours_of_decord(real_media) -> None:
    view = View(rule=ResizeRule(size=64), num_frames=16)
    for name in ("tc_bt2020_10bit.mp4", "tc_odd_vp9.mp4", "decord_rot90.mov", "tc_nasa_13013_rotated.mp4"):
        from featurestore.clips import Clip
        from pipeline.decode.sampling import DecodeJob

        clip = Clip(dataset="d", path=f"hazard_clips/{name}", kind="video")
        ours, theirs = (
            decode_clip(DecodeJob(root=str(real_media), clip=clip, views=(view,), decoder=decoder)).frames[view]
            for decoder in ("frames/1", "decord")
        )
        assert np.array_equal(ours, theirs), name
