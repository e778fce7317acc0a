"""A store's clips as folders that FiftyOne opens: paths of media, conversations and a vector per encoder.

DIR/video/ and DIR/image/, since a FiftyOne dataset has media of one kind, each with the two files of its type
`FiftyOneDataset`: metadata.json (the fields) and samples.json. They are written in the layout of FiftyOne 1.0, which
later versions migrate when they load it. Media are named by absolute path and not copied.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.clips import KINDS, Sample
from featurestore.store import FeatureStore
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import MervCacheError, UserError
from mervcache.files import atomic_directory
from pipeline.media import LocalFile, Source
from pipeline.properties import root_of
from pipeline.summary import media_roots
from pipeline.vectors import chosen_encoders, pool_clips

VERSION = "1.0.0"  # of FiftyOne, whose layout is written
FIELDS = {  # name -> type of its values; encoders' vectors are added
    "filepath": "StringField",
    "tags": "ListField",
    "clip_id": "StringField",
    "source_dataset": "StringField",
    "start_s": "FloatField",
    "end_s": "FloatField",
    "questions": "ListField",
    "answers": "ListField",
    "_media_type": "StringField",
    "_rand": "FloatField",
}


@dataclass(frozen=True, kw_only=True)
class FiftyOneExport:
    """What was written."""

    folders: Mapping[str, Path]  # kind -> folder that `fiftyone.Dataset.from_dir` opens
    clips: int
    left_out: int  # clips whose media are gone, or are no files of their own, such as members of a tar archive


def write_fiftyone(
    store: FeatureStore,
    out: Path | str,
    encoders: Sequence[str] | None = None,
    *,
    root: str | None = None,
    progress: ProgressLine = SILENT,
) -> FiftyOneExport:
    """Write all clips whose media are files, with the mean tokens of `encoders`, by default all, into a new folder.

    `root` is the folder of the media, by default where the extractions found them; `progress` counts clips. UserError
    if `out` exists, for an encoder that the `store` lacks, or if no clip has its media.
    """
    out, roots = Path(out), media_roots(store.runs(), root)
    chosen = chosen_encoders(store, encoders)
    if out.exists():
        raise UserError(f"{out} exists; give a new folder")
    rows = [(row, path) for row in store.clips.to_pylist() if (path := _file_of(row, roots)) is not None]
    if not rows:
        raise UserError(f"no clip of {store.path} has its media as a file; name their folder with --root DIR")
    ids = [row["clip_id"] for row, _ in rows]
    vectors: dict[str, dict[str, Any]] = {clip_id: {} for clip_id in ids}
    for encoder in chosen:
        found = pool_clips(store, encoder, ids, progress=progress)
        for clip_id, vector_D in zip(found.clip_ids, found.values_CD, strict=True):
            vectors[clip_id][_field_of(encoder)] = _binary(vector_D)
    samples = _samples_by_clip(store.samples())
    entries: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for row, path in rows:
        entries[row["kind"]].append(_entry(row, path, samples.get(row["clip_id"], ()), vectors[row["clip_id"]]))
    kinds = [kind for kind in KINDS if entries[kind]]
    try:
        with atomic_directory(out) as folder:
            for kind in kinds:
                (folder / kind).mkdir()
                name = f"{Path(store.path).name.removesuffix('.zarr')}-{kind}"
                metadata = _metadata(name, kind, [_field_of(encoder) for encoder in chosen])
                (folder / kind / "metadata.json").write_text(json.dumps(metadata, indent=1))
                (folder / kind / "samples.json").write_text(json.dumps({"samples": entries[kind]}))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; give another --out") from error
    folders = {kind: out / kind for kind in kinds}
    return FiftyOneExport(folders=folders, clips=len(rows), left_out=len(store) - len(rows))


def _file_of(row: Mapping[str, Any], roots: Mapping[str, Any]) -> str | None:
    """The absolute path of a clip's media where they are one file."""
    if (root := root_of(row, roots)) is None:
        return None
    try:
        media = Source.find(root, row["path"]).media
    except MervCacheError:
        return None
    return os.path.abspath(media.path) if isinstance(media, LocalFile) else None


def _samples_by_clip(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.clip_id is not None:
            found.setdefault(sample.clip_id, []).append(sample)
    return found


def _field_of(encoder: str) -> str:
    """A field's name of an encoder's key, which may be `name@grid` or `name@identity`."""
    return encoder.replace("@", "_").replace("-", "_")


def _binary(vector_D: np.ndarray) -> dict[str, Any]:
    """A vector as FiftyOne keeps it: an .npy file, compressed."""
    file = io.BytesIO()
    np.save(file, vector_D, allow_pickle=False)
    return {"$binary": {"base64": base64.b64encode(zlib.compress(file.getvalue())).decode(), "subType": "00"}}


def _entry(row: Mapping[str, Any], path: str, samples: Sequence[Sample], vectors: Mapping[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(row["clip_id"].encode()).hexdigest()
    return {
        "_id": {"$oid": digest[:24]},
        "filepath": path,
        "tags": list(dict.fromkeys([row["dataset"], *(sample.split for sample in samples)])),
        "clip_id": row["clip_id"],
        "source_dataset": row["dataset"],
        "start_s": row["start_s"],
        "end_s": row["end_s"],
        "questions": [turn.text for sample in samples for turn in sample.turns if turn.role == "human"],
        "answers": [turn.text for sample in samples for turn in sample.turns if turn.role == "gpt"],
        "_media_type": row["kind"],
        "_rand": int(digest[24:37], 16) / 16**13,  # FiftyOne's random views sort by it
        **vectors,
    }


def _metadata(name: str, kind: str, vector_fields: Sequence[str]) -> dict[str, Any]:
    types = {**FIELDS, **dict.fromkeys(vector_fields, "VectorField")}
    fields = [
        {
            "name": field,
            "db_field": field,
            "ftype": f"fiftyone.core.fields.{kind_of_field}",
            "subfield": "fiftyone.core.fields.StringField" if kind_of_field == "ListField" else None,
        }
        for field, kind_of_field in types.items()
    ]
    return {"name": name, "version": VERSION, "media_type": kind, "sample_fields": fields, "frame_fields": []}
