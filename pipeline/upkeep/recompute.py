"""A committed block computed once more, for `repair`: that block and that encoder only, into a folder of its own.

Comes in: a group and the receipt of one of its blocks. Goes out: the shards and the receipt that this machine makes of
the same media, for the caller to compare. Settings are those of the newest run in the store's journal that wrote to the
group; the media's folder, the weights and the device may be given, since they decide no bytes by contract.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from featurestore.clips import table_to_clips
from featurestore.identity import FeatureIdentity
from featurestore.layout import ROOT_METADATA, array_metadata_key, group_metadata_key, receipt_key, rows_of, shard_key
from featurestore.locate import Place
from featurestore.maintenance.repair import Recomputed
from featurestore.objects.open import open_objects
from featurestore.records import Receipt, maker_of
from featurestore.writer import GroupWriter, StoreWriter
from mervcache.errors import UserError
from pipeline.certify.parity import made_again
from pipeline.config import AUTO, ExtractConfig, read_config
from pipeline.costs.ledger import settings_of


class Recompute:
    """Computes blocks of one store again; encoders stay loaded between blocks."""

    def __init__(self, path: Place, *, root: str | None, weights: Mapping[str, str] | None, device: str | None) -> None:
        self._path, self._root = path, root
        self._overrides = {"weights": dict(weights) if weights else None, "device": device}

    def __call__(self, group: GroupWriter, receipt: Receipt) -> Recomputed:
        from pipeline.worker.block import BlockTask, extract_block

        maker = maker_of(group.objects, group.name)
        if maker is None:
            raise UserError(f"no journal tells how {group.name} was made: fetch the block with --from OTHER_STORE")
        name = group.identity.encoder
        config = self._config(maker.run)
        settings = next(entry for entry in config.encoder_settings if entry.name == name)
        engine = replace(  # decode processes as suit this machine: they decide no byte
            config.engine_settings, encoders=(settings,), threads=maker.threads or AUTO, decode_processes=AUTO
        )
        ok = [row for row, outcome in enumerate(receipt.rows, start=receipt.first_row()) if outcome.state == "ok"]
        with tempfile.TemporaryDirectory(prefix="merv-repair-") as folder:
            _copy_documents(group, folder)
            task = BlockTask(
                store=folder,
                root=self._root or maker.run["root"],
                kind=group.kind,
                block=receipt.block,
                rows=_rows(self._path, group, receipt),
                wanted={name: frozenset(ok)},
                groups={name: group.name},
                batch=group.batch_shape,
                accept_damaged=config.accept_damaged,
                engine=engine,
            )
            extract_block(task)
            return _made(group, receipt.block, folder)

    def canaries(self, kind: str, identity: FeatureIdentity) -> bytes:
        """The file of a group's canaries as this machine makes it."""
        weights, device = self._overrides["weights"] or {}, self._overrides["device"]
        return made_again(open_objects(self._path), kind, identity, weights, device).to_bytes()

    def _config(self, run: Mapping[str, Any]) -> ExtractConfig:
        given = {name: value for name, value in self._overrides.items() if value is not None}
        return read_config(None, settings_of(run) | given)


def _copy_documents(group: GroupWriter, folder: str) -> None:
    """A store that has room for the block and nothing in it."""
    target, kind = open_objects(folder), group.kind
    arrays = [array_metadata_key(kind, group.name, array) for array in group.specs]
    for key in (ROOT_METADATA, f"{kind}/{ROOT_METADATA}", group_metadata_key(kind, group.name), *arrays):
        target.put_new(key, group.objects.get(key))


def _rows(path: Place, group: GroupWriter, receipt: Receipt) -> tuple:
    wanted = rows_of(receipt.block, group.block_rows)
    pairs = table_to_clips(StoreWriter.open(path).clips())
    return tuple(sorted((pair for pair in pairs if pair[1].kind == group.kind and pair[0] in wanted), key=_row))


def _row(pair: tuple[int, object]) -> int:
    return pair[0]


def _made(group: GroupWriter, block: int, folder: str) -> Recomputed:
    made = open_objects(folder)
    data = made.get(receipt_key(group.kind, group.name, block))
    receipt = Receipt.parse(data, kind=group.kind, group=group.name, block=block, block_rows=group.block_rows)
    keys = {name: shard_key(group.kind, group.name, name, block) for name in group.specs}
    return Recomputed(receipt=receipt, shards={name: made.get(key) for name, key in keys.items()})
