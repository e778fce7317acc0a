"""A reader of stores made from docs/store-format.md alone, with plain zarr, pyarrow and json."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr


def record_digest(record: dict) -> str:
    """Digest of a record, over all but its own `digest`."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


class Reader:
    """The newest snapshot of a store in a folder."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        root = json.loads((self.path / "zarr.json").read_text())["attributes"]["merv_cache"]
        if root["format"] != 1:
            raise ValueError(f"format {root['format']}")
        names = [file.stem for file in (self.path / "snapshots").glob("*.json")]
        self.snapshot = max(name for name in names if re.fullmatch(r"\d{8}-[0-9a-f]{12}", name))
        self.record = json.loads((self.path / f"snapshots/{self.snapshot}.json").read_text())
        digest = record_digest(self.record)
        if digest != self.record["digest"] or self.snapshot != f"{self.record['sequence']:08d}-{digest[:12]}":
            raise ValueError(f"snapshot {self.snapshot} does not match its digest")
        table = (self.path / f"snapshots/{self.snapshot}.parquet").read_bytes()
        if hashlib.sha256(table).hexdigest() != self.record["table_sha256"]:
            raise ValueError(f"the table of {self.snapshot} does not match its digest")
        tombstones = [json.loads(file.read_text()) for file in (self.path / "tombstones").glob("*.json")]
        self.removed = {clip for tombstone in tombstones for clip in tombstone["clips"]}
        self.erased = {sha256 for tombstone in tombstones for sha256 in tombstone["erased"]}
        rows = pq.read_table(pa.BufferReader(table)).to_pylist()
        self.lines = {row["clip_id"]: row for row in rows if row["clip_id"] not in self.removed}
        self.identities = {name.split("/")[1]: entry["identity"] for name, entry in self.record["groups"].items()}

    def clips(self, group: str) -> list[str]:
        """Ids of the clips that have tokens of a group."""
        return [clip for clip, line in self.lines.items() if line[f"{group}.row"] >= 0]

    def quarantine(self, group: str) -> dict[str, str]:
        """Clip id -> reason, of those that failed and have no tokens."""
        failed = {clip: line for clip, line in self.lines.items() if line[f"{group}.failed_row"] >= 0}
        return {clip: line[f"{group}.failed_reason"] for clip, line in failed.items() if line[f"{group}.row"] < 0}

    def samples(self, name: str) -> list[dict]:
        """Conversations of one name."""
        entry = self.record["samples"][name]
        if entry["sha256"] in self.erased:
            raise ValueError(f"samples {name} are erased")
        rows = pq.read_table(self.path / entry["key"]).to_pylist()
        return [row for row in rows if row["clip_id"] not in self.removed]

    def read(self, group: str, clip: str, array: str = "tokens") -> np.ndarray:
        """Floats of one clip: [T, H, W, D] of tokens, [T, K, D] of the prefix."""
        kind, row = self.lines[clip]["kind"], self.lines[clip][f"{group}.row"]
        if row < 0:
            raise KeyError(clip)
        identity = self.identities[group]
        folder = zarr.open_group(self.path / kind / group, mode="r")
        items = folder[array][row]
        dtype = identity["storage_dtype"]
        if dtype == "bfloat16":
            items = (items.astype(np.uint32) << 16).view(np.float32)
        elif dtype == "uint8" and array == "tokens":
            items = items.astype(np.float32) * folder["scale"][row] + folder["offset"][row]
        steps = np.arange(identity["grid"][0]) % len(items)  # a still repeats
        return items[steps]

    def row_digest(self, group: str, clip: str) -> str:
        """Digest of a clip's stored items."""
        kind, row = self.lines[clip]["kind"], self.lines[clip][f"{group}.row"]
        folder = zarr.open_group(self.path / kind / group, mode="r")
        total = hashlib.sha256()
        for name in ("prefix", "scale", "offset", "tokens"):
            if name in folder:
                items = folder[name][row]
                total.update(f"{name} {items.dtype.name} {items.shape}\n".encode())
                total.update(np.ascontiguousarray(items.astype(items.dtype.newbyteorder("<"))).tobytes())
        return total.hexdigest()[:32]
