"""The encoders' own float32 of a sample, computed again from the media: what dtypes are measured against with these.

Encoders are built from their identity and must have it, and media must be those that the tokens were made from, both by
digest. What was computed lies in a scratch folder until its encoder is done: 15 MB a clip of MERV's four.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featurestore.clips import Clip
from featurestore.find import Place
from featurestore.journal import driver_runs
from featurestore.layout import block_of
from featurestore.places.by_url import open_objects
from featurestore.places.objects import Objects
from pipeline.certify.distortion import Again, Floats, Sample
from pipeline.ledger import media_roots

if TYPE_CHECKING:
    from pipeline.engine import EncoderRun, Engine


@contextmanager
def encoded_again(
    place: Place, *, root: str | None = None, weights: Mapping[str, str] | None = None, device: str | None = None
) -> Iterator[Again]:
    """What encodes samples of a store on this machine; decode processes live until it is left."""
    from pipeline.config import EngineSettings
    from pipeline.engine import Engine  # torch and the models

    objects = open_objects(place)
    roots = media_roots(driver_runs(objects), root)
    loaded: dict[str, EncoderRun] = {}  # one encoder at a time
    with closing(Engine(EngineSettings(encoders=(), device=device or "auto", decode_processes=1))) as engine:

        def again(sample: Sample, folder: Path) -> Floats:
            if sample.encoder not in loaded:
                loaded.clear()  # before the next one is loaded
                loaded[sample.encoder] = _load(objects, engine, sample, weights or {})
            return _encode(engine, loaded[sample.encoder], sample, roots, folder)

        yield again


def _load(objects: Objects, engine: Engine, sample: Sample, weights: Mapping[str, str]) -> EncoderRun:
    from pipeline.certify.parity import load_encoder

    return load_encoder(objects, sample.encoder, sample.group.identity, weights, engine.device)


def _encode(engine: Engine, run: EncoderRun, sample: Sample, roots: Mapping[str, str], folder: Path) -> Floats:
    """In the batch shape of the sample's group, into files of the folder."""
    from pipeline.certify.parity_clips import encode_clips

    media, batch = _media(sample), sample.group.batch_shape
    for start in range(0, len(sample.clips), batch):
        made = encode_clips(engine, run, batch, sample.clips[start : start + batch], roots, media)
        for number, arrays in enumerate(made, start=start):
            np.savez(folder / f"{number}.npz", **arrays)
    numbers = {clip.clip_id: number for number, clip in enumerate(sample.clips)}

    def floats(clip: Clip) -> dict[str, np.ndarray]:
        with np.load(folder / f"{numbers[clip.clip_id]}.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    return floats


def _media(sample: Sample) -> dict[str, str | None]:
    """Clip id -> sha256 of the media that its committed tokens were made from."""
    group, found = sample.group, {}
    for clip, row in zip(sample.clips, sample.rows, strict=True):
        found[clip.clip_id] = group.receipt(block_of(row, group.block_rows)).outcome(row).media_sha256
    return found
