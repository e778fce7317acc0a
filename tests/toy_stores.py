"""Identities of encoders that are none, and real stores of whatever arrays a test makes up for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from featurestore import Clip, FeatureIdentity, StoreWriter
from featurestore.clips import KINDS
from mervcache.files import sha256_hex

TOY = FeatureIdentity(
    encoder="toy",
    architecture={"class": "Toy"},
    weights_sha256="0" * 64,
    layer="last",
    num_frames=4,
    frame_rule="linspace-32/8",
    decode="frames/1",
    preprocessing={},
    still_period=1,
    grid=(4, 2, 2),
    pooling="adaptive-avg",
    width=8,
)
Arrays = Mapping[str, np.ndarray]  # "tokens" [T, H, W, D], and "prefix" [T, K, D] where the identity has some


@pytest.fixture(scope="session")
def toy_identity() -> Callable[..., FeatureIdentity]:
    """Makes one: `toy_identity("dinov2", grid=(2, 2, 2), width=6)`; what is not named is that of `TOY`."""
    return lambda encoder="toy", **fields: replace(TOY, encoder=encoder, **fields)


@pytest.fixture(scope="session")
def write_store() -> Callable[..., StoreWriter]:
    """Writes one: `write_store(path, clips, {encoder: identity}, {(encoder, clip id): arrays})`, then publish it."""
    return _write_store


def _write_store(
    path: Path,
    clips: Sequence[Clip],
    identities: Mapping[str, FeatureIdentity],
    arrays: Mapping[tuple[str, str], Arrays],
    *,
    failed: Collection[tuple[str, str]] = (),  # (encoder, clip id) that cannot be decoded
    block_rows: int = 4,
    media: Mapping[tuple[str, str], str] = MappingProxyType({}),  # (encoder, clip id) -> sha256 of its file
) -> StoreWriter:
    writer = StoreWriter.open_or_create(path, block_rows=dict.fromkeys(KINDS, block_rows))
    rows = writer.add_clips(clips)
    for encoder, identity in identities.items():
        for kind in sorted({clip.kind for clip in clips}):
            group = writer.ensure_group(kind, identity, batch_shape=1, weights_label="random:0", new_identity=True)
            mine = {row: clip for row, clip in rows if clip.kind == kind}
            for block in sorted({row // block_rows for row in mine}):
                task = group.begin(block)
                for row in sorted(row for row in mine if row // block_rows == block):
                    clip = mine[row]
                    if (encoder, clip.clip_id) in failed:
                        task.fail(row, "cannot be decoded")
                    else:
                        key = encoder, clip.clip_id
                        sha256 = media.get(key) or sha256_hex(clip.path.encode())  # every path is a file of its own
                        task.add(row, arrays[key], media_sha256=sha256, decoder="frames/1")
                task.commit()
    return writer
