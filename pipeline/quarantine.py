"""List quarantined clips, and retry some of them.

A retry is an extraction: of each encoder that failed, the newest run in the store's journal is repeated for the failed
clips. They get new rows; rows that failed stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from featurestore.encoder_keys import keys_of
from featurestore.locate import Place
from featurestore.store import FeatureStore
from mervcache.errors import UserError
from pipeline.config import RUN_ONLY_SETTINGS, ExtractConfig, read_config
from pipeline.summary import ExtractSummary, settings_of

log = logging.getLogger(__name__)

# The whole dataset is listed, since the quarantine names the clips; samples stay; damage is judged again. The other
# store of `reuse` is kept: it may have tokens of media that cannot be decoded here.
_NOT_REPEATED = (RUN_ONLY_SETTINGS | {"stage", "kind", "limit", "samples", "accept_damaged"}) - {"reuse"}


def quarantined(path: Place, *, encoder: str | None = None, reason: str | None = None) -> list[dict[str, Any]]:
    """clip_id, path, encoder, reason, scope of what failed; `reason` is a part of the text, `encoder` a key or name."""
    store = FeatureStore.open(path)
    chosen = list(store.encoders) if encoder is None else keys_of(encoder, store.encoders)
    if encoder is not None and not chosen:
        raise UserError(f"encoder {encoder!r} is not in this store; it has: {', '.join(store.encoders) or 'none'}")
    return [
        row
        for row in store.quarantine.to_pylist()
        if row["encoder"] in chosen and (reason is None or reason.lower() in row["reason"].lower())
    ]


def retry(
    path: Place,
    *,
    encoder: str | None = None,
    reason: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> list[ExtractSummary]:
    """Extract the quarantined clips again, one run for every set of settings that they failed under."""
    from pipeline.extract import extract  # the cluster

    failed = quarantined(path, encoder=encoder, reason=reason)
    if not failed:
        log.info("no quarantined clip matches: nothing to retry")
    return [extract(config, quiet=quiet) for config in retry_configs(path, failed, reason, overrides or {})]


def retry_configs(
    path: Place, failed: list[dict[str, Any]], reason: str | None, overrides: Mapping[str, Any]
) -> list[ExtractConfig]:
    """Configs that retry the failed clips with the settings of the runs that made their groups."""
    store = FeatureStore.open(path)
    runs = store.runs()
    datasets = dict(zip(*(store.clips[name].to_pylist() for name in ("clip_id", "dataset")), strict=True))
    encoders: dict[int, set[str]] = {}  # number of a run -> encoders to repeat
    for dataset, key in sorted({(datasets[row["clip_id"]], row["encoder"]) for row in failed}):
        identity = store.encoders[key]
        number = _newest_run(runs, dataset, identity.group_name)
        encoders.setdefault(number, set()).add(identity.encoder)
    configs = []
    for number, names in sorted(encoders.items()):
        settings = settings_of(runs[number], without=_NOT_REPEATED)
        settings |= {"root": runs[number]["root"], "store": str(path), "samples": False}
        settings |= {"encoders": [name for name in settings["encoders"] if name in names]}
        settings |= {"retry_quarantine": True, "retry_reason": reason}
        given = {name: value for name, value in settings.items() if value is not None}
        configs.append(read_config(given, overrides))
    return configs


def _newest_run(runs: list[dict[str, Any]], dataset: str, group: str) -> int:
    for number in reversed(range(len(runs))):
        entries = runs[number]["encoders"].values()
        if runs[number]["config"]["dataset"] == dataset and any(entry["group"] == group for entry in entries):
            return number
    raise UserError(
        f"the journal has no run that encoded {dataset} as {group}: use `merv-pipeline extract --retry-quarantine` "
        "with the settings of its extraction"
    )
