"""CPU seconds per clip of the default reader alongside other readers, one thread each.

    python benchmarks/decode.py --media DIR --cache DIR [--json FILE] [--only TEXT]

Every reader returns the same thing: 16 frames (every second of 32 sampled), RGB, squashed to 224 x 224 by Pillow. The
files are the videos under --media, and 60 s and 600 s made here of six of them by the ffmpeg program: 240p, 720p and
1080p at 30 fps, a keyframe every 30, 250 and 600 frames, x264 veryfast with 3 B-frames; 600 s are ten joined copies.
Readers take turns on each file; the best of --rounds counts. User and system time are counted, of this process and of
the programs that it starts.

"digest" is the SHA-256 of the file, which an extraction takes besides and no peer does. A star marks a reader that
failed or returned other frames, more than one grey level apart from ours on average. The best peer is the fastest that
returned the same frames. "file read" is what our reader read, of the file's bytes, without the digest.

    python benchmarks/decode.py --views FILE

prints milliseconds per native frame of each step behind the decoder, for the views of MERV's four encoders.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from PIL import Image

from featurestore.clips import Clip
from pipeline.decode.container import open_video
from pipeline.decode.pyav import read_frames
from pipeline.decode.resize import NativeFrame, resize
from pipeline.decode.sampling import DecodeJob, FrameCollector
from pipeline.media import Source
from pipeline.views import ResizeRule, View

VIEW = View(rule=ResizeRule(), num_frames=16)
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm")
SIZES, GOPS, SECONDS, COPIES, FPS = {240: 320, 720: 1280, 1080: 1920}, (30, 250, 600), 60, 10, 30
OURS, BEST_PEER, DIGEST, READ = "frames/1", "best peer", "digest", "file read"
WHOLE_FILE_PIXELS = 5e8  # of longer files no reader decodes every frame: it would be far behind
MAX_DIFFERENCE = 1.0  # grey levels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--media", type=Path, help="folder of videos, searched recursively")
    parser.add_argument("--cache", type=Path, help="folder for the generated videos, kept between runs")
    parser.add_argument("--views", type=Path, metavar="FILE", help="measure the steps behind the decoder on one video")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over the readers, the best counts (default: 3)")
    parser.add_argument("--json", type=Path, help="add the results to this file")
    parser.add_argument("--only", default="", help="only cases whose name contains this text, as 'real' or '240p'")
    parser.add_argument("--core", type=int, help="pin to this core (default: not pinned)")
    arguments = parser.parse_args()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    if arguments.views:
        print_steps(arguments.views, arguments.rounds)
        return
    if not (arguments.media and arguments.cache):
        parser.error("needs --media and --cache, or --views")
    real = sorted(path for path in arguments.media.rglob("*") if path.suffix in VIDEOS)
    readers = {name: read for name, read in READERS.items() if is_available(name)}
    known = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {"cases": {}}
    result = {"machine": machine(), "versions": versions(), "cases": known["cases"]}
    for name, make in cases(real, arguments.cache).items():
        if arguments.only in name:
            result["cases"][name] = measure(readers, make(), arguments.rounds)
            print(name, json.dumps(result["cases"][name]), file=sys.stderr, flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result["cases"], list(readers))


def cases(real: list[Path], cache: Path) -> dict[str, Callable[[], list[Path]]]:
    """Name -> the files of a case, made when they are first needed."""
    found: dict[str, Callable[[], list[Path]]] = {f"{len(real)} real clips, mean": lambda: real}
    for height in SIZES:
        for gop in GOPS:
            minute = cache / f"{height}p_g{gop}_{SECONDS}s.mp4"
            long = cache / f"{height}p_g{gop}_{COPIES * SECONDS}s.mp4"
            found[f"{height}p, GOP {gop}, {SECONDS} s"] = lambda h=height, g=gop, m=minute: [make_minute(real, h, g, m)]
            found[f"{height}p, GOP {gop}, {COPIES * SECONDS} s"] = lambda h=height, g=gop, m=minute, j=long: [
                join_copies(make_minute(real, h, g, m), j)
            ]
    return found


def cpu_seconds() -> float:
    """User and system time of this process and of the programs it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(readers: dict[str, Callable], paths: list[Path], rounds: int) -> dict[str, dict[str, float]]:
    """Reader -> CPU seconds per clip (mean over the clips of the best round), clips that failed, different frames.

    Also the means over the clips of the fastest other reader that returned the same frames, of the digest's CPU
    seconds, and of the share of the file that our reader read.
    """
    figures = {name: {"cpu_s": 0.0, "failed": 0, "different": 0} for name in readers}
    best_peer = read = digest = 0.0
    for path in paths:
        before = bytes_read()
        expected = read_default(path).astype(np.int16)
        read += (bytes_read() - before) / path.stat().st_size
        digest += min(digest_seconds(path) for _ in range(rounds))
        is_long = num_pixels(path) > WHOLE_FILE_PIXELS
        taking_part = {name: call for name, call in readers.items() if not (is_long and name == IN_ORDER)}
        seconds, frames = dict.fromkeys(taking_part, math.inf), dict.fromkeys(taking_part)
        for _ in range(rounds):
            for name, call in taking_part.items():
                began = cpu_seconds()
                try:
                    frames[name] = call(path)
                except Exception as error:
                    print(f"{path.name}: {name}: {type(error).__name__}: {error}", file=sys.stderr)
                seconds[name] = min(seconds[name], cpu_seconds() - began)
        right = []
        for name in readers:
            figure = figures[name]
            figure["cpu_s"] += seconds.get(name, math.nan) / len(paths)
            if frames.get(name) is not None:
                different = int((np.abs(frames[name] - expected).mean(axis=(1, 2, 3)) > MAX_DIFFERENCE).sum())
                figure["different"] += different
                right += [seconds[name]] if not different and name != OURS else []
            elif name in taking_part:
                figure["failed"] += 1
        best_peer += min(right)
    kept = {name: figure for name, figure in figures.items() if not math.isnan(figure["cpu_s"])}
    others = {BEST_PEER: best_peer, DIGEST: digest, READ: read}
    return kept | {name: {"mean": total / len(paths)} for name, total in others.items()}


