"""Processor time of decoding the windows of a long video, one after the other in one process.

    python benchmarks/windows.py VIDEO [--limit 40]

Each window is decoded for an encoder of 16 frames and one of 32, at 1 frame per second and 16 frames a window. A video
to measure: ffmpeg -f lavfi -i testsrc2=size=320x240:rate=30000/1001:duration=1800 -c:v libx264 -preset veryfast
-pix_fmt yuv420p long.mp4
"""

from __future__ import annotations

import statistics
import time
from fractions import Fraction
from pathlib import Path

import click

from featurestore.clips import Clip
from featurestore.windows import count_windows, window_of
from pipeline.decode.decoders import decode_clip
from pipeline.decode.length import length_s
from pipeline.decode.sampling import DecodeJob
from pipeline.media import Source
from pipeline.views import ResizeRule, View

LENGTH = Fraction(16)  # seconds
VIEWS = tuple(
    View(rule=ResizeRule(), num_frames=frames, frame_rule=f"rate-{frames / LENGTH}x{frames}") for frames in (16, 32)
)


@click.command()
@click.argument("video", type=click.Path(exists=True, path_type=Path))
@click.option("--limit", type=click.IntRange(2), help="Only the first windows.")
def main(video: Path, limit: int | None) -> None:
    """Print the CPU seconds of the first window, of the others, and of all."""
    root, clip = str(video.resolve().parent), Clip(dataset="video", path=video.name, kind="video")
    began = time.process_time()
    number = count_windows(clip, LENGTH, length_s(Source.find(root, video.name)))
    click.echo(f"{number} windows, counted in {time.process_time() - began:.3f} s")
    spent: list[float] = []
    for place in range(min(number, limit or number)):
        began = time.process_time()
        decode_clip(DecodeJob(root=root, clip=window_of(clip, LENGTH, place), views=VIEWS))
        spent.append(time.process_time() - began)
    later = f"later ones {statistics.median(spent[1:]):.3f} s (median), " if spent[1:] else ""
    click.echo(f"CPU: first window {spent[0]:.3f} s, {later}all {len(spent)} {sum(spent):.1f} s")


if __name__ == "__main__":
    main()
