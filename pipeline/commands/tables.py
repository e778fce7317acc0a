"""Results as tables for a person, on stdout. Values come from the library; no command computes here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mervcache.console import console, strong, table
from pipeline.summary import DECODING


def size(num_bytes: float) -> str:
    """Decimal units, as disks are sold: `7.3 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(num_bytes) < 1000 or unit == "TB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def predicted(prediction: Mapping[str, Any] | None) -> str:
    """`2.1 h (1.9 h to 2.4 h), 512.0 GB for 81000 clips, by plan`."""
    if not prediction:
        return "-"
    time = "no time" if prediction["seconds"] is None else duration(prediction["seconds"])
    if prediction["interval_s"]:
        low, high = map(duration, prediction["interval_s"])
        time += f" ({low} to {high})"
    return f"{time}, {size(prediction['bytes'])} for {plural(prediction['clips'], 'clip')}, by {prediction['by']}"


def summary(result) -> None:
    """What an extraction did: counts, rates, seconds per stage, quarantine by reason."""
    out = console()
    ok, seconds = result.clips - result.failed, max(result.elapsed_s, 1e-9)
    out.print(strong(result.store), f"  snapshot {result.snapshot}", sep="")
    if not result.clips:
        out.print(f"nothing to do: all {result.listed} clips listed are committed or quarantined, `status` counts them")
    else:
        if result.predicted:
            out.print(f"predicted: {predicted(result.predicted)}")
        out.print(
            f"{plural(ok, 'clip')} committed, {result.failed} quarantined, {plural(result.blocks, 'block')}, "
            f"{size(result.bytes)} in {duration(seconds)}: {result.clips / seconds:.2f} clips/s, "
            f"{result.frames / seconds:.0f} frames/s, "
            f"{size(result.bytes / seconds)}/s"
        )
        _stages(result.stage_s)
    counted("quarantined", "clips", result.reasons)
    counted("listed but absent", "media", result.missing)
    counted("refused at listing", "records", result.rejected)
    if result.reused:
        out.print(f"{result.reused} cells (clip and encoder) were copied from another store")
    if result.halvings:
        out.print(f"{result.halvings} batches were halved for lack of device memory: give a smaller batch")
    if result.unchanged:
        out.print(f"{plural(result.unchanged, 'clip')} failed as before and stay quarantined")
    if result.reasons:
        out.print("after mending the cause: the same command with --retry-quarantine")
    out.print(f"look: merv-pipeline report {result.store}")
    if result.samples:
        how = "--recipe demo" if result.dataset == "demo" else "--llm FOLDER_OR_HUB_ID"
        out.print(f"train: merv-train --from-cache {result.store} {how} --out runs/first", soft_wrap=True)


def _stages(stage_s: Mapping[str, float]) -> None:
    """Where the blocks' time went: shares of the worker's own time, and decoding, which runs beside it."""
    beside = stage_s.get(DECODING, 0.0)
    stages = {name: s for name, s in stage_s.items() if name not in ("total", DECODING)}
    total = stage_s["total"]
    stages["rest"] = max(0.0, total - sum(stages.values()))
    rows = [(name, f"{s:.1f}", f"{s / total:.0%}") for name, s in sorted(stages.items(), key=lambda item: -item[1])]
    table(("stage", "seconds", "share"), rows, right=("seconds", "share"))
    console().print(f"decoding took {beside:.1f} s in processes of its own, beside these stages")


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def counted(title: str, unit: str, counts: Mapping[str, int]) -> None:
    """A table of counts, largest first; nothing where there are none."""
    if counts:
        rows = sorted(counts.items(), key=lambda item: -item[1])
        table((title, unit), rows, right=(unit,))


def status(result: Mapping[str, Any], quarantine: Sequence[Mapping[str, Any]]) -> None:
    """What a store holds; failures by reason, a clip's own once and not per encoder."""
    out = console()
    out.print(strong(result["store"]), f"  snapshot {result['snapshot']}, {size(result['bytes'])}", sep="")
    out.print(", ".join(plural(n, f"{kind} clip") for kind, n in result["clips"].items()) or "no clips")
    columns = ("encoder", "identity", "weights", "grid", "width", "storage", "committed", "failed", "to_do")
    rows = [[_cell(entry[name]) for name in columns] for entry in result["encoders"]]
    shown = tuple(column.replace("_", " ") for column in columns)
    table(shown, rows, right=("width", "committed", "failed", "to do"))
    if run := result["last run"]:
        out.print(f"last run: {duration(run['seconds'])}, {size(run['bytes'])} for {plural(run['clips'], 'clip')}")
        if run["predicted"]:
            out.print(f"predicted: {predicted(run['predicted'])}")
    if result["unpublished_blocks"]:
        out.print(
            f"{plural(result['unpublished_blocks'], 'block')} committed after this snapshot, by a run that goes on or "
            "was interrupted: the next snapshot shows them"
        )
    counted("samples", "count", result["samples"])
    failed = Counter((reason, encoders) for (_, reason), encoders in failures(quarantine).items())
    if failed:
        rows = [(*names, clips) for names, clips in failed.most_common()]
        table(("quarantined", "encoders", "clips"), rows, right=("clips",))
    for stone in result["tombstones"]:
        out.print(f"{plural(stone['clips'], 'clip')} removed on {stone['date']}: {stone['reason']}")


def failures(quarantine: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """(clip, reason) -> the encoders that it failed at; a clip's own fault is that of all of them."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in quarantine:
        encoder = "all encoders" if row["scope"] == "clip" else row["encoder"]
        found.setdefault((row["clip_id"], row["reason"]), {})[encoder] = None
    return {failure: ", ".join(encoders) for failure, encoders in found.items()}


def details(result: Mapping[str, Any]) -> None:
    table(("", ""), [(name, _cell(value)) for name, value in result.items()])


def _cell(value: Any) -> str:
    """Sizes as 16x8x8, other numbers with commas, texts a line each."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        if all(isinstance(entry, int) for entry in value):
            return "x".join(map(str, value))
        return (", " if all(isinstance(entry, int | float) for entry in value) else "\n").join(map(_cell, value))
    return str(value)


def forecast(result) -> None:
    """What an extraction would cost."""
    out = console()
    columns = ("stage", "kind", "encoder", "clips", "to do", "reusable", "bytes", "files", "time")
    rows = [
        (
            r.stage,
            r.kind,
            r.encoder,
            r.clips,
            r.to_do,
            r.reusable,
            size(r.bytes),
            r.files,
            duration(r.seconds) if r.seconds else "-",
        )
        for r in result.rows
    ]
    table(columns, rows, right=columns[3:])
    if reusable := sum(r.reusable for r in result.rows):
        to_do = sum(r.to_do for r in result.rows)
        out.print(
            f"the other store saves {reusable} of {to_do} cells ({reusable / to_do:.0%}), where the media are the same"
        )
    free = "" if result.free_bytes is None else f", {size(result.free_bytes)} free"
    out.print(strong(size(result.bytes)), f" to write at {result.store}{free}", sep="")
    if result.seconds:
        low, high = (duration(s) for s in result.interval_s)
        workers = plural(result.workers, "worker")
        out.print(strong(duration(result.seconds)), f" with {workers} like this one ({low} to {high})", sep="")
        out.print(
            f"from a probe of {plural(result.probed, 'clip')} on {plural(result.probed_workers, 'worker')} "
            f"({result.device}); the range is {result.interval}. The rows tell the encoders alone; "
            f"decoding, {result.decode_s:.3f} s per clip, runs beside them and counts where it is the slower; "
            f"{duration(result.startup_s)} of the whole is a worker's start."
        )
    counted("listed but absent", "media", result.missing)


def encoder_row(spec) -> dict[str, Any]:
    return {
        "encoder": spec.name,
        "weights": spec.hub_id,
        "frames": spec.num_frames,
        "grid": list(spec.grid),
        "width": spec.width,
        "layer": spec.layer,
        "summary": spec.summary,
    }


def encoders(rows: Sequence[Mapping[str, Any]]) -> None:
    """Two tables: names of weights and of layers are too long to stand beside the sizes."""
    for columns in (("encoder", "frames", "grid", "width", "summary"), ("encoder", "weights", "layer")):
        rows_of([{name: row[name] for name in columns} for row in rows], right=("frames", "width"))


def dataset_row(spec) -> dict[str, Any]:
    return {"dataset": spec.name, "default root": spec.default_root, "summary": spec.summary}


def dataset_details(spec) -> dict[str, Any]:
    options = {f"options: {name}": f"{o.help} (default: {o.default})" for name, o in spec.options.items()}
    stages = ", ".join(spec.stages) or "none: it has no samples"
    return {**dataset_row(spec), "stages": stages, "what to get": spec.download, **options}


def rows_of(rows: Sequence[Mapping[str, Any]], *, right: Sequence[str] = ()) -> None:
    """A table whose headings are the rows' keys."""
    table(tuple(rows[0]), [[_cell(value) for value in row.values()] for row in rows], right=right)