def digest_seconds(path: Path) -> float:
    """CPU seconds of a file's SHA-256."""
    began = cpu_seconds()
    with open(path, "rb") as file:
        hashlib.file_digest(file, "sha256")
    return cpu_seconds() - began


def bytes_read() -> int:
    """What this process has read by system calls, from disk or cache; 0 where the system does not count it."""
    counters = Path("/proc/self/io")
    return int(counters.read_text().split()[1]) if counters.exists() else 0


def num_pixels(path: Path) -> int:
    """Pixels of all frames, as the header counts them."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        return stream.width * stream.height * stream.frames


def print_table(cases: dict[str, dict], readers: list[str]) -> None:
    """Markdown: seconds, a star where a reader failed or returned other frames; then best peer over ours."""
    print(
        "| CPU seconds per clip | " + " | ".join(readers) + " | best peer / ours | digest | with digest | file read |"
    )
    print("|---" * (len(readers) + 5) + "|")
    for case, figures in cases.items():
        cells = []
        for name in readers:
            figure = figures.get(name)
            star = "" if figure is None else "*" * bool(figure["failed"] or figure["different"])
            cells.append("-" if figure is None else f"{figure['cpu_s']:.3f}{star}")
        ours, best, digest, read = (
            figures[OURS]["cpu_s"],
            *(figures[name]["mean"] for name in (BEST_PEER, DIGEST, READ)),
        )
        cells += [f"{best / ours:.2f}", f"{digest:.3f}", f"{best / (ours + digest):.2f}", f"{read:.0%}"]
        print(f"| {case} | " + " | ".join(cells) + " |")


STEPS = (
    *("to RGB, once", "copy into Pillow, once", "bicubic: DINOv2 and SigLIP", "bilinear: ViViT"),
    "centre crop without antialias: LanguageBind",
)


def print_steps(path: Path, rounds: int) -> None:
    """Markdown: CPU milliseconds per frame, the best of the rounds over the first frames of a video."""
    bicubic, bilinear = ResizeRule(filter="bicubic"), ResizeRule(filter="bilinear")
    crop = ResizeRule(filter="bilinear", antialias=False, fit="centre-crop")
    best: dict[str, float] = {}
    with open_video(Source.find(str(path.parent), path.name)) as video:
        decoded = list(itertools.islice(video.container.decode(video.stream), 16))
        for _ in range(rounds):
            seconds = dict.fromkeys(STEPS, 0.0)
            for frame in decoded:
                ends = [time.process_time()]
                native = NativeFrame(video.to_rgb(frame))
                ends.append(time.process_time())
                _ = native.image
                ends.append(time.process_time())
                for rule in (bicubic, bilinear, crop):
                    resize(native, rule)
                    ends.append(time.process_time())
                for name, began, ended in zip(STEPS, ends[:-1], ends[1:], strict=True):
                    seconds[name] += (ended - began) / len(decoded)
            best = {name: min(best.get(name, math.inf), mean) for name, mean in seconds.items()}
    print(f"| {video.codec.width} x {video.codec.height} | CPU ms per frame |\n|---|---|")
    for name, seconds in best.items():
        print(f"| {name} | {seconds * 1000:.2f} |")


def machine() -> str:
    """Processor and number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of the readers that are installed."""
    found = {"python": platform.python_version(), "pillow": Image.__version__, "av": av.__version__}
    found["ffmpeg in av"] = av.ffmpeg_version_info
    for name in ("decord", "torchcodec"):
        if importlib.util.find_spec(name):
            found[name] = importlib.import_module(name).__version__
    if shutil.which("ffmpeg"):
        output = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True).stdout
        found["ffmpeg program"] = output.split()[2]
    return found


def wanted_of(num_frames: int) -> np.ndarray:
    """Every second of 32 evenly spaced frame numbers."""
    return np.linspace(0, num_frames - 1, 32, dtype=int)[::2]


def squash(frame_HWC: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(frame_HWC).resize((224, 224), Image.Resampling.BICUBIC))


def read_default(path: Path) -> np.ndarray:
    """The reader alone."""
    clip = Clip(dataset="benchmark", path=path.name, kind="video")
    job = DecodeJob(root=str(path.parent), clip=clip, views=(VIEW,))
    collector = FrameCollector(job)
    read_frames(Source.find(job.root, job.clip.path), collector, accept_damaged=False)
    return collector.frames()[VIEW]


def read_with_decord(path: Path) -> np.ndarray:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    frames = reader.get_batch(wanted_of(len(reader)).tolist()).asnumpy()
    return np.stack([squash(frame) for frame in frames])


def read_with_torchcodec(path: Path, seek_mode: str = "exact") -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode=seek_mode)
    frames = decoder.get_frames_at(wanted_of(decoder.metadata.num_frames).tolist()).data.numpy()
    return np.stack([squash(frame) for frame in frames])


def read_with_torchcodec_approximate(path: Path) -> np.ndarray:
    """Without its scan of the packets: frames are found by the average rate."""
    return read_with_torchcodec(path, "approximate")


def read_with_seeks(path: Path) -> np.ndarray:
    """PyAV as its cookbook seeks: to the keyframe before each frame's time by the average rate, then forwards."""
    small = []
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
        ticks = 1 / (stream.average_rate * stream.time_base)
        for number in wanted_of(stream.frames).tolist():
            target = (stream.start_time or 0) + round(number * ticks)
            container.seek(target, stream=stream)
            frame = next(frame for frame in container.decode(stream) if frame.pts >= target)
            small.append(squash(frame.to_ndarray(format="rgb24")))
    return np.stack(small)


