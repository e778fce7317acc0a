"""The newest snapshot of a store and its removals: from a listing, or in a bucket from the object `newest.json`.

Listing a bucket costs requests and grows with its history, so every publication and removal replaces that object by
what a listing finds. Readers list where it is absent or damaged.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from featurestore.layout import NEWEST, SNAPSHOTS, TOMBSTONES, snapshot_ids, tombstone_key, tombstone_names
from featurestore.objects.base import Objects, get_bounded, put_if_absent
from mervcache.errors import StoreError, StoreFormatError
from mervcache.files import canonical_json, is_json_list, is_json_object, load_json, record_digest

MAX_NEWEST_BYTES = 16 << 20
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Newest:
    """Names in a store at one moment."""

    snapshot: str | None  # id of the newest snapshot
    tombstones: tuple[str, ...]  # ids of every removal, sorted

    def to_bytes(self) -> bytes:
        content = self._content()
        return (canonical_json(content | {"digest": record_digest(content)}) + "\n").encode()

    def _content(self) -> dict[str, Any]:
        return {"format": _VERSION, "snapshot": self.snapshot, "tombstones": list(self.tombstones)}

    @classmethod
    def parse(cls, data: bytes) -> Newest:
        """StoreFormatError unless these are the bytes of `to_bytes` and every name is one that a store has."""
        record = load_json(data, NEWEST)
        record = record if is_json_object(record) else {}
        snapshot, tombstones = record.get("snapshot"), record.get("tombstones")
        if (
            (snapshot is None or (isinstance(snapshot, str) and snapshot_ids([f"{snapshot}.json"]) == [snapshot]))
            and is_json_list(tombstones)
            and all(isinstance(name, str) for name in tombstones)
            and tombstone_names([tombstone_key(name).split("/")[1] for name in tombstones]) == tombstones
        ):
            newest = cls(snapshot=snapshot, tombstones=tuple(tombstones))
            if newest.to_bytes() == data:
                return newest
        raise StoreFormatError(f"{NEWEST} is damaged or of another version; publish a new snapshot")


def read_newest(objects: Objects) -> Newest:
    """One request where the object is there, else two listings."""
    if objects.keeps_newest:
        with suppress(FileNotFoundError, StoreError):
            return Newest.parse(get_bounded(objects, NEWEST, MAX_NEWEST_BYTES))
    return list_newest(objects)


def list_newest(objects: Objects) -> Newest:
    """By the names that are there."""
    ids = snapshot_ids(objects.list_names(SNAPSHOTS))
    return Newest(snapshot=ids[-1] if ids else None, tombstones=tuple(tombstone_names(objects.list_names(TOMBSTONES))))


def update_newest(objects: Objects) -> None:
    """Call this after a snapshot or a removal was put; in a folder, where listing is cheap, it does nothing.

    A writer that loses the swap lists again. One that wins listed after the bytes it replaced were put, and a snapshot
    that was put after that listing has an update of its own, so nothing is left out for good.
    """
    if not objects.keeps_newest:
        return
    while True:
        try:
            old = objects.get(NEWEST)
        except FileNotFoundError:
            if put_if_absent(objects, NEWEST, list_newest(objects).to_bytes()):
                return
            continue
        new = list_newest(objects).to_bytes()
        if new == old or objects.compare_and_swap(NEWEST, old, new):
            return
