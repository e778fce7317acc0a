"""A small film studio: videos whose every frame carries its own number in black and white blocks."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from featurestore.clips import Clip
from pipeline.decode.sampling import Decoded, DecodeJob
from pipeline.views import ResizeRule, View

WIDTH, HEIGHT = 192, 96  # 3 x 3 blocks of 64 x 32 pixels: 9 bits
STAMP_VIEW = View(rule=ResizeRule(size=48, filter="bilinear"), num_frames=32)


class Studio:
    """Makes, changes and reads stamped videos in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def stamped_frame(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
        """uint8 [height, width, 3] with bit k of `number` in block k."""
        bits = np.array([(number >> k) & 1 for k in range(9)], np.uint8).reshape(3, 3)
        blocks = np.kron(bits * 219 + 16, np.ones((height // 3, width // 3), np.uint8))
        return np.repeat(blocks[..., None], 3, axis=2)

    @staticmethod
    def stamps(frames_THWC: np.ndarray, quarter_turns: int = 0) -> list[int]:
        """The number in each frame; `quarter_turns` undoes a rotation by np.rot90."""
        turned = np.rot90(frames_THWC, -quarter_turns, axes=(1, 2))
        side = turned.shape[1]
        centres = [side // 6, side // 2, side * 5 // 6]
        bits = turned[:, centres][:, :, centres].mean(axis=-1).reshape(-1, 9) > 127
        return [int(sum(1 << k for k in range(9) if row[k])) for row in bits]

    def film(
        self,
        name: str,
        codec: str = "libx264",
        *,
        frames: int = 60,
        rate: int = 30,
        options: Mapping[str, str] | None = None,
        muxing: Mapping[str, str] | None = None,
        pts: Iterable[int] | None = None,  # in ticks of 1 / 1000 s; default: regular
        pixels: str = "yuv420p",
        container: str | None = None,
        size: tuple[int, int] = (WIDTH, HEIGHT),
    ) -> Path:
        """Encode frames 0, 1, 2, ... and return the file's path."""
        path = self.folder / name
        with av.open(str(path), "w", format=container, options=dict(muxing or {})) as output:
            stream = output.add_stream(codec, rate=rate, options=dict(options or {}))
            stream.width, stream.height, stream.pix_fmt = *size, pixels
            stream.codec_context.thread_count = 1
            times = list(pts) if pts is not None else None
            if times:
                stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
            for number in range(frames):
                frame = av.VideoFrame.from_ndarray(self.stamped_frame(number, *size), format="rgb24")
                frame.pts = times[number] if times else number
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        return path

    def remux(
        self, source: Path, name: str, *, shift: int = 0, first: int = 0, muxing: Mapping[str, str] | None = None
    ) -> Path:
        """Copy packets from number `first` (decode order) on, all times later by `shift` ticks."""
        path = self.folder / name
        with av.open(str(source)) as original, av.open(str(path), "w", options=dict(muxing or {})) as copy:
            stream = copy.add_stream_from_template(original.streams.video[0])
            packets = [packet for packet in original.demux(video=0) if packet.size]
            for packet in packets[first:]:
                packet.pts, packet.stream = packet.pts + shift, stream
                packet.dts = None if packet.dts is None else packet.dts + shift
                copy.mux(packet)
        return path

    def bytes(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def patched(self, source: Path, name: str, box: bytes, offset: int, data: bytes) -> Path:
        """A copy of an MP4 with `data` written `offset` bytes behind the name of its first `box`."""
        content = bytearray(source.read_bytes())
        at = content.index(box) + len(box) + offset
        content[at : at + len(data)] = data
        return self.bytes(name, bytes(content))

    def rotated(self, source: Path, name: str, degrees: int) -> Path:
        """A copy whose track header turns the picture clockwise; the matrix is 9 fixed-point numbers in `tkhd`."""
        a, b = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
        one = 1 << 16
        matrix = struct.pack(">9i", a * one, b * one, 0, -b * one, a * one, 0, 0, 0, 1 << 30)
        return self.patched(source, name, b"tkhd", 40, matrix)

    def job(self, path: Path, *, views: tuple[View, ...] = (STAMP_VIEW,), kind: str = "video", **options) -> DecodeJob:
        """A job for one file of the folder; `options` go to the job or to its clip."""
        of_clip = {name: options.pop(name) for name in ("start_s", "end_s", "end_frame") if name in options}
        clip = Clip(dataset="studio", path=path.relative_to(self.folder).as_posix(), kind=kind, **of_clip)
        return DecodeJob(root=str(self.folder), clip=clip, views=views, **options)

    def numbers(self, decoded: Decoded) -> list[int]:
        """The frame numbers seen through the stamp view."""
        return self.stamps(decoded.frames[STAMP_VIEW])


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    """An empty studio of one test."""
    return Studio(tmp_path)


@pytest.fixture(scope="session")
def shared_studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """A studio whose files many tests read."""
    return Studio(tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="session")
def real_media() -> Path:
    """The folder of real media next to the project; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[4] / "shared"
    if not (folder / "hazard_clips").is_dir():
        pytest.skip("the folder of real test media is not next to the project")
    return folder
