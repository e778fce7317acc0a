"""Results as tables for a person, on stdout. Values come from the library; no command computes here.

What keeping a store in order has to say, as tables for a person.

What moving and joining stores did, for a person, on stdout.

What `explain` found, for a person, on stdout.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from featurestore.quality import VERDICTS, ParityRecord, TokenRecord, token_notes, token_table
from featurestore.transfer.merge import Combined
from featurestore.transfer.sync import Transferred
from mervcache.console import bold, console, table
from pipeline.explain import Cost, EncoderChange, Explanation
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
    out.print(bold(result.store), f"  snapshot {result.snapshot}", sep="")
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
    out.print(bold(result["store"]), f"  snapshot {result['snapshot']}, {size(result['bytes'])}", sep="")
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
    out.print(bold(size(result.bytes)), f" to write at {result.store}{free}", sep="")
    if result.seconds:
        low, high = (duration(s) for s in result.interval_s)
        workers = plural(result.workers, "worker")
        out.print(bold(duration(result.seconds)), f" with {workers} like this one ({low} to {high})", sep="")
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


_MEDIA = {
    "quick": "media that were touched since the first run are compared, --media full compares all",
    "full": "all media compared",
}


def findings(found: Sequence, full: bool, media: str | None = None) -> None:
    """Damage first, then orphans and notices, each with what to do."""
    out = console()
    level = "every byte read" if full else "quick: names, sizes and digests of metadata; --full reads every byte"
    if media:
        level += f"; {_MEDIA[media]}"
    counts = Counter(finding.severity for finding in found)
    others = "".join(f", {plural(counts[name], name)}" for name in ("orphan", "notice") if counts[name])
    if found:
        rows = [(finding.severity, finding.key, finding.problem, finding.advice) for finding in found]
        table(("severity", "object", "problem", "what to do"), rows)
    if damage := counts["damage"]:
        out.print(bold(f"damage: {plural(damage, 'finding')}"), f"{others} ({level})", sep="")
    else:
        out.print(f"no damage found{others} ({level})")


def parity(checked: ParityRecord) -> None:
    """What this machine makes of the canaries, beside what the store holds; the verdict in words."""
    out = console()
    columns = ("encoder", "kind", "clips", "frames", "max abs", "relative", "cosine", "tolerance", "verdict")
    rows = []
    for row in checked.rows:
        if row.relative is None:
            figures = ("-", "overflow", "-")
        else:
            figures = (f"{row.max_abs:.1e}", f"{row.relative:.1e}", f"{row.cosine_min:.6f}")
        limits = f"{row.tolerance:.1e}, {row.cosine_tolerance:.6f}"
        rows.append((row.encoder, row.kind, row.clips, row.frames, *figures, limits, VERDICTS[row.verdict]))
    table(columns, rows, right=("clips", "max abs", "relative", "cosine"))
    out.print(f"on {checked.device}, {checked.machine}, with torch {checked.versions.get('torch', 'unknown')}")
    if any(row.frames == "differ" for row in checked.rows):
        out.print("frames differ: decoding or resizing drifted (PyAV, Pillow), before any encoder saw them")


def repaired(done: Sequence) -> None:
    """What was mended, and what was not."""
    out = console()
    if not done:
        out.print("no damage found: nothing was touched")
        return
    rows = [("mended" if each.is_mended else "NOT MENDED", each.key, each.done) for each in done]
    table(("", "object", "what was done"), rows)
    left = sum(not each.is_mended for each in done)
    out.print(
        bold(f"{len(done) - left} mended, {left} not"), "; `merv-pipeline verify --full` reads every byte", sep=""
    )


def quarantined(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per clip and reason, whatever the number of encoders, and how many clips each reason has."""
    if not rows:
        console().print("no clip is quarantined (of those asked for)")
        return
    found = failures(rows)
    table(("clip", "encoders", "reason"), [(clip, encoders, reason) for (clip, reason), encoders in found.items()])
    counted("reason", "clips", Counter(reason for _, reason in found))


def distortion(record: TokenRecord) -> None:
    """One line per encoder, kind and dtype, then what it was measured on."""
    columns, rows = token_table(record)
    table(columns, rows, right=columns[3:])
    for note in token_notes(record):
        console().print(note)


def transferred(done: Transferred) -> None:
    """What a push or pull did."""
    out = console()
    out.print(
        bold(done.destination), f"  snapshot {done.snapshot}, {', '.join(done.encoders) or 'no encoders'}", sep=""
    )
    out.print(
        f"{plural(done.sent_blocks, 'block')} of {done.blocks} moved, {size(done.sent_bytes)} of {size(done.bytes)}; "
        "the rest was there"
    )
    if done.card is False:
        out.print("no card was written: the README.md there is somebody's own")
    if done.overhead > 1:
        out.print(
            f"whole blocks hold {done.overhead:.2f} times the clips asked for: `merv-pipeline subset` cuts them out"
        )


