"""Seconds per clip of the default reader beside others, one thread each.

    python benchmarks/decode.py --media DIR --cache DIR

Every reader gives the same thing: 16 frames (every second of 32 sampled), RGB, squashed to 224 x 224 by Pillow. The
clips are the videos under --media and two made here: 60 s of 1280 x 720 at 30 fps with a keyframe every 250 frames,
and 600 s joined from ten copies of it without encoding again. The clock is processor time by default, which other
work on the machine disturbs little; --clock wall for an idle one. The best of --repeats counts.

"bare sequential" is what a reader without an index costs: PyAV, every frame decoded, only wanted ones converted.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from PIL import Image

from featurestore.clips import Clip
from pipeline import media as source_module
from pipeline.decode.decoders import decode_clip
from pipeline.decode.sampling import DecodeJob
from pipeline.views import ResizeRule, View

VIEW = View(rule=ResizeRule(), num_frames=16)
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm")
FPS, SECONDS, COPIES, GOP = 30, 60, 10, 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--media", type=Path, required=True, help="folder of videos, searched recursively")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the generated videos, kept between runs")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, the best counts (default: 3)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu", help="what is measured (default: cpu)")
    parser.add_argument("--core", type=int, help="pin to this core (default: not pinned)")
    arguments = parser.parse_args()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    real = sorted(path for path in arguments.media.rglob("*") if path.suffix in VIDEOS)
    minute = make_minute(arguments.cache / "720p_g250_60s.mp4")
    long = join_copies(minute, arguments.cache / "720p_g250_600s.mp4")
    groups = {f"{len(real)} real clips, mean": real, "720p, 60 s": [minute], "720p, 600 s": [long]}
    readers = {name: read for name, read in READERS.items() if is_available(name)}
    clock = CLOCKS[arguments.clock]
    table = {
        group: {name: measure(read, paths, arguments.repeats, clock) for name, read in readers.items()}
        for group, paths in groups.items()
        if paths
    }
    print_table(table, list(readers), arguments.clock)


def cpu_seconds() -> float:
    """Processor time of this process and of the programs it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


CLOCKS: dict[str, Callable[[], float]] = {"cpu": cpu_seconds, "wall": time.perf_counter}


def measure(read: Callable[[Path], np.ndarray], paths: list[Path], repeats: int, clock: Callable[[], float]) -> float:
    """Mean over the clips of the best of the repeats [s]; NaN where the reader fails on one."""
    best = []
    for path in paths:
        times = []
        for _ in range(repeats):
            began = clock()
            try:
                frames = read(path)
            except Exception as error:
                print(f"{path.name}: {type(error).__name__}: {error}", file=sys.stderr)
                return float("nan")
            times.append(clock() - began)
            assert frames.shape == (16, 224, 224, 3), frames.shape
        best.append(min(times))
    return float(np.mean(best))


def print_table(table: dict[str, dict[str, float]], readers: list[str], clock: str) -> None:
    """Markdown: seconds, then times as long as the best and as the bare sequential reader."""
    print(f"| {clock} seconds per clip (x best, x bare sequential) | " + " | ".join(readers) + " |")
    print("|---" * (len(readers) + 1) + "|")
    for group, seconds in table.items():
        fastest, bare = np.nanmin(list(seconds.values())), seconds["bare sequential"]
        cells = (f"{s:.3f} ({s / fastest:.2f}, {s / bare:.2f})" for s in seconds.values())
        print(f"| {group} | " + " | ".join(cells) + " |")


def read_default(path: Path) -> np.ndarray:
    """The product's reader with everything it does: digest, checks, index, resize."""
    return _decode_clip(path, "frames/1")


def read_ffmpeg(path: Path) -> np.ndarray:
    return _decode_clip(path, "ffmpeg")


def _decode_clip(path: Path, decoder: str) -> np.ndarray:
    source_module._KNOWN_SHA256.clear()  # every repeat pays for its digest
    clip = Clip(dataset="benchmark", path=path.name, kind="video")
    return decode_clip(DecodeJob(root=str(path.parent), clip=clip, views=(VIEW,), decoder=decoder)).frames[VIEW]


def read_bare_sequential(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
        count = sum(1 for packet in container.demux(stream) if packet.size)
        wanted = np.linspace(0, count - 1, 32, dtype=int)[::2]
        container.seek(0)
        small = {
            number: squash(frame.to_ndarray(format="rgb24"))
            for number, frame in enumerate(container.decode(stream))
            if number in wanted
        }
    return np.stack([small[number] for number in wanted])


def read_decord(path: Path) -> np.ndarray:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    frames = reader.get_batch(list(np.linspace(0, len(reader) - 1, 32, dtype=int)[::2])).asnumpy()
    return np.stack([squash(frame) for frame in frames])


def read_torchcodec(path: Path) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC")
    wanted = np.linspace(0, decoder.metadata.num_frames - 1, 32, dtype=int)[::2]
    return np.stack([squash(frame) for frame in decoder.get_frames_at(wanted.tolist()).data.numpy()])


def squash(frame_HWC: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(frame_HWC).resize((224, 224), Image.Resampling.BICUBIC))


READERS: dict[str, Callable[[Path], np.ndarray]] = {
    "frames/1 (default)": read_default,
    "bare sequential": read_bare_sequential,
    "decord": read_decord,
    "torchcodec": read_torchcodec,
    "ffmpeg program": read_ffmpeg,
}


def is_available(name: str) -> bool:
    """Optional readers are left out, and said so, where they are not installed."""
    found = {"decord": importlib.util.find_spec, "torchcodec": importlib.util.find_spec, "ffmpeg program": shutil.which}
    if name not in found or found[name](name.split()[0]):
        return True
    print(f"{name}: not installed, left out", file=sys.stderr)
    return False


def make_minute(path: Path) -> Path:
    """A window that wanders over a large soft picture with noise: motion and texture for the encoder to code."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (90, 160, 3), dtype=np.uint8))
    world = np.asarray(coarse.resize((2560, 1440), Image.Resampling.BICUBIC)).astype(np.int16)
    world = (world + rng.integers(-12, 13, world.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8)
    unfinished = path.with_suffix(".part.mp4")
    with av.open(str(unfinished), "w") as output:
        options = {"preset": "veryfast", "crf": "24", "g": str(GOP), "bf": "3"}
        stream = output.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for number in range(FPS * SECONDS):
            x, y = (int(640 + 600 * np.sin(number / 170)), int(360 + 340 * np.sin(number / 110)))
            frame_HWC = np.ascontiguousarray(world[y : y + 720, x : x + 1280])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        output.mux(stream.encode(None))
    unfinished.rename(path)
    return path


def join_copies(minute: Path, path: Path) -> Path:
    """Ten copies one after the other, packets copied."""
    if path.exists():
        return path
    unfinished = path.with_suffix(".part.mp4")
    with av.open(str(unfinished), "w") as output:
        stream = None
        for copy in range(COPIES):
            with av.open(str(minute)) as original:
                video = original.streams.video[0]
                stream = stream or output.add_stream_from_template(video)
                shift = round(copy * SECONDS / video.time_base)
                for packet in original.demux(video):
                    if packet.size:
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                        output.mux(packet)
    unfinished.rename(path)
    return path


if __name__ == "__main__":
    main()
