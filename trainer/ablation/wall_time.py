"""How long the runs of a sweep took, alongside the same runs end to end.

SWEEP/times.json    seconds of every run, measured, and of its live encoding, computed

No run is trained end to end for this. What decoding and encoding would add to a run is the number of clips that it was
trained and scored on times the seconds of a clip: a worker's in the store's extraction, by its journal, or those of the
steps of a run end to end (`live_time.py`). Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from mervcache.console import format_duration
from mervcache.errors import UserError
from mervcache.files import load_json, replace_text
from trainer.ablation.document import TIME, Cell, Column, NotComputed, Section, Unit
from trainer.ablation.supervise import RunTime

FORMAT = 1
TIMES_FILE = "times.json"
COLUMNS = ("run", "steps", "in steps (s)", "training (s)", "scoring (s)", "end to end, computed (s)")


def read_times(sweep: Path) -> dict[str, Any]:
    """The file of a sweep, empty where there is none; UserError for another format."""
    path = Path(sweep) / TIMES_FILE
    if not path.is_file():
        return {"format": FORMAT, "runs": {}}
    times = load_json(path.read_bytes(), str(path))
    if times.get("format") != FORMAT or not isinstance(times.get("runs"), dict):
        raise UserError(f"{path} has format {times.get('format')!r}, this version reads {FORMAT}; remove it")
    return times


def write_times(sweep: Path, times: Mapping[str, Any]) -> None:
    replace_text(Path(sweep) / TIMES_FILE, json.dumps(times, indent=1) + "\n")


def add_run_time(sweep: Path, run: str, time: RunTime) -> None:
    """Add the seconds of a task or session that brought a run to its end."""
    times = read_times(sweep)
    entry = times["runs"].setdefault(run, {})
    for name, seconds in asdict(time).items():
        entry[name] = entry.get(name, 0.0) + seconds
    write_times(sweep, times)


def totals(times: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of all runs that have ended: from the store, and end to end where that is computed."""
    runs = times["runs"].values()
    cached = sum(entry["train_s"] + entry["score_s"] for entry in runs)
    added = [entry.get("live_s") for entry in runs]
    return {"cached_s": cached, "end_to_end_s": None if None in added else cached + sum(added)}


def describe(times: Mapping[str, Any]) -> str:
    """One sentence with the sums."""
    found, number = totals(times), len(times["runs"])
    text = f"{number} runs from the store, training and scoring: {format_duration(found['cached_s'])} measured"
    if found["end_to_end_s"] is None:
        return f"{text}; end to end not computed: {times.get('not_computed') or 'the sweep is not finished'}"
    return (
        f"{text}, its extraction {format_duration(times['extraction_s'])}; the same runs end to end, computed:"
        f" {format_duration(found['end_to_end_s'])}, by {times['live_source']}"
    )


def time_section(sweep: Path) -> Section | None:
    """The table of a sweep's times; None where none were kept."""
    times = read_times(sweep)
    if not times["runs"]:
        return None
    reason = times.get("not_computed") or "the sweep is not finished"
    rows: list[tuple[Cell, ...]] = []
    for name, entry in times["runs"].items():
        elapsed = entry["train_s"] + entry["score_s"]
        added = entry.get("live_s")
        computed = NotComputed(reason) if added is None else elapsed + added
        rows.append((name, entry.get("steps"), entry.get("steps_s"), entry["train_s"], entry["score_s"], computed))
    found = totals(times)
    sums = [sum(cast("float", row[index] or 0) for row in rows) for index in range(1, len(COLUMNS) - 1)]
    end_to_end = NotComputed(reason) if found["end_to_end_s"] is None else found["end_to_end_s"]
    rows.append(("all runs", *sums, end_to_end))
    if times.get("extraction_s") is not None:
        rows.append(("extraction of the store", None, None, times["extraction_s"], None, 0.0))
    times_in: list[Unit] = ["decimal"]
    units: list[Unit] = ["text", "count", *times_in * (len(COLUMNS) - 2)]
    return Section(
        title="Wall time of the sweep and of its runs end to end",
        columns=tuple(Column(name=name, unit=unit) for name, unit in zip(COLUMNS, units, strict=True)),
        rows=tuple(rows),
        block=TIME,
        notes=(
            "Measured: elapsed seconds of training, loading and checkpoints included, and of scoring; attempts that"
            " were killed are not in them, but their steps are in the column of steps.",
            f"Computed, not run: end to end adds decoding and encoding to every step and to every question's clip, by"
            f" {times.get('live_source') or 'no rate'}, before the step and not alongside it.",
        ),
    )