def combined(done: Combined) -> None:
    """What a union, subset or import laid out."""
    out = console()
    out.print(bold(done.store), f"  snapshot {done.snapshot}", sep="")
    out.print(f"{done.clips} clips, {done.cells} cells (clip and encoder), {done.copied} of them copied in this run")
    if done.shared:
        out.print(
            f"{done.shared} cells are in several stores, {done.differing} with other bits: the first store's stand"
        )
    if done.renamed:
        out.print(f"{done.renamed} cells were taken from the same media under another name")
    if done.other_media:
        out.print(
            f"{done.other_media} cells were left aside: a later store has other media under the name of a clip; rename "
            "it there, or give that store first"
        )
    if done.removed:
        out.print(f"{plural(done.removed, 'clip')} left out: removed by tombstones, which the new store has as well")
    counted("samples", "count", done.samples)


SHOWN = 5  # clip ids; --json has all
WIDTH = 70  # characters of a value
_STATES = {"same": "stored as wanted", "changed": "stored otherwise", "new": "not stored"}
_WEIGHTS = {
    "remembered": "digest remembered",
    "loaded": "digest of the weights loaded now",
    "assumed": "weights are not here: assumed to be those that are stored",
}


def explanation(found: Explanation) -> None:
    """Encoders, what differs, what it costs, the media, and the next commands."""
    out = console()
    out.print(bold(found.store), f"  snapshot {found.snapshot}, dataset {found.dataset}", sep="")
    out.print(f"settings that were not given: those of {found.settings}")
    for change in found.encoders:
        _encoder(change)
    _costs(found.encoders)
    if found.untouched:
        out.print(f"not asked for, and as they are: {', '.join(found.untouched)}")
    for name, count in found.other_datasets.items():
        out.print(f"not looked at: {plural(count, 'clip')} of {name} (--dataset {name})")
    _media(found)
    for words in found.next:
        out.print(f"next: {words}", soft_wrap=True)


def _encoder(change: EncoderChange) -> None:
    out = console()
    out.print(
        "\n",
        bold(change.encoder),
        f" {change.identity}: {_STATES[change.state]} ({_WEIGHTS[change.weights]})",
        sep="",
    )
    if change.fields:
        rows = [(name, _short(old), _short(new)) for name, (old, new) in change.fields.items()]
        if "weights_sha256" in change.fields:
            rows.append(("weights", *map(str, change.labels)))
        table(("field", "stored", "wanted"), rows)
    for words in change.stays:
        out.print(f"stays: {words}", soft_wrap=True)
    for name, versions in change.versions.items():
        out.print(
            f"made with {name} {', '.join(versions['made with'])}, here {versions['here']}: no identity holds that",
            soft_wrap=True,
        )


def _costs(changes: Sequence[EncoderChange]) -> None:
    """What is to compute, and below it where its bytes and times are from: beside them it would fold every row."""
    costs = [(change, cost) for change in changes for cost in change.costs]
    if not costs:
        return
    columns = ("to compute", "kind", "missing", "changed media", "quarantined", "bytes", "time")
    table(columns, [_cost_row(change, cost) for change, cost in costs], right=columns[2:])
    sources: dict[str, list[str]] = {}
    for change, cost in costs:
        if cost.clips:
            words = f"bytes: {cost.bytes_from}; time: {cost.seconds_from}"
            sources.setdefault(words, []).append(f"{change.encoder} {cost.kind}")
    for words, named in sources.items():
        console().print(f"{', '.join(named)}: {words}", soft_wrap=True)
    if any(cost.quarantined for _, cost in costs):
        console().print("quarantined clips are in no other figure: --retry-quarantine tries them")
    _total(changes)


def _cost_row(change: EncoderChange, cost: Cost) -> Sequence[Any]:
    time = "-" if cost.seconds is None else duration(cost.seconds)
    amounts = (size(cost.bytes), time) if cost.clips else ("-", "-")
    return (change.encoder, cost.kind, cost.missing, cost.stale, cost.quarantined, *amounts)


def _total(changes: Sequence[EncoderChange]) -> None:
    costs = [cost for change in changes for cost in change.costs if cost.clips]
    if not costs:
        return
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    time = f"{duration(sum(known))} on one worker" if known else "a time that nobody knows"
    if known and len(known) < len(costs):
        time += f", and {plural(len(costs) - len(known), 'row')} of unknown time"
    console().print("in all ", bold(f"{size(sum(cost.bytes for cost in costs))} and {time}"), sep="")


def _media(found: Explanation) -> None:
    out = console()
    if found.problem:
        out.print(f"\nmedia not looked at: {found.problem}", soft_wrap=True)
        return
    none = "" if found.changed or found.failed else ", none of them changed"
    looked = f"{plural(found.looked_at, 'clip')} with tokens looked at{none}"
    out.print(f"\nmedia under {found.root}: {looked}", soft_wrap=True)
    for words, clips in (
        ("changed since their tokens were made", found.changed),
        ("changed, and the new content failed: the old tokens stand", found.failed),
        ("not there, or not to be read: their tokens stay good", found.gone),
    ):
        if clips:
            more = ", ..." if clips[SHOWN:] else ""
            out.print(f"{len(clips)} {words}: {', '.join(clips[:SHOWN])}{more}", soft_wrap=True, markup=False)
    if found.new:
        out.print(f"{plural(found.new, 'clip')} listed that the store has never seen")
    if found.unlisted:
        out.print(
            f"{plural(found.unlisted, 'clip')} of the store that the dataset lists no more: their tokens stay good"
        )


def _short(value: Any) -> str:
    text = "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return f"{text[:12]}..."
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."
