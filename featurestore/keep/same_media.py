"""Same media: the other clips of a store that were made from the bytes of a clip's file, whatever they are called.

A video that two datasets share has two ids; so have two spans of one film, and a file under two names. Receipts hold
the sha256 of the file behind every row, whole whatever the span: that is what is compared. A clip that was never
computed has no receipt and is not found, nor is the same film encoded anew.
"""

from __future__ import annotations

from collections.abc import Collection

from featurestore.clips import KINDS
from featurestore.groups import GroupWriter
from featurestore.layout import block_of
from featurestore.parts import ClipIndex
from featurestore.places.by_url import in_parallel
from featurestore.writer import StoreWriter


def clips_of_same_media(writer: StoreWriter, clip_ids: Collection[str]) -> list[str]:
    """Sorted ids of all other clips that share a file with one of these; reads every receipt of the store once."""
    index = ClipIndex(writer.objects, writer.block_rows).refresh()
    groups = [writer.open_group(kind, name) for kind in KINDS for name in writer.encoder_groups(kind)]
    rows = {kind: index.rows_of_clips(kind, clip_ids) for kind in KINDS}
    media = {
        sha256
        for group in groups
        for block in {block_of(row, group.block_rows) for row in rows[group.kind]} & group.committed_blocks()
        for row, sha256 in _media(group, block).items()
        if row in rows[group.kind]
    }
    if not media:
        return []
    blocks = [(group, block) for group in groups for block in sorted(group.committed_blocks())]

    def found_in(entry: tuple[GroupWriter, int]) -> list[tuple[str, int]]:
        return [(entry[0].kind, row) for row, sha256 in _media(*entry).items() if sha256 in media]

    same = {pair for pairs in in_parallel(found_in, blocks, writer.objects.parallel_reads) for pair in pairs}
    columns = [index.table[name].to_pylist() for name in ("clip_id", "kind", "row")]
    found = {clip_id for clip_id, kind, row in zip(*columns, strict=True) if (kind, row) in same}
    return sorted(found - set(clip_ids))


def _media(group: GroupWriter, block: int) -> dict[int, str]:
    """Row -> sha256 of its media, of clips that failed as well: they have conversations."""
    receipt = group.receipt(block)
    rows = enumerate(receipt.rows, start=receipt.first_row())
    return {row: outcome.media_sha256 for row, outcome in rows if outcome.media_sha256 is not None}
