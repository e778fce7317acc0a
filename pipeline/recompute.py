"""Store maintenance that needs the media: compute a damaged block again, and find media that changed.

A block is computed again in a temporary store, with the settings of the newest run that wrote to its group; the media's
folder, the weights' place and the device may be given, since they decide no bytes by contract.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from operator import itemgetter
from typing import Literal

from featurestore.clips import Clip
from featurestore.group_writer import GroupWriter
from featurestore.identity import FeatureIdentity
from featurestore.layout import ROOT_METADATA, array_metadata_key, group_metadata_key, receipt_key, rows_of, shard_key
from featurestore.locate import Place
from featurestore.maintenance.findings import Finding
from featurestore.maintenance.repair import Recomputed
from featurestore.objects.open import open_objects
from featurestore.records import Receipt, maker_of
from featurestore.schemas import table_to_clips
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import MervCacheError, UserError
from pipeline.config import AUTO, read_config
from pipeline.media import Root, Source, newest_touch_s
from pipeline.parity import encode_as_group
from pipeline.summary import media_root, media_roots, settings_of

MediaLevel = Literal["quick", "full"]
MEDIA_LEVELS: tuple[MediaLevel, ...] = ("quick", "full")


class Recompute:
    """Computes blocks of one store again; encoders stay loaded between blocks."""

    def __init__(self, path: Place, *, root: str | None, weights: Mapping[str, str] | None, device: str | None) -> None:
        self._path, self._root, self._weights, self._device = path, root, dict(weights or {}), device

    def __call__(self, group: GroupWriter, receipt: Receipt) -> Recomputed:
        """The shards and the receipt that this machine makes of the block's media, for the caller to compare."""
        from pipeline.worker.block import BlockTask, extract_block

        maker = maker_of(group.objects, group.name)
        if maker is None:
            raise UserError(f"no journal records how {group.name} was made: fetch the block with --from OTHER_STORE")
        overrides = {"weights": self._weights or None, "device": self._device}
        config = read_config(None, settings_of(maker.run) | {name: v for name, v in overrides.items() if v is not None})
        name, kind, block = maker.encoder, group.kind, receipt.block
        settings = next(entry for entry in config.encoder_settings if entry.key == name)
        engine = replace(  # as many decode processes as suit this machine: they decide no byte
            config.engine_settings, encoders=(settings,), threads=maker.threads or AUTO, decode_processes=AUTO
        )
        planned = rows_of(block, group.block_rows)
        clips = table_to_clips(StoreWriter.open(self._path).clips())
        rows = sorted(((row, clip) for row, clip in clips if clip.kind == kind and row in planned), key=itemgetter(0))
        wanted = [row for row, outcome in enumerate(receipt.rows, start=receipt.first_row()) if outcome.state == "ok"]
        with tempfile.TemporaryDirectory(prefix="merv-repair-") as folder:
            made = open_objects(folder)  # an empty store with this group
            arrays = [array_metadata_key(kind, group.name, array) for array in group.specs]
            for key in (ROOT_METADATA, f"{kind}/{ROOT_METADATA}", group_metadata_key(kind, group.name), *arrays):
                made.put_exclusive(key, group.objects.get(key))
            extract_block(
                BlockTask(
                    store=folder,
                    root=media_root(maker.run, self._root),
                    kind=kind,
                    block=block,
                    rows=tuple(rows),
                    wanted={name: frozenset(wanted)},
                    groups={name: group.name},
                    batch=group.batch_shape,
                    accept_damaged=config.accept_damaged,
                    engine=engine,
                )
            )
            data = made.get(receipt_key(kind, group.name, block))
            return Recomputed(
                receipt=Receipt.parse(data, kind=kind, group=group.name, block=block, block_rows=group.block_rows),
                shards={array: made.get(shard_key(kind, group.name, array, block)) for array in group.specs},
            )

    def canaries(self, kind: str, identity: FeatureIdentity) -> bytes:
        """The file of a group's reference clips as this machine makes it."""
        return encode_as_group(open_objects(self._path), kind, identity, self._weights, self._device).to_bytes()


def verify_media(
    path: Place,
    level: MediaLevel,
    *,
    root: str | None = None,
    workers: int = 2,
    progress: ProgressLine = SILENT,
) -> list[Finding]:
    """Media that are gone or whose bytes are no longer those that the receipts name; keys are clip ids.

    "full" hashes every file; "quick" those that were modified or moved since the store's first run began, by the later
    of mtime and ctime. It misses files exchanged on a file system whose clock was set back, bits that rotted under an
    old date, and stores whose journal is lost; a folder that was copied since is hashed whole.
    """
    if level not in MEDIA_LEVELS:
        raise UserError(f"media are checked {' or '.join(MEDIA_LEVELS)}, got {level!r}")
    store = FeatureStore.open(path)
    runs = [record for name, record in store.journal() if name.endswith("-driver")]  # all: the first run's start counts
    roots = media_roots(runs, root)
    since = min((run["started"] for run in runs), default=0.0) if level == "quick" else 0.0
    removed = {clip_id for tombstone in store.tombstones.values() for clip_id in tombstone.clips}
    known = _media_digests(StoreWriter.open(path), removed)
    progress.start(len(known))

    def check(entry: tuple[Clip, set[str]]) -> Finding | None:
        progress.advance()
        return _check(*entry, roots, since)

    with ThreadPoolExecutor(workers) as pool:
        found = [finding for finding in pool.map(check, known.values()) if finding is not None]
    return sorted(found, key=lambda finding: (finding.severity, finding.key))


def _media_digests(writer: StoreWriter, removed: Collection[str]) -> dict[str, tuple[Clip, set[str]]]:
    """Clip id -> the clip, and the sha256 of the media that each encoder's newest tokens of it were made from."""
    newest: dict[
        str, tuple[Clip, dict[str, str]]
    ] = {}  # clip id -> the clip, and sha256 by group: a later row replaces
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


def _check(clip: Clip, digests: set[str], roots: Mapping[str, Root], since: float) -> Finding | None:
    root = roots.get(clip.dataset, roots.get(""))
    if root is None:
        problem = f"no run records where the media of {clip.dataset} are"
        return Finding(clip.clip_id, problem, "notice", "give --root DIR")
    try:
        source = Source.find(root, clip.path)
        if newest_touch_s(source) < since:
            return None
        now = source.sha256()
    except MervCacheError as error:
        return Finding(clip.clip_id, str(error), "notice", "its tokens stay valid; restore the file to recompute")
    except OSError as error:
        return Finding(clip.clip_id, f"cannot be read: {error.strerror}", "notice", "check the disk")
    if digests == {now}:
        return None
    if len(digests) > 1:
        problem = "encoders saw different content of its media"
    else:
        problem = "its media are not those that its tokens were made from"
    advice = "restore the file it was made from, or compute it again with `extract --refresh`"
    return Finding(clip.clip_id, problem, "damage", advice)