def read_in_order(path: Path) -> np.ndarray:
    """PyAV without an index: every frame decoded, only wanted ones converted."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
        wanted = wanted_of(sum(1 for packet in container.demux(stream) if packet.size))
        container.seek(0)
        frames = enumerate(container.decode(stream))
        small = {number: squash(frame.to_ndarray(format="rgb24")) for number, frame in frames if number in wanted}
    return np.stack([small[number] for number in wanted])


def read_with_ffmpeg(path: Path) -> np.ndarray:
    """The program: once with a `select` filter, ffprobe counts the packets first; for long files once per frame."""
    if num_pixels(path) > WHOLE_FILE_PIXELS:
        return read_with_ffmpeg_seeks(path)
    probe = ["ffprobe", "-v", "error", "-select_streams", "V:0", "-count_packets", "-of", "csv=p=0"]
    probe += ["-show_entries", "stream=nb_read_packets,width,height", str(path)]
    width, height, count = (int(field) for field in _output(probe).decode().strip().rstrip(",").split(","))
    selected = "+".join(f"eq(n,{number})" for number in dict.fromkeys(wanted_of(count).tolist()))
    frames = _raw_frames(path, width, height, [], ["-vf", f"select='{selected}'", "-fps_mode", "passthrough"])
    position = {number: frames[i] for i, number in enumerate(dict.fromkeys(wanted_of(count).tolist()))}
    return np.stack([squash(position[number]) for number in wanted_of(count).tolist()])


def read_with_ffmpeg_seeks(path: Path) -> np.ndarray:
    """Each time with `-ss` before the input, by the average rate."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        count, rate, width, height = stream.frames, float(stream.average_rate), stream.width, stream.height
    small = []
    for number in wanted_of(count).tolist():
        seconds = f"{max(0.0, (number - 0.5) / rate):.6f}"
        small.append(squash(_raw_frames(path, width, height, ["-ss", seconds], ["-frames:v", "1"])[0]))
    return np.stack(small)


