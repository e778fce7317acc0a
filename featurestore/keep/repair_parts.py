"""A clip part that is lost, made again from what the newest snapshot lists; it counts only with the digest it had.

Snapshots list clips in the order in which they got rows, rows follow one another, and a clip's id says all of it, so
the bytes can be known. They cannot where the part gave second rows to clips (a retry), and where another version of the
Parquet library would write the same table in other bytes: then the digest differs, and nothing is put.
"""

from __future__ import annotations

import re
from contextlib import suppress

from featurestore.clips import KINDS, Clip
from featurestore.columns import CLIP_SCHEMA
from featurestore.digests import sha256_hex
from featurestore.errors import MervCacheError
from featurestore.layout import next_batch_row
from featurestore.parquet import read_table, table_file
from featurestore.parts import allocate, part_bytes
from featurestore.places.objects import Objects
from featurestore.snapshots import Snapshot, read_snapshot_table

_TRIES = 16
_FRAGMENT = re.compile(r"#(?:end_frame=(\d+)|t=([^,]*),([^,]*))\Z")


def rebuild_part(objects: Objects, snapshot: Snapshot, key: str) -> bytes | None:
    """The bytes of the clip part at `key` as the snapshot's digest knows them, or None."""
    with suppress(MervCacheError, FileNotFoundError, ValueError):
        earlier, later, first = _other_parts(objects, snapshot, key)
        listed = read_snapshot_table(objects, snapshot, ["clip_id", "kind"])
        pairs = list(zip(listed["clip_id"].to_pylist(), listed["kind"].to_pylist(), strict=True))
        clips = [clip_of(clip_id, kind) for clip_id, kind in pairs if clip_id not in earlier]
        # Its clips come first among these; they end at the last that is in no later part, or at one that has a later
        # row as well.
        least = max((place + 1 for place, clip in enumerate(clips) if clip.clip_id not in later), default=0)
        for stop in range(least, min(len(clips), least + _TRIES) + 1):
            data = part_bytes(allocate(clips[:stop], first))
            if sha256_hex(data) == snapshot.parts[key]:
                return data
    return None


def _other_parts(objects: Objects, snapshot: Snapshot, key: str) -> tuple[set[str], set[str], dict[str, int]]:
    """Clip ids of the parts before and after, and the first row of each kind in the one that is lost."""
    earlier: set[str] = set()
    later: set[str] = set()
    first = dict.fromkeys(KINDS, 0)
    for other in snapshot.parts:
        if other == key:
            continue
        table = read_table(table_file(objects, other), CLIP_SCHEMA, other)
        (earlier if other < key else later).update(table["clip_id"].to_pylist())
        for row, kind in zip(table["row"].to_pylist(), table["kind"].to_pylist(), strict=True):
            if other < key:
                first[kind] = max(first[kind], next_batch_row(row, snapshot.block_rows[kind]))
    return earlier, later, first


def clip_of(clip_id: str, kind: str) -> Clip:
    """The clip that an id names; the inverse of `Clip.clip_id`."""
    dataset, _, rest = clip_id.partition("/")
    fragment = _FRAGMENT.search(rest)
    path = (rest[: fragment.start()] if fragment else rest).replace("%23", "#").replace("%25", "%")
    frame, start, end = fragment.groups() if fragment else (None, None, None)
    return Clip(
        dataset=dataset,
        path=path,
        kind=kind,  # type: ignore[arg-type] - Clip checks it
        start_s=float(start) if start else None,
        end_s=float(end) if end else None,
        end_frame=int(frame) if frame else None,
    )
