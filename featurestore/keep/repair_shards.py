"""Mending a shard whose receipt is sound: a flipped bit undone, another copy fetched, or computed again.

A shard is put back only if it has the sha256 that its receipt names. Other bytes need somebody's word for it, and get a
receipt with a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from featurestore.digests import sha256_hex
from featurestore.errors import MervCacheError, StoreError
from featurestore.groups import GroupWriter
from featurestore.keep.flips import flip_by_crc, flipped
from featurestore.layout import receipt_key, shard_key
from featurestore.metadata import ArraySpec
from featurestore.places.objects import Objects, get_bounded
from featurestore.receipts import Receipt
from featurestore.shards import ABSENT


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """A block computed once more, elsewhere."""

    receipt: Receipt
    shards: Mapping[str, bytes]  # array -> bytes


Recompute = Callable[[GroupWriter, Receipt], Recomputed]


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What was done about one object."""

    key: str
    done: str  # in words
    is_mended: bool = True


def mend_block(
    group: GroupWriter,
    block: int,
    arrays: set[str],
    *,
    other: Objects | None,
    recompute: Recompute | None,
    new_bytes: bool,
) -> list[Repaired]:
    """Put the shards of these arrays back."""
    receipt = group.receipt(block)
    left, done = set(arrays), []
    for name in sorted(arrays & receipt.shards.keys()):  # a crafted receipt may leave one out
        key = shard_key(group.kind, group.name, name, block)
        for words, data in _copies(group.objects, other, key, group.specs[name], receipt.shards[name]["bytes"]):
            if _is(data, receipt, name):
                group.objects.replace(key, data)
                done.append(Repaired(key=key, done=words))
                left.discard(name)
                break
    if left:
        done += _recomputed(group, receipt, left, recompute, new_bytes)
    return done


def _copies(objects: Objects, other: Objects | None, key: str, spec: ArraySpec, num_bytes: int):
    """(words, bytes) of what may be the shard, the cheapest first; none is larger than its receipt says."""
    with suppress(FileNotFoundError, StoreError):
        data = get_bounded(objects, key, num_bytes)
        if (mended := undo_shard_flip(data, spec)) is not None:
            yield "one flipped bit was undone", mended
    if other is not None:
        with suppress(FileNotFoundError, StoreError):
            yield "fetched from the other copy", get_bounded(other, key, num_bytes)


def _is(data: bytes, receipt: Receipt, name: str) -> bool:
    entry = receipt.shards.get(name)
    return entry is not None and len(data) == entry["bytes"] and sha256_hex(data) == entry["sha256"]


def undo_shard_flip(data: bytes, spec: ArraySpec) -> bytes | None:
    """The shard with the one bit turned back that its checksums tell of."""
    start = len(data) - spec.index_bytes
    if start < 0:
        return None
    if place := flip_by_crc(memoryview(data)[start:]):
        return flipped(data, start + place[0], place[1])
    index = np.frombuffer(data[start:-4], dtype="<u8").reshape(-1, 2)
    for offset, length in index[index[:, 0] != ABSENT].tolist():
        if (
            offset + length <= start
            and length > 4
            and (place := flip_by_crc(memoryview(data)[offset : offset + length]))
        ):
            return flipped(data, offset + place[0], place[1])
    return None


def _recomputed(
    group: GroupWriter, receipt: Receipt, left: set[str], recompute: Recompute | None, new_bytes: bool
) -> list[Repaired]:
    keys = {name: shard_key(group.kind, group.name, name, receipt.block) for name in sorted(left)}
    if recompute is None:
        why = "no other copy has it; give --from OTHER_STORE, or --root DIR to compute it from the media"
        return [Repaired(key=key, done=why, is_mended=False) for key in keys.values()]
    try:
        made = recompute(group, receipt)
    except MervCacheError as error:
        return [Repaired(key=key, done=f"cannot be computed again: {error}", is_mended=False) for key in keys.values()]
    if all(_is(made.shards[name], receipt, name) for name in left):
        for name, key in keys.items():
            group.objects.replace(key, made.shards[name])
        return [Repaired(key=key, done="computed again from the media, the same bytes") for key in keys.values()]
    if changed := _changed_media(made.receipt, receipt):
        why = f"{changed} of its media changed since: not put back; restore the media, or retire the store"
        return [Repaired(key=key, done=why, is_mended=False) for key in keys.values()]
    if not new_bytes:
        why = (
            "computed again, but this machine gives other bytes (another device, thread count or library): not put "
            "back; compute it where the store was made, fetch it with --from, or take the new ones with --new-bytes"
        )
        return [Repaired(key=key, done=why, is_mended=False) for key in keys.values()]
    return _take_new_bytes(group, receipt, made)


def _changed_media(made: Receipt, before: Receipt) -> int:
    pairs = zip(made.rows, before.rows, strict=True)
    return sum(
        old.state == "ok" and None not in (new.media_sha256, old.media_sha256) and new.media_sha256 != old.media_sha256
        for new, old in pairs
    )


def _take_new_bytes(group: GroupWriter, before: Receipt, made: Recomputed) -> list[Repaired]:
    """Other bytes of the same features, under a receipt that says so: its number counts, it names the one before."""
    rows = [new if old.state == "ok" else old for new, old in zip(made.receipt.rows, before.rows, strict=True)]
    for name in group.specs:
        group.objects.replace(shard_key(group.kind, group.name, name, before.block), made.shards[name])
    numbered = replace(made.receipt, rows=tuple(rows), number=before.number + 1, replaces=before.digest)
    key = receipt_key(group.kind, group.name, before.block)
    group.objects.replace(key, numbered.to_bytes())
    words = f"computed again with other bytes, as asked: receipt number {numbered.number}"
    return [Repaired(key=shard_key(group.kind, group.name, name, before.block), done=words) for name in group.specs]
