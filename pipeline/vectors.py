"""One vector per clip and encoder: the mean of its tokens, for search, maps and duplicates; and a Parquet file of them.

The file has a row per clip: clip_id, dataset, kind, and a fixed-size list of float32 per encoder (null: no tokens), so
duckdb, LanceDB, FAISS and FiftyOne read it. Its metadata, under `merv_cache.vectors`, names the snapshot, identities
and pooling.

C clips, D width of an encoder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from featurestore.locate import is_url
from featurestore.pooling import Pool
from featurestore.store import FeatureStore
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import UserError
from mervcache.files import canonical_json
from mervcache.reprs import brief

METADATA = b"merv_cache.vectors"
FORMAT = 1
CLIPS_AT_ONCE = 64  # between two updates of the progress line


@dataclass(frozen=True, kw_only=True)
class ClipVectors:
    """Vectors of one encoder."""

    clip_ids: tuple[str, ...]
    values_CD: NDArray[np.float32]

    def __repr__(self) -> str:
        return brief(self, f"of {len(self.clip_ids)} clips, width {self.values_CD.shape[1]}")

    def normalised(self) -> NDArray[np.float32]:
        """The vectors less their mean, at length one: their dot products are cosines between -1 and 1.

        Without the mean, which all clips share, cosines of pooled features crowd near one.
        """
        centred_CD = self.values_CD - self.values_CD.mean(axis=0)
        lengths_C1 = np.linalg.norm(centred_CD, axis=1, keepdims=True)
        return centred_CD / np.maximum(lengths_C1, np.finfo(np.float32).tiny)


def pool_clips(
    store: FeatureStore,
    encoder: str,
    clip_ids: Sequence[str] | None = None,
    *,
    pooling: Pool = "mean",
    progress: ProgressLine = SILENT,
) -> ClipVectors:
    """One vector per clip of an encoder, float32 [C, D], in the order of the store.

    Parameters
    ----------
    store, encoder
        An open store and a key of it.
    clip_ids
        Clips to choose; those without tokens are left out. None: all.
    pooling
        "mean" or "max" over time, height and width.
    progress
        Counts clips.

    Raises
    ------
    UserError
        Tokens are infinite or NaN.
    """
    chosen = None if clip_ids is None else set(clip_ids)
    table, encoder = store.clips, store.encoder_key(encoder)
    is_stored = table[encoder].to_pylist()
    known = [clip for clip, is_in in zip(table["clip_id"].to_pylist(), is_stored, strict=True) if is_in]
    wanted = known if chosen is None else [clip for clip in known if clip in chosen]
    values_CD = np.empty((len(wanted), store.encoders[encoder].width), np.float32)
    for start in range(0, len(wanted), CLIPS_AT_ONCE):
        batch = wanted[start : start + CLIPS_AT_ONCE]
        values_CD[start : start + len(batch)] = store.read(batch, encoder=encoder, pool=pooling)
        progress.advance(len(batch))
    odd = np.flatnonzero(~np.isfinite(values_CD).all(axis=1))
    if len(odd):
        raise UserError(
            f"{len(odd)} clips of {encoder} hold infinite values or NaN, such as {wanted[odd[0]]}: `merv-pipeline"
            " verify --full` says whether the store is damaged"
        )
    return ClipVectors(clip_ids=tuple(wanted), values_CD=values_CD)


def chosen_encoders(store: FeatureStore, encoders: Sequence[str] | None) -> list[str]:
    """Keys of the encoders named, by default all of the store; UserError for one that it lacks."""
    return list(store.encoders) if encoders is None else [store.encoder_key(name) for name in encoders]


def pool_store(
    store: FeatureStore,
    encoders: Sequence[str] | None = None,
    *,
    pooling: Pool = "mean",
    progress: ProgressLine = SILENT,
) -> pa.Table:
    """A row per clip of the `store` with a vector of each of `encoders` (default: all), in the layout of this module.

    `pooling` is "mean" or "max", `progress` counts clips. UserError for an encoder that the store lacks.
    """
    chosen = chosen_encoders(store, encoders)
    clips = store.clips.select(["clip_id", "dataset", "kind"])
    place_of_clip = {clip: place for place, clip in enumerate(clips["clip_id"].to_pylist())}
    for encoder in chosen:
        vectors = pool_clips(store, encoder, pooling=pooling, progress=progress)
        width = store.encoders[encoder].width
        full_CD = np.zeros((len(place_of_clip), width), np.float32)
        is_missing = np.ones(len(place_of_clip), bool)
        places = [place_of_clip[clip] for clip in vectors.clip_ids]
        full_CD[places], is_missing[places] = vectors.values_CD, False
        flat = pa.array(full_CD.reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(is_missing))
        clips = clips.append_column(encoder, column)
    record = {
        "format": FORMAT,
        "snapshot": store.snapshot,
        "pooling": f"{pooling} over time, height and width, in float32",
        "identities": {encoder: store.encoders[encoder].id for encoder in chosen},
    }
    return clips.replace_schema_metadata({METADATA: canonical_json(record)})


def vectors_path(store: FeatureStore) -> Path:
    """`NAME-vectors.parquet` next to a store, or in the current folder for a store at a URL."""
    path = Path(store.path.rpartition("/")[2]) if is_url(store.path) else Path(store.path)
    return path.with_name(f"{path.name.removesuffix('.zarr')}-vectors.parquet")


def write_vectors(table: pa.Table, path: Path) -> Path:
    """Write the `table` as Parquet to `path`, at once or not at all; returns the path."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        pq.write_table(table, temporary, compression="zstd")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; give another --out") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
