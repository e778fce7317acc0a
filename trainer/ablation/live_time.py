"""What the runs of a sweep would have taken end to end, computed from measured rates; see `wall_time.py`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from featurestore.clips import Sample
from mervcache.errors import UserError
from trainer.ablation.costs import extraction_cost, live_seconds_per_clip, run_step_time
from trainer.ablation.sweep import SweepRun, run_folder
from trainer.ablation.wall_time import read_times, write_times
from trainer.config import read_config
from trainer.runs.run_record import RunRecord, read_metrics
from trainer.runs.stage_folders import METRICS_FILE, last_stage


def names_in(encoders: Iterable[str]) -> set[str]:
    """Names in a store's journal: a store that holds an encoder twice calls it NAME@GRID or NAME@ID."""
    return {encoder.partition("@")[0] for encoder in encoders}


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
    write_times(sweep, times)


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
