"""Blocks: one shard per array, built row by row, committed by a receipt.

Order makes recovery simple. Shards are put in the order of layout.ARRAYS, tokens last, and a row goes into the tokens'
shard only if its prefix, scale and offset on disk are the ones that belong to it. So a row that is present in a tokens'
shard is whole, whoever wrote it, and an orphan shard (its writer was killed before the receipt) is adopted as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from featurestore.errors import UserError
from featurestore.identity import FeatureIdentity
from featurestore.layout import receipt_key, rows_of, shard_key
from featurestore.metadata import ArraySpec
from featurestore.places.objects import Objects, put_if_absent
from featurestore.quantise import OverflowedTokens, to_stored
from featurestore.receipts import LOST, MAX_REASON_LENGTH, Receipt, RowOutcome, read_receipt, row_digest
from featurestore.shards import Shard, build_shard, encode_row

_PENDING = "0" * 32  # digest of an added row until the bytes on disk are digested


@dataclass(frozen=True, kw_only=True)
class BlockTarget:
    """The encoder's group that blocks go to."""

    objects: Objects
    kind: str
    identity: FeatureIdentity
    specs: Mapping[str, ArraySpec]  # in the order of layout.ARRAYS
    block_rows: int

    @property
    def name(self) -> str:
        return self.identity.group_name


