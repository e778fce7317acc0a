"""Parity: do the encoders of this machine make the tokens that a store holds?

Comes in: a store, and where the weights are. Goes out: a `ParityRecord`, a row per encoder and kind. Each encoder is
built from its identity and must have it, so other weights are refused by their digest; then the canaries (or clips of
the store, with their media) go through decoding, resizing and the encoder in the group's own batch shape, are stored as
extraction stores them, and are compared with what is there. Digests of the frames tell a drift of decoding or resizing
from one of the encoder.

Parity on a store's own clips: their media are decoded and encoded again and compared with the committed tokens.

Canaries need no media and nobody's permission; this is for who wants to see real clips. Media other than those that the
tokens were made from are refused by their digest, before anything is compared.

How far two machines' tokens of the same clips are apart, and how far they may be.

Tolerances bound a clip's relative error: the root of its summed squared differences over that of its summed squared
stored values. On the machine that made them, and on one like it (same device, batch shape, threads), tokens are equal
to the bit. Elsewhere an encoder's sums round in another order, and the result may fall into the next stored number;
`TOLERANCES` allows for the first by compute dtype, the storage dtype's step for the second. The worst single token may
be `WORST_TOKEN` times as far off as the clip, which its cosine tells. benchmarks/README.md holds what was measured.
"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featurestore.clips import KINDS, Clip
from featurestore.identity import FeatureIdentity
from featurestore.locate import Place
from featurestore.objects.base import Objects
from featurestore.objects.open import open_objects
from featurestore.quality import ParityRecord, ParityRow, now
from featurestore.records import driver_runs, maker_of
from featurestore.reference_clips import ReferenceClips, read_reference_clips
from featurestore.storage_dtypes import OverflowedTokens, from_stored, storage_dtype, to_stored
from featurestore.store import FeatureStore
from featurestore.transfer.merge import LoadedCell, StoreCells, decoded_cell
from featurestore.transfer.selection import read_clip_list
from featurestore.zarr_metadata import array_specs, read_group
from mervcache.errors import ClipUnavailableError, StoreFormatError, UserError, unknown_name
from pipeline.config import EncoderSettings, EngineSettings
from pipeline.reference_clips import CLIPS, RENDERING, decode_reference_clips, encode_reference_clips
from pipeline.summary import media_roots, software_versions

if TYPE_CHECKING:
    from pipeline.decode.sampling import Decoded
    from pipeline.worker.engine import Engine, TokenEncoder

log = logging.getLogger(__name__)

TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
WORST_TOKEN = 4
Stored = Mapping[str, np.ndarray]  # a clip's stored items by array


def compare(key: str, kind: str, identity: FeatureIdentity, pairs: Iterable[tuple[Stored, Stored | None]]) -> ParityRow:
    """Stored items of clips beside those that were made here (None: they overflow the storage dtype here).

    Figures are None where a clip has none: it overflows here, or a crafted store holds what is no number.
    """
    pairs = list(pairs)
    equal, figures = True, []
    for theirs, mine in pairs:
        equal = equal and mine is not None and all(np.array_equal(theirs[name], mine[name]) for name in theirs)
        if mine is not None:
            figures.append(_differences(identity, theirs, mine))
    whole = len(figures) == len(pairs) and bool(pairs) and bool(np.isfinite(figures).all())
    max_abs, relative, cosine = (
        (max(f[0] for f in figures), max(f[1] for f in figures), min(f[2] for f in figures))
        if whole
        else (None, None, None)
    )
    tolerance = TOLERANCES[identity.compute_dtype] + storage_dtype(identity.storage_dtype).step
    cosine_tolerance = 1 - (WORST_TOKEN * tolerance) ** 2 / 2  # the cosine of two vectors that differ by so much
    is_within = whole and relative <= tolerance and cosine >= cosine_tolerance
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
        verdict="equal" if equal else "within" if is_within else "outside",
    )


def _differences(identity: FeatureIdentity, theirs: Stored, mine: Stored) -> tuple[float, float, float]:
    """(largest difference, relative error, smallest cosine of a token) of one clip; NaN where its values are none."""
    largest, squares, total, cosine = 0.0, 0.0, 0.0, 1.0
    stored, made = (from_stored(arrays, identity.storage_dtype) for arrays in (theirs, mine))
    for name in stored:  # in float64, where differences of float16 numbers are exact
        a, b = stored[name].astype(np.float64), made[name].astype(np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return (math.nan,) * 3
        largest = max(largest, float(np.abs(a - b).max()))
        squares, total = squares + float(((a - b) ** 2).sum()), total + float((a**2).sum())
        norms = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
        cosines = np.where(norms > 0, (a * b).sum(-1) / np.where(norms > 0, norms, 1), (norms == 0) & (a == b).all(-1))
        cosine = min(cosine, float(cosines.min()))
    relative = (squares / total) ** 0.5 if total > 0 else (0.0 if squares == 0 else 1.0)
    return largest, relative, min(cosine, 1.0)


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
    place: Place, engine: Engine, run: TokenEncoder, key: str, kind: str, clip_ids: Sequence[str], *, root: str | None
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
    run: TokenEncoder,
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


def _stored(arrays: Mapping[str, np.ndarray], run: TokenEncoder) -> dict[str, np.ndarray] | None:
    """As extraction stores them; None where the tokens overflow here."""
    try:
        return to_stored(arrays, run.identity.storage_dtype)
    except OverflowedTokens:
        return None


MAX_PARAMETERS = 1 << 34  # that a stranger's identity may make us build


def check_parity(
    place: Place,
    *,
    encoders: Sequence[str] | None = None,
    weights: Mapping[str, str] | None = None,
    device: str | None = None,
    clips: str | Path | None = None,
    root: str | None = None,
) -> ParityRecord:
    """Encode again and compare; `clips`, a file of clip ids of the store, takes the place of the canaries.

    `weights` is encoder -> SPEC, "" for all the others; by default what the store was made with.
    """
    store = FeatureStore.open(place)
    chosen = _chosen(store, encoders)
    listed = clips_by_kind(store, read_clip_list(clips)) if clips else None
    if listed is None:
        _refuse_without_reference_clips(place, store, chosen)
    with engine_without_encoders(device) as engine:
        check = _Check(place=place, store=store, engine=engine, weights=weights or {}, listed=listed, root=root)
        rows = [row for key, identity in chosen.items() for row in check.rows(key, identity)]
        device_name = _device_name(engine.device)
    return ParityRecord(
        time=now(),
        snapshot=store.snapshot,
        device=device_name,
        machine=platform.machine(),
        versions=software_versions(),
        rows=tuple(rows),
    )


def made_again(
    objects: Objects, kind: str, identity: FeatureIdentity, weights: Mapping[str, str], device: str | None
) -> ReferenceClips:
    """A group's canaries as this machine makes them."""
    with engine_without_encoders(device) as engine:
        run = load_as_stored(objects, identity.encoder, identity, weights, engine.device)
        return _own_reference_clips(objects, kind, run, decode_reference_clips(engine, [run], kind))