def _raw_frames(path: Path, width: int, height: int, before: list[str], after: list[str]) -> np.ndarray:
    command = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", *before, "-i", str(path), "-map", "0:V:0", *after]
    data = _output([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"])
    return np.frombuffer(data, np.uint8).reshape(-1, height, width, 3)


def _output(command: list[str]) -> bytes:
    return subprocess.run(command, capture_output=True, check=True).stdout


IN_ORDER = "PyAV, in order"
READERS: dict[str, Callable[[Path], np.ndarray]] = {
    OURS: read_default,
    "decord": read_with_decord,
    "torchcodec": read_with_torchcodec,
    "torchcodec, approximate": read_with_torchcodec_approximate,
    "PyAV, seeking": read_with_seeks,
    IN_ORDER: read_in_order,
    "ffmpeg program": read_with_ffmpeg,
}


def is_available(name: str) -> bool:
    """Optional readers are left out, with a note, where they are not installed."""
    library = name.replace(",", " ").split()[0]
    found = {"decord": importlib.util.find_spec, "torchcodec": importlib.util.find_spec, "ffmpeg": shutil.which}
    if library not in found or found[library](library):
        return True
    print(f"{name}: not installed, left out", file=sys.stderr)
    return False


def make_minute(real: list[Path], height: int, gop: int, path: Path) -> Path:
    """60 s of six real clips, 10 s of each (short ones are repeated), scaled and cropped to the size."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    clips, width, inputs, filters = [clip for clip in real if clip.name in CONTENT], SIZES[height], [], ""
    if len(clips) != len(CONTENT):
        raise SystemExit(f"--media needs {', '.join(CONTENT)} to make videos of")
    for number, clip in enumerate(clips):
        inputs += ["-stream_loop", "-1", "-t", "10", "-i", str(clip)]
        scale = f"scale={width}:{height}:force_original_aspect_ratio=increase,crop={width}:{height},setsar=1"
        filters += f"[{number}:v]fps={FPS},{scale},trim=duration=10,setpts=PTS-STARTPTS[v{number}];"
    filters += "".join(f"[v{number}]" for number in range(len(clips))) + f"concat=n={len(clips)}:v=1:a=0[all]"
    encoder = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "24", "-bf", "3", "-pix_fmt", "yuv420p"]
    encoder += ["-g", str(gop), "-sc_threshold", "0", "-threads", "2"]
    _write([*inputs, "-filter_complex", filters, "-map", "[all]", *encoder], path)
    return path


def join_copies(minute: Path, path: Path) -> Path:
    """Ten copies one after the other, packets copied."""
    if path.exists():
        return path
    names = path.with_suffix(".txt")
    names.write_text(f"file '{minute.resolve()}'\n" * COPIES)
    _write(["-f", "concat", "-safe", "0", "-i", str(names), "-c", "copy"], path)
    names.unlink()
    return path


def _write(arguments: list[str], path: Path) -> None:
    """Run ffmpeg into a temporary name; the tables are at the front, as in files made for the web."""
    unfinished = path.with_suffix(".part.mp4")
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", *arguments, "-movflags", "+faststart", str(unfinished)]
    subprocess.run(command, check=True)
    unfinished.rename(path)


CONTENT = (
    *("anet_v_ZNVhz7ctTq0.mp4", "askany_jesse_dance.mp4", "askany_yoga.mp4"),
    *("sam2_cups.mp4", "sam2_dog.mp4", "vllava_sample_1.mp4"),
)


if __name__ == "__main__":
    main()