class BlockWriter:
    """Collects the outcome of every planned row of one block; memory is bounded by the block's encoded bytes."""

    def __init__(self, group: BlockTarget, block: int, planned: Iterable[int]) -> None:
        self._group = group
        self._objects = group.objects
        self.block = block
        self.rows = rows_of(block, group.block_rows)
        self.planned = frozenset(planned)
        self._outcomes: dict[int, RowOutcome] = {}
        self._chunks: dict[str, dict[int, bytes]] = {name: {} for name in group.specs}  # by row within the block
        if not self.planned:
            raise UserError(f"block {block} of {group.kind}/{group.name} holds no clip: give out rows first")
        if outside := sorted(self.planned - set(self.rows)):
            raise UserError(f"row {outside[0]} is not in block {block} ({self.rows.start}..{self.rows.stop - 1})")

    @property
    def specs(self) -> Mapping[str, ArraySpec]:
        """The arrays of the group."""
        return self._group.specs

    @property
    def encoded_bytes(self) -> int:
        """Bytes of the rows added so far; one thread may add while another asks."""
        return sum(len(chunk) for chunks in self._chunks.values() for chunk in list(chunks.values()))

    def add(self, row: int, arrays: Mapping[str, np.ndarray], *, media_sha256: str | None, decoder: str | None) -> None:
        """Keep a clip's floats {"tokens": [T, H, W, D], "prefix": [T, K, D] if the identity has prefix tokens}.

        Tokens that do not fit the storage dtype fail the row for this encoder; nothing is raised.
        """
        self._check_free(row)
        self._check_shapes(row, arrays)
        try:
            stored = to_stored(arrays, self._group.identity.storage_dtype)
        except OverflowedTokens as error:
            self.fail(row, str(error), media_sha256=media_sha256, decoder=decoder, scope="encoder")
            return
        for name, spec in self._group.specs.items():
            self._chunks[name][row - self.rows.start] = encode_row(spec, stored[name])
        self._outcomes[row] = RowOutcome(state="ok", digest=_PENDING, media_sha256=media_sha256, decoder=decoder)

    def add_chunks(
        self, row: int, chunks: Mapping[str, bytes], *, media_sha256: str | None, decoder: str | None
    ) -> None:
        """Keep a clip's rows as another store encoded them, of every array, in this group's codec."""
        self._check_free(row)
        if set(chunks) != set(self._group.specs):
            raise UserError(
                f"row {row} of {self._group.name} must have {sorted(self._group.specs)}, got {sorted(chunks)}"
            )
        for name, chunk in chunks.items():
            self._chunks[name][row - self.rows.start] = chunk
        self._outcomes[row] = RowOutcome(state="ok", digest=_PENDING, media_sha256=media_sha256, decoder=decoder)

    def fail(
        self,
        row: int,
        reason: str,
        *,
        media_sha256: str | None = None,
        decoder: str | None = None,
        scope: str = "clip",
    ) -> None:
        """Quarantine a clip ("clip") or one encoder on it ("encoder")."""
        self._check_free(row)
        text = reason.strip()[:MAX_REASON_LENGTH] or "no reason given"
        self._outcomes[row] = RowOutcome(
            state="failed", scope=scope, reason=text, media_sha256=media_sha256, decoder=decoder
        )

    def skip(self, row: int) -> None:
        """Leave a row empty because the clip has tokens in another one."""
        self._check_free(row)
        self._outcomes[row] = RowOutcome(state="skipped")

    def commit(self) -> Receipt:
        """Put the shards, read them back and put the receipt; returns the receipt that is on disk.

        If another worker was first, its bytes stand: rows that it has are ok, rows that only we had are lost in an
        interrupted attempt and can be retried.
        """
        if existing := self._read_receipt():
            return existing
        if missing := sorted(self.planned - set(self._outcomes)):
            raise UserError(f"block {self.block}: {len(missing)} planned rows have no outcome, one is row {missing[0]}")
        *sidecars, tokens = self._group.specs
        for name in sidecars:
            self._put_shard(name)
            self._keep_rows_that_match(name)
        self._put_shard(tokens)
        receipt = self._describe_disk()
        if put_if_absent(self._objects, self._receipt_key, receipt.to_bytes()):
            return receipt
        return self._read_receipt() or receipt

    @property
    def _receipt_key(self) -> str:
        return receipt_key(self._group.kind, self._group.name, self.block)

    def _check_free(self, row: int) -> None:
        if row not in self.planned:
            raise UserError(f"row {row} is not planned in block {self.block}")
        if row in self._outcomes:
            raise UserError(f"row {row} of block {self.block} has an outcome already ({self._outcomes[row].state})")

    def _check_shapes(self, row: int, arrays: Mapping[str, np.ndarray]) -> None:
        wanted = {name: self._group.specs[name].row_shape for name in ("tokens", "prefix") if name in self._group.specs}
        given = {name: tuple(array.shape) for name, array in arrays.items()}
        if given != wanted:
            raise UserError(f"row {row} of {self._group.name} must have arrays {wanted}, got {given}")

    def _read_receipt(self) -> Receipt | None:
        group = self._group
        if not self._objects.exists(self._receipt_key):
            return None
        return read_receipt(self._objects, group.kind, group.name, self.block, group.block_rows)

    def _put_shard(self, name: str) -> None:
        pieces = build_shard(self._group.specs[name], self._chunks[name])
        put_if_absent(self._objects, self._shard_key(name), pieces)  # the caller reads what it holds

    def _shard_key(self, name: str) -> str:
        return shard_key(self._group.kind, self._group.name, name, self.block)

    def _open_shard(self, name: str) -> Shard:
        return Shard(self._group.specs[name], self._objects.open(self._shard_key(name)))

    def _keep_rows_that_match(self, name: str) -> None:
        """Drop rows whose sidecar on disk is another attempt's, so that tokens never meet a foreign scale."""
        shard = self._open_shard(name)
        for row in list(self._chunks[name]):
            chunk = shard.chunk(row)
            if chunk is None or chunk.tobytes() != self._chunks[name][row]:
                for chunks in self._chunks.values():
                    chunks.pop(row, None)
        shard.close()

    def _describe_disk(self) -> Receipt:
        """The receipt of what the shards on disk hold."""
        shards = {name: self._open_shard(name) for name in self._group.specs}
        present = set(shards["tokens"].rows())
        rows = tuple(self._row_outcome(row, row - self.rows.start in present, shards) for row in self.rows)
        receipt = Receipt(
            kind=self._group.kind,
            group=self._group.name,
            block=self.block,
            rows=rows,
            shards={name: shard.record() for name, shard in shards.items()},
        )
        for shard in shards.values():
            shard.close()
        return receipt

    def _row_outcome(self, row: int, is_present: bool, shards: Mapping[str, Shard]) -> RowOutcome:
        ours = self._outcomes.get(row)
        if ours is None:
            return RowOutcome(state="empty")
        if not is_present:
            lost = RowOutcome(state="failed", scope="encoder", reason=LOST)
            return replace(lost, media_sha256=ours.media_sha256, decoder=ours.decoder) if ours.state == "ok" else ours
        stored = {name: shard.decode(row - self.rows.start) for name, shard in shards.items()}
        if any(array is None for array in stored.values()):
            return RowOutcome(state="failed", scope="encoder", reason=LOST)
        digest = row_digest(stored)
        return RowOutcome(state="ok", digest=digest, media_sha256=ours.media_sha256, decoder=ours.decoder)
