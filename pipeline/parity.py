"""Parity: do the encoders of this machine make the tokens that a store holds?

Each encoder is built from its identity and must have it, so other weights are refused by their digest. The reference
clips (or clips of the store, with their media) are decoded and encoded in the group's batch shape and compared as they
would be stored. Equal digests of the frames mean that decoding and resizing did not change.
"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featurestore.clips import KINDS, Clip
from featurestore.encoder_keys import chosen_keys
from featurestore.identity import FeatureIdentity
from featurestore.locate import Place
from featurestore.objects.base import Objects
from featurestore.objects.open import open_objects
from featurestore.quality import ParityRecord, ParityRow, now
from featurestore.records import driver_runs, maker_of
from featurestore.reference_clips import ReferenceClips, read_reference_clips
from featurestore.storage_dtypes import OverflowedTokens, from_stored, storage_dtype, to_stored
from featurestore.store import FeatureStore
from featurestore.transfer.merge import StoreCells, decoded_cell
from featurestore.transfer.selection import read_clip_list
from featurestore.zarr_metadata import array_specs, read_group
from mervcache.errors import ClipUnavailableError, StoreFormatError, UserError, unknown_name
from pipeline.config import EncoderSettings, EngineSettings
from pipeline.media import Root
from pipeline.reference_clips import CLIPS, RENDERING, decode_reference_clips, encode_reference_clips
from pipeline.summary import media_roots, software_versions

if TYPE_CHECKING:
    from pipeline.worker.encode import TokenEncoder
    from pipeline.worker.engine import Engine

log = logging.getLogger(__name__)

# A clip's relative error is sqrt(sum of squared differences / sum of squared stored values). On a machine like the one
# that made them (same device, batch shape, threads) tokens are bit-identical. Elsewhere sums round in another order
# (TOLERANCES, by compute dtype), and the result may fall into the next stored number (the step of the storage dtype).
# The worst single token may be WORST_TOKEN times as far off as the clip. benchmarks/README.md has the measurements.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
WORST_TOKEN = 4
MAX_CLIPS = 1000  # of a store that are encoded again: a check, not an extraction
MAX_PARAMETERS = 1 << 34  # of an encoder that an untrusted identity may have built

Arrays = Mapping[str, np.ndarray]  # a clip's stored items by array


def check_parity(
    place: Place,
    *,
    encoders: Sequence[str] | None = None,
    weights: Mapping[str, str] | None = None,
    device: str | None = None,
    clips: str | Path | None = None,
    root: str | None = None,
) -> ParityRecord:
    """Encode again and compare; `clips`, a file of clip ids of the store, replaces the reference clips.

    `weights` is encoder -> SPEC, "" for all the others; by default what the store was made with.
    """
    store, objects = FeatureStore.open(place), open_objects(place)
    chosen = _chosen_encoders(store, encoders)
    listed = clips_by_kind(store, read_clip_list(clips)) if clips else None
    kinds = {
        key: [kind for kind in KINDS if f"{kind}/{identity.group_name}" in store.canaries]
        for key, identity in chosen.items()
    }
    if listed is None and not any(kinds.values()):
        raise UserError(
            f"{place} has no reference clips of {', '.join(chosen) or 'any encoder'}: run its `merv-pipeline extract` "
            "again, which adds them where it made the tokens; or name clips of the store with --clips, and their --root"
        )
    rows = []
    with engine_without_encoders(device) as engine:
        for key, identity in chosen.items():
            if listed is None and not kinds[key]:
                log.info("%s: no reference clips, not checked", key)
                continue
            log.info("%s: loading", key)
            run = load_as_stored(objects, key, identity, weights or {}, engine.device)
            for kind in kinds[key] if listed is None else listed:
                if listed is None:
                    row = _check_reference_clips(store, objects, engine, run, key, kind)
                else:
                    row = _check_clips(place, engine, run, key, kind, listed[kind], root=root)
                rows += [row] if row.clips else []
        device_name = engine.device
    if device_name.startswith("cuda"):
        import torch

        device_name = f"{device_name} {torch.cuda.get_device_name(device_name)}"
    return ParityRecord(
        time=now(),
        snapshot=store.snapshot,
        device=device_name,
        machine=platform.machine(),
        versions=software_versions(),
        rows=tuple(rows),
    )


def _chosen_encoders(store: FeatureStore, encoders: Sequence[str] | None) -> dict[str, FeatureIdentity]:
    """Identities by key; a bare name means every identity of it."""
    if encoders is None:
        return dict(store.encoders)
    chosen = set(chosen_keys(encoders, store.encoders))
    return {key: identity for key, identity in store.encoders.items() if key in chosen}


def clips_by_kind(store: FeatureStore, clip_ids: Collection[str]) -> dict[str, list[str]]:
    """Kind -> clip ids, in the order of the store; `UserError` for unknown and for too many clips."""
    kinds = dict(zip(store.clips["clip_id"].to_pylist(), store.clips["kind"].to_pylist(), strict=True))
    if len(clip_ids) > MAX_CLIPS:
        raise UserError(f"at most {MAX_CLIPS} clips are encoded again, got {len(clip_ids)}")
    for clip_id in clip_ids:
        if clip_id not in kinds:
            raise UserError(unknown_name("clip", clip_id, sorted(kinds)[:2000])[:600])
    by_kind: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for clip_id, kind in kinds.items():
        if clip_id in clip_ids:
            by_kind[kind].append(clip_id)
    return {kind: ids for kind, ids in by_kind.items() if ids}


@contextmanager
def engine_without_encoders(device: str | None) -> Iterator[Engine]:
    """A device and one decode process; encoders are loaded one at a time, by `load_as_stored`."""
    from pipeline.worker.engine import Engine  # torch and the models

    with closing(Engine(EngineSettings(encoders=(), device=device or "auto", decode_processes=1))) as engine:
        yield engine


def load_as_stored(
    objects: Objects, key: str, identity: FeatureIdentity, weights: Mapping[str, str], device: str
) -> TokenEncoder:
    """The encoder that made a store's tokens; `UserError` if what is loaded has another identity.

    By default the weights are those of the newest run that wrote to the group, else those that the group itself names.
    """
    import torch

    from pipeline.worker.encode import TokenEncoder

    if maker := maker_of(objects, identity.group_name):
        given = maker.run["config"]["weights"]
        made_with, threads = given.get(identity.encoder, given.get("", "hub")), maker.threads
    else:
        kind = next(kind for kind in KINDS if identity.group_name in objects.list_names(kind))
        label = read_group(objects, kind, identity.group_name).weights
        made_with, threads = ("hub" if label == "pretrained" else label), None
    if threads and device == "cpu":
        torch.set_num_threads(threads)  # they decide the last bits of a sum
    spec = weights.get(identity.encoder, weights.get("", made_with))
    settings = EncoderSettings.of_identity(identity, spec)
    sizes = settings.spec.architecture  # untrusted, and a network is allocated before its weights can be compared
    width, layers = sizes["hidden_size"], sizes.get("num_layers", 1)
    if layers * width * (4 * width + 2 * sizes.get("mlp_size", 4 * width)) > MAX_PARAMETERS:
        raise StoreFormatError(f"{key}: {layers} layers of width {width} are more than any encoder has: not built")
    run = TokenEncoder(settings, device)
    differences = run.identity.differences(identity)
    if "weights_sha256" in differences:
        here, stored = (digest[:12] for digest in differences["weights_sha256"])
        raise UserError(
            f"{key}: the weights of {spec} have sha256 {here}, the store's tokens were made with {stored}: they are "
            f"other weights, so nothing is compared; name the right ones with --weights {key.split('@')[0]}=SPEC"
        )
    if differences:
        fields = "; ".join(f"{name} is {a!r} here, {b!r} in the store" for name, (a, b) in differences.items())
        raise UserError(f"{key}: this version builds another encoder than the identity names: {fields}")
    return run


def encode_as_group(
    objects: Objects, kind: str, identity: FeatureIdentity, weights: Mapping[str, str], device: str | None
) -> ReferenceClips:
    """A group's reference clips as this machine encodes them, for `repair`."""
    with engine_without_encoders(device) as engine:
        run = load_as_stored(objects, identity.encoder, identity, weights, engine.device)
        batch = read_group(objects, kind, identity.group_name).batch_shape
        return encode_reference_clips(run, kind, batch, decode_reference_clips(engine, [run], kind))


