"""The encoders' own float32 tokens, computed again from the media: the reference that dtypes are measured against.

Encoders are built from their identity and must have it, and media must be those that the tokens were made from, both by
digest. What was computed lies in a scratch folder until its encoder is done: 15 MB a clip of MERV's four.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featurestore.clips import Clip
from featurestore.layout import block_of
from featurestore.locate import Place
from featurestore.objects.open import open_objects
from featurestore.records import driver_runs
from pipeline.certify.distortion import Again, Floats, MeasuredClips
from pipeline.certify.parity import engine_without_encoders, load_as_stored
from pipeline.certify.parity_clips import encode_clips
from pipeline.costs.ledger import media_roots

if TYPE_CHECKING:
    from pipeline.worker.engine import EncoderRun, Engine


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
