"""Parity on a store's own clips: their media are decoded and encoded again and compared with the committed tokens.

Canaries need no media and nobody's permission; this is for who wants to see real clips. Media other than those that the
tokens were made from are refused by their digest, before anything is compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from featurestore.clips import KINDS, Clip
from featurestore.locate import Place
from featurestore.objects.open import open_objects
from featurestore.quality import ParityRow
from featurestore.records import driver_runs
from featurestore.storage_dtypes import OverflowedTokens, to_stored
from featurestore.store import FeatureStore
from featurestore.transfer.merge import LoadedCell, StoreCells, decoded_cell
from featurestore.zarr_metadata import array_specs
from mervcache.errors import ClipUnavailableError, UserError, unknown_name
from pipeline.certify.parity_figures import compare
from pipeline.costs.ledger import media_roots

if TYPE_CHECKING:
    from pipeline.worker.engine import EncoderRun, Engine

MAX_CLIPS = 1000  # a check, not an extraction


def clips_by_kind(store: FeatureStore, clip_ids: Collection[str]) -> dict[str, list[str]]:
    """Kind -> clip ids, in the order of the store."""
    kinds = dict(zip(store.clips["clip_id"].to_pylist(), store.clips["kind"].to_pylist(), strict=True))
    if len(clip_ids) > MAX_CLIPS:
        raise UserError(f"at most {MAX_CLIPS} clips are encoded again, got {len(clip_ids)}")
    for clip_id in clip_ids:
        if clip_id not in kinds:
            raise UserError(unknown_name("clip", clip_id, sorted(kinds)[:2000])[:600])
    asked = [clip_id for clip_id in kinds if clip_id in clip_ids]
    return {kind: found for kind in KINDS if (found := [clip_id for clip_id in asked if kinds[clip_id] == kind])}


def check_clips(
    place: Place, engine: Engine, run: EncoderRun, key: str, kind: str, clip_ids: Sequence[str], *, root: str | None
) -> ParityRow:
    """Encode clips of a store again, a batch of the group's shape at a time, and compare."""
    cells, name = StoreCells(place), f"{kind}/{run.identity.group_name}"
    if name not in cells.groups():
        raise ClipUnavailableError(f"{key} has no tokens of {kind} clips in this store; leave them out of the list")
    batch = cells.groups()[name].batch_shape
    specs = array_specs(run.identity, kind, blocks=0, block_rows=1, codec=cells.groups()[name].codec)
    clips = {clip.clip_id: clip for clip in cells.clips()}
    roots = media_roots(driver_runs(open_objects(place)), root)
    pairs = []
    for start in range(0, len(clip_ids), batch):
        part = list(clip_ids[start : start + batch])
        loaded = {clip_id: _load(cells, name, clip_id, key, specs) for clip_id in part}
        media = {clip_id: cell.outcome.media_sha256 for clip_id, cell in loaded.items()}
        mine = encode_clips(engine, run, batch, [clips[clip_id] for clip_id in part], roots, media)
        for clip_id, made in zip(part, mine, strict=True):
            pairs.append((decoded_cell(loaded[clip_id], specs), _stored(made, run)))
    return compare(key, kind, run.identity, pairs)


def _load(cells: StoreCells, name: str, clip_id: str, key: str, specs: Mapping) -> LoadedCell:
    cell = cells.cells(name).get(clip_id)
    if cell is None or not cell.is_ok:
        raise ClipUnavailableError(f"{clip_id} has no committed tokens of {key}: leave it out of the list")
    return cells.load(name, clip_id, specs)


def encode_clips(
    engine: Engine,
    run: EncoderRun,
    batch: int,
    clips: Sequence[Clip],
    roots: Mapping[str, str],
    media: Mapping[str, str | None],
) -> list[dict[str, np.ndarray]]:
    """float32 arrays of at most `batch` clips, as this machine makes them; `media` is clip id -> sha256 of its file."""
    from pipeline.worker.engine import decode_job, encode_batch

    futures = []
    for clip in clips:
        if (root := roots.get(clip.dataset, roots.get(""))) is None:
            raise UserError(f"no run says where the media of {clip.dataset} are: give --root DIR")
        futures.append(engine.pool.submit(decode_job(root, clip, [run], accept_damaged=True)))
    frames = {}
    for slot, (clip, future) in enumerate(zip(clips, futures, strict=True)):
        decoded = future.result()
        if decoded.media_sha256 != media[clip.clip_id]:
            raise UserError(f"the media of {clip.clip_id} are not those that its tokens were made from: give others")
        frames[slot] = decoded.frames[run.view]
    arrays, _ = encode_batch(run, frames, range(batch))
    return [{name: items[slot] for name, items in arrays.items()} for slot in frames]


def _stored(arrays: Mapping[str, np.ndarray], run: EncoderRun) -> dict[str, np.ndarray] | None:
    """As extraction stores them; None where the tokens overflow here."""
    try:
        return to_stored(arrays, run.identity.storage_dtype)
    except OverflowedTokens:
        return None
