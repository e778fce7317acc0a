"""Writers of one encoder's arrays: which blocks are committed, growing the arrays, and committing a block."""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from featurestore.layout import (
    TEMPORARY,
    array_metadata_key,
    receipt_blocks,
    receipt_key,
    receipts_prefix,
    rows_of,
    shard_key,
)
from featurestore.objects.base import Objects, put_if_absent
from featurestore.records import (
    LOST,
    MAX_REASON_LENGTH,
    Receipt,
    RowOutcome,
    read_receipt,
    row_digest,
)
from featurestore.shards import Shard, build_shard, check_shard, decode_all, decode_row, encode_row
from featurestore.snapshots import ClipIndex
from featurestore.storage_dtypes import OverflowedTokens, to_stored
from featurestore.zarr_metadata import (
    ArraySpec,
    parse_array,
    read_arrays,
    read_group,
)
from mervcache.errors import StoreDamagedError, UserError
from mervcache.text import shareable

log = logging.getLogger(__name__)


class GroupWriter:
    """The Zarr group of one encoder and kind, open for committing blocks; make one with `StoreWriter.open_group`."""

    def __init__(self, objects: Objects, index: ClipIndex, kind: str, group: str) -> None:
        record = read_group(objects, kind, group)
        self.objects = objects
        self.kind = kind
        self.name = group
        self.identity = record.identity
        self.batch_shape = record.batch_shape
        self.weights_label = record.weights
        self.block_rows = index.block_rows[kind]
        self.specs: dict[str, ArraySpec] = {}  # in the order of layout.ARRAYS
        self._index = index  # of the allocated rows
        self._read_specs()

    def committed_blocks(self) -> set[int]:
        """Blocks that have a receipt, by listing names."""
        return receipt_blocks(self.objects.list_names(receipts_prefix(self.kind, self.name)))

    def missing_blocks(self) -> list[int]:
        """Blocks allocated and not committed, ascending: what is left to do."""
        return sorted(set(range(self._index.allocated_blocks(self.kind))) - self.committed_blocks())

    def receipt(self, block: int) -> Receipt:
        """The receipt of a committed `block`, checked; FileNotFoundError if there is none."""
        return read_receipt(self.objects, self.kind, self.name, block, self.block_rows)

    def begin(self, block: int, rows: Iterable[int] | None = None) -> BlockWriter:
        """Start a `block`; `rows` are its planned rows where the caller knows them, which saves reading the clip parts.

        UserError for a block without clips.
        """
        return BlockWriter(self, block, self._index.planned_rows(self.kind, block) if rows is None else rows)

    def grow(self) -> None:
        """Grow the arrays to cover all allocated rows; safe under concurrent writers, as a shape never shrinks."""
        while True:
            rows = self._index.allocated_blocks(self.kind) * self.block_rows
            self._read_specs()
            too_short = [array for array, spec in self.specs.items() if spec.rows < rows]
            if not too_short:
                return
            for array in too_short:  # tokens last in ARRAYS: where they are long enough, the other arrays are
                key = array_metadata_key(self.kind, self.name, array)
                before = self.objects.get(key)
                spec = parse_array(array, before)
                if spec is not None and spec.rows < rows:
                    # Where another writer was first, the loop looks again.
                    self.objects.compare_and_swap(key, before, spec.with_rows(rows).document())

    def _read_specs(self) -> None:
        self.specs = read_arrays(self.objects, self.kind, self.identity, self.block_rows)


