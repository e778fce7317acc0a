"""What keeping a store in order has to say, as tables for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from featurestore.quality import VERDICTS, ParityRecord, TokenRecord, token_notes, token_table
from mervcache.console import console, strong, table
from pipeline.commands.tables import counted, failures, plural

_MEDIA = {
    "quick": "media that were touched since the first run are compared, --media full compares all",
    "full": "all media compared",
}


def findings(found: Sequence, full: bool, media: str | None = None) -> None:
    """Damage first, then strays, each with what to do."""
    out = console()
    level = "every byte read" if full else "quick: names, sizes and digests of metadata; --full reads every byte"
    if media:
        level += f"; {_MEDIA[media]}"
    damage = sum(finding.severity == "damage" for finding in found)
    if found:
        rows = [(finding.severity, finding.key, finding.problem, finding.advice) for finding in found]
        table(("severity", "object", "problem", "what to do"), rows)
    if damage:
        out.print(strong(f"damage: {plural(damage, 'finding')}"), f", {len(found) - damage} strays ({level})", sep="")
    else:
        strays = f", {plural(len(found), 'stray')}" if found else ""
        out.print(f"no damage found{strays} ({level})")


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
        strong(f"{len(done) - left} mended, {left} not"), "; `merv-pipeline verify --full` reads every byte", sep=""
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
