"""Results of `merv-pipeline` as text and tables on stdout; the figures are the library's."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from featurestore.quality import VERDICTS, ParityRecord, TokenRecord, token_notes, token_table
from featurestore.transfer.merge import Combined
from featurestore.transfer.sync import Transferred
from mervcache.console import bold, console, format_bytes, format_duration, plural, table
from pipeline.cli.next_step import quarantine_advice, train_command
from pipeline.datasets import FILES_NAMED, folder_name, link_advice, missing_lines, options_of
from pipeline.duplicates import Duplicates
from pipeline.status import EncoderProgress, StoreProgress
from pipeline.summary import hours_text, prediction_text
from pipeline.worker.reports import PARALLEL_STAGES

NUM_PAIRS = 50
_MEDIA = {
    "quick": "media modified since their tokens were made are compared, --media full compares all",
    "full": "all media compared",
}


def counted(title: str, unit: str, counts: Mapping[str, int]) -> None:
    """A table of counts, largest first; nothing where there are none."""
    if counts:
        table((title, unit), sorted(counts.items(), key=lambda item: -item[1]), right=(unit,))


def left_out(result) -> None:
    """What a listing left out, of an `ExtractSummary` or a `Forecast`."""
    counted("listed but absent", "media", {folder_name(name): count for name, count in result.missing.items()})
    for line in missing_lines(result.missing_files):
        console().print(line, soft_wrap=True)
    if len(result.missing_files) > FILES_NAMED:
        console().print("--json names all of them")
    counted("refused at listing", "records", result.rejected)
    counted("not read", "count", result.skipped)
    for line in link_advice(result.rejected):
        console().print(line, soft_wrap=True)


def details(result: Mapping[str, Any]) -> None:
    """A table of names and values."""
    table(("", ""), [(name, _cell(value)) for name, value in result.items()])


def rows_of(rows: Sequence[Mapping[str, Any]], *, right: Sequence[str] = ()) -> None:
    """A table whose headings are the rows' keys."""
    table(tuple(rows[0]), [[_cell(value) for value in row.values()] for row in rows], right=right)


def _cell(value: Any) -> str | list[str]:
    """A grid as 16x8x8, other numbers with commas, a list of texts with a line each."""
    if isinstance(value, list | tuple) and not all(isinstance(entry, int | float) for entry in value):
        return list(map(_words, value))
    return _words(value)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ("x" if all(isinstance(entry, int) for entry in value) else ", ").join(map(_words, value))
    return str(value)


def summary(result) -> None:
    """What an extraction did: counts, rates, seconds per stage, quarantine by reason."""
    out = console()
    committed, seconds = result.clips - result.failed, max(result.elapsed_s, 1e-9)
    out.print(bold(result.store), f"  snapshot {result.snapshot}", sep="")
    if not result.clips:
        out.print(f"nothing to do: all {result.listed} clips listed are committed or quarantined, `status` counts them")
    else:
        if result.predicted:
            out.print(f"predicted: {prediction_text(result.predicted, result.device)}")
        out.print(
            f"{plural(committed, 'clip')} committed, {result.failed} quarantined, {plural(result.blocks, 'block')}, "
            f"{format_bytes(result.bytes)} in {result.duration_text}: {result.clips / seconds:.2f} clips/s, "
            f"{result.frames / seconds:.0f} frames/s, {format_bytes(result.bytes / seconds)}/s"
        )
        if result.worker_s:
            out.print(f"spent: {hours_text(result.worker_s, result.device, result.gpu_cost)}")
        total = result.stage_s["total"]
        stages = {name: s for name, s in result.stage_s.items() if name not in ("total", *PARALLEL_STAGES)}
        stages["rest"] = max(0.0, total - sum(stages.values()))
        rows = [(name, f"{s:.1f}", f"{s / total:.0%}") for name, s in sorted(stages.items(), key=lambda item: -item[1])]
        table(("stage", "seconds", "share"), rows, right=("seconds", "share"))
        beside = ", ".join(f"{name} {result.stage_s.get(name, 0.0):.1f} s" for name in PARALLEL_STAGES)
        out.print(f"in parallel with these stages: {beside}")
    reasons = {f"{why}; such as {result.examples[why]}": count for why, count in result.reasons.items()}
    counted("quarantined", "clips", reasons)
    left_out(result)
    copied = {"another store": result.reused, "other datasets' clips of the same media": result.same_media}
    for source, count in copied.items():
        if count:
            out.print(f"{count} (clip, encoder) pairs were copied from {source}")
    if result.halvings:
        out.print(f"{result.halvings} batches were halved for lack of device memory; see what else uses the device")
    if result.unchanged:
        out.print(f"{plural(result.unchanged, 'clip')} failed as before and stay quarantined")
    if result.reasons:
        out.print(quarantine_advice(result), soft_wrap=True)
    out.print(f"report: merv-pipeline report {result.store}")
    if result.samples:
        out.print(f"train: {train_command(result)}", soft_wrap=True)


