"""The table of a snapshot derived again from the clip parts and receipts that its record names.

A digest proves that a table is the one that was published, not that it is right: with two rows swapped and the digests
computed again, a reader would give one clip the tokens of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pyarrow as pa

from featurestore.layout import receipt_key, snapshot_keys
from featurestore.objects.base import Objects
from featurestore.objects.open import in_parallel
from featurestore.records import STATES, Receipt, read_receipt
from featurestore.snapshots import ClipIndex, Snapshot, SnapshotTable, read_snapshot_table
from mervcache.errors import StoreDamagedError, StoreError

_AT_ONCE = 256  # receipts in memory


def check_table(objects: Objects, snapshot: Snapshot, *, source: Objects | None = None) -> None:
    """Raise `StoreDamagedError` unless the snapshot's table, in `source`, follows from the parts and receipts.

    Receipts in `objects` that are newer than the snapshot's are read from `source`, another copy of the store.
    """
    source = objects if source is None else source
    index = ClipIndex(objects, snapshot.block_rows).refresh()
    derived = SnapshotTable.extend(None, pa.concat_tables(index.tables[: len(snapshot.parts)] or [index.table]))
    for name, summary in snapshot.groups.items():
        derived.ensure_columns(name.split("/")[1])
        counts, stored_bytes = dict.fromkeys(STATES, 0), 0
        for receipt in _receipts(objects, source, name, summary.receipts, snapshot.block_rows):
            derived.apply(receipt)
            counts = {state: counts[state] + receipt.counts[state] for state in STATES}
            stored_bytes += receipt.stored_bytes
        if (dict(summary.counts), summary.stored_bytes) != (counts, stored_bytes):
            raise StoreDamagedError(
                f"snapshot {snapshot.id} counts other rows or bytes of {name} than its receipts list: it was not made "
                "of this store's files; do not use it"
            )
    expected, stored = derived.to_arrow(), read_snapshot_table(source, snapshot)
    if stored.num_rows != expected.num_rows or set(stored.column_names) != set(expected.column_names):
        raise _differs(snapshot, f"has {stored.num_rows} clips, the clip parts have {expected.num_rows}")
    for name in expected.column_names:
        given, wanted = stored[name].combine_chunks(), expected[name].combine_chunks()
        if not given.equals(wanted):
            line = next(n for n in range(len(wanted)) if given[n].as_py() != wanted[n].as_py())
            clip, values = expected["clip_id"][line].as_py(), (given[line].as_py(), wanted[line].as_py())
            raise _differs(snapshot, f"has {name} {values[0]!r} for {clip!r}, its receipts have {values[1]!r}")


def _receipts(
    objects: Objects, source: Objects, name: str, digests: Mapping[str, str], block_rows: Mapping[str, int]
) -> Iterator[Receipt]:
    """The receipts of a group, each with the digest that the snapshot names."""
    kind, group = name.split("/")

    def read(entry: tuple[str, str]) -> Receipt:
        block, digest = int(entry[0]), entry[1]
        for place in dict.fromkeys((objects, source)):
            try:
                receipt = read_receipt(place, kind, group, block, block_rows[kind])
            except (FileNotFoundError, StoreError):
                continue
            if receipt.digest == digest:
                return receipt
        raise StoreDamagedError(f"{receipt_key(kind, group, block)} is not the receipt that the snapshot names")

    entries = sorted(digests.items(), key=lambda entry: int(entry[0]))
    for start in range(0, len(entries), _AT_ONCE):
        yield from in_parallel(read, entries[start : start + _AT_ONCE], objects.parallel_reads)


def _differs(snapshot: Snapshot, what: str) -> StoreDamagedError:
    key = snapshot_keys(snapshot.id)[0]
    return StoreDamagedError(f"{key} {what}: it does not follow from the store's own files; do not use it")
