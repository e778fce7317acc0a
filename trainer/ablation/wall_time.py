"""How long the runs of a sweep took, alongside the same runs end to end.

SWEEP/times.json    seconds of every run, measured, and of its live encoding, computed

No run is trained end to end for this. What decoding and encoding would add to a run is the number of clips that it was
trained and scored on times the seconds of a clip: a worker's in the store's extraction, by its journal, or those of the
steps of a run end to end.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from featurestore.clips import Sample
from mervcache.console import format_duration
from mervcache.errors import UserError
from mervcache.files import load_json, replace_text
from trainer.ablation.costs import extraction_cost, live_seconds_per_clip, run_step_time
from trainer.ablation.document import TIME, Cell, Column, NotComputed, Section
from trainer.ablation.supervise import RunTime
from trainer.ablation.sweep import SweepRun, run_folder
from trainer.config import read_config
from trainer.runs.run_record import METRICS_FILE, RunRecord, read_metrics
from trainer.runs.stage_folders import last_stage

FORMAT = 1
TIMES_FILE = "times.json"
COLUMNS = ("run", "steps", "in steps (s)", "training (s)", "scoring (s)", "end to end, computed (s)")


def names_in(encoders: Iterable[str]) -> set[str]:
    """Names in a store's journal: a store that holds an encoder twice calls it NAME@ID."""
    return {encoder.partition("@")[0] for encoder in encoders}


def read_times(sweep: Path) -> dict[str, Any]:
    """The file of a sweep, empty where there is none; UserError for another format."""
    path = Path(sweep) / TIMES_FILE
    if not path.is_file():
        return {"format": FORMAT, "runs": {}}
    times = load_json(path.read_bytes(), str(path))
    if times.get("format") != FORMAT or not isinstance(times.get("runs"), dict):
        raise UserError(f"{path} has format {times.get('format')!r}, this version reads {FORMAT}; remove it")
    return times


def _write(sweep: Path, times: Mapping[str, Any]) -> None:
    replace_text(Path(sweep) / TIMES_FILE, json.dumps(times, indent=1) + "\n")


def add_run_time(sweep: Path, run: str, time: RunTime) -> None:
    """Add the seconds of a task or session that brought a run to its end."""
    times = read_times(sweep)
    entry = times["runs"].setdefault(run, {})
    for name, seconds in asdict(time).items():
        entry[name] = entry.get(name, 0.0) + seconds
    _write(sweep, times)


def add_end_to_end(
    sweep: Path,
    runs: Sequence[SweepRun],
    journal: Sequence[Mapping[str, Any]],
    *,
    encoders: Collection[str],
    samples: Sequence[Sample],
    questions: Sequence[Sample],
    live: Path | None = None,
) -> None:
    """Compute what each of the runs that have ended would have taken end to end, and write it next to its seconds.

    `samples` and `questions` are those of all runs, `encoders` those of the sweep, whose extraction is what a store
    costs. `live` is a run end to end, with the encoders of one of the runs: without it the rates are the journal's.
    """
    times = read_times(sweep)
    times |= {"extraction_s": None, "live_source": "", "not_computed": ""}
    share = sum(sample.clip_id is not None for sample in samples) / max(1, len(samples))
    asked = len({sample.clip_id for sample in questions if sample.clip_id is not None})
    try:
        times["extraction_s"] = extraction_cost(journal, encoders=names_in(encoders)).seconds
        scale, times["live_source"] = _live_scale(sweep, runs, journal, live)
    except UserError as error:
        times["not_computed"] = str(error)
    for run in runs:
        entry, folder = times["runs"].get(run.name), run_folder(sweep, run)
        if entry is None:
            continue
        rows = [row for path in sorted(folder.rglob(METRICS_FILE)) for row in read_metrics(path.parent)]
        entry["steps"] = len(rows)
        entry["steps_s"] = sum(row["samples"] / row["samples_per_s"] for row in rows if row.get("samples_per_s"))
        entry["live_s"] = None
        if not times["not_computed"]:
            clips = share * sum(row["samples"] for row in rows) + asked
            entry["live_s"] = clips * scale * _worker_seconds(journal, run.encoders)
    _write(sweep, times)


def _live_scale(
    sweep: Path, runs: Sequence[SweepRun], journal: Sequence[Mapping[str, Any]], live: Path | None
) -> tuple[float, str]:
    """By what the journal's seconds of a clip are multiplied, and where the rate comes from."""
    if live is None:
        return 1.0, "a worker's seconds per clip in the store's extraction, by its journal"
    record, config = RunRecord.read(last_stage(live)), read_config(last_stage(live))
    for run in runs:
        folder = run_folder(sweep, run)
        is_same = set(run.encoders) == set(record.encoder_order) and folder.is_dir()
        if is_same and read_config(last_stage(folder)).batch_size == config.batch_size:
            added = live_seconds_per_clip(run_step_time(folder), run_step_time(live), config.batch_size)
            return added / _worker_seconds(journal, run.encoders), f"the steps of {live} less those of {run.name}"
    raise UserError(
        f"no run of this sweep has the encoders of {live}, {', '.join(record.encoder_order)}, and its batch_size"
        f" {config.batch_size}"
    )


def _worker_seconds(journal: Sequence[Mapping[str, Any]], encoders: Collection[str]) -> float:
    """Seconds of a worker to decode a clip and to encode it with these encoders; 0 of text only."""
    return extraction_cost(journal, encoders=names_in(encoders)).worker_s_per_clip if encoders else 0.0


def totals(times: Mapping[str, Any]) -> dict[str, float | None]:
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
    sums = [sum(row[index] or 0 for row in rows) for index in range(1, len(COLUMNS) - 1)]
    end_to_end = NotComputed(reason) if found["end_to_end_s"] is None else found["end_to_end_s"]
    rows.append(("all runs", *sums, end_to_end))
    if times.get("extraction_s") is not None:
        rows.append(("extraction of the store", None, None, times["extraction_s"], None, 0.0))
    units = ("text", "count", *["decimal"] * (len(COLUMNS) - 2))
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
