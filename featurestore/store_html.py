"""What a notebook shows of a store: a line about it, and a table of its encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featurestore.identity import FeatureIdentity
from mervcache.console import format_bytes
from mervcache.page import Markup, escaped, table

COLUMNS = ("encoder", "identity", "weights", "grid", "width", "stored as", "video", "image", "failed", "bytes")


def store_html(info: Mapping[str, Any], encoders: Mapping[str, tuple[FeatureIdentity, str]]) -> Markup:
    """HTML of `FeatureStore.info()` and of the identity and group by encoder key; all names are escaped."""
    clips = info["clips"]
    facts = [
        f"snapshot {info['snapshot']}",
        f"{clips['video'] + clips['image']:,} clips ({clips['video']:,} video, {clips['image']:,} image)",
        f"samples: {', '.join(info['samples']) or 'none'}",
        format_bytes(info["stored_bytes"]),
    ]
    rows: list[tuple[Any, ...]] = []
    for key, (identity, name) in encoders.items():
        group = info["groups"][name]
        states = group["rows"]
        rows.append(
            (
                key,
                identity.id,
                group["weights"],
                "x".join(map(str, identity.grid)),
                identity.width,
                identity.storage_dtype,
                *(f"{states.get(kind, {}).get('ok', 0):,}" for kind in ("video", "image")),
                f"{sum(counts.get('failed', 0) for counts in states.values()):,}",
                format_bytes(group["stored_bytes"]),
            )
        )
    title = f"<b>FeatureStore</b> <code>{escaped(info['path'])}</code><br>{escaped(' · '.join(facts))}"
    return Markup(title + table(COLUMNS, rows, right=range(4, len(COLUMNS))))
