"""The dataset card: README.md of a store, with the front matter that the Hub reads; all else follows from the store.

A README.md written by hand is never replaced: ours carries a mark.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from featurestore.layout import CARD
from featurestore.locate import is_url
from featurestore.objects.base import Objects, put_if_absent
from featurestore.objects.hub_place import HubPlace
from featurestore.quality import (
    loss_notes,
    loss_table,
    parity_words,
    read_distortion,
    read_parity,
    token_notes,
    token_table,
)
from featurestore.store import FeatureStore
from featurestore.transfer.viewer import configs_lines, viewer_configs
from mervcache.errors import UserError
from mervcache.text import one_line, redact

MARK = "<!-- written by merv-pipeline push: it is written anew at every push -->"
DEFAULT_LICENSE = "unknown"
_MAX_REASONS = 20  # of failure that are listed
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_FRONT_MATTER = """---
license: {license}
pretty_name: Features of frozen video encoders
size_categories:
- {size}
tags:
- video
- feature-extraction
- zarr
- merv
{configs}---"""
_LOAD = """## Load

```python
from featurestore import FeatureStore
store = FeatureStore.open({place!r})
tokens_BTHWD = store.read(store.clips["clip_id"].to_pylist()[:8], encoder={encoder!r})
```

Copy it with `merv-pipeline pull {place} FOLDER`, check it with `merv-pipeline verify --full FOLDER`."""
_LOAD_TABLES = """
Clips, samples and quarantine without tokens, for `datasets`; the viewer of the Hub shows the same tables:

```python
from datasets import load_dataset
clips = load_dataset({name!r}, "clips", split="clips")
```"""


def write_card(objects: Objects, store: FeatureStore, *, place: str, license: str | None = None) -> bool:
    """Put the card; False where a README.md written by hand was left. A license given once is kept."""
    try:
        before = objects.get(CARD).decode(errors="replace")
    except FileNotFoundError:
        before = None
    if before is not None and MARK not in before:
        return False
    known = re.search(r"^license: (\S+)$", before or "", re.MULTILINE)
    text = card(store, place=place, license=license or (known[1] if known else DEFAULT_LICENSE)).encode()
    if before is None:
        put_if_absent(objects, CARD, text)
    elif before.encode() != text:
        objects.replace(CARD, text)
    return True


def card(store: FeatureStore, *, place: str, license: str = DEFAULT_LICENSE) -> str:
    """The text of the card."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", license):
        raise UserError(f"a license is an identifier such as cc-by-4.0, apache-2.0, other or unknown, got {license!r}")
    size = next((name for bound, name in _SIZES if len(store) < bound), "1M<n<10M")
    info, configs = store.info(), "".join(f"{line}\n" for line in configs_lines(viewer_configs(store)))
    kinds = ", ".join(f"{number} {kind} clips" for kind, number in info["clips"].items() if number)
    datasets = sorted(Counter(store.clips["dataset"].to_pylist()).items())
    samples = [f"{_cell(name)} ({len(store.samples(name))})" for name in store.sample_names]
    lines = [
        *(_FRONT_MATTER.format(license=license, size=size, configs=configs), MARK, "", "# A feature store", ""),
        f"Tokens of frozen encoders over {kinds or 'no clips'}, {info['stored_bytes'] / 1e6:.1f} MB,",
        f"at snapshot `{store.snapshot}`. Plain Zarr v3, Parquet and JSON; every byte is covered by a digest.",
        *("", "| dataset | clips |", "|---|--:|", *(f"| {_cell(name)} | {number} |" for name, number in datasets)),
        *("", f"Conversations: {', '.join(samples) or 'none'}.", ""),
    ]
    if removed := {clip for tombstone in store.tombstones.values() for clip in tombstone.clips}:
        lines += [
            f"Removed on request, tokens and conversations: {len(removed)} clips; `tombstones/` gives reasons.",
            "",
        ]
    lines += [*_encoders(store), *_distortion(store), *_quarantine(store)]
    encoder = next(iter(store.encoders), "dinov2")
    place = _line(place if is_url(place) else Path(place).name)  # not the path to it on this machine
    lines.append(_LOAD.format(place=place, encoder=encoder))
    if "configs:" in configs and (name := _dataset_name(place)):
        lines.append(_LOAD_TABLES.format(name=name))
    return "\n".join([*lines, ""])


