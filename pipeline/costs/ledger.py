"""The ledger: what a store's journal tells of past runs. What encoders cost, with which libraries, of which media.

Comes in: the records of a store's extractions. Goes out: measured seconds per clip, by kind and encoder, for whoever
asks what computing would cost. A rate holds for the same network in the same arithmetic; grid, storage, weights and
decoder do not change what a forward takes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featurestore.identity import FeatureIdentity
from pipeline.summary import software_versions

_DECIDES_COST = ("encoder", "architecture", "num_frames", "compute_dtype")  # fields of an identity


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Seconds of a worker per clip, all told: encoding, and its share of waiting for decoders and of writing."""

    seconds: float
    clips: int  # that were measured
    source: str  # "3 runs on cpu", for a person


def past_rate(
    runs: Sequence[Mapping[str, Any]], stored: Mapping[str, FeatureIdentity], wanted: FeatureIdentity, kind: str
) -> Rate | None:
    """What the encoder took in the store's own runs; None where no run computed this network on this kind.

    `stored` is group name -> identity. Runs on other devices than the newest one's are left out.
    """
    found: list[tuple[str, float, float]] = []  # device, clips, seconds
    for run in runs:
        entry = run["encoders"].get(wanted.encoder, {})
        made = run["summary"].get("made", {}).get(f"{kind}/{wanted.encoder}", {})
        if made.get("clips") and made.get("seconds") and _costs_the_same(stored.get(entry.get("group", "")), wanted):
            overhead = _overhead(run["summary"]["stage_s"])
            found.append((str(entry.get("device", "?")), made["clips"], made["seconds"] * overhead))
    if not found:
        return None
    device = found[-1][0]
    mine = [(clips, seconds) for other, clips, seconds in found if other == device]
    clips = sum(clips for clips, _ in mine)
    words = f"{clips} clips of {len(mine)} run{'s' if len(mine) > 1 else ''} on {device}"
    return Rate(seconds=sum(seconds for _, seconds in mine) / clips, clips=int(clips), source=words)


def changed_versions(runs: Sequence[Mapping[str, Any]], group: str) -> dict[str, dict[str, Any]]:
    """By library, where they differ: the versions that made a group's tokens, and the version here."""
    here, made_with = software_versions(), {}
    for run in runs:
        wrote = any(entry.get("group") == group for entry in run["encoders"].values()) and run["summary"]["clips"]
        for name, version in run.get("versions", {}).items() if wrote else ():
            made_with.setdefault(name, set()).add(version)
    return {
        name: {"made with": sorted(versions), "here": here[name]}
        for name, versions in made_with.items()
        if name in here and versions != {here[name]}
    }


def settings_of(run: Mapping[str, Any], *, without: Collection[str] = ()) -> dict[str, Any]:
    """A run's settings in the words that `read_config` takes, for whoever repeats it, without those named."""
    settings = {name: value for name, value in run["config"].items() if name not in without}
    return settings | {"grid": settings.get("grid") or "raw"}


def media_roots(runs: Iterable[Mapping], root: str | None) -> dict[str, str]:
    """Dataset -> folder of its media: as given, else as its newest run says; "" stands for every other dataset."""
    known = {run["config"]["dataset"]: run["root"] for run in runs}
    return {"": root} if root else known


def _costs_the_same(stored: FeatureIdentity | None, wanted: FeatureIdentity) -> bool:
    if stored is None:
        return False
    ours, theirs = stored.to_dict(), wanted.to_dict()
    return all(ours[name] == theirs[name] for name in _DECIDES_COST)


def _overhead(stage_s: Mapping[str, float]) -> float:
    """Whole seconds of the blocks over those of all encoders: what a forward brings along."""
    encode_s = sum(seconds for name, seconds in stage_s.items() if name.startswith("encode:"))
    return max(1.0, stage_s.get("total", 0.0) / encode_s) if encode_s else 1.0
