"""Reading rows: one ranged read per clip, straight into the batch.

Shards of the known codecs are read without zarr (index cached, crc checked, tested bit-equal to zarr); any other valid
Zarr array is read by a plain `array[i]` loop. Never `oindex`: it takes a hundred times as long.
Legend: T frames, H W height width, K prefix tokens, D encoder width.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from featurestore.errors import StoreDamagedError, UserError
from featurestore.foreign import foreign_reader
from featurestore.groups import read_group
from featurestore.identity import FeatureIdentity
from featurestore.layout import array_metadata_key, block_of, group_prefix, shard_key, slot_of
from featurestore.lookup import Frames, time_steps
from featurestore.metadata import ArraySpec, array_specs, parse_array, read_document
from featurestore.places.by_url import in_parallel
from featurestore.places.objects import Objects
from featurestore.quantise import from_bfloat16_bits, from_stored
from featurestore.shards import Scratch, Shard

MAX_OPEN_SHARDS = 256  # indexes and files held open by a reader
MAX_REMOTE_SHARDS = 16_384  # indexes of 1 kB where nothing is held open, and opening one anew costs a request


class ShardCache:
    """Recently used shards, opened once; bounded, safe among threads."""

    def __init__(self, objects: Objects, max_open: int = MAX_OPEN_SHARDS) -> None:
        self._objects = objects
        self._max_open = max_open if objects.parallel_reads == 1 else max(max_open, MAX_REMOTE_SHARDS)
        self._shards: OrderedDict[str, Shard] = OrderedDict()
        self._lock = threading.Lock()
        self.scratch = threading.local()

    def get(self, key: str, spec: ArraySpec) -> Shard:
        with self._lock:
            if key in self._shards:
                self._shards.move_to_end(key)
                return self._shards[key]
        try:
            shard = Shard(spec, self._objects.open(key))
        except FileNotFoundError:
            raise StoreDamagedError(
                f"{key} is missing though its receipt is there; run `merv-pipeline verify`"
            ) from None
        with self._lock:
            self._shards[key] = shard
            # A dropped shard closes its file when the last reader lets go of it, not here under a reader's feet.
            while len(self._shards) > self._max_open:
                self._shards.popitem(last=False)
        return shard

    def take_scratch(self) -> Scratch:
        """This thread's buffer for encoded bytes."""
        if not hasattr(self.scratch, "buffer"):
            self.scratch.buffer = Scratch()
        return self.scratch.buffer


