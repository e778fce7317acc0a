"""Distortion of tokens: what each storage dtype takes, how fast it is read and what it loses, on a store's own tokens.

Comes in: a store. A seeded sample of its clips is read as float32 and written, in each dtype in turn, by the store's
own writer into a temporary store on this machine, with the codec of the real one. Goes out: a `TokenRecord`. The
reference is what the store holds, not what the encoders once computed: without the media nothing better is known, and
the record says so. With the media, `distortion_again.py` gives the encoders' own float32. One encoder and dtype is on
disk at a time.

The encoders' own float32 tokens, computed again from the media: the reference that dtypes are measured against.

Encoders are built from their identity and must have it, and media must be those that the tokens were made from, both by
digest. What was computed lies in a scratch folder until its encoder is done: 15 MB a clip of MERV's four.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from featurestore.clips import KINDS, Clip
from featurestore.layout import block_of
from featurestore.locate import Place
from featurestore.objects.open import open_objects
from featurestore.quality import TokenRecord, TokenRow, now
from featurestore.records import driver_runs
from featurestore.storage_dtypes import STORAGE_DTYPES
from featurestore.store import FeatureStore
from featurestore.writer import GroupWriter, StoreWriter
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import UserError
from pipeline.parity import encode_clips, engine_without_encoders, load_as_stored
from pipeline.summary import media_roots

if TYPE_CHECKING:
    from pipeline.worker.engine import EncoderRun, Engine

READ_BATCH = 8  # clips in memory at once
REPEATS = 3  # of every timing, of which the fastest counts: others share the machine
_CLIP_FIELDS = ("dataset", "path", "kind", "start_s", "end_s", "end_frame")


Floats = Callable[[Clip], dict[str, np.ndarray]]  # the arrays that an encoder hands over; a still's steps once


@dataclass(frozen=True, kw_only=True)
class MeasuredClips:
    """The drawn clips of one encoder and kind, and what their tokens should be."""

    group: GroupWriter  # of the store
    encoder: str  # key
    clips: tuple[Clip, ...]
    rows: tuple[int, ...]  # where each lies
    floats: Floats  # the reference


Again = Callable[[MeasuredClips, Path], Floats]  # makes the tokens of the clips again, into a folder


def measure_distortion(
    place: Place,
    *,
    sample: int = 64,
    seed: int = 0,
    scratch: Path | None = None,
    again: Again | None = None,
    progress: ProgressLine = SILENT,
) -> TokenRecord:
    """Measure every storage dtype on at most `sample` clips of each encoder and kind, chosen by `seed`.

    `again` makes the reference anew from the media; without it, the reference is what the store holds.
    """
    store = FeatureStore.open(place)
    drawn = list(_drawn_clips(store, StoreWriter.open(place), sample, seed))
    if not drawn:
        raise UserError(f"{place} holds no committed tokens yet: nothing can be measured; run the extraction first")
    progress.start(len(drawn) * len(STORAGE_DTYPES))
    rows = []
    temporary = partial(tempfile.TemporaryDirectory, prefix="merv-distortion-", dir=scratch)
    for each in drawn:
        with temporary() as made:
            known = each if again is None else replace(each, floats=again(each, Path(made)))
            for dtype in STORAGE_DTYPES:
                with temporary() as folder:
                    rows.append(_measure(known, dtype, Path(folder)))
                progress.advance()
    return TokenRecord(
        time=now(),
        snapshot=store.snapshot,
        reference="store" if again is None else "encoders",
        sample=sample,
        seed=seed,
        rows=tuple(rows),
    )


def _drawn_clips(store: FeatureStore, origin: StoreWriter, size: int, seed: int) -> Iterator[MeasuredClips]:
    """At most `size` clips of each encoder and kind."""
    for encoder, identity in store.encoders.items():
        committed = store.clips.filter(store.clips[encoder])
        for kind in KINDS:
            records = committed.filter(pc.equal(committed["kind"], kind)).select(_CLIP_FIELDS).to_pylist()
            clips = sorted((Clip(**record) for record in records), key=lambda clip: _draw(seed, clip))[:size]
            if clips:
                group = origin.open_group(kind, identity.group_name)
                rows = store.rows([clip.clip_id for clip in clips], encoder=encoder).tolist()
                floats = _stored_floats(store, encoder, group)
                yield MeasuredClips(group=group, encoder=encoder, clips=tuple(clips), rows=tuple(rows), floats=floats)


def _stored_floats(store: FeatureStore, encoder: str, group: GroupWriter) -> Floats:
    """What the store holds, as float32."""
    asked = {"encoder": encoder, "frames": slice(0, group.identity.grid_of(group.kind)[0])}

    def floats(clip: Clip) -> dict[str, np.ndarray]:
        arrays = {"tokens": store.read([clip.clip_id], **asked)[0]}
        if group.identity.prefix_tokens:
            arrays["prefix"] = store.read_prefix([clip.clip_id], **asked)[0]
        return {name: array.astype(np.float32) for name, array in arrays.items()}

    return floats


def _draw(seed: int, clip: Clip) -> str:
    """Where a clip stands in the lot: the same in every store that has it."""
    return hashlib.sha256(f"{seed} {clip.clip_id}".encode()).hexdigest()


def _measure(measured: MeasuredClips, dtype: str, folder: Path) -> TokenRow:
    stored_bytes, kept = _write(measured, dtype, folder)
    own = measured.group.identity
    row = TokenRow(
        encoder=measured.encoder,
        identity=own.id,
        weights=measured.group.weights_label,
        kind=measured.group.kind,
        dtype=dtype,
        is_stored=dtype == own.storage_dtype,
        clips=len(kept),
        refused=len(measured.clips) - len(kept),
        **dict.fromkeys(("bytes_per_clip", "clips_s", "mb_s", "of_raw", "max_abs", "relative_rms", "cosine_min")),
    )
    if not kept:
        return row
    made = FeatureStore.open(folder)
    seconds = _fastest(lambda: _read_all(made, own.encoder, kept))
    raw_seconds = _fastest(lambda: _read_raw(folder / measured.group.kind))
    return replace(
        row,
        bytes_per_clip=stored_bytes / len(kept),
        clips_s=len(kept) / seconds,
        mb_s=stored_bytes / 1e6 / seconds,
        of_raw=raw_seconds / seconds,
        **_errors(measured, made, kept),
    )


def _write(measured: MeasuredClips, dtype: str, folder: Path) -> tuple[int, tuple[Clip, ...]]:
    """Write a store of the clips in that dtype; returns the bytes of its shards, and the clips that fit the dtype."""
    origin, kind = measured.group, measured.group.kind
    writer = StoreWriter.open_or_create(folder, block_rows={kind: min(origin.block_rows, len(measured.clips))})
    clip_of = dict(writer.add_clips(measured.clips))
    group = writer.ensure_group(
        kind,
        replace(origin.identity, storage_dtype=dtype),
        batch_shape=origin.batch_shape,
        weights_label=origin.weights_label,
        codec=origin.specs["tokens"].codec,
    )
    stored_bytes, kept = 0, []
    for block in group.missing_blocks():
        task = group.begin(block)
        for row in sorted(task.planned):
            task.add(row, measured.floats(clip_of[row]), media_sha256=None, decoder=None)
        receipt = task.commit()
        stored_bytes += receipt.stored_bytes
        outcomes = enumerate(receipt.rows, start=receipt.first_row())
        kept += [clip_of[row] for row, outcome in outcomes if outcome.state == "ok"]
    writer.publish_snapshot()
    return stored_bytes, tuple(kept)


def _fastest(call: Callable[[], None]) -> float:
    """Seconds of the fastest of some calls; the first also brings the files into the page cache."""
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return max(min(seconds), 1e-9)


def _read_all(store: FeatureStore, encoder: str, clips: Sequence[Clip]) -> None:
    """As a loader reads: batches, into the same memory again."""
    ids, out = [clip.clip_id for clip in clips], None
    for start in range(0, len(ids), READ_BATCH):
        batch = ids[start : start + READ_BATCH]
        out = store.read(batch, encoder=encoder, out=None if out is None else out[: len(batch)])


def _read_raw(folder: Path) -> None:
    """The bytes of every shard below a folder, whole, into memory that is used again."""
    files = sorted(file for file in folder.glob("*/*/c/**/*") if file.is_file())
    buffer = memoryview(bytearray(max(file.stat().st_size for file in files)))
    for file in files:
        with open(file, "rb", buffering=0) as source:
            while source.readinto(buffer):
                pass


def _errors(measured: MeasuredClips, made: FeatureStore, clips: Sequence[Clip]) -> dict[str, float]:
    """Differences of the tokens from the reference, in float64; prefix tokens are stored but not compared."""
    largest, squares, total, cosine = 0.0, 0.0, 0.0, 1.0
    identity = measured.group.identity
    encoder, steps = identity.encoder, slice(0, identity.grid_of(measured.group.kind)[0])
    for clip in clips:
        wanted_THWD = measured.floats(clip)["tokens"].astype(np.float64)
        found_THWD = made.read([clip.clip_id], encoder=encoder, frames=steps)[0].astype(np.float64)
        difference = found_THWD - wanted_THWD
        largest = max(largest, float(np.abs(difference).max()))
        squares += float(np.square(difference).sum())
        total += float(np.square(wanted_THWD).sum())
        cosine = min(cosine, _smallest_cosine(wanted_THWD, found_THWD))
    return {
        "max_abs": largest,
        "relative_rms": float(np.sqrt(squares / total)) if total else 0.0,
        "cosine_min": cosine,
    }


def _smallest_cosine(wanted_THWD: np.ndarray, found_THWD: np.ndarray) -> float:
    """Over tokens; a token of zeros has no direction and is left out."""
    # The root of a square is exact, so that equal tokens have a cosine of 1.
    norms = np.sqrt(np.square(wanted_THWD).sum(axis=-1) * np.square(found_THWD).sum(axis=-1))
    products = (wanted_THWD * found_THWD).sum(axis=-1)
    cosines = products[norms > 0] / norms[norms > 0]
    return float(min(1.0, cosines.min(initial=1.0)))


@contextmanager
def encoded_again(
    place: Place, *, root: str | None = None, weights: Mapping[str, str] | None = None, device: str | None = None
) -> Iterator[Again]:
    """Encodes clips of a store again on this machine; its decode process lives until the context is left."""
    objects = open_objects(place)
    roots = media_roots(driver_runs(objects), root)
    loaded: dict[str, EncoderRun] = {}  # one encoder at a time
    with engine_without_encoders(device) as engine:

        def again(measured: MeasuredClips, folder: Path) -> Floats:
            key = measured.encoder
            if key not in loaded:
                loaded.clear()  # before the next one is loaded
                loaded[key] = load_as_stored(objects, key, measured.group.identity, weights or {}, engine.device)
            return _encode(engine, loaded[key], measured, roots, folder)

        yield again


def _encode(engine: Engine, run: EncoderRun, measured: MeasuredClips, roots: Mapping[str, str], folder: Path) -> Floats:
    """In the batch shape of the clips' group, into files of the folder."""
    media, batch = _media(measured), measured.group.batch_shape
    for start in range(0, len(measured.clips), batch):
        made = encode_clips(engine, run, batch, measured.clips[start : start + batch], roots, media)
        for number, arrays in enumerate(made, start=start):
            np.savez(folder / f"{number}.npz", **arrays)
    numbers = {clip.clip_id: number for number, clip in enumerate(measured.clips)}

    def floats(clip: Clip) -> dict[str, np.ndarray]:
        with np.load(folder / f"{numbers[clip.clip_id]}.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    return floats


def _media(measured: MeasuredClips) -> dict[str, str | None]:
    """Clip id -> sha256 of the media that its committed tokens were made from."""
    group, found = measured.group, {}
    for clip, row in zip(measured.clips, measured.rows, strict=True):
        found[clip.clip_id] = group.receipt(block_of(row, group.block_rows)).outcome(row).media_sha256
    return found