@contextmanager
def engine_without_encoders(device: str | None) -> Iterator[Engine]:
    """A device and one decode process; encoders are loaded one at a time, by `load_as_stored`."""
    from pipeline.worker.engine import Engine  # torch and the models

    with closing(Engine(EngineSettings(encoders=(), device=device or "auto", decode_processes=1))) as engine:
        yield engine


@dataclass(frozen=True, kw_only=True)
class _Check:
    """What all encoders of one check have in common."""

    place: Place
    store: FeatureStore
    engine: Engine
    weights: Mapping[str, str]  # encoder -> SPEC, "" for all the others
    listed: Mapping[str, Sequence[str]] | None  # kind -> clips of the store; None: the canaries
    root: str | None  # of the clips' media, where it is not what the journal says

    def rows(self, key: str, identity: FeatureIdentity) -> list[ParityRow]:
        """Load one encoder and check it; a row for each kind of which there is anything to compare."""
        kinds = _kinds_with_reference_clips(self.store, identity) if self.listed is None else list(self.listed)
        if not kinds:
            log.info("%s: no reference clips, not checked", key)
            return []
        log.info("%s: loading", key)
        run = load_as_stored(open_objects(self.place), key, identity, self.weights, self.engine.device)
        check = self._of_reference_clips if self.listed is None else self._of_clips
        return [row for kind in kinds if (row := check(run, key, kind)).clips]

    def _of_clips(self, run: TokenEncoder, key: str, kind: str) -> ParityRow:
        return check_clips(self.place, self.engine, run, key, kind, self.listed[kind], root=self.root)

    def _of_reference_clips(self, run: TokenEncoder, key: str, kind: str) -> ParityRow:
        objects = open_objects(self.place)
        theirs = read_reference_clips(objects, kind, run.identity)
        _refuse_other_pictures(theirs, key)
        decoded = decode_reference_clips(self.engine, [run], kind)
        _refuse_other_media(theirs, decoded, key)
        mine = _own_reference_clips(objects, kind, run, decoded)
        here = {clip.name: clip for clip in mine.clips}
        same = all(here[c.name].frames_sha256 == c.frames_sha256 for c in theirs.clips if c.name in here)
        row = compare(key, kind, run.identity, [(theirs.stored(c.name), mine.stored(c.name)) for c in theirs.clips])
        sha256 = self.store.canaries[f"{kind}/{run.identity.group_name}"]
        return replace(row, canaries=sha256, frames="equal" if same else "differ")