def _check_reference_clips(
    store: FeatureStore, objects: Objects, engine: Engine, run: TokenEncoder, key: str, kind: str
) -> ParityRow:
    stored = read_reference_clips(objects, kind, run.identity)
    names = {clip.name for clip in stored.clips}
    if stored.rendering != RENDERING or not names <= set(CLIPS[kind]):
        raise UserError(
            f"{key}: its reference clips are {stored.rendering[:40]!r}, this version has {RENDERING!r}; "
            "check it with a newer merv-pipeline"
        )
    decoded = decode_reference_clips(engine, [run], kind)
    for clip in stored.clips:
        if clip.media_sha256 != decoded[clip.name].media_sha256:
            raise StoreFormatError(f"{key}: the reference clip {clip.name} is another file here: nothing is compared")
    batch = read_group(objects, kind, run.identity.group_name).batch_shape
    made = encode_reference_clips(run, kind, batch, decoded)
    frames = {clip.name: clip.frames_sha256 for clip in made.clips}
    same = all(frames[clip.name] == clip.frames_sha256 for clip in stored.clips if clip.name in frames)
    pairs = [
        (arrays, made.stored(clip.name)) for clip in stored.clips if (arrays := stored.stored(clip.name)) is not None
    ]
    sha256 = store.canaries[f"{kind}/{run.identity.group_name}"]
    return replace(compare(key, kind, run.identity, pairs), canaries=sha256, frames="equal" if same else "differ")


