"""Tables that the Hub's dataset viewer shows, and the card's `configs:` that name them.

Clips and quarantine are Parquet files that `push` writes for the viewer: the store's own clip parts list removed and
retried clips too, and its quarantine is spread over the columns of the snapshot. Samples are the store's own files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from featurestore.layout import viewer_key
from featurestore.objects.base import Objects, digest_of, put_if_absent
from featurestore.parquet import table_bytes
from featurestore.store import FeatureStore
from mervcache.files import sha256_hex

CLIPS, SAMPLES, QUARANTINE = "clips", "samples", "quarantine"


def viewer_tables(store: FeatureStore) -> dict[str, pa.Table]:
    """Config name -> table with at least one row: `store.clips` and `store.quarantine`.

    `datasets` cannot read a Parquet file without rows, so a table that has none is left out.
    """
    tables = {CLIPS: store.clips, QUARANTINE: store.quarantine}
    return {name: table for name, table in tables.items() if table.num_rows}


def put_viewer_tables(objects: Objects, store: FeatureStore) -> None:
    """Write the tables of the store's snapshot; one that has no rows any more is deleted."""
    tables = viewer_tables(store)
    for name in (CLIPS, QUARANTINE):
        key = viewer_key(name)
        if name not in tables:
            objects.delete(key)
            continue
        data = table_bytes(tables[name])
        if not put_if_absent(objects, key, data) and digest_of(objects, key) != sha256_hex(data):
            objects.replace(key, data)


def viewer_configs(store: FeatureStore) -> dict[str, dict[str, list[str]]]:
    """Config name -> split -> keys of its files. A split of `samples` is one samples name.

    The Hub takes letters, digits, `_` and `.` in the name of a split, so a dash becomes `_`; two samples names that
    become one are one split.
    """
    configs = {name: {name: [viewer_key(name)]} for name in viewer_tables(store)}
    splits: dict[str, list[str]] = {}
    for name, key in store.sample_keys.items():
        if store.samples(name):
            splits.setdefault(name.replace("-", "_"), []).append(key)
    return configs | ({SAMPLES: splits} if splits else {})


def configs_lines(configs: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    """`configs:` as lines of a card's front matter; clips are shown first."""
    lines = ["configs:"] if configs else []
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", *(["  default: true"] if name == CLIPS else []), "  data_files:"]
        for split, keys in splits.items():
            lines += [f"  - split: {split}", "    path:", *(f"    - {key}" for key in keys)]
    return lines