class GroupReader:
    """The rows of one kind and encoder."""

    def __init__(self, objects: Objects, kind: str, group: str, cache: ShardCache) -> None:
        self.kind = kind
        self.group = group
        self.identity: FeatureIdentity = read_group(objects, kind, group).identity
        self._objects = objects
        self._cache = cache
        self._row_readers: dict[str, Callable[[int, np.ndarray], None]] = {}
        # Sizes follow from the identity; block rows and codec do not matter to them.
        self.specs = array_specs(self.identity, kind, blocks=0, block_rows=1)

    def output_dtype(self, array: str = "tokens") -> np.dtype:
        """What reading gives: float16 stays, all others become float32."""
        return np.dtype("float16" if self.specs[array].dtype == "float16" else "float32")

    def read_row(self, array: str, row: int, out: np.ndarray, steps: np.ndarray | None = None) -> None:
        """Row `row` as floats into `out`; `steps` picks stored time steps, None takes all in order."""
        spec = self.specs[array]
        if spec.dtype == "float16" and steps is None and out.flags.c_contiguous:
            self.read_stored(array, row, out)
            return
        stored = np.empty(spec.row_shape, dtype=spec.dtype)
        self.read_stored(array, row, stored)
        picked = stored if steps is None else stored[steps]
        if spec.logical_dtype == "bfloat16" and out.flags.c_contiguous:
            from_bfloat16_bits(picked, out)
        elif spec.dtype == "uint8":
            out[...] = from_stored(picked, logical_dtype=None, **self._affine(row))
        else:
            out[...] = from_stored(picked, logical_dtype=spec.logical_dtype)

    def read_stored(self, array: str, row: int, out: np.ndarray) -> None:
        """Row `row` as it is stored, into a contiguous array of the stored dtype."""
        if array not in self._row_readers:
            self._row_readers[array] = self._make_row_reader(array)
        self._row_readers[array](row, out)

    def _affine(self, row: int) -> dict[str, np.ndarray]:
        values = {name: np.empty(self.specs[name].row_shape, dtype=np.float32) for name in ("scale", "offset")}
        for name, out in values.items():
            self.read_stored(name, row, out)
        return values

    def _make_row_reader(self, array: str) -> Callable[[int, np.ndarray], None]:
        key, expected = array_metadata_key(self.kind, self.group, array), self.specs[array]
        try:
            stored = parse_array(array, read_document(self._objects, key))
        except FileNotFoundError:
            raise StoreDamagedError(f"{key} is missing; run `merv-pipeline verify`") from None
        if stored is None:
            path = f"{group_prefix(self.kind, self.group)}/{array}"
            return foreign_reader(self._objects, path, expected)
        if (stored.row_shape, stored.dtype) != (expected.row_shape, expected.dtype):
            raise StoreDamagedError(
                f"{key} describes {stored.row_shape} {stored.dtype}, which is not its identity's shape"
            )
        return self._direct_reader(stored)

    def _direct_reader(self, spec: ArraySpec) -> Callable[[int, np.ndarray], None]:
        def read(row: int, out: np.ndarray) -> None:
            key = shard_key(self.kind, self.group, spec.name, block_of(row, spec.block_rows))
            shard = self._cache.get(key, spec)
            if not shard.read_row(slot_of(row, spec.block_rows), out, self._cache.take_scratch()):
                raise StoreDamagedError(f"{key} lacks row {row} though its receipt has it; run `merv-pipeline verify`")

        return read


class BatchReader:
    """Rows of one encoder and both kinds, read into one batch."""

    def __init__(self, objects: Objects) -> None:
        self._objects, self._cache = objects, ShardCache(objects)
        self._groups: dict[tuple[str, str], GroupReader] = {}

    def group(self, kind: str, group: str) -> GroupReader:
        """The reader of one kind's rows, opened on first use."""
        if (kind, group) not in self._groups:
            self._groups[kind, group] = GroupReader(self._objects, kind, group, self._cache)
        return self._groups[kind, group]

    def read(
        self,
        array: str,
        identity: FeatureIdentity,
        rows: np.ndarray,  # int64 [B]
        is_image: np.ndarray,  # bool [B]: in which kind's array the row lies
        frames: Frames = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Floats [B, T, ...]: `frames` picks time steps, a still's steps repeat; `out` is an array to read into."""
        steps = time_steps(identity.grid[0], frames)
        kinds = {image: "image" if image else "video" for image in set(is_image.tolist())}
        readers = {image: self.group(kind, identity.group_name) for image, kind in kinds.items()}
        dtype = next((reader.output_dtype(array) for reader in readers.values()), np.dtype("float32"))
        inner = identity.grid[1:] if array == "tokens" else (identity.prefix_tokens,)
        out = _batch((len(rows), len(steps), *inner, identity.width), dtype, out)
        whole = np.array_equal(steps, np.arange(identity.grid[0]))

        def read_row(place: int) -> None:
            reader = readers[bool(is_image[place])]
            stored_time = reader.specs[array].row_shape[0]
            picked = None if whole and stored_time == identity.grid[0] else steps % stored_time
            reader.read_row(array, int(rows[place]), out[place], picked)

        in_parallel(read_row, np.lexsort((rows, is_image)), self._objects.parallel_reads)  # in the order on disk
        return out


def _batch(shape: tuple[int, ...], dtype: np.dtype, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return np.empty(shape, dtype=dtype)
    if out.shape != shape or out.dtype != dtype:
        raise UserError(f"out must be {shape} {dtype}, got {out.shape} {out.dtype}")
    return out
