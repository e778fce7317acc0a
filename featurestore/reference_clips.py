"""Reference clips: stored tokens of clips that every installation can render, to be encoded again elsewhere.

Library versions are not in an identity; encoding these clips again detects drift. A group has at most one such file,
`canaries/KIND/GROUP.safetensors`: the group's arrays with one row per clip, as stored, and the digest of the frames
that the encoder saw. It is read and written here, because the safetensors library keeps its header in hash-table order
and an untrusted file must claim nothing before it is checked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from featurestore.identity import FeatureIdentity
from featurestore.layout import ARRAYS, reference_clip_key
from featurestore.objects.base import Objects, get_bounded, put_if_absent
from featurestore.zarr_metadata import ArraySpec, array_specs
from mervcache.errors import StoreDamagedError, StoreFormatError
from mervcache.files import canonical_json, load_json, sha256_hex

MAX_CANARIES = 4  # of one group: each costs a clip's bytes
MAX_HEADER_BYTES = 1 << 16
_VERSION = 1
_NAME = re.compile(r"[a-z0-9-]{1,40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ALIGNMENT = 8  # safetensors pads its header to it


@dataclass(frozen=True, kw_only=True)
class ReferenceClip:
    """One reference clip before it was encoded."""

    name: str  # "scene": the renderer knows it
    media_sha256: str  # of the rendered file
    frames_sha256: str  # of the small frames that the encoder saw: decoding and resizing


@dataclass(frozen=True, kw_only=True)
class ReferenceClips:
    """The reference clips of one encoder and kind."""

    kind: str
    identity: FeatureIdentity
    rendering: str  # "canaries/1": how the clips are rendered
    clips: tuple[ReferenceClip, ...]  # in the order of the arrays' rows
    arrays: Mapping[str, np.ndarray]  # by name in layout.ARRAYS: stored items [clip, *row shape]

    def stored(self, name: str) -> dict[str, np.ndarray] | None:
        """A clip's row of each array; None where the group has none of it."""
        rows = {clip.name: row for row, clip in enumerate(self.clips)}
        return {array: items[rows[name]] for array, items in self.arrays.items()} if name in rows else None

    def to_bytes(self) -> bytes:
        """A safetensors file; the same clips give the same bytes."""
        data = b"".join(self._items(name).tobytes() for name in self._names)
        header, offset = {}, 0
        for name in self._names:
            items = self._items(name)
            shape = list(items.shape)
            header[name] = {
                "dtype": f"{items.dtype.kind.upper()}{8 * items.itemsize}",  # as safetensors names it: F16, U8
                "shape": shape,
                "data_offsets": [offset, offset + items.nbytes],
            }
            offset += items.nbytes
        record = canonical_json(self._record())
        digest = hashlib.sha256(canonical_json([record, header]).encode() + data).hexdigest()
        head = canonical_json(header | {"__metadata__": {"canaries": record, "digest": digest}}).encode()
        head += b" " * (-len(head) % _ALIGNMENT)
        return len(head).to_bytes(8, "little") + head + data

    @property
    def _names(self) -> list[str]:
        return [name for name in ARRAYS if name in self.arrays]

    def _items(self, name: str) -> np.ndarray:
        items = np.ascontiguousarray(self.arrays[name])
        return items.astype(items.dtype.newbyteorder("<"), copy=False)

    def _record(self) -> dict[str, Any]:
        clips = [vars(clip) for clip in self.clips]
        head = {"format": _VERSION, "kind": self.kind, "group": self.identity.group_name}
        return head | {"rendering": self.rendering, "clips": clips}

    @classmethod
    def parse(cls, data: bytes, kind: str, identity: FeatureIdentity) -> ReferenceClips:
        """Reference clips from their file, whole, undamaged, and of this group."""
        what = reference_clip_key(kind, identity.group_name)
        try:
            record, start = _read_record(data, what)
            clips = tuple(ReferenceClip(**entry) for entry in record["clips"])
            arrays = _arrays(memoryview(data)[start:], kind, identity, len(clips))
            rendering = record["rendering"]
            parsed = cls(kind=kind, identity=identity, rendering=rendering, clips=clips, arrays=arrays)
            is_whole = all(map(_is_sound, clips)) and type(rendering) is str and bool(rendering)
            is_whole = is_whole and parsed.to_bytes() == data
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise StoreFormatError(f"{what} lacks fields or has malformed ones ({error})") from error
        if not is_whole:
            raise StoreDamagedError(f"{what} does not match its own digest; run `merv-pipeline repair`")
        return parsed


def read_reference_clips(objects: Objects, kind: str, identity: FeatureIdentity) -> ReferenceClips:
    """The reference clips of a group; FileNotFoundError where it has none."""
    data = get_bounded(objects, reference_clip_key(kind, identity.group_name), max_reference_clip_bytes(kind, identity))
    return ReferenceClips.parse(data, kind, identity)


def put_reference_clips(objects: Objects, canaries: ReferenceClips) -> bool:
    """Keep a group's reference clips unless it has some; False if it has, and the existing ones win."""
    return put_if_absent(objects, reference_clip_key(canaries.kind, canaries.identity.group_name), canaries.to_bytes())


def reference_clip_digest(objects: Objects, kind: str, identity: FeatureIdentity) -> str | None:
    """sha256 of a group's reference clips; None where there are none, or damaged ones, which `verify` reports."""
    try:
        key = reference_clip_key(kind, identity.group_name)
        data = get_bounded(objects, key, max_reference_clip_bytes(kind, identity))
        ReferenceClips.parse(data, kind, identity)
    except (FileNotFoundError, StoreFormatError, StoreDamagedError):
        return None
    return sha256_hex(data)


def max_reference_clip_bytes(kind: str, identity: FeatureIdentity) -> int:
    """Upper bound of the file's size."""
    return 8 + MAX_HEADER_BYTES + MAX_CANARIES * sum(spec.row_bytes for spec in _specs(kind, identity).values())


def _specs(kind: str, identity: FeatureIdentity) -> dict[str, ArraySpec]:
    return array_specs(identity, kind, blocks=0, block_rows=1)


def _read_record(data: bytes, what: str) -> tuple[dict[str, Any], int]:
    """The record in a file's header, and where its data begin."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= size <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"a header of {size} bytes")
    header = load_json(data[8 : 8 + size], what)
    return load_json(header["__metadata__"]["canaries"], what), 8 + size


def _arrays(data: memoryview, kind: str, identity: FeatureIdentity, count: int) -> dict[str, np.ndarray]:
    """Views of the data, of the shapes that the identity gives; the header is compared later."""
    specs = _specs(kind, identity)
    if count > MAX_CANARIES or len(data) != count * sum(spec.row_bytes for spec in specs.values()):
        raise ValueError(f"{count} clips in {len(data)} bytes")
    arrays: dict[str, np.ndarray] = {}
    offset = 0
    for name in (name for name in ARRAYS if name in specs):
        spec = specs[name]
        stop = offset + count * spec.row_bytes
        dtype = np.dtype(spec.dtype).newbyteorder("<")
        arrays[name] = np.frombuffer(data[offset:stop], dtype=dtype).reshape(count, *spec.row_shape)
        offset = stop
    return arrays


def _is_sound(clip: ReferenceClip) -> bool:
    texts = (clip.name, clip.media_sha256, clip.frames_sha256)
    if not all(type(text) is str for text in texts):
        return False
    digests = all(_SHA256.fullmatch(text) for text in texts[1:])
    return bool(_NAME.fullmatch(clip.name)) and digests