def _own_reference_clips(
    objects: Objects, kind: str, run: TokenEncoder, decoded: Mapping[str, Decoded]
) -> ReferenceClips:
    """In the batch shape of the encoder's group."""
    return encode_reference_clips(run, kind, read_group(objects, kind, run.identity.group_name).batch_shape, decoded)


def _chosen(store: FeatureStore, encoders: Sequence[str] | None) -> dict[str, FeatureIdentity]:
    """Identities by key; a bare name means every identity of it."""
    for name in encoders or ():
        if not any(name in (key, key.split("@")[0]) for key in store.encoders):
            raise UserError(unknown_name("encoder", name, store.encoders))
    return {
        key: identity
        for key, identity in store.encoders.items()
        if encoders is None or key in encoders or key.split("@")[0] in encoders
    }


def _kinds_with_reference_clips(store: FeatureStore, identity: FeatureIdentity) -> list[str]:
    return [kind for kind in KINDS if f"{kind}/{identity.group_name}" in store.canaries]


def load_as_stored(
    objects: Objects, key: str, identity: FeatureIdentity, weights: Mapping[str, str], device: str
) -> TokenEncoder:
    """The encoder that made a store's tokens; refused if what is loaded has another identity."""
    import torch

    from pipeline.worker.engine import TokenEncoder

    made_with, threads = _made_with(objects, identity)
    own_weights = weights.get(identity.encoder, weights.get("", made_with))
    if threads and device == "cpu":
        torch.set_num_threads(threads)  # they decide the last bits of a sum
    settings = EncoderSettings.of_identity(identity, own_weights)
    _check_parameter_count(settings, key)
    run = TokenEncoder(settings, device)
    if odd := run.identity.differences(identity):
        _refuse(key, own_weights, odd)
    return run


def _made_with(objects: Objects, identity: FeatureIdentity) -> tuple[str, int | None]:
    """(weights SPEC, threads) of the newest run that wrote to the group, else what the group itself says."""
    if maker := maker_of(objects, identity.group_name):
        given = maker.run["config"]["weights"]
        return given.get(maker.encoder, given.get("", "hub")), maker.threads
    kind = next(kind for kind in KINDS if identity.group_name in objects.list_names(kind))
    label = read_group(objects, kind, identity.group_name).weights
    return ("hub" if label == "pretrained" else label), None


def _check_parameter_count(settings: EncoderSettings, key: str) -> None:
    """An identity may be a stranger's, and a network is allocated before its weights can be compared."""
    sizes = settings.spec.architecture
    width, layers = sizes["hidden_size"], sizes["num_layers"]
    if layers * width * (4 * width + 2 * sizes["mlp_size"]) > MAX_PARAMETERS:
        raise StoreFormatError(f"{key}: {layers} layers of width {width} are more than any encoder has: not built")


def _refuse(key: str, weights: str, odd: Mapping[str, tuple]) -> None:
    if "weights_sha256" in odd:
        ours, theirs = (digest[:12] for digest in odd["weights_sha256"])
        raise UserError(
            f"{key}: the weights of {weights} have sha256 {ours}, the store's tokens were made with {theirs}: they are "
            f"other weights, so nothing is compared; name the right ones with --weights {key.split('@')[0]}=SPEC"
        )
    fields = "; ".join(f"{name} is {ours!r} here, {theirs!r} in the store" for name, (ours, theirs) in odd.items())
    raise UserError(f"{key}: this version builds another encoder than the identity says: {fields}")


def _refuse_without_reference_clips(place: Place, store: FeatureStore, chosen: Mapping[str, FeatureIdentity]) -> None:
    if not any(_kinds_with_reference_clips(store, identity) for identity in chosen.values()):
        raise UserError(
            f"{place} has no canaries of {', '.join(chosen) or 'any encoder'}: run its `merv-pipeline extract` again, "
            "which adds them where it made the tokens; or name clips of the store with --clips, and their --root"
        )


def _refuse_other_media(canaries: ReferenceClips, decoded: Mapping[str, Decoded], key: str) -> None:
    for clip in canaries.clips:
        if clip.media_sha256 != decoded[clip.name].media_sha256:
            raise StoreFormatError(
                f"{key}: the canary {clip.name} is rendered to other bytes here: nothing is compared"
            )


def _refuse_other_pictures(canaries: ReferenceClips, key: str) -> None:
    names = {clip.name for clip in canaries.clips}
    if canaries.rendering != RENDERING or not names <= set(CLIPS[canaries.kind]):
        raise UserError(
            f"{key}: its canaries are pictures of {canaries.rendering[:40]!r}, this version renders {RENDERING!r}; "
            "check it with a newer merv-pipeline"
        )


def _device_name(device: str) -> str:
    import torch

    return f"{device} {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else device