def _dataset_name(place: str) -> str | None:
    """What `datasets.load_dataset` takes for the place; None of a bucket, a web server and a folder of a repository."""
    if not is_url(place):
        return place
    if not place.startswith("hf://datasets/"):
        return None
    at = HubPlace.of(place)
    return None if at.folder else at.repo


def _encoders(store: FeatureStore) -> list[str]:
    """Identities, counts, and the newest parity check of each encoder against the reference clips."""
    info, failed = store.info(), Counter(store.quarantine["encoder"].to_pylist())
    columns = "encoder | identity | weights | grid T x H x W | width | stored | clips | quarantined | bytes per clip"
    lines = ["## Encoders", "", f"| {columns} |", "|---|---|---|---|--:|---|--:|--:|--:|"]
    for key, identity in store.encoders.items():
        group = info["groups"][identity.group_name]
        committed = int(np.count_nonzero(store.clips[key].to_numpy(zero_copy_only=False)))
        per_clip = f"{group['stored_bytes'] / committed:,.0f}" if committed else "-"
        cells = [key, f"`{identity.id}`", group["weights"], " x ".join(map(str, identity.grid)), identity.width]
        cells += [identity.storage_dtype, committed, failed[key], per_clip]
        lines.append(f"| {' | '.join(_cell(str(cell)) for cell in cells)} |")
    lines += ["", "An identity names architecture, weights, layer, frames, preprocessing, grid and dtype.", ""]
    lines += ["Newest check of each encoder against the reference clips (`merv-pipeline verify STORE --parity`):", ""]
    return [*lines, *(f"- {key}: {_cell(parity_words(check))}" for key, check in read_parity(store).items()), ""]


def _distortion(store: FeatureStore) -> list[str]:
    """What was measured of storage dtypes on these tokens, or the commands that measure it."""
    measured, lines = read_distortion(store), ["## Storage dtypes", ""]
    if measured.tokens:
        lines += [*_table(*token_table(measured.tokens)), "", *map(_line, token_notes(measured.tokens)), ""]
    else:
        lines += ["Bytes, reading speed and error: not measured; run `merv-pipeline distortion STORE`.", ""]
    if measured.loss:
        return [*lines, *_table(*loss_table(measured.loss)), "", *map(_line, loss_notes(measured.loss)), ""]
    return [*lines, "Change in loss: not measured; run `merv-eval distortion --checkpoint RUN --store STORE`.", ""]


def _quarantine(store: FeatureStore) -> list[str]:
    reasons = Counter((row["encoder"], row["reason"]) for row in store.quarantine.to_pylist())
    if not reasons:
        return []
    lines = ["## Quarantine", "", "Clips without tokens, with the reason:", "", "| encoder | reason | clips |"]
    lines.append("|---|---|--:|")
    shown = reasons.most_common(_MAX_REASONS)
    lines += [f"| {_cell(key)} | {_cell(reason)} | {number} |" for (key, reason), number in shown]
    if hidden := len(reasons) - len(shown):
        lines += ["", f"And {hidden} rarer reasons: `merv-pipeline quarantine list` lists all."]
    return [*lines, ""]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|---" * 3 + "|--:" * (len(columns) - 3) + "|"]
    return lines + [f"| {' | '.join(map(_cell, row))} |" for row in rows]


def _cell(text: str) -> str:
    return _line(text)[:200]


def _line(text: str) -> str:
    """Untrusted names and reasons: no markup, no credentials, one line."""
    return re.sub(r"[|<>\[\]]", " ", one_line(redact(text)))
