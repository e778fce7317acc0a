"""What `explain` found, for a person, on stdout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mervcache.console import console, strong, table
from pipeline.commands.tables import duration, plural, size
from pipeline.upkeep.explain import EncoderChange, Explanation
from pipeline.upkeep.explain_costs import Cost

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
    out.print(strong(found.store), f"  snapshot {found.snapshot}, dataset {found.dataset}", sep="")
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
        strong(change.encoder),
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
    console().print("in all ", strong(f"{size(sum(cost.bytes for cost in costs))} and {time}"), sep="")


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
