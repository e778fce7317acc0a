"""A committed block computed once more, for `repair`: that block and that encoder only, into a folder of its own.

Comes in: a group and the receipt of one of its blocks. Goes out: the shards and the receipt that this machine makes of
the same media, for the caller to compare. Settings are those of the newest run in the store's journal that wrote to the
group; the media's folder, the weights and the device may be given, since they decide no bytes by contract.

Have the media changed since they were encoded? Receipts hold the sha256 of what each clip was made from.

Comes in: a store and the folders of its media. Goes out: findings. "full" hashes every file. "quick" hashes only files
that were modified, or moved into their place, after the store's first run began (the later of mtime and ctime), and
finds those that are gone. It cannot see what was exchanged on a file system whose clock was set back, bits that rotted
under an old date, or a store whose journal is lost; a folder that was copied since is hashed whole, as full would.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

from featurestore.clips import Clip
from featurestore.identity import FeatureIdentity
from featurestore.layout import ROOT_METADATA, array_metadata_key, group_metadata_key, receipt_key, rows_of, shard_key
from featurestore.locate import Place
from featurestore.maintenance.repair import Recomputed
from featurestore.maintenance.verify import Finding
from featurestore.objects.open import open_objects
from featurestore.records import Receipt, maker_of
from featurestore.schemas import table_to_clips
from featurestore.store import FeatureStore
from featurestore.writer import GroupWriter, StoreWriter
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import MervCacheError, UserError
from pipeline.config import AUTO, ExtractConfig, read_config
from pipeline.media import Source, newest_touch_s
from pipeline.parity import encode_as_group
from pipeline.summary import media_roots, settings_of


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
        return encode_as_group(open_objects(self._path), kind, identity, weights, device).to_bytes()

    def _config(self, run: Mapping[str, Any]) -> ExtractConfig:
        given = {name: value for name, value in self._overrides.items() if value is not None}
        return read_config(None, settings_of(run) | given)


def _copy_documents(group: GroupWriter, folder: str) -> None:
    """A store that has room for the block and nothing in it."""
    target, kind = open_objects(folder), group.kind
    arrays = [array_metadata_key(kind, group.name, array) for array in group.specs]
    for key in (ROOT_METADATA, f"{kind}/{ROOT_METADATA}", group_metadata_key(kind, group.name), *arrays):
        target.put_exclusive(key, group.objects.get(key))


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


MediaLevel = Literal["quick", "full"]
MEDIA_LEVELS: tuple[MediaLevel, ...] = ("quick", "full")
_RESTORE = "restore the file it was made from, or compute it again with `extract --refresh`"


def verify_media(
    path: Place,
    level: MediaLevel,
    *,
    root: str | None = None,
    workers: int = 2,
    progress: ProgressLine = SILENT,
) -> list[Finding]:
    """Media that are gone or whose bytes are no longer those that the receipts name; keys are clip ids."""
    if level not in MEDIA_LEVELS:
        raise UserError(f"media are checked {' or '.join(MEDIA_LEVELS)}, got {level!r}")
    store = FeatureStore.open(path)
    runs = [record for name, record in store.journal() if name.endswith("-driver")]
    roots = media_roots(runs, root)
    since = min((run["started"] for run in runs), default=0.0) if level == "quick" else 0.0
    known = _media_digests(path, set(store.tombstones) and {c for s in store.tombstones.values() for c in s.clips})
    progress.start(len(known))

    def check(entry: tuple[Clip, set[str]]) -> Finding | None:
        progress.advance()
        return _check(*entry, roots, since)

    with ThreadPoolExecutor(workers) as pool:
        found = [finding for finding in pool.map(check, known.values()) if finding is not None]
    return sorted(found, key=lambda finding: (finding.severity, finding.key))


def _media_digests(path: Place, removed: Iterable[str]) -> dict[str, tuple[Clip, set[str]]]:
    """Clip id -> the clip, and the sha256 of the media that each encoder's tokens of it were made from."""
    writer, removed = StoreWriter.open(path), set(removed)
    newest: dict[str, tuple[Clip, dict[str, str]]] = {}  # clip id -> the clip, and by group: a later row's wins
    clips = {(clip.kind, row): clip for row, clip in table_to_clips(writer.clips())}
    for kind in {kind for kind, _ in clips}:
        for name in writer.encoder_groups(kind):
            group = writer.open_group(kind, name)
            for block in sorted(group.committed_blocks()):
                receipt = group.receipt(block)
                for row, outcome in enumerate(receipt.rows, start=receipt.first_row()):
                    clip = clips.get((kind, row))
                    if outcome.state == "ok" and outcome.media_sha256 and clip and clip.clip_id not in removed:
                        newest.setdefault(clip.clip_id, (clip, {}))[1][name] = outcome.media_sha256
    return {clip_id: (clip, set(digests.values())) for clip_id, (clip, digests) in newest.items()}


def _check(clip: Clip, digests: set[str], roots: Mapping[str, str], since: float) -> Finding | None:
    root = roots.get(clip.dataset, roots.get(""))
    if root is None:
        return Finding(clip.clip_id, f"no run says where the media of {clip.dataset} are", "notice", "give --root DIR")
    try:
        source = Source.find(root, clip.path)
        if newest_touch_s(source) < since:
            return None
        now = source.sha256()
    except MervCacheError as error:
        return Finding(clip.clip_id, str(error), "notice", "its tokens stay good; restore the file to compute it again")
    except OSError as error:
        return Finding(clip.clip_id, f"cannot be read: {error.strerror}", "notice", "check the disk")
    if digests == {now}:
        return None
    if len(digests) > 1:
        words = "encoders saw different content of its media"
    else:
        words = "its media are not those that its tokens were made from"
    return Finding(clip.clip_id, words, "damage", _RESTORE)
