"""Reading tokens: rows of any encoder straight into the batch, one ranged read per clip."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from featurestore.buffers import BufferPool
from featurestore.clip_names import ids_that_end_with
from featurestore.identity import FeatureIdentity
from featurestore.layout import ROOT_METADATA, array_metadata_key, shard_key
from featurestore.objects.base import Objects
from featurestore.objects.open import in_parallel
from featurestore.shards import Shard, ShardCache
from featurestore.storage_dtypes import StorageDtype, prefix_dtype, storage_dtype
from featurestore.zarr_metadata import ArraySpec, array_specs, parse_array, parse_root, read_document
from mervcache.errors import ClipUnavailableError, StoreDamagedError, StoreFormatError, UserError

Frames = slice | Sequence[int] | np.ndarray | None


class BatchReader:
    """Reads rows of both kinds into one batch; opens each group on first use."""

    def __init__(self, objects: Objects) -> None:
        self._objects, self._shards, self._buffers = objects, ShardCache(objects), BufferPool()
        self._groups: dict[tuple[str, bool], GroupReader] = {}  # by group name and "is a still"

    def read(
        self,
        array: str,
        identity: FeatureIdentity,
        rows: np.ndarray,  # int64 [B]
        is_image: np.ndarray,  # bool [B]: the kind whose array holds the row
        frames: Frames = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Floats [B, T, ...]: `frames` picks time steps, a still's steps repeat; `out` is an array to read into."""
        time, height, width = identity.grid
        steps = np.arange(time) if frames is None else time_steps(time, frames)
        inner = (height, width) if array == "tokens" else (identity.prefix_tokens,)
        shape, dtype = (len(rows), len(steps), *inner, identity.width), np.dtype(_dtype_of(identity, array).float_dtype)
        if out is None:
            out = self._buffers.empty(shape, dtype)
        elif out.shape != shape or out.dtype != dtype:
            raise UserError(f"out must be {shape} {dtype}, got {out.shape} {out.dtype}")

        group, is_whole = identity.group_name, frames is None or np.array_equal(steps, np.arange(time))
        readers: dict[bool, tuple[GroupReader, np.ndarray | None]] = {}  # is a still -> reader, stored steps to take
        for still in set(is_image.tolist()):
            reader = self._groups.get((group, still))
            if reader is None:
                reader = GroupReader(self._objects, "image" if still else "video", identity, self._shards)
                self._groups[group, still] = reader
            stored_time = reader.specs[array].row_shape[0]
            readers[still] = reader, None if is_whole and stored_time == time else steps % stored_time

        def read_row(index: int) -> None:
            reader, stored_steps = readers[bool(is_image[index])]
            reader.read_row(array, int(rows[index]), out[index], stored_steps)

        order = np.lexsort((rows, is_image)).tolist()  # as on disk
        if self._objects.parallel_reads == 1:
            for index in order:
                read_row(index)
        else:
            # Each shard is opened once: of many threads that want its rows, each would send the same requests.
            size = {still: reader.block_rows(array) for still, (reader, _) in readers.items()}
            of_block = {(bool(is_image[n]), int(rows[n]) // size[bool(is_image[n])]): n for n in order}
            width = self._objects.parallel_reads
            in_parallel(lambda n: readers[bool(is_image[n])][0].shard(array, int(rows[n])), of_block.values(), width)
            in_parallel(read_row, order, width)
        return out


class GroupReader:
    """Rows of one encoder and kind, in stored items or as floats."""

    def __init__(self, objects: Objects, kind: str, identity: FeatureIdentity, shards: ShardCache | None = None):
        self.kind, self.identity, self.group = kind, identity, identity.group_name
        self.specs = array_specs(identity, kind, blocks=0, block_rows=1)  # block rows and codec: see _open_array
        self._objects, self._shards = objects, shards or ShardCache(objects)
        self._dtypes = {array: _dtype_of(identity, array) for array in ("tokens", "prefix")}
        self._opened: dict[str, ArraySpec] = {}  # as on disk
        self._opening = threading.Lock()  # a batch is read by many threads, and each would send the same request

    def read_row(self, array: str, row: int, out: np.ndarray, steps: np.ndarray | None = None) -> None:
        """Row `row` as floats into `out`; `steps` picks stored time steps, None takes all in order."""
        dtype, spec = self._dtypes[array], self.specs[array]
        if dtype.from_stored is None and steps is None and out.flags.c_contiguous:
            self.read_stored(array, row, out)
            return
        stored = np.empty(spec.row_shape, dtype=spec.dtype)
        self.read_stored(array, row, stored)
        picked = stored if steps is None else stored[steps]
        if dtype.from_stored is None:
            out[...] = picked
            return
        sidecars: dict[str, np.ndarray] = {}
        if dtype.is_affine:
            for name in ("scale", "offset"):
                sidecars[name] = np.empty(self.specs[name].row_shape, dtype=self.specs[name].dtype)
                self.read_stored(name, row, sidecars[name])
        dtype.from_stored(picked, sidecars, out)

    def read_stored(self, array: str, row: int, out: np.ndarray) -> None:
        """Row `row` as it is stored, into a contiguous array of the stored dtype."""
        block, slot = divmod(row, self.block_rows(array))
        if not self.shard(array, row).read_row(slot, out, self._shards.scratch):
            key = shard_key(self.kind, self.group, array, block)
            raise StoreDamagedError(f"{key} lacks row {row} though its receipt has it; run `merv-pipeline verify`")

    def block_rows(self, array: str) -> int:
        return self._spec(array).block_rows

    def shard(self, array: str, row: int) -> Shard:
        """The shard of a row, opened on first use."""
        spec = self._spec(array)
        return self._shards.get(self.kind, self.group, spec, row // spec.block_rows)

    def _spec(self, array: str) -> ArraySpec:
        """The array as it is on disk, read on first use."""
        if array not in self._opened:
            with self._opening:
                if array not in self._opened:
                    self._opened[array] = self._open_array(array)
        return self._opened[array]

    def _open_array(self, array: str) -> ArraySpec:
        key, expected = array_metadata_key(self.kind, self.group, array), self.specs[array]
        try:
            spec = parse_array(array, read_document(self._objects, key))
        except FileNotFoundError:
            raise StoreDamagedError(f"{key} is missing; run `merv-pipeline verify`") from None
        if spec is None:
            block_rows = parse_root(read_document(self._objects, ROOT_METADATA))["block_rows"][self.kind]
            raise StoreFormatError(
                f"{key} describes chunks or codecs that are not read here; rewrite the array in the store's folder: "
                + expected.rewrite_command(key.rpartition("/")[0], block_rows)
            )
        if (spec.row_shape, spec.dtype) != (expected.row_shape, expected.dtype):
            raise StoreDamagedError(
                f"{key} describes {spec.row_shape} {spec.dtype}, its identity {expected.row_shape} {expected.dtype}"
            )
        return spec


def _dtype_of(identity: FeatureIdentity, array: str) -> StorageDtype:
    name = identity.storage_dtype
    return storage_dtype(prefix_dtype(name) if array == "prefix" else name)


class ClipLines:
    """Clip id -> line, as sorted hashes: 16 bytes a clip where a dict of texts takes 150."""

    def __init__(self, clip_ids: pa.Array) -> None:
        self._clip_ids = clip_ids
        hashes = np.fromiter(map(hash, clip_ids.to_pylist()), dtype=np.int64, count=len(clip_ids))
        self._lines = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._lines]

    def find(self, wanted: Sequence[str]) -> np.ndarray:
        """int64 [len(wanted)]; ClipUnavailableError names the first that is unknown."""
        hashes = np.fromiter(map(hash, wanted), dtype=np.int64, count=len(wanted))
        lines = np.empty(len(wanted), dtype=np.int64)
        for number, position in enumerate(np.searchsorted(self._hashes, hashes).tolist()):
            while position < len(self._hashes) and self._hashes[position] == hashes[number]:
                lines[number] = self._lines[position]
                if self._clip_ids[int(lines[number])].as_py() == wanted[number]:
                    break
                position += 1  # another clip of the same hash
            else:
                matches = ids_that_end_with(wanted[number], self._clip_ids.to_pylist())
                hint = f"did you mean {matches[0]!r}?" if len(matches) == 1 else "see store.clips for those that are"
                raise ClipUnavailableError(f"clip {wanted[number]!r} is not in this store's snapshot; {hint}")
        return lines


def time_steps(time: int, frames: slice | Sequence[int] | np.ndarray) -> np.ndarray:
    """Indices of the time steps that `frames` picks of `time`; UserError where one is outside."""
    if isinstance(frames, slice):
        return np.atleast_1d(np.arange(time)[frames])
    steps = np.atleast_1d(np.asarray(frames, dtype=np.int64))
    try:
        return np.arange(time)[steps]
    except IndexError:
        raise UserError(f"frames must be 0..{time - 1}, got {steps.tolist()}") from None
