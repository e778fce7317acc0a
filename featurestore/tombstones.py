"""Tombstones: clips removed on request (a licence, a consent withdrawn), as data that travels with the store.

A tombstone is a JSON record with its own digest, put once. From then on readers list and read none of its clips, at any
snapshot, and nothing computes them again; `erase.py` takes their tokens and conversations off the disk. Clip ids stay
in the clip parts (rows are never given out twice) and in the record, which must know whom to leave out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from featurestore.digests import canonical_json, record_digest
from featurestore.errors import StoreDamagedError, StoreFormatError, UserError
from featurestore.layout import TOMBSTONES, tombstone_key, tombstone_names
from featurestore.metadata import load_json
from featurestore.places.objects import Objects, get_bounded, put_if_absent

MAX_RECORD_BYTES = 64 << 20  # a hundred thousand clip ids have 10 MB
_VERSION = 1
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True, kw_only=True)
class Tombstone:
    """One removal."""

    clips: tuple[str, ...]  # clip ids, sorted
    reason: str
    date: str  # of the request, YYYY-MM-DD, UTC
    erased: tuple[str, ...] = ()  # sha256 of samples files that held their conversations and are gone

    @cached_property
    def digest(self) -> str:
        """64 hex digits over everything else in the record."""
        return record_digest(self._content())

    @property
    def id(self) -> str:
        return self.digest[:16]

    def to_bytes(self) -> bytes:
        return (canonical_json(self._content() | {"digest": self.digest}) + "\n").encode()

    def _content(self) -> dict[str, Any]:
        fields = {"clips": list(self.clips), "reason": self.reason, "date": self.date, "erased": list(self.erased)}
        return {"format": _VERSION} | fields

    @classmethod
    def parse(cls, data: bytes, tombstone_id: str) -> Tombstone:
        """A tombstone from its file, whole and undamaged."""
        what = f"tombstone {tombstone_id}"
        record = load_json(data, what)
        try:
            stone = cls(
                clips=tuple(record["clips"]),
                reason=record["reason"],
                date=record["date"],
                erased=tuple(record["erased"]),
            )
            texts = [*stone.clips, *stone.erased, stone.reason, stone.date]
            good = all(type(text) is str for text in texts) and bool(_DATE.fullmatch(stone.date))
            whole = good and stone.to_bytes() == data and stone.id == tombstone_id
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise StoreFormatError(f"{what} lacks fields or has malformed ones ({error})") from error
        if not whole:
            raise StoreDamagedError(
                f"{what} does not match its own digest; it must not be lost: run `merv-pipeline repair`"
            )
        return stone


def tombstone_ids(objects: Objects) -> list[str]:
    return tombstone_names(objects.list_names(TOMBSTONES))


def read_tombstone(objects: Objects, tombstone_id: str) -> Tombstone:
    return Tombstone.parse(get_bounded(objects, tombstone_key(tombstone_id), MAX_RECORD_BYTES), tombstone_id)


def read_tombstones(objects: Objects) -> dict[str, Tombstone]:
    """Every removal by id. A damaged record is an error: rather no store than one that shows what was taken back."""
    return {name: read_tombstone(objects, name) for name in tombstone_ids(objects)}


def tombstoned_clips(objects: Objects) -> dict[str, Tombstone]:
    """Clip id -> a removal that names it."""
    return {clip: stone for stone in read_tombstones(objects).values() for clip in stone.clips}


def put_tombstone(objects: Objects, clips: Iterable[str], reason: str, date: str, erased: Iterable[str]) -> Tombstone:
    """Record a removal; from now on it holds, whatever happens to the erasing."""
    if not reason.strip():
        raise UserError("a tombstone needs a reason: who reads the store later must know why the clip is gone")
    stone = Tombstone(
        clips=tuple(sorted(set(clips))), reason=reason.strip(), date=date, erased=tuple(sorted(set(erased)))
    )
    put_if_absent(objects, tombstone_key(stone.id), stone.to_bytes())  # the name holds the digest
    return stone