def status(result: Mapping[str, Any], quarantine: Sequence[Mapping[str, Any]]) -> None:
    """What a store holds, and failures by reason: those of a clip itself count once, not per encoder."""
    out = console()
    out.print(bold(result["store"]), f"  snapshot {result['snapshot']}, {format_bytes(result['bytes'])}", sep="")
    for name, snapshot in result["tags"].items():
        out.print(f"tag {name}: snapshot {snapshot}")
    out.print(", ".join(plural(n, f"{kind} clip") for kind, n in result["clips"].items()) or "no clips")
    columns = ("encoder", "identity", "weights", "grid", "width", "storage", "committed", "failed", "to_do")
    if any("@" in entry["encoder"] for entry in result["encoders"]):  # several identities of an encoder
        columns = (*columns[:4], "layer", *columns[4:])
    rows = [[_cell(entry[name]) for name in columns] for entry in result["encoders"]]
    headings = tuple(column.replace("_", " ") for column in columns)
    table(headings, rows, right=("width", "committed", "failed", "to do"))
    if run := result["last run"]:
        took = f"{format_duration(run['seconds'])}, {format_bytes(run['bytes'])}"
        if run.get("worker_s"):
            took += f", {hours_text(run['worker_s'], run['device'], run.get('gpu_cost'))},"
        out.print(f"last run: {took} for {plural(run['clips'], 'clip')}")
        if run["predicted"]:
            out.print(f"predicted: {prediction_text(run['predicted'], run.get('device', ''))}")
    for total in result["spent"]:
        cost = "" if total["cost"] is None else f", cost {total['cost']:.2f}"
        out.print(f"spent in {plural(total['runs'], 'run')}: {hours_text(total['worker_s'], total['device'])}{cost}")
    if result["unpublished_blocks"]:
        out.print(
            f"{plural(result['unpublished_blocks'], 'block')} committed after this snapshot, by a run that is active "
            "or was interrupted: the next snapshot shows them"
        )
    counted("samples", "count", result["samples"])
    if failed := Counter((reason, encoders) for (_, reason), encoders in _failures(quarantine).items()):
        rows = [(*names, clips) for names, clips in failed.most_common()]
        table(("quarantined", "encoders", "clips"), rows, right=("clips",))
    for tombstone in result["tombstones"]:
        out.print(f"{plural(tombstone['clips'], 'clip')} removed on {tombstone['date']}: {tombstone['reason']}")