class BlockWriter:
    """Collects the outcome of every planned row of one block, then commits it; make one with `GroupWriter.begin`.

    Several threads may add rows at once: a shard is sorted by row when it is built. Memory is bounded by the block's
    encoded bytes. Shards are put in the order of layout.ARRAYS, tokens last, and a row
    goes into the tokens' shard only if its prefix, scale and offset on disk are its own. So a row in a tokens' shard is
    complete, and a shard without a receipt (its writer was killed) is adopted as it is.
    """

    def __init__(self, group: GroupWriter, block: int, planned: Iterable[int]) -> None:
        self._group = group
        self._objects = group.objects
        self.specs: Mapping[str, ArraySpec] = group.specs
        self.block = block
        self.rows = rows_of(block, group.block_rows)
        self.planned = frozenset(planned)
        self._receipt_key = receipt_key(group.kind, group.name, block)
        self._outcomes: dict[int, RowOutcome] = {}
        self._chunks: dict[str, dict[int, bytes]] = {name: {} for name in self.specs}  # by row within the block
        if not self.planned:
            raise UserError(f"block {block} of {group.kind}/{group.name} holds no clip: allocate rows first")
        if outside := sorted(self.planned - set(self.rows)):
            raise UserError(f"row {outside[0]} is not in block {block} ({self.rows.start}..{self.rows.stop - 1})")

    @property
    def encoded_bytes(self) -> int:
        """Bytes of the rows added so far; safe to read while another thread adds."""
        return sum(len(chunk) for chunks in self._chunks.values() for chunk in list(chunks.values()))

    def add(self, row: int, arrays: Mapping[str, np.ndarray], *, media_sha256: str | None, decoder: str | None) -> None:
        """Keep a clip's floats; tokens that do not fit the storage dtype fail the row, nothing is raised.

        Parameters
        ----------
        row
            A planned row of the block without an outcome yet; UserError for others.
        arrays
            {"tokens": [T, H, W, D], "prefix": [T, K, D] if the identity has prefix tokens}, floats.
        media_sha256, decoder
            What the receipt records of the media; None where unknown.
        """
        self._check_free(row)
        wanted = {name: spec.row_shape for name, spec in self.specs.items() if name in ("tokens", "prefix")}
        if wanted != (given := {name: tuple(array.shape) for name, array in arrays.items()}):
            raise UserError(f"row {row} of {self._group.name} must have arrays {wanted}, got {given}")
        try:
            stored = to_stored(arrays, self._group.identity.storage_dtype)
        except OverflowedTokens as error:
            self.fail(row, str(error), media_sha256=media_sha256, decoder=decoder, scope="encoder")
            return
        self.add_stored(row, stored, media_sha256=media_sha256, decoder=decoder)

    def add_stored(
        self, row: int, stored: Mapping[str, np.ndarray], *, media_sha256: str | None, decoder: str | None
    ) -> None:
        """Keep a clip's items as they are stored, every array of the group: what `to_stored` gives for its floats.

        `row`, `media_sha256` and `decoder` are those of `add`, `stored` is array name -> item.
        """
        self._check_free(row)
        chunks = {name: encode_row(spec, stored[name]) for name, spec in self.specs.items()}
        self._keep(row, chunks, row_digest(stored), media_sha256=media_sha256, decoder=decoder)

    def add_chunks(
        self, row: int, chunks: Mapping[str, bytes], *, media_sha256: str | None, decoder: str | None
    ) -> None:
        """Keep a clip's rows as another store encoded them, every array, in this group's codec.

        `row`, `media_sha256` and `decoder` are those of `add`, `chunks` is array name -> bytes.
        """
        self._check_free(row)
        if set(chunks) != set(self.specs):
            raise UserError(f"row {row} of {self._group.name} must have {sorted(self.specs)}, got {sorted(chunks)}")
        stored = {name: np.empty(spec.row_shape, spec.dtype) for name, spec in self.specs.items()}
        for name, spec in self.specs.items():
            decode_row(spec, np.frombuffer(chunks[name], dtype=np.uint8), stored[name])
        self._keep(row, chunks, row_digest(stored), media_sha256=media_sha256, decoder=decoder)

    def _keep(
        self, row: int, chunks: Mapping[str, bytes], digest: str, *, media_sha256: str | None, decoder: str | None
    ) -> None:
        for name, chunk in chunks.items():
            self._chunks[name][row - self.rows.start] = chunk
        self._outcomes[row] = RowOutcome(state="ok", digest=digest, media_sha256=media_sha256, decoder=decoder)

    def fail(
        self,
        row: int,
        reason: str,
        *,
        media_sha256: str | None = None,
        decoder: str | None = None,
        scope: str = "clip",
    ) -> None:
        """Quarantine the clip of a `row`, or with `scope="encoder"` this encoder on it.

        `reason` is stored, so it holds no paths and no measured values; `media_sha256` and `decoder` as in `add`.
        """
        self._check_free(row)
        text = shareable(reason)[:MAX_REASON_LENGTH] or "no reason given"
        self._outcomes[row] = RowOutcome(
            state="failed", scope=scope, reason=text, media_sha256=media_sha256, decoder=decoder
        )

    def skip(self, row: int) -> None:
        """Leave a `row` empty because the clip has tokens in another one."""
        self._check_free(row)
        self._outcomes[row] = RowOutcome(state="skipped")

    def commit(self) -> Receipt:
        """Put the shards, read them back and put the receipt; returns the receipt that is on disk.

        Where every shard is this writer's own and reads back as it was written, rows have the digests that were taken
        when they were added. If another worker was first, or an interrupted attempt left a shard, the existing shards
        win and their rows are digested from disk: rows that they hold are ok, rows that only this writer had are
        recorded as lost in an interrupted attempt and can be retried.
        """
        if existing := self._read_receipt():
            return existing
        if missing := sorted(self.planned - set(self._outcomes)):
            raise UserError(f"block {self.block}: {len(missing)} planned rows have no outcome, one is row {missing[0]}")
        own: dict[str, dict[str, Any]] = {}  # {"sha256", "bytes"} of the shards that are this writer's
        for name, spec in self.specs.items():
            shard = build_shard(spec, self._chunks[name])
            if put_if_absent(self._objects, self._shard_key(name), shard):
                own[name] = self._read_back(name, shard)
                continue
            self._replace_torn(name, b"".join(shard))
            if name != "tokens":
                self._drop_rows_that_differ(name)
        receipt = self._receipt(self._outcomes, own) if len(own) == len(self.specs) else self._describe_shards()
        if put_if_absent(self._objects, self._receipt_key, receipt.to_bytes()):
            return receipt
        return self._read_receipt() or receipt

    def _check_free(self, row: int) -> None:
        if row not in self.planned:
            raise UserError(f"row {row} is not planned in block {self.block}")
        if row in self._outcomes:
            raise UserError(f"row {row} of block {self.block} has an outcome already ({self._outcomes[row].state})")

    def _read_receipt(self) -> Receipt | None:
        return self._group.receipt(self.block) if self._objects.exists(self._receipt_key) else None

    def _shard_key(self, name: str) -> str:
        return shard_key(self._group.kind, self._group.name, name, self.block)

    def _open_shard(self, name: str) -> Shard:
        return Shard(self.specs[name], self._objects.open(self._shard_key(name)))

    def _read_back(self, name: str, shard: Sequence[bytes]) -> dict[str, Any]:
        """{"sha256", "bytes"} of a shard that was just put; `StoreDamagedError` unless it reads back as written."""
        key, written = self._shard_key(name), hashlib.sha256()
        for piece in shard:
            written.update(piece)
        with closing(self._open_shard(name)) as opened:
            record = opened.record()
        if record != {"sha256": written.hexdigest(), "bytes": sum(map(len, shard))}:
            raise StoreDamagedError(f"{key} does not read back as it was written: check the disk that holds the store")
        return record

    def _replace_torn(self, name: str, shard: bytes) -> None:
        """Set aside an existing shard that is not whole, as after a power cut: no receipt names it."""
        key = self._shard_key(name)
        try:
            check_shard(self.specs[name], self._objects.open(key))
        except StoreDamagedError:
            torn = self._objects.get(key)
            aside = f"{TEMPORARY}/torn/{key.replace('/', '-')}-{uuid.uuid4().hex[:8]}"
            self._objects.put_exclusive(aside, torn)
            log.warning("%s is torn and no receipt names it: set aside as %s and written anew", key, aside)
            self._objects.compare_and_swap(key, torn, shard)  # unless another writer was first: its shard is kept

    def _drop_rows_that_differ(self, name: str) -> None:
        """Drop rows whose sidecar on disk is another attempt's, so that tokens never meet another attempt's scale."""
        shard = self._open_shard(name)
        for row in list(self._chunks[name]):
            chunk = shard.chunk(row)
            if chunk is None or chunk.tobytes() != self._chunks[name][row]:
                for chunks in self._chunks.values():
                    chunks.pop(row, None)
        shard.close()

    def _describe_shards(self) -> Receipt:
        """The receipt of what the shards on disk hold."""
        shards = {name: self._open_shard(name) for name in self.specs}
        present = {self.rows.start + slot for slot in shards["tokens"].rows()}
        rows: dict[int, RowOutcome] = {}
        for row in self.rows:
            outcome = self._outcomes.get(row, RowOutcome(state="empty"))
            if row in present and row in self.planned:
                if (stored := decode_all(shards, row - self.rows.start)) is not None:
                    about = {"media_sha256": outcome.media_sha256, "decoder": outcome.decoder}
                    outcome = RowOutcome(state="ok", digest=row_digest(stored), **about)
                else:
                    outcome = RowOutcome(state="failed", scope="encoder", reason=LOST)
            elif outcome.state == "ok":
                outcome = replace(outcome, state="failed", digest=None, scope="encoder", reason=LOST)
            rows[row] = outcome
        records = {name: shard.record() for name, shard in shards.items()}
        for shard in shards.values():
            shard.close()
        return self._receipt(rows, records)

    def _receipt(self, outcomes: Mapping[int, RowOutcome], shards: Mapping[str, Mapping[str, Any]]) -> Receipt:
        return Receipt(
            kind=self._group.kind,
            group=self._group.name,
            block=self.block,
            rows=tuple(outcomes.get(row, RowOutcome(state="empty")) for row in self.rows),
            shards=shards,
        )
