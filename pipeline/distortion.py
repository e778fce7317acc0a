"""What each storage dtype takes, how fast it is read and what it loses, measured on a store's own tokens.

A seeded sample of clips is written in each dtype in turn by the store's own writer, with its codec, into a temporary
store. The reference is what the store holds, or, with the media, the encoders' own float32 (`encoded_again`).
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
from featurestore.group_writer import GroupWriter
from featurestore.layout import block_of
from featurestore.locate import Place
from featurestore.objects.open import open_objects
from featurestore.quality import TokenRecord, TokenRow, now
from featurestore.records import driver_runs
from featurestore.storage_dtypes import STORAGE_DTYPES
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import UserError
from pipeline.parity import encode_clips, engine_without_encoders, load_as_stored
from pipeline.summary import media_roots

if TYPE_CHECKING:
    from pipeline.worker.encode import TokenEncoder

READ_BATCH = 8  # clips in memory at once
REPEATS = 3  # of every timing, of which the fastest counts: other programs share the machine

Floats = Callable[[Clip], dict[str, np.ndarray]]  # a clip's float32 arrays by name; a still's time steps once


@dataclass(frozen=True, kw_only=True)
class MeasuredClips:
    """The sampled clips of one encoder and kind, and what their tokens should be."""

    group: GroupWriter  # of the store
    encoder: str  # key
    clips: tuple[Clip, ...]
    rows: tuple[int, ...]  # of the clips in the store
    floats: Floats  # the reference


Encode = Callable[[MeasuredClips, Path], Floats]  # computes the tokens of the clips again, into files of a folder


def measure_distortion(
    place: Place,
    *,
    sample: int = 64,
    seed: int = 0,
    scratch: Path | None = None,
    again: Encode | None = None,
    progress: ProgressLine = SILENT,
) -> TokenRecord:
    """Measure every storage dtype on at most `sample` clips of each encoder and kind, chosen by `seed`.

    `again`, of `encoded_again`, computes the reference from the media; without it, the reference is what the store
    holds. `scratch` holds one encoder and dtype at a time; reading speed is that of its disk.
    """
    store = FeatureStore.open(place)
    chosen = list(_sampled_clips(store, StoreWriter.open(place), sample, seed))
    if not chosen:
        raise UserError(f"{place} holds no committed tokens yet: nothing can be measured; run the extraction first")
    progress.start(len(chosen) * len(STORAGE_DTYPES))
    rows = []
    temporary = partial(tempfile.TemporaryDirectory, prefix="merv-distortion-", dir=scratch)
    for measured in chosen:
        with temporary() as encoded:
            reference = measured if again is None else replace(measured, floats=again(measured, Path(encoded)))
            for dtype in STORAGE_DTYPES:
                with temporary() as folder:
                    rows.append(_measure(reference, dtype, Path(folder)))
                progress.advance()
    return TokenRecord(
        time=now(),
        snapshot=store.snapshot,
        reference="store" if again is None else "encoders",
        sample=sample,
        seed=seed,
        rows=tuple(rows),
    )


def _sampled_clips(store: FeatureStore, origin: StoreWriter, size: int, seed: int) -> Iterator[MeasuredClips]:
    """At most `size` clips of each encoder and kind, in an order that is the same in every store that has them."""

    def draw(clip: Clip) -> str:
        return hashlib.sha256(f"{seed} {clip.clip_id}".encode()).hexdigest()

    for encoder, identity in store.encoders.items():
        committed = store.clips.filter(store.clips[encoder])
        for kind in KINDS:
            table = committed.filter(pc.equal(committed["kind"], kind))
            records = table.select(("dataset", "path", "kind", "start_s", "end_s", "end_frame")).to_pylist()
            clips = sorted((Clip(**record) for record in records), key=draw)[:size]
            if clips:
                group = origin.open_group(kind, identity.group_name)
                rows = store.rows([clip.clip_id for clip in clips], encoder=encoder).tolist()
                floats = partial(_stored_floats, store, encoder, group)
                yield MeasuredClips(group=group, encoder=encoder, clips=tuple(clips), rows=tuple(rows), floats=floats)


def _stored_floats(store: FeatureStore, encoder: str, group: GroupWriter, clip: Clip) -> dict[str, np.ndarray]:
    """What the store holds of a clip, as float32."""
    wanted = {"encoder": encoder, "frames": slice(0, group.identity.grid_of(group.kind)[0])}
    arrays = {"tokens": store.read([clip.clip_id], **wanted)[0]}
    if group.identity.prefix_tokens:
        arrays["prefix"] = store.read_prefix([clip.clip_id], **wanted)[0]
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _measure(measured: MeasuredClips, dtype: str, folder: Path) -> TokenRow:
    stored_bytes, clips = _write(measured, dtype, folder)
    identity = measured.group.identity
    row = TokenRow(
        encoder=measured.encoder,
        identity=identity.id,
        weights=measured.group.weights_label,
        kind=measured.group.kind,
        dtype=dtype,
        is_stored=dtype == identity.storage_dtype,
        clips=len(clips),
        refused=len(measured.clips) - len(clips),
        **dict.fromkeys(("bytes_per_clip", "clips_s", "mb_s", "of_raw", "max_abs", "relative_rms", "cosine_min")),
    )
    if not clips:
        return row
    made, ids = FeatureStore.open(folder), [clip.clip_id for clip in clips]
    files = sorted(file for file in (folder / measured.group.kind).glob("*/*/c/**/*") if file.is_file())
    buffer = memoryview(bytearray(max(file.stat().st_size for file in files)))

    def read_tokens() -> None:  # as a loader reads: batches, into the same memory again
        out = None
        for start in range(0, len(ids), READ_BATCH):
            batch = ids[start : start + READ_BATCH]
            out = made.read(batch, encoder=identity.encoder, out=None if out is None else out[: len(batch)])

    def read_raw() -> None:  # the bytes of every shard
        for file in files:
            with open(file, "rb", buffering=0) as source:
                while source.readinto(buffer):
                    pass

    seconds, raw_seconds = _fastest(read_tokens), _fastest(read_raw)
    return replace(
        row,
        bytes_per_clip=stored_bytes / len(clips),
        clips_s=len(clips) / seconds,
        mb_s=stored_bytes / 1e6 / seconds,
        of_raw=raw_seconds / seconds,
        **_errors(measured, made, clips),
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
    stored_bytes, clips = 0, []
    for number in group.missing_blocks():
        block = group.begin(number)
        for row in sorted(block.planned):
            block.add(row, measured.floats(clip_of[row]), media_sha256=None, decoder=None)
        receipt = block.commit()
        stored_bytes += receipt.stored_bytes
        outcomes = enumerate(receipt.rows, start=receipt.first_row())
        clips += [clip_of[row] for row, outcome in outcomes if outcome.state == "ok"]
    writer.publish_snapshot()
    return stored_bytes, tuple(clips)


def _fastest(call: Callable[[], None]) -> float:
    """Seconds of the fastest of some calls; the first also brings the files into the page cache."""
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return max(min(seconds), 1e-9)


def _errors(measured: MeasuredClips, made: FeatureStore, clips: Sequence[Clip]) -> dict[str, float]:
    """Differences of the tokens from the reference, in float64; prefix tokens are stored but not compared."""
    largest, squares, total, cosine = 0.0, 0.0, 0.0, 1.0
    identity = measured.group.identity
    steps = slice(0, identity.grid_of(measured.group.kind)[0])
    for clip in clips:
        wanted_THWD = measured.floats(clip)["tokens"].astype(np.float64)
        made_THWD = made.read([clip.clip_id], encoder=identity.encoder, frames=steps)[0].astype(np.float64)
        difference = made_THWD - wanted_THWD
        largest = max(largest, float(np.abs(difference).max()))
        squares += float(np.square(difference).sum())
        total += float(np.square(wanted_THWD).sum())
        # The root of a square is exact, so equal tokens have a cosine of 1; a token of zeros has no direction.
        norms = np.sqrt(np.square(wanted_THWD).sum(axis=-1) * np.square(made_THWD).sum(axis=-1))
        products = (wanted_THWD * made_THWD).sum(axis=-1)
        cosine = min(cosine, float((products[norms > 0] / norms[norms > 0]).min(initial=1.0)))
    return {
        "max_abs": largest,
        "relative_rms": float(np.sqrt(squares / total)) if total else 0.0,
        "cosine_min": cosine,
    }


@contextmanager
def encoded_again(
    place: Place, *, root: str | None = None, weights: Mapping[str, str] | None = None, device: str | None = None
) -> Iterator[Encode]:
    """Yields a function that encodes clips of a store on this machine, in the batch shape of their group.

    Other weights and other media than those that the tokens were made from are refused by digest. Results are files of
    a scratch folder (15 MB a clip of MERV's four encoders); the decode process lives until the context exits.
    """
    objects = open_objects(place)
    roots = media_roots(driver_runs(objects), root)
    loaded: dict[str, TokenEncoder] = {}  # one encoder at a time
    with engine_without_encoders(device) as engine:

        def encode(measured: MeasuredClips, folder: Path) -> Floats:
            key, group = measured.encoder, measured.group
            if key not in loaded:
                loaded.clear()  # before the next one is loaded
                loaded[key] = load_as_stored(objects, key, group.identity, weights or {}, engine.device)
            media = {
                clip.clip_id: group.receipt(block_of(row, group.block_rows)).outcome(row).media_sha256
                for clip, row in zip(measured.clips, measured.rows, strict=True)
            }
            batch, files = group.batch_shape, {}
            for start in range(0, len(measured.clips), batch):
                clips = measured.clips[start : start + batch]
                encoded = encode_clips(engine, loaded[key], batch, clips, roots, media)
                for number, (clip, arrays) in enumerate(zip(clips, encoded, strict=True), start=start):
                    files[clip.clip_id] = folder / f"{number}.npz"
                    np.savez(files[clip.clip_id], allow_pickle=False, **arrays)

            def floats(clip: Clip) -> dict[str, np.ndarray]:
                with np.load(files[clip.clip_id], allow_pickle=False) as arrays:
                    return dict(arrays)

            return floats

        yield encode
