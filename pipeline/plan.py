"""The plan: which rows of which blocks each encoder still has to compute.

Comes in: a store whose rows are given out, and the encoders asked for. Goes out: blocks to compute. Resume, a new
encoder and a retried quarantine are one rule: an encoder computes the newest row of a clip, unless an older row already
holds the clip's tokens. What is committed is learned by listing names; receipts are opened only for clips that have
several rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from featurestore.clips import Clip
from featurestore.columns import table_to_clips
from featurestore.groups import GroupWriter
from featurestore.identity import FeatureIdentity
from featurestore.receipts import Receipt
from featurestore.tombstones import tombstoned_clips
from featurestore.writer import StoreWriter


@dataclass(frozen=True, kw_only=True)
class PlannedBlock:
    """One block with something left to compute."""

    kind: str
    block: int
    rows: tuple[tuple[int, Clip], ...]  # every planned row of the block
    wanted: Mapping[str, frozenset[int]]  # encoder -> rows to compute
    batch: int  # clips per forward, of every encoder wanted

    @property
    def num_clips(self) -> int:
        return len(frozenset().union(*self.wanted.values()))

    @property
    def clip_ids(self) -> set[str]:
        """Clips that some encoder has to compute here."""
        wanted = frozenset().union(*self.wanted.values())
        return {clip.clip_id for row, clip in self.rows if row in wanted}


def plan_blocks(
    store: StoreWriter, identities: Mapping[str, FeatureIdentity], *, clip_ids: Collection[str]
) -> list[PlannedBlock]:
    """Blocks that hold any of `clip_ids` and miss tokens of an encoder, in the order of their rows.

    Encoders whose groups were made with different batch shapes get a block each: one shape gives one set of bytes.
    """
    planned, removed = [], tombstoned_clips(store.objects)
    for kind, rows in _rows_by_kind(store).items():
        by_block = _by_block(rows, store.block_rows[kind])
        asked = [b for b, block in by_block.items() if any(clip.clip_id in clip_ids for _, clip in block)]
        if not asked:
            continue
        newest, older = _newest_rows(rows)
        missing: dict[tuple[int, int], dict[str, frozenset[int]]] = defaultdict(dict)  # by block and batch shape
        for name, identity in identities.items():
            group = store.open_group(kind, identity.group_name)
            committed = group.committed_blocks()
            done = _clips_done_earlier(group, older, committed, store.block_rows[kind]) | removed.keys()
            for block in asked:
                if block in committed:
                    continue
                live = (
                    row for row, clip in by_block[block] if newest[clip.clip_id] == row and clip.clip_id not in done
                )
                if wanted := frozenset(live):
                    missing[block, group.batch_shape][name] = wanted
        planned += [
            PlannedBlock(kind=kind, block=block, rows=tuple(by_block[block]), wanted=wanted, batch=batch)
            for (block, batch), wanted in sorted(missing.items(), key=lambda item: item[0])
        ]
    return planned


def _rows_by_kind(store: StoreWriter) -> dict[str, list[tuple[int, Clip]]]:
    rows: dict[str, list[tuple[int, Clip]]] = defaultdict(list)
    for row, clip in table_to_clips(store.clips()):
        rows[clip.kind].append((row, clip))
    return {kind: sorted(found, key=lambda pair: pair[0]) for kind, found in sorted(rows.items(), reverse=True)}


def _newest_rows(rows: Iterable[tuple[int, Clip]]) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Clip id -> its newest row, and for clips with several rows -> the older ones."""
    newest: dict[str, int] = {}
    older: dict[str, list[int]] = defaultdict(list)
    for row, clip in rows:
        if clip.clip_id in newest:
            older[clip.clip_id].append(newest[clip.clip_id])
        newest[clip.clip_id] = row
    return newest, older


def _by_block(rows: Iterable[tuple[int, Clip]], block_rows: int) -> dict[int, list[tuple[int, Clip]]]:
    blocks: dict[int, list[tuple[int, Clip]]] = defaultdict(list)
    for row, clip in rows:
        blocks[row // block_rows].append((row, clip))
    return blocks


def _clips_done_earlier(
    group: GroupWriter, older: Mapping[str, list[int]], committed: Collection[int], block_rows: int
) -> set[str]:
    """Clips whose tokens of this encoder stand in a row before their newest one."""
    receipts: dict[int, Receipt] = {}
    done = set()
    for clip_id, rows in older.items():
        for row in rows:
            block = row // block_rows
            if block not in committed:
                continue
            if block not in receipts:
                receipts[block] = group.receipt(block)
            if receipts[block].rows[row % block_rows].state == "ok":
                done.add(clip_id)
    return done