def quarantined(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line per clip and reason, whatever the number of encoders, and how many clips each reason has."""
    if not rows:
        console().print("no matching clip is quarantined")
        return
    failures = _failures(rows)
    table(("clip", "encoders", "reason"), [(clip, encoders, reason) for (clip, reason), encoders in failures.items()])
    counted("reason", "clips", Counter(reason for _, reason in failures))


def _failures(quarantine: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """(clip, reason) -> names of the encoders that failed, or "all encoders" where the clip cannot be decoded."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in quarantine:
        encoder = "all encoders" if row["scope"] == "clip" else row["encoder"]
        found.setdefault((row["clip_id"], row["reason"]), {})[encoder] = None
    return {failure: ", ".join(encoders) for failure, encoders in found.items()}


def watch_line(progress: StoreProgress) -> str:
    """`12:00:05  siglip-0123456789ab 84/120 clips (21/30 blocks), 3.1 clips/s, 12.0 s left; ...`."""
    parts = [
        f"{e.encoder} {e.clips}/{e.all_clips} clips ({e.blocks}/{e.all_blocks} blocks), {_rate(e)}, {_left(e)}"
        for e in progress.encoders
    ]
    return f"{time.strftime('%H:%M:%S')}  {'; '.join(parts) or 'no encoder has a group yet'}"


def watch_table(progress: StoreProgress) -> None:
    """A screen of `status --watch`."""
    out, columns = console(), ("encoder", "clips", "of", "blocks", "of", "rate", "left")
    rows = [(e.encoder, e.clips, e.all_clips, e.blocks, e.all_blocks, _rate(e), _left(e)) for e in progress.encoders]
    out.print(time.strftime("%H:%M:%S  rates of the last 5 min (Ctrl-C ends the watch, not the run)"))
    table(columns, rows, right=columns[1:])
    if progress.is_done:
        out.print("every planned block is committed")
    elif progress.seconds_left is not None:
        out.print(f"about {format_duration(progress.seconds_left)} left")


def _rate(encoder: EncoderProgress) -> str:
    if encoder.is_done:
        return "-"
    return "not moving" if encoder.clips_per_s is None else f"{encoder.clips_per_s:.2f} clips/s"


def _left(encoder: EncoderProgress) -> str:
    if encoder.is_done:
        return "done"
    return "time left unknown" if encoder.seconds_left is None else f"{format_duration(encoder.seconds_left)} left"


def encoder_row(spec) -> dict[str, Any]:
    return {
        "encoder": spec.name,
        "weights": spec.hub_id,
        "licence": spec.licence or "not stated",
        "gated": spec.gated,
        "frames": spec.num_frames,
        "grid": list(spec.grid),
        "width": spec.width,
        "layer": spec.layer,
        "summary": spec.summary,
    }


def encoders(rows: Sequence[Mapping[str, Any]]) -> None:
    """Three tables: names of weights and of layers are too long for one."""
    shown = [{**row, "licence": f"{row['licence']}{' (gated)' * row['gated']}"} for row in rows]
    for columns in (
        ("encoder", "frames", "grid", "width", "summary"),
        ("encoder", "weights", "licence"),
        ("encoder", "layer"),
    ):
        rows_of([{name: row[name] for name in columns} for row in shown], right=("frames", "width"))
    out = console()
    out.print("Licences are those of the weights. Check them before you share tokens; nc allows no commercial use.")
    if any(row["gated"] for row in rows):
        out.print("gated: accept the licence on the weights' page of huggingface.co, then run `hf auth login`.")
    out.print("Any model of timm is an encoder too: --encoders timm:NAME, with timm's own licence and preprocessing.")


def dataset_row(spec) -> dict[str, Any]:
    return {"dataset": spec.name, "default root": spec.default_root, "summary": spec.summary}


def dataset_details(spec) -> dict[str, Any]:
    options = {f"options: {name}": f"{o.help} (default: {o.default})" for name, o in options_of(spec).items()}
    stages = ", ".join(spec.stages) or "none: it has no samples"
    return {**dataset_row(spec), "stages": stages, "what to get": spec.download, **options}


def findings(found: Sequence, full: bool, media: str | None = None) -> None:
    """Damage first, then orphans and notices, each with what to do."""
    out = console()
    level = "every byte read" if full else "quick: names, sizes and digests of metadata; --full reads every byte"
    level += f"; {_MEDIA[media]}" if media else ""
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
    """This machine's tokens of the reference clips compared with the stored ones, and the verdict."""
    out = console()
    columns = ("encoder", "kind", "clips", "frames", "max abs", "relative", "cosine", "tolerance", "verdict")
    rows = []
    for row in checked.rows:
        figures = ("-", "overflow", "-")
        if row.relative is not None:
            figures = (f"{row.max_abs:.1e}", f"{row.relative:.1e}", f"{row.cosine_min:.6f}")
        limits = f"{row.tolerance:.1e}, {row.cosine_tolerance:.6f}"
        rows.append((row.encoder, row.kind, row.clips, row.frames, *figures, limits, VERDICTS[row.verdict]))
    table(columns, rows, right=("clips", "max abs", "relative", "cosine"))
    out.print(f"on {checked.device}, {checked.machine}, with torch {checked.versions.get('torch', 'unknown')}")
    if any(row.frames == "differ" for row in checked.rows):
        out.print("frames differ: decoding or resizing changed (PyAV, Pillow), before any encoder read them")


def repaired(done: Sequence) -> None:
    """What was repaired, and what was not."""
    out = console()
    if not done:
        out.print("no damage found: nothing was changed")
        return
    rows = [("repaired" if each.is_mended else "NOT REPAIRED", each.key, each.done) for each in done]
    table(("", "object", "what was done"), rows)
    left = sum(not each.is_mended for each in done)
    out.print(
        bold(f"{len(done) - left} repaired, {left} not"), "; `merv-pipeline verify --full` reads every byte", sep=""
    )


def distortion(record: TokenRecord) -> None:
    """A line per encoder, kind and dtype, then what it was measured on."""
    columns, rows = token_table(record)
    table(columns, rows, right=columns[3:])
    for note in token_notes(record):
        console().print(note)


def transferred(done: Transferred) -> None:
    """What a push or pull did."""
    out = console()
    names = ", ".join(done.encoders) or "no encoders"
    out.print(bold(done.destination), f"  snapshot {done.snapshot}, {names}", sep="")
    out.print(
        f"{plural(done.sent_blocks, 'block')} of {done.blocks} moved, {format_bytes(done.sent_bytes)} of "
        f"{format_bytes(done.bytes)}; the rest was already there"
    )
    if done.tags:
        out.print(f"tags: {', '.join(done.tags)}")
    if done.card is False:
        out.print("no card was written: the README.md there was not made by this program")
    if done.overhead > 1:
        out.print(
            f"whole blocks hold {done.overhead:.2f} times the selected clips: `merv-pipeline subset` cuts them out"
        )


def combined(done: Combined) -> None:
    """What a union, subset or import wrote."""
    out = console()
    out.print(bold(done.store), f"  snapshot {done.snapshot}", sep="")
    out.print(f"{done.clips} clips, {done.cells} (clip, encoder) pairs, {done.copied} of them copied in this run")
    if done.shared:
        out.print(f"{done.shared} pairs are in several stores, {done.differing} with other bits: the first store wins")
    if done.renamed:
        out.print(f"{done.renamed} pairs were taken from the same media under another name")
    if done.other_media:
        out.print(
            f"{done.other_media} pairs were left out: a later store has other media under the name of a clip; rename "
            "it there, or give that store first"
        )
    if done.removed:
        out.print(f"{plural(done.removed, 'clip')} left out: removed by tombstones, which the new store has as well")
    counted("samples", "count", done.samples)


def duplicates(found: Duplicates, next_command: str) -> None:
    """Pairs, leaks first, what was compared, and the command that leaves the training clips of leaks out."""
    pairs = sorted(found.pairs, key=lambda pair: not pair.is_leak)
    rows = [
        (
            pair.first,
            pair.second,
            f"{min(pair.cosines.values()):.4f}",
            "same bytes" if pair.is_exact else "",
            "trained and scored" if pair.is_leak else "",
        )
        for pair in pairs[:NUM_PAIRS]
    ]
    if rows:
        table(("clip", "other clip", "least cosine", "media", "leak"), rows, right=("least cosine",))
    if len(pairs) > NUM_PAIRS:
        print(f"and {len(pairs) - NUM_PAIRS:,} more: --json has all")
    print(
        f"{plural(len(pairs), 'pair')} of {found.clips:,} clips reach {found.threshold} for"
        f" {', '.join(found.encoders)}; {len(found.leaks):,} between a trained and a scored clip"
    )
    if found.shared:
        print(f"{plural(found.shared, 'clip')} have both trained and scored conversations")
    if found.without:
        print(f"{plural(found.without, 'clip')} not compared: tokens of an encoder are missing")
    if found.leaked or found.repeated:
        print(f"training clips to leave out: {len(found.leaked):,} of leaks, {len(found.repeated):,} more with --dedup")
        print(next_command)
