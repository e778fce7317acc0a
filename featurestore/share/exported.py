"""Import: the cells of an exported folder, which may be a stranger's.

Nothing outside the folder is opened, no file or array larger than its identity allows is read, every file must have its
digest in SHA256SUMS and every row the digest of its cell. File names come from numbers, never from what a file says.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.canaries import Canaries, max_canary_bytes
from featurestore.clips import KINDS, Clip, check_relative_path
from featurestore.columns import CLIP_SCHEMA, SAMPLE_SCHEMA, table_to_clips, table_to_samples
from featurestore.digests import sha256_hex
from featurestore.errors import StoreDamagedError, StoreFormatError, UserError
from featurestore.groups import parse_identity
from featurestore.layout import GROUP_NAME, SAMPLES_NAME, TOMBSTONES, canary_key, check_block_rows, record_name
from featurestore.metadata import CODECS, ArraySpec, array_specs, load_json
from featurestore.parts import read_table
from featurestore.places.local_objects import LocalObjects
from featurestore.places.objects import get_bounded
from featurestore.receipts import RowOutcome
from featurestore.samples import Sample
from featurestore.shards import encode_row
from featurestore.share.cells import Cell, CellGroup, LoadedCell, check_cell
from featurestore.share.export import CELL_SCHEMA, CLIPS, FORMAT, FORMATS, RECORD, SUMS, clip_path, tar_path
from featurestore.tombstones import Tombstone

MAX_TABLE_BYTES = 2 << 30
MAX_RECORD_BYTES = 64 << 20
_HEADER_BYTES = 4096  # of an .npy member, and a clip's fields
_SUM = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_./-]{1,400})")
_SAMPLES_FILE = re.compile(r"samples/([A-Za-z0-9_-]+)\.parquet")


class ExportCells:
    """The cells of a folder that `export` wrote."""

    parallel_reads = 1

    def __init__(self, folder: str | Path) -> None:
        self.name = str(folder)
        if not os.path.isfile(os.path.join(folder, SUMS)):
            raise UserError(f"{folder} is no exported store: it has no {SUMS}")
        self._files = LocalObjects(folder)  # refuses links and names that lead out of the folder
        self._sums = self._read_sums()
        record = load_json(self._read(RECORD, MAX_RECORD_BYTES), RECORD)
        self._record = record if isinstance(record, dict) else {}
        if self._record.get("format") != FORMAT or self._record.get("as") not in FORMATS:
            raise StoreFormatError(f"{folder}: {RECORD} is of another version; import it with a newer merv-pipeline")
        self.block_rows = self._block_rows()
        self._groups = {name: _group(name, entry) for name, entry in self._entries().items()}
        table = read_table(self._read(CLIPS, MAX_TABLE_BYTES), CLIP_SCHEMA, CLIPS)
        self._clips = [clip for _, clip in table_to_clips(table)]
        self._numbers = {clip.clip_id: number for number, clip in enumerate(self._clips)}
        self._outcomes: dict[str, dict[int, tuple[int, RowOutcome]]] = {}  # group -> number -> place, outcome
        self._tar = lru_cache(4)(self._open_tar)

    def tombstones(self) -> list[Tombstone]:
        folder = f"{TOMBSTONES}/"
        ids = {path: record_name(path) for path in self._sums if path.startswith(folder)}
        return [Tombstone.parse(self._read(path, MAX_RECORD_BYTES), name) for path, name in ids.items() if name]

    def clips(self) -> list[Clip]:
        return self._clips

    def groups(self) -> dict[str, CellGroup]:
        return self._groups

    def cells(self, name: str) -> dict[str, Cell]:
        return {
            self._clips[number].clip_id: Cell(is_ok=outcome.state == "ok", digest=outcome.digest)
            for number, (_, outcome) in self._cells(name).items()
        }

    def load(self, name: str, clip_id: str, specs: Mapping[str, ArraySpec]) -> LoadedCell:
        place, outcome = self._cells(name)[self._numbers[clip_id]]
        if outcome.state != "ok":
            return LoadedCell(outcome=outcome, chunks={})
        read = self._from_tar if self._record["as"] == "webdataset" else self._from_safetensors
        stored = read(name, self._numbers[clip_id], place, specs)
        check_cell(self.name, clip_id, outcome, stored)
        return LoadedCell(outcome=outcome, chunks={array: encode_row(specs[array], stored[array]) for array in specs})

    def media(self) -> dict[str, str]:
        outcomes = [entry for name in self._groups for entry in self._cells(name).items()]
        return {
            self._clips[number].clip_id: outcome.media_sha256
            for number, (_, outcome) in outcomes
            if outcome.state == "ok" and outcome.media_sha256
        }

    def canaries(self, name: str) -> Canaries | None:
        kind, group = name.split("/")
        key, identity = canary_key(kind, group), self._groups[name].identity
        if key not in self._sums:
            return None
        return Canaries.parse(self._read(key, max_canary_bytes(kind, identity)), kind, identity)

    def samples(self) -> dict[str, list[Sample]]:
        found: dict[str, list[Sample]] = {}
        for path in self._sums:
            if (match := _SAMPLES_FILE.fullmatch(path)) and SAMPLES_NAME.fullmatch(match[1]):
                table = read_table(self._read(path, MAX_TABLE_BYTES), SAMPLE_SCHEMA, path)
                found[match[1]] = table_to_samples(table)
        return found

    def journal(self) -> Iterable[tuple[str, dict[str, Any]]]:
        return ()

    def provenance(self) -> dict[str, Any]:
        return {"export": self.name, "sums": sha256_hex(repr(sorted(self._sums.items())).encode())}

    def _read_sums(self) -> dict[str, str]:
        lines = get_bounded(self._files, SUMS, MAX_TABLE_BYTES).decode(errors="replace").splitlines()
        matches = [_SUM.fullmatch(line) for line in lines]
        sums = {match[2]: match[1] for match in matches if match}
        try:
            for path in sums:
                check_relative_path(path)
        except UserError as error:
            raise StoreFormatError(f"{self.name}: {SUMS} names a file outside: {error}") from error
        if not all(matches):
            raise StoreFormatError(f"{self.name}: {SUMS} has a line that is no checksum and plain file name")
        return sums

    def _read(self, path: str, max_bytes: int) -> bytes:
        """A file of the export, its size bounded and its digest checked."""
        if path not in self._sums:
            raise StoreDamagedError(f"{self.name}: {path} is not in {SUMS}; get the whole export again")
        try:
            data = get_bounded(self._files, path, max_bytes)
        except FileNotFoundError:
            raise StoreDamagedError(f"{self.name}: {path} is missing; get the whole export again") from None
        if sha256_hex(data) != self._sums[path]:
            raise StoreDamagedError(f"{self.name}: {path} differs from its digest in {SUMS}; get it again")
        return data

    def _block_rows(self) -> dict[str, int]:
        rows = self._record.get("block_rows")
        try:
            return check_block_rows(rows)
        except (UserError, TypeError, ValueError, AttributeError) as error:
            raise StoreFormatError(f"{self.name}: {RECORD} has no usable block rows: {error}") from error

    def _entries(self) -> dict[str, Any]:
        entries = self._record.get("groups")
        if not isinstance(entries, dict):
            raise StoreFormatError(f"{self.name}: {RECORD} lists no groups")
        return entries

    def _cells(self, name: str) -> dict[int, tuple[int, RowOutcome]]:
        """Number of the clip -> place among the group's cells, and outcome."""
        if name not in self._outcomes:
            path = f"cells/{name}.parquet"
            lines = read_table(self._read(path, MAX_TABLE_BYTES), CELL_SCHEMA, path).to_pylist()
            outcomes = {}
            for place, line in enumerate(lines):
                number = line.pop("number")
                kind = name.split("/")[0]
                if not 0 <= number < len(self._clips) or self._clips[number].kind != kind or number in outcomes:
                    raise StoreFormatError(f"{self.name}: {path} speaks of clip {number}, which is none of its kind")
                if line["state"] not in ("ok", "failed"):
                    raise StoreFormatError(f"{self.name}: {path} has the state {line['state']!r}")
                outcomes[number] = (place, RowOutcome(**line))
            self._outcomes[name] = outcomes
        return self._outcomes[name]

    def _from_tar(self, name: str, number: int, place: int, specs: Mapping[str, ArraySpec]) -> dict[str, np.ndarray]:
        size = self.block_rows[name.split("/")[0]]
        limit = size * (sum(spec.row_bytes + _HEADER_BYTES for spec in specs.values()) + 4 * _HEADER_BYTES) + (1 << 20)
        path = tar_path(f"data/{name}", place // size)
        data, members = self._tar(path, limit)
        stored: dict[str, np.ndarray] = {}
        for array, spec in specs.items():
            offset, length = members.get(f"{number:09d}.{array}.npy", (0, 0))
            stored[array] = _npy(data[offset : offset + length], spec, path)
        return stored

    def _open_tar(self, path: str, limit: int) -> tuple[memoryview, dict[str, tuple[int, int]]]:
        data = self._read(path, limit)
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                members = {m.name: (m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()}
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            raise StoreFormatError(f"{self.name}: {path} is not a plain tar ({error})") from error
        return memoryview(data), members

    def _from_safetensors(
        self, name: str, number: int, place: int, specs: Mapping[str, ArraySpec]
    ) -> dict[str, np.ndarray]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = clip_path(f"data/{name}", number)
        limit = sum(spec.row_bytes for spec in specs.values()) + 16 * _HEADER_BYTES
        try:
            arrays = load(self._read(path, limit))
        except (SafetensorError, KeyError, ValueError) as error:
            raise StoreFormatError(f"{self.name}: {path} is not a safetensors file ({error})") from error
        stored: dict[str, np.ndarray] = {}
        for array, spec in specs.items():
            items = arrays.get(array)
            if items is None or items.shape != spec.row_shape or items.dtype != np.dtype(spec.dtype):
                raise StoreFormatError(f"{self.name}: {path} does not hold {array} {spec.row_shape} {spec.dtype}")
            stored[array] = items
        return stored


def _npy(data: memoryview, spec: ArraySpec, path: str) -> np.ndarray:
    """An .npy member of exactly the wanted shape and type; its header decides no memory and nothing is unpickled."""
    source = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(source) != (1, 0):
            raise ValueError("version")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(source)
        good = (shape, is_fortran, dtype) == (spec.row_shape, False, np.dtype(spec.dtype))
    except ValueError:
        good = False
    if not good or len(data) - source.tell() != spec.row_bytes:
        raise StoreFormatError(f"{path}: a member does not hold {spec.name} {spec.row_shape} {spec.dtype}")
    return np.frombuffer(data[source.tell() :], dtype=spec.dtype).reshape(spec.row_shape)


def _group(name: str, entry: Any) -> CellGroup:
    kind, _, group = name.partition("/")
    if kind not in KINDS or not GROUP_NAME.fullmatch(group) or not isinstance(entry, dict):
        raise StoreFormatError(f"{RECORD} names the group {name[:100]!r}")
    identity = parse_identity(entry.get("identity"), name)
    weights, batch, codec = entry.get("weights"), entry.get("batch_shape"), entry.get("codec")
    good = type(weights) is str and len(weights) < 1000 and type(batch) is int and 1 <= batch <= 1 << 20
    if not good or codec not in CODECS or identity.group_name != group:
        raise StoreFormatError(f"{RECORD}: {name} must have its identity, weights, batch_shape and codec")
    array_specs(identity, kind, blocks=0, block_rows=1)  # refuses rows of impossible size
    return CellGroup(identity=identity, weights=weights, batch_shape=batch, codec=codec)
