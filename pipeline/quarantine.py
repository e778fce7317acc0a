"""The quarantine as data: which clips failed and why, and trying some of them again.

A retry is an extraction. The store's journal tells with which settings its clips were encoded; of each encoder that
failed, the newest run is repeated for the clips that failed. They get new rows; rows that failed stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from featurestore.locate import Place
from featurestore.objects.open import open_objects
from featurestore.records import driver_runs
from featurestore.store import FeatureStore
from mervcache.errors import UserError
from pipeline.config import RUN_ONLY_SETTINGS, ExtractConfig, read_config
from pipeline.summary import ExtractSummary, settings_of

# A retry lists the whole dataset, for the quarantine names its clips; samples stay as they are; damage is judged anew.
_CHOSEN_ANEW = frozenset(("stage", "kind", "limit", "samples", "accept_damaged"))
_KEPT = frozenset(("reuse",))  # the other store may have tokens of media that cannot be decoded here


def quarantined(path: Place, *, encoder: str | None = None, reason: str | None = None) -> list[dict[str, Any]]:
    """clip_id, path, encoder, reason, scope of what failed; `reason` is a part of the text, `encoder` a key or name."""
    store = FeatureStore.open(path)
    known = {key: key.split("@")[0] for key in store.encoders}
    if encoder is not None and encoder not in known and encoder not in known.values():
        raise UserError(f"encoder {encoder!r} is not in this store; it has: {', '.join(known) or 'none'}")
    return [
        row
        for row in store.quarantine.to_pylist()
        if encoder in (None, row["encoder"], known[row["encoder"]])
        and (reason is None or reason.lower() in row["reason"].lower())
    ]


def retry(
    path: Place,
    *,
    encoder: str | None = None,
    reason: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[ExtractSummary]:
    """Extract the quarantined clips again, one run for every set of settings that they failed under."""
    from pipeline.extract import extract  # the cluster

    failed = quarantined(path, encoder=encoder, reason=reason)
    if not failed:
        say("no quarantined clip matches: nothing to try again")
    configs = retry_configs(path, failed, reason, overrides or {})
    return [extract(config, quiet=quiet, say=say) for config in configs]


def retry_configs(
    path: Place, failed: list[dict[str, Any]], reason: str | None, overrides: Mapping[str, Any]
) -> list[ExtractConfig]:
    """What to run so that the failed clips are tried again with the settings of the runs that made their groups."""
    store, runs = FeatureStore.open(path), driver_runs(open_objects(path))
    datasets = dict(zip(*(store.clips[name].to_pylist() for name in ("clip_id", "dataset")), strict=True))
    wanted: dict[int, set[str]] = {}  # number of a run -> encoders to repeat
    for dataset, key in sorted({(datasets[row["clip_id"]], row["encoder"]) for row in failed}):
        wanted.setdefault(_newest_run(runs, dataset, store.encoders[key].group_name), set()).add(
            store.encoders[key].encoder
        )
    return [_config(path, runs[number], names, reason, overrides) for number, names in sorted(wanted.items())]


def _newest_run(runs: list[dict[str, Any]], dataset: str, group: str) -> int:
    for number in reversed(range(len(runs))):
        entries = runs[number]["encoders"].values()
        if runs[number]["config"]["dataset"] == dataset and any(entry["group"] == group for entry in entries):
            return number
    raise UserError(
        f"no journal tells how {dataset} was encoded as {group}: use `merv-pipeline extract --retry-quarantine` with "
        "the settings of its extraction"
    )


def _config(
    path: Place, run: Mapping[str, Any], encoders: set[str], reason: str | None, overrides: Mapping[str, Any]
) -> ExtractConfig:
    settings = settings_of(run, without=(RUN_ONLY_SETTINGS | _CHOSEN_ANEW) - _KEPT)
    settings |= {"root": run["root"], "store": str(path), "samples": False}
    settings |= {"encoders": [name for name in settings["encoders"] if name in encoders]}
    settings |= {"retry_quarantine": True, "retry_reason": reason}
    return read_config(None, settings | {name: value for name, value in overrides.items() if value is not None})
