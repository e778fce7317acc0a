"""Reference clips: two videos and a still that ship with the package, and their tokens in each group of a store.

`verify --parity` encodes them again: the container's reader, frame choice, colour conversion, resizing and the encoder
must give what the store holds. scripts/render_reference_clips.py renders the media; stores name them by digest. There
are two videos because two clips are one forward on a CPU.
"""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from featurestore.clips import Clip, Kind
from featurestore.identity import FeatureIdentity
from featurestore.layout import CANARIES, reference_clip_groups
from featurestore.reference_clips import ReferenceClip, ReferenceClips, put_reference_clips
from featurestore.storage_dtypes import OverflowedTokens, to_stored
from featurestore.writer import StoreWriter
from featurestore.zarr_metadata import array_specs
from mervcache.errors import MediaError
from mervcache.files import sha256_hex
from pipeline.config import EngineSettings

if TYPE_CHECKING:
    from pipeline.decode.sampling import Decoded
    from pipeline.worker.encode import TokenEncoder
    from pipeline.worker.engine import Engine

RENDERING = "canaries/1"  # of the archive's pictures; on disk, so other pictures get another number
ARCHIVE = "reference_clips.tar.xz"
CLIPS: dict[str, tuple[str, ...]] = {"video": ("scene", "noise"), "image": ("still",)}
FILES = {"scene": "scene.avi", "noise": "noise.avi", "still": "still.ppm"}


@lru_cache(3)
def media_bytes(name: str) -> bytes:
    """The media file of a reference clip."""
    with files("pipeline").joinpath(ARCHIVE).open("rb") as archive, tarfile.open(fileobj=archive, mode="r:xz") as tar:
        member = tar.extractfile(FILES[name])
        assert member is not None
        return member.read()


def decode_reference_clips(engine: Engine, runs: Sequence[TokenEncoder], kind: str) -> dict[str, Decoded]:
    """The resized frames of a kind's reference clips, in every view that the encoders need."""
    from pipeline.worker.engine import decode_job

    with tempfile.TemporaryDirectory(prefix="merv-reference-clips-") as root:
        futures = {}
        for name in CLIPS[kind]:
            (Path(root) / FILES[name]).write_bytes(media_bytes(name))
            clip = Clip(dataset="canaries", path=FILES[name], kind=cast("Kind", kind))
            futures[name] = engine.pool.submit(decode_job(root, clip, runs))
        return {name: future.result() for name, future in futures.items()}


def encode_reference_clips(run: TokenEncoder, kind: str, batch: int, decoded: Mapping[str, Decoded]) -> ReferenceClips:
    """Tokens of the reference clips as a group of this encoder stores them, encoded in the group's batch shape.

    A clip whose tokens overflow the storage dtype is left out: a dataset's clip would be quarantined.
    """
    (made,) = _encode_together({"": run}, kind, batch, decoded).values()
    return made


def _encode_together(
    runs: Mapping[str, TokenEncoder], kind: str, batch: int, decoded: Mapping[str, Decoded]
) -> dict[str, ReferenceClips]:
    """`encode_reference_clips` of encoders that share a network, by key, from one forward of each batch."""
    from pipeline.worker.encode import encode_batch_together

    made = {key: _Rows(run, kind) for key, run in runs.items()}
    view, names = next(iter(runs.values())).view, list(decoded)
    for start in range(0, len(names), batch):
        part = names[start : start + batch]
        frames = {slot: decoded[name].frames[view] for slot, name in enumerate(part)}
        for key, arrays in encode_batch_together(runs, frames, range(batch)):
            for slot, name in enumerate(part):
                items = {array: values[slot] for array, values in arrays.items()}
                made[key].add(name, decoded[name].media_sha256, frames[slot], items)
    return {key: rows.reference_clips() for key, rows in made.items()}


class _Rows:
    """The reference clips of one group, as they are encoded."""

    def __init__(self, run: TokenEncoder, kind: str) -> None:
        self._identity, self._kind = run.identity, kind
        self._specs = array_specs(run.identity, kind, blocks=0, block_rows=1)
        self._rows: dict[str, list[np.ndarray]] = {name: [] for name in self._specs}
        self._clips: list[ReferenceClip] = []

    def add(self, name: str, media_sha256: str, frames: np.ndarray, items: Mapping[str, np.ndarray]) -> None:
        try:
            stored = to_stored(items, self._identity.storage_dtype)
        except OverflowedTokens:
            return
        for key in self._specs:
            self._rows[key].append(stored[key])
        shaped = f"{frames.shape}\n".encode() + np.ascontiguousarray(frames).tobytes()
        self._clips.append(ReferenceClip(name=name, media_sha256=media_sha256, frames_sha256=sha256_hex(shaped)))

    def reference_clips(self) -> ReferenceClips:
        arrays = {
            key: np.stack(self._rows[key]) if self._clips else np.empty((0, *spec.row_shape), spec.dtype)
            for key, spec in self._specs.items()
        }
        return ReferenceClips(
            kind=self._kind, identity=self._identity, rendering=RENDERING, clips=tuple(self._clips), arrays=arrays
        )


@dataclass(frozen=True, kw_only=True)
class ReferenceClipTask:
    """Groups that have no reference clips yet; small and picklable."""

    store: str
    engine: EngineSettings
    groups: Mapping[str, Mapping[str, int]]  # kind -> encoder -> batch shape


def missing_reference_clips(
    store: StoreWriter, identities: Mapping[str, FeatureIdentity], kinds: Iterable[str]
) -> dict[str, dict[str, int]]:
    """Kind -> encoder -> batch shape of the groups that have no reference clips yet, by listing names."""
    missing: dict[str, dict[str, int]] = {}
    for kind in kinds:
        present = reference_clip_groups(store.objects.list_names(f"{CANARIES}/{kind}"))
        for name, identity in identities.items():
            if identity.group_name not in present:
                missing.setdefault(kind, {})[name] = store.open_group(kind, identity.group_name).batch_shape
    return missing


def write_reference_clips(task: ReferenceClipTask) -> dict[str, list[str]]:
    """Run by a worker: write the missing reference clips; returns "written" groups and "problems" in words.

    A decoder that cannot read the files is a problem for parity checks only, so the extraction goes on.
    """
    from pipeline.worker.engine import engine_for

    engine, objects = engine_for(task.engine), StoreWriter.open(task.store).objects
    written, problems = [], []
    for kind, batches in task.groups.items():
        runs = {name: engine.encoders[name] for name in batches}
        try:
            decoded = decode_reference_clips(engine, list(runs.values()), kind)
        except MediaError as error:
            problems.append(f"{kind}: {error}")
            continue
        groups: dict[tuple[tuple[str, ...], int], dict[str, TokenEncoder]] = {}  # by forward and batch shape
        for keys in engine.forwards:
            for name in runs.keys() & set(keys):
                groups.setdefault((keys, batches[name]), {})[name] = runs[name]
        for (_, batch), shared in groups.items():
            for made in _encode_together(shared, kind, batch, decoded).values():
                if put_reference_clips(objects, made):
                    written.append(f"{kind}/{made.identity.group_name}")
    return {"written": written, "problems": problems}
