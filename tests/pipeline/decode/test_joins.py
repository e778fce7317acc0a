"""Transport streams: joined ones decode, ones with missing packets are damaged."""

from __future__ import annotations

import numpy as np
import pytest

from mervcache.errors import MediaError
from pipeline.decode.decoders import decode_clip
from pipeline.decode.joins import count_joins

CODECS = {  # with B-frames and several groups of pictures
    "libx264": {"g": "12", "x264-params": "b-adapt=0:bframes=3"},
    "mpeg2video": {"bf": "2", "g": "12"},
    "libx265": {"x265-params": "log-level=none:keyint=12:min-keyint=12:bframes=3:pools=none:frame-threads=1"},
}
PACKET, VIDEO_PID = 188, 256  # FFmpeg's first PID


@pytest.fixture(scope="module", params=CODECS)
def stream(request, shared_studio) -> bytes:
    """A transport stream of 60 frames, large enough for several packets."""
    codec = request.param
    return shared_studio.film(f"{codec}.ts", codec, options=CODECS[codec], size=(768, 384)).read_bytes()


def packets(stream: bytes) -> list[bytes]:
    return [stream[at : at + PACKET] for at in range(0, len(stream), PACKET)]


def of_video(packet: bytes) -> bool:
    return (packet[1] & 0x1F) << 8 | packet[2] == VIDEO_PID


def begins_frame(packet: bytes) -> bool:
    return of_video(packet) and bool(packet[1] & 0x40)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("decoder", ["frames/1", "ffmpeg"])
def test_every_frame_of_joined_streams_is_read(parts, decoder, stream, studio) -> None:
    path = studio.bytes("joined.ts", stream * parts)
    decoded = decode_clip(studio.job(path, decoder=decoder))
    wanted = np.linspace(0, 60 * parts - 1, 32, dtype=int) % 60
    assert (decoded.num_frames, studio.numbers(decoded)) == (60 * parts, wanted.tolist())


def test_a_joined_stream_of_the_larger_packets_of_cameras_is_read(stream, studio) -> None:
    m2ts = b"".join(b"\0\0\0\0" + packet for packet in packets(stream))
    decoded = decode_clip(studio.job(studio.bytes("joined.m2ts", m2ts + m2ts)))
    assert decoded.num_frames == 120


def test_streams_of_different_length_and_content_are_joined(shared_studio, studio) -> None:
    first = shared_studio.film("first.ts", frames=30, options=CODECS["libx264"]).read_bytes()
    second = shared_studio.film("second.ts", frames=45, rate=25, options=CODECS["libx264"]).read_bytes()
    decoded = decode_clip(studio.job(studio.bytes("joined.ts", first + second)))
    wanted = [n if n < 30 else n - 30 for n in np.linspace(0, 74, 32, dtype=int).tolist()]
    assert (decoded.num_frames, studio.numbers(decoded)) == (75, wanted)


HOLES = {  # packets, one that begins a frame in the middle, one inside that frame -> a stream without some of them
    "a packet inside a frame": lambda parts, begin, inside: parts[:inside] + parts[inside + 1 :],
    "the beginning of a frame": lambda parts, begin, inside: parts[:begin] + parts[begin + 1 :],
    "cut off inside a frame, then joined": lambda parts, begin, inside: parts[:inside] + parts,
    "joined to a part without its beginning": lambda parts, begin, inside: parts + parts[inside:],
    "joined to a part without a keyframe": lambda parts, begin, inside: parts + parts[begin:],
    "joined, with a hole elsewhere": lambda parts, begin, inside: parts[:inside] + parts[inside + 1 :] + parts,
    "not cut between packets": lambda parts, begin, inside: [*parts[:inside], parts[inside][:90], *parts],
    "marked by the receiver": lambda parts, begin, inside: [
        *parts[:inside],
        marked(parts[inside]),
        *parts[inside + 1 :],
    ],
}


def hole(stream: bytes, name: str) -> bytes:
    parts = packets(stream)
    begin = next(i for i in range(len(parts) // 2, len(parts)) if begins_frame(parts[i]) and is_inside(parts[i + 1]))
    return b"".join(HOLES[name](parts, begin, begin + 1))


def is_inside(packet: bytes) -> bool:
    """Whether a packet continues a frame."""
    return of_video(packet) and not begins_frame(packet)


def marked(packet: bytes) -> bytes:
    """With the bit for errors that could not be corrected."""
    return bytes([packet[0], packet[1] | 0x80]) + packet[2:]


@pytest.mark.parametrize("name", HOLES)
def test_a_stream_without_some_of_its_packets_is_damaged(name, stream, studio) -> None:
    path = studio.bytes("hole.ts", hole(stream, name))
    for decoder in ("frames/1", "ffmpeg"):
        with pytest.raises(MediaError, match=r"^damaged file: a packet is corrupt$|^ffmpeg cannot decode the file$"):
            decode_clip(studio.job(path, decoder=decoder))
    assert decode_clip(studio.job(path, accept_damaged=True)).num_frames > 20


def test_joins_are_counted_across_the_pieces_that_are_read(stream, studio, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.decode.joins.CHUNK_PACKETS", 3)
    counters = [packet[3] & 15 for packet in packets(stream) if of_video(packet)]
    assert (counters[-1] + 1) % 16 != counters[0]  # else there is nothing to see
    for parts in (1, 2, 4):
        with open(studio.bytes("a.ts", stream * parts), "rb") as file:
            assert count_joins(file, VIDEO_PID) == parts - 1
    for name in HOLES:
        if name != "joined to a part without a keyframe":  # for the packet list to see
            with open(studio.bytes("b.ts", hole(stream, name)), "rb") as file:
                assert count_joins(file, VIDEO_PID) is None, name