def _check_clips(
    place: Place, engine: Engine, run: TokenEncoder, key: str, kind: str, clip_ids: Sequence[str], *, root: str | None
) -> ParityRow:
    """Encode clips of a store again, a batch of the group's shape at a time, and compare."""
    cells, name = StoreCells(place), f"{kind}/{run.identity.group_name}"
    if name not in cells.groups():
        raise ClipUnavailableError(f"{key} has no tokens of {kind} clips in this store; leave them out of the list")
    group = cells.groups()[name]
    specs = array_specs(run.identity, kind, blocks=0, block_rows=1, codec=group.codec)
    clips = {clip.clip_id: clip for clip in cells.clips()}
    roots = media_roots(driver_runs(open_objects(place)), root)
    pairs = []
    for start in range(0, len(clip_ids), group.batch_shape):
        part = clip_ids[start : start + group.batch_shape]
        for clip_id in part:
            cell = cells.cells(name).get(clip_id)
            if cell is None or not cell.is_ok:
                raise ClipUnavailableError(f"{clip_id} has no committed tokens of {key}: leave it out of the list")
        loaded = [cells.load(name, clip_id, specs) for clip_id in part]
        media = {clip_id: cell.outcome.media_sha256 for clip_id, cell in zip(part, loaded, strict=True)}
        made = encode_clips(engine, run, group.batch_shape, [clips[clip_id] for clip_id in part], roots, media)
        for cell, arrays in zip(loaded, made, strict=True):
            try:
                here = to_stored(arrays, run.identity.storage_dtype)
            except OverflowedTokens:
                here = None
            pairs.append((decoded_cell(cell, specs), here))
    return compare(key, kind, run.identity, pairs)


