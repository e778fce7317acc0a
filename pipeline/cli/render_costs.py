"""Predictions of `merv-pipeline plan` and `explain` as text and tables on stdout; the figures are the library's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mervcache.console import bold, console, format_bytes, format_duration, plural, table
from pipeline.cli.render import left_out
from pipeline.explain import Cost, EncoderChange, Explanation
from pipeline.summary import hours_text

if TYPE_CHECKING:
    from pipeline.forecast import ForecastRow  # its module loads torch

NUM_SHOWN = 5  # clip ids; --json has all
VALUE_WIDTH = 70  # characters of a setting
_STATES = {"same": "stored as requested", "changed": "stored with other settings", "new": "not stored"}
_WEIGHTS = {
    "remembered": "digest remembered",
    "loaded": "digest of the weights loaded now",
    "assumed": "weights are not here: assumed to be the stored ones",
}


def forecast(result) -> None:
    """What an extraction would cost."""
    out = console()
    columns = ("stage", "kind", "encoder", "clips", "to do", "reusable", "bytes", "files", "time")
    rows = []
    for row in result.rows:
        counts = (row.clips, row.to_do, row.reusable, format_bytes(row.bytes), row.files)
        rows.append((row.stage, row.kind, row.encoder, *counts, _time(row) if row.seconds else "-"))
    table(columns, rows, right=columns[3:])
    _shared_note(result.rows)
    for note in result.stored_notes:
        out.print(note)
    free = "" if result.free_bytes is None else f", {format_bytes(result.free_bytes)} free"
    out.print(bold(format_bytes(result.bytes)), f" to write at {result.store}{free}", sep="")
    if result.seconds:
        low, high = map(format_duration, result.interval_s)
        workers = plural(result.workers, "worker")
        out.print(bold(format_duration(result.seconds)), f" with {workers} like this one ({low} to {high})", sep="")
        out.print("all workers together: ", bold(hours_text(result.worker_s, result.device, result.gpu_cost)), sep="")
        batch = " or ".join(plural(clips, f"{kind} clip") for kind, clips in result.batch.items())
        out.print(
            f"from a probe of {plural(result.probed, 'clip')} on {plural(result.probed_workers, 'worker')} "
            f"({result.device}), a batch is {batch}; the range is {result.interval}. The rows are the "
            f"encoders alone; decoding, {result.decode_s:.3f} s per clip, runs in parallel and counts where it is "
            f"slower; {format_duration(result.startup_s)} of the whole is a worker's start."
        )
    if balance := result.balance:
        kind = "GPU" if result.device.startswith("cuda") else "worker"
        cores = plural(balance.cores_wanted, "core")
        bound = "bound by decoding: the encoders wait for frames" if balance.decode_bound else "not bound by decoding"
        out.print(
            f"{bound}; a {kind} here has {balance.decoders} for decoding, and wants {cores} to decode and compress at "
            "the encoders' pace"
        )
    left_out(result)


def _time(row: ForecastRow | Cost) -> str:
    if row.seconds is None:
        return "-"
    return format_duration(row.seconds) + " (shared)" * row.is_shared


def _shared_note(rows: Sequence[ForecastRow | Cost]) -> None:
    if any(row.is_shared and row.seconds is not None for row in rows):
        console().print(
            "(shared): grids and layers of an encoder share a forward; it counts once, in the first row that needs it"
        )


def explanation(found: Explanation) -> None:
    """Encoders, what differs, what it costs, the media, and the next commands."""
    out = console()
    out.print(bold(found.store), f"  snapshot {found.snapshot}, dataset {found.dataset}", sep="")
    out.print(f"settings that were not given: those of {found.settings}")
    for change in found.encoders:
        _encoder_change(change)
    if any(change.costs for change in found.encoders):
        _costs(found.encoders)
    if found.untouched:
        out.print(f"not requested, and unchanged: {', '.join(found.untouched)}")
    for name, count in found.other_datasets.items():
        out.print(f"not looked at: {plural(count, 'clip')} of {name} (--dataset {name})")
    _changed_media(found)
    for command in found.next:
        out.print(f"next: {command}", soft_wrap=True)


def _encoder_change(change: EncoderChange) -> None:
    out = console()
    state = f" {change.identity}: {_STATES[change.state]} ({_WEIGHTS[change.weights]})"
    out.print("\n", bold(change.encoder), state, sep="")
    if change.fields:
        rows: list[tuple[str, ...]] = [(name, _short(old), _short(new)) for name, (old, new) in change.fields.items()]
        if "weights_sha256" in change.fields:
            rows.append(("weights", *map(str, change.labels)))
        table(("field", "stored", "requested"), rows)
    for reason in change.stays:
        out.print(f"stays: {reason}", soft_wrap=True)
    for name, versions in change.versions.items():
        out.print(
            f"made with {name} {', '.join(versions['made with'])}, here {versions['here']}: not part of the identity",
            soft_wrap=True,
        )


def _short(value: Any) -> str:
    text = "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return f"{text[:12]}..."
    return text if len(text) <= VALUE_WIDTH else text[: VALUE_WIDTH - 3] + "..."


def _costs(changes: Sequence[EncoderChange]) -> None:
    """What is to compute, and below it the sources of bytes and times: in the table they would fold every row."""
    out, rows, sources = console(), [], {}
    for encoder, cost in [(change.encoder, cost) for change in changes for cost in change.costs]:
        amounts = (format_bytes(cost.bytes), _time(cost)) if cost.clips else ("-", "-")
        rows.append((encoder, cost.kind, cost.missing, cost.stale, cost.quarantined, *amounts))
        if cost.clips:
            source = f"bytes: {cost.bytes_from}; time: {cost.seconds_from}"
            sources.setdefault(source, []).append(f"{encoder} {cost.kind}")
    columns = ("to compute", "kind", "missing", "changed media", "quarantined", "bytes", "time")
    table(columns, rows, right=columns[2:])
    _shared_note([cost for change in changes for cost in change.costs])
    for source, names in sources.items():
        out.print(f"{', '.join(names)}: {source}", soft_wrap=True)
    costs = [cost for change in changes for cost in change.costs]
    if any(cost.quarantined for cost in costs):
        out.print("quarantined clips are in no other figure: --retry-quarantine tries them")
    if costs := [cost for cost in costs if cost.clips]:
        known = [cost.seconds for cost in costs if cost.seconds is not None]
        total = f"{format_duration(sum(known))} on one worker" if known else "an unknown time"
        if known and len(known) < len(costs):
            total += f", and {plural(len(costs) - len(known), 'row')} of unknown time"
        out.print("in all ", bold(f"{format_bytes(sum(cost.bytes for cost in costs))} and {total}"), sep="")


def _changed_media(found: Explanation) -> None:
    out = console()
    if found.problem:
        out.print(f"\nmedia not looked at: {found.problem}", soft_wrap=True)
        return
    none = "" if found.changed or found.failed else ", none of them changed"
    looked = f"{plural(found.looked_at, 'clip')} with tokens looked at{none}"
    out.print(f"\nmedia under {found.root}: {looked}", soft_wrap=True)
    for problem, clips in (
        ("changed since their tokens were made", found.changed),
        ("changed, and the new content failed: the old tokens stay", found.failed),
        ("missing or not readable: their tokens stay valid", found.gone),
    ):
        if clips:
            more = ", ..." if clips[NUM_SHOWN:] else ""
            out.print(f"{len(clips)} {problem}: {', '.join(clips[:NUM_SHOWN])}{more}", soft_wrap=True, markup=False)
    if found.new:
        out.print(f"{plural(found.new, 'clip')} listed that the store has never seen")
    if found.unlisted:
        out.print(
            f"{plural(found.unlisted, 'clip')} of the store that the dataset lists no more: their tokens stay valid"
        )
