"""Small real stores for the tests of this package."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from featurestore.clips import Clip
from featurestore.identity import FeatureIdentity
from featurestore.reference_clips import ReferenceClip, ReferenceClips, put_reference_clips
from featurestore.storage_dtypes import to_stored
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter
from mervcache.files import sha256_hex
from tests.featurestore.azure_server import azure, azure_endpoint
from tests.featurestore.gcs_server import gcs

__all__ = ["azure", "azure_endpoint", "gcs"]  # fixtures of modules next to this one

SHA256 = "b" * 64
BASE = FeatureIdentity(
    encoder="dinov2",
    architecture={"class": "Tiny", "hidden_size": 8},
    weights_sha256="a" * 64,
    layer="output of block 1 of 2",
    num_frames=16,
    frame_rule="linspace-32/2",
    decode="frames/1",
    preprocessing={"size": 28},
    still_period=2,
    grid=(4, 2, 2),
    pooling="adaptive-avg",
    width=8,
)


class RecordedProgress:
    """A progress callback that records its calls."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.items: list[int] = []

    def start(self, total: int) -> None:
        self.totals.append(total)

    def advance(self, items: int = 1, **amounts: float) -> None:
        self.items.append(items)


@pytest.fixture
def recorded() -> RecordedProgress:
    return RecordedProgress()


def tiny_identity(**changes) -> FeatureIdentity:
    return replace(BASE, **changes)


def video(number: int, dataset: str = "tiny") -> Clip:
    return Clip(dataset=dataset, path=f"videos/{number}.mp4", kind="video")


def image(number: int, dataset: str = "tiny") -> Clip:
    return Clip(dataset=dataset, path=f"images/{number}.jpg", kind="image")


def floats_of(clip: Clip, identity: FeatureIdentity, noise: int = 0) -> dict[str, np.ndarray]:
    """The float32 arrays of a clip: a pure function of clip and identity, as an encoder is."""
    time, height, width = identity.grid_of(clip.kind)
    rng = np.random.default_rng(zlib.crc32(f"{clip.clip_id} {identity.encoder} {noise}".encode()))
    arrays = {"tokens": rng.standard_normal((time, height, width, identity.width)).astype(np.float32)}
    if identity.prefix_tokens:
        shape = (time, identity.prefix_tokens, identity.width)
        arrays["prefix"] = rng.standard_normal(shape).astype(np.float32)
    return arrays


def media_of(clip: Clip) -> str:
    """Every path is a file of its own."""
    return sha256_hex(clip.path.encode())


@dataclass
class Kit:
    """A store in the making and what was put into it."""

    path: Path
    block_rows: dict[str, int] = field(default_factory=lambda: {"video": 4, "image": 3})
    media: Callable[[Clip], str] = media_of  # sha256 of the file behind a clip

    def writer(self) -> StoreWriter:
        return StoreWriter.open_or_create(self.path, block_rows=self.block_rows)

    def group(self, identity: FeatureIdentity, kind: str = "video", **options):
        options = {"batch_shape": 2, "weights_label": "random:0"} | options
        return self.writer().ensure_group(kind, identity, **options)

    def fill(self, identity: FeatureIdentity = BASE, *, broken: tuple[str, ...] = (), noise: int = 0, **options) -> str:
        """Commit every missing block of both kinds; clips whose path is in `broken` fail. Returns the snapshot."""
        writer = self.writer()
        rows = clips_by_row(writer)
        for kind in ("video", "image"):
            if writer.allocated_blocks(kind):
                group = self.group(identity, kind, **options)
                for block in group.missing_blocks():
                    fill_block(group.begin(block), rows[kind], identity, broken, noise, self.media).commit()
        return writer.publish_snapshot()

    def add_reference_clips(self, identity: FeatureIdentity = BASE, noise: int = 0) -> str:
        """Canaries of the groups of an encoder that are there; returns the snapshot that names them."""
        writer = self.writer()
        for kind in ("video", "image"):
            if identity.group_name in writer.encoder_groups(kind):
                put_reference_clips(writer.objects, reference_clips_of(kind, identity, noise))
        return writer.publish_snapshot()

    def open(self) -> FeatureStore:
        return FeatureStore.open(self.path)


def reference_clips_of(kind: str, identity: FeatureIdentity, noise: int = 0) -> ReferenceClips:
    """Two canaries whose tokens are a pure function of kind, name and identity."""
    names = ("scene", "noise")
    clips = [Clip(dataset="canaries", path=f"{name}.x", kind=kind) for name in names]
    rows = [to_stored(floats_of(clip, identity, noise), identity.storage_dtype) for clip in clips]
    return ReferenceClips(
        kind=kind,
        identity=identity,
        rendering="canaries/1",
        clips=tuple(ReferenceClip(name=name, media_sha256="c" * 64, frames_sha256="d" * 64) for name in names),
        arrays={array: np.stack([row[array] for row in rows]) for array in rows[0]},
    )


def clips_by_row(writer: StoreWriter) -> dict[str, dict[int, Clip]]:
    from featurestore.schemas import table_to_clips

    rows: dict[str, dict[int, Clip]] = {"video": {}, "image": {}}
    for row, clip in table_to_clips(writer.clips()):
        rows[clip.kind][row] = clip
    return rows


def fill_block(block_writer, clips, identity, broken=(), noise=0, media=lambda clip: SHA256):
    for row in sorted(block_writer.planned):
        if clips[row].path in broken:
            block_writer.fail(row, "the file is cut off")
        else:
            arrays = floats_of(clips[row], identity, noise)
            block_writer.add(row, arrays, media_sha256=media(clips[row]), decoder="frames/1")
    return block_writer


@pytest.fixture
def kit(tmp_path) -> Kit:
    return Kit(tmp_path / "store.zarr")


@pytest.fixture(scope="session")
def make():
    """The plain functions above, for tests that need them (test folders are not packages)."""

    class Make:
        identity = staticmethod(tiny_identity)
        video = staticmethod(video)
        image = staticmethod(image)
        floats = staticmethod(floats_of)
        canaries = staticmethod(reference_clips_of)
        fill_block = staticmethod(fill_block)
        clips_by_row = staticmethod(clips_by_row)
        kit = Kit

    return Make
