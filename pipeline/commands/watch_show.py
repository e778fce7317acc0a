"""What `status --watch` prints: a table that is redrawn on a terminal, a line per look elsewhere, or JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable

from pipeline.commands import tables
from pipeline.watch import EncoderProgress, Progress


def show(looks: Iterable[Progress], *, as_json: bool = False) -> None:
    """Print every look as it comes."""
    for progress in looks:
        if as_json:
            print(json.dumps(progress.to_dict()), flush=True)
        elif sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")  # home, clear: works over ssh
            _table(progress)
        else:
            print(line(progress), flush=True)


def line(progress: Progress) -> str:
    """`12:00:05  siglip-0123456789ab 84/120 clips (21/30 blocks), 3.1 clips/s, 12.0 s left; ...`."""
    told = [
        f"{e.encoder} {e.clips}/{e.all_clips} clips ({e.blocks}/{e.all_blocks} blocks), {_rate(e)}, {_left(e)}"
        for e in progress.encoders
    ]
    return f"{time.strftime('%H:%M:%S')}  {'; '.join(told) or 'no encoder has a group yet'}"


def _table(progress: Progress) -> None:
    columns = ("encoder", "clips", "of", "blocks", "of", "rate", "left")
    rows = [(e.encoder, e.clips, e.all_clips, e.blocks, e.all_blocks, _rate(e), _left(e)) for e in progress.encoders]
    left = progress.seconds_left
    tables.console().print(time.strftime("%H:%M:%S  rates are of the last 5 min (Ctrl-C leaves; the run goes on)"))
    tables.table(columns, rows, right=columns[1:])
    if progress.is_done:
        tables.console().print("every block given out is committed")
    elif left is not None:
        tables.console().print(f"about {tables.duration(left)} left")


def _rate(encoder: EncoderProgress) -> str:
    if encoder.is_done:
        return "-"
    return "not moving" if encoder.clips_per_s is None else f"{encoder.clips_per_s:.2f} clips/s"


def _left(encoder: EncoderProgress) -> str:
    if encoder.is_done:
        return "done"
    return "time left unknown" if encoder.seconds_left is None else f"{tables.duration(encoder.seconds_left)} left"