def encode_clips(
    engine: Engine,
    run: TokenEncoder,
    batch: int,
    clips: Sequence[Clip],
    roots: Mapping[str, Root],
    media: Mapping[str, str | None],
) -> list[dict[str, np.ndarray]]:
    """float32 arrays of at most `batch` clips, as this machine makes them.

    `media` is clip id -> sha256 of the file that its tokens were made from; any other file is a `UserError`.
    """
    from pipeline.worker.encode import encode_batch
    from pipeline.worker.engine import decode_job

    futures = []
    for clip in clips:
        if (root := roots.get(clip.dataset, roots.get(""))) is None:
            raise UserError(f"no run records where the media of {clip.dataset} are: give --root DIR")
        futures.append(engine.pool.submit(decode_job(root, clip, [run], accept_damaged=True)))
    frames = {}
    for slot, (clip, future) in enumerate(zip(clips, futures, strict=True)):
        decoded = future.result()
        if decoded.media_sha256 != media[clip.clip_id]:
            raise UserError(f"the media of {clip.clip_id} are not those that its tokens were made from: give others")
        frames[slot] = decoded.frames[run.view]
    arrays, _ = encode_batch(run, frames, range(batch))
    return [{name: items[slot] for name, items in arrays.items()} for slot in frames]


def compare(key: str, kind: str, identity: FeatureIdentity, pairs: Iterable[tuple[Arrays, Arrays | None]]) -> ParityRow:
    """Compare pairs of (stored, made here) items; made is None where it overflows the storage dtype.

    Figures are None where a clip has none: it overflows here, or a crafted store holds values that are not finite.
    """
    pairs, is_equal, figures = list(pairs), True, []
    for stored, made in pairs:
        is_equal = is_equal and made is not None and all(np.array_equal(stored[name], made[name]) for name in stored)
        if made is not None:
            figures.append(_differences(identity, stored, made))
    tolerance = TOLERANCES[identity.compute_dtype] + storage_dtype(identity.storage_dtype).step
    cosine_tolerance = 1 - (WORST_TOKEN * tolerance) ** 2 / 2  # the cosine of two vectors that differ by so much
    max_abs = relative = cosine = None
    is_within = False
    if pairs and len(figures) == len(pairs) and np.isfinite(figures).all():
        differences, errors, cosines = zip(*figures, strict=True)
        max_abs, relative, cosine = max(differences), max(errors), min(cosines)
        is_within = relative <= tolerance and cosine >= cosine_tolerance
    return ParityRow(
        encoder=key,
        identity=identity.id,
        kind=kind,
        canaries="",
        clips=len(pairs),
        frames="not compared",
        max_abs=max_abs,
        relative=relative,
        cosine_min=cosine,
        tolerance=tolerance,
        cosine_tolerance=cosine_tolerance,
        verdict="equal" if is_equal else "within" if is_within else "outside",
    )


def _differences(identity: FeatureIdentity, stored: Arrays, made: Arrays) -> tuple[float, float, float]:
    """(largest difference, relative error, smallest cosine of a token) of one clip; NaN where values are not finite."""
    largest, squares, total, cosine = 0.0, 0.0, 0.0, 1.0
    stored, made = (from_stored(arrays, identity.storage_dtype) for arrays in (stored, made))
    for name in stored:  # in float64, where differences of float16 numbers are exact
        a, b = stored[name].astype(np.float64), made[name].astype(np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return math.nan, math.nan, math.nan
        largest = max(largest, float(np.abs(a - b).max()))
        squares, total = squares + float(((a - b) ** 2).sum()), total + float((a**2).sum())
        norms = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
        cosines = np.where(norms > 0, (a * b).sum(-1) / np.where(norms > 0, norms, 1), (norms == 0) & (a == b).all(-1))
        cosine = min(cosine, float(cosines.min()))
    relative = (squares / total) ** 0.5 if total > 0 else (0.0 if squares == 0 else 1.0)
    return largest, relative, min(cosine, 1.0)
