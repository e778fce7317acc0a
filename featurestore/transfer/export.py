"""Export: a store as plain files for other tools, WebDataset tars or one safetensors file per clip; and import.

    OUT/export.json                       format, identities, block rows
    OUT/clips.parquet                     clips in order; a clip's number below is its line here
    OUT/samples/NAME.parquet              conversations
    OUT/cells/KIND/GROUP.parquet          per clip: state, reason, digests
    OUT/data/KIND/GROUP/00000012.tar      webdataset: NUMBER.tokens.npy and so on, NUMBER.json
    OUT/data/KIND/GROUP/000000012.safetensors
    OUT/canaries/KIND/GROUP.safetensors   reference clips, as in the store
    OUT/tombstones/ID.json                as in the store: a removed clip stays removed in every copy
    OUT/SHA256SUMS                        of all of them: `sha256sum -c SHA256SUMS`

Arrays are as stored (bfloat16 as its bits in uint16), so an import gives the same rows and digests back. An imported
folder is untrusted: nothing outside it is opened, no file or array larger than its identity allows is read, and every
file and row must have its digest. File names come from numbers, never from file content.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from featurestore.clips import KINDS, Clip, Sample, check_relative_path
from featurestore.layout import (
    GROUP_NAME,
    SAMPLES_NAME,
    TOMBSTONES,
    check_block_rows,
    record_name,
    reference_clip_key,
    tombstone_key,
)
from featurestore.objects.base import get_bounded, machine_faults
from featurestore.objects.local import LocalObjects
from featurestore.objects.open import in_parallel
from featurestore.parquet import read_table, table_bytes
from featurestore.records import RowOutcome, Tombstone
from featurestore.reference_clips import ReferenceClips, max_reference_clip_bytes
from featurestore.schemas import (
    CLIP_SCHEMA,
    SAMPLE_SCHEMA,
    clips_to_table,
    samples_to_table,
    table_to_clips,
    table_to_samples,
)
from featurestore.shards import encode_row
from featurestore.transfer.merge import Cell, CellGroup, CellSource, LoadedCell, check_cell, decoded_cell
from featurestore.transfer.selection import Selection, windowed_videos
from featurestore.zarr_metadata import CODECS, ArraySpec, array_specs, parse_identity
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import StoreDamagedError, StoreFormatError, UserError, unknown_name
from mervcache.files import canonical_json, is_json_object, load_json, sha256_hex
from mervcache.text import redact

RECORD, CLIPS, SUMS = "export.json", "clips.parquet", "SHA256SUMS"
FORMAT = 1
MAX_TABLE_BYTES = 2 << 30
MAX_RECORD_BYTES = 64 << 20
_HEADER_BYTES = 4096  # of an .npy member, and a clip's fields
_SUM = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_./-]{1,400})")
_SAMPLES_FILE = re.compile(r"samples/([A-Za-z0-9_-]+)\.parquet")
CELL_SCHEMA = pa.schema(
    [pa.field("number", pa.int64(), nullable=False)]
    + [pa.field(name, pa.string()) for name in ("state", "scope", "reason", "digest", "media_sha256", "decoder")]
)
Stored = Mapping[str, np.ndarray]  # array -> stored items
Row = tuple[int, Clip, Stored]  # number, clip


@dataclass(kw_only=True)
class Exported:
    """What was written."""

    folder: str
    clips: int
    cells: int = 0
    files: int = 0
    bytes: int = 0


def export(
    source: CellSource,
    out: str | Path,
    *,
    format: str,
    selection: Selection | None = None,
    progress: ProgressLine = SILENT,
) -> Exported:
    """Write the selected cells into an empty folder."""
    if format not in FORMATS:
        raise UserError(unknown_name("format", format, FORMATS))
    videos = windowed_videos([source])
    selection = (selection or Selection()).with_samples(
        (sample for samples in source.samples().values() for sample in samples), videos
    )
    clips = source.clips()
    selection.check(clips)
    clips = [clip for clip in clips if selection.takes(clip)]
    selected = selection.groups(group.identity for group in source.groups().values())
    groups = {name: group for name, group in source.groups().items() if name.split("/")[1] in selected}
    files = _FileWriter(Path(out))
    record = {
        name: {"identity": g.identity.to_dict(), "weights": g.weights, "batch_shape": g.batch_shape, "codec": g.codec}
        for name, g in groups.items()
    }
    head = {"format": FORMAT, "as": format, "block_rows": dict(source.block_rows), "groups": record}
    origin = source.provenance() | {"store": redact(source.name).rstrip("/").rpartition("/")[2]}  # not the path to it
    files.put(RECORD, (canonical_json(head | {"from": origin}) + "\n").encode())
    files.put(CLIPS, table_bytes(clips_to_table(enumerate(clips))))
    for tombstone in source.tombstones():
        files.put(tombstone_key(tombstone.id), tombstone.to_bytes())
    ids = {clip.clip_id for clip in clips}
    ids |= {video for video, windows in videos.items() if windows & ids}
    for name, samples in source.samples().items():
        of_split = [sample for sample in samples if selection.split in (None, sample.split)]
        kept = [sample for sample in of_split if sample.clip_id is None or sample.clip_id in ids]
        files.put(f"samples/{name}.parquet", table_bytes(samples_to_table(kept)))
    cells = {name: source.cells(name) for name in groups}
    done = Exported(folder=str(out), clips=len(clips))
    progress.start(sum(sum(clip.clip_id in cells[name] for clip in clips) for name in groups))
    for name in groups:
        numbered = [(number, clip) for number, clip in enumerate(clips) if clip.clip_id in cells[name]]
        done.cells += _export_group(source, files, name, numbered, format, progress)
        if reference_clips := source.reference_clips(name):
            files.put(reference_clip_key(*name.split("/")), reference_clips.to_bytes())
    files.close()
    done.files, done.bytes = len(files.sums), files.bytes
    return done


def _export_group(
    source: CellSource,
    files: _FileWriter,
    name: str,
    numbered: list[tuple[int, Clip]],
    format: str,
    progress: ProgressLine,
) -> int:
    """Write the cells of a group, as many in one piece as a block has rows; returns their number."""
    kind = name.split("/")[0]
    group, size = source.groups()[name], source.block_rows[kind]
    specs = array_specs(group.identity, kind, blocks=0, block_rows=size, codec=group.codec)
    lines: list[dict[str, Any]] = []
    for start in range(0, len(numbered), size):
        part = numbered[start : start + size]
        loaded = in_parallel(lambda pair: source.load(name, pair[1].clip_id, specs), part, source.parallel_reads)
        rows: list[Row] = []
        for (number, clip), cell in zip(part, loaded, strict=True):
            outcome = {field: getattr(cell.outcome, field) for field in CELL_SCHEMA.names[1:]}
            lines.append({"number": number} | outcome)
            if cell.outcome.state == "ok":
                rows.append((number, clip, decoded_cell(cell, specs)))
        for path, data in FORMATS[format](f"data/{name}", start // size, rows) if rows else ():
            files.put(path, data)
        progress.advance(len(part))
    files.put(f"cells/{name}.parquet", table_bytes(pa.Table.from_pylist(lines, schema=CELL_SCHEMA)))
    return len(lines)


def _tar(folder: str, block: int, rows: list[Row]) -> Iterator[tuple[str, bytes]]:
    """One tar per block; the same rows give the same bytes."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, clip, stored in rows:
            for name, array in stored.items():
                item = io.BytesIO()
                np.save(item, array, allow_pickle=False)
                _add(tar, f"{number:09d}.{name}.npy", item.getvalue())
            fields = {field: getattr(clip, field) for field in clip.__dataclass_fields__} | {"clip_id": clip.clip_id}
            _add(tar, f"{number:09d}.json", json.dumps(fields, sort_keys=True).encode())
    yield tar_path(folder, block), sink.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _safetensors(folder: str, block: int, rows: list[Row]) -> Iterator[tuple[str, bytes]]:
    """One file per clip."""
    from safetensors.numpy import save

    for number, clip, stored in rows:
        yield clip_path(folder, number), save(dict(stored), metadata={"clip_id": clip.clip_id})


def tar_path(folder: str, block: int) -> str:
    return f"{folder}/{block:08d}.tar"


def clip_path(folder: str, number: int) -> str:
    return f"{folder}/{number:09d}.safetensors"


FORMATS: dict[str, Callable[[str, int, list[Row]], Iterator[tuple[str, bytes]]]] = {
    "webdataset": _tar,
    "safetensors": _safetensors,
}


class _FileWriter:
    """Writes files into an empty folder and keeps their checksums; the list of checksums is written last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.sums: dict[str, str] = {}
        self.bytes = 0
        with machine_faults(f"make {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise UserError(f"{folder} is not empty: export into a new folder")

    def put(self, path: str, data: bytes) -> None:
        target = self._folder / path
        with machine_faults(f"write {path}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        self.sums[path] = sha256_hex(data)
        self.bytes += len(data)

    def close(self) -> None:
        text = "".join(f"{digest}  {path}\n" for path, digest in sorted(self.sums.items()))
        with machine_faults(f"write {SUMS}"):
            (self._folder / SUMS).write_text(text)


class ExportCells:
    """The cells of a folder that `export` wrote, which may be untrusted."""

    parallel_reads = 1

    def __init__(self, folder: str | Path) -> None:
        self.name = str(folder)
        if not os.path.isfile(os.path.join(folder, SUMS)):
            raise UserError(f"{folder} is no exported store: it has no {SUMS}")
        self._files = LocalObjects(folder)  # refuses links and names that lead out of the folder
        self._sums = self._read_sums()
        record = load_json(self._read(RECORD, MAX_RECORD_BYTES), RECORD)
        record = record if is_json_object(record) else {}
        self._format = str(record.get("as"))
        if record.get("format") != FORMAT or self._format not in FORMATS:
            raise StoreFormatError(f"{folder}: {RECORD} is of another version; import it with a newer merv-pipeline")
        try:
            self.block_rows: Mapping[str, int] = check_block_rows(record.get("block_rows"))
        except (UserError, TypeError, ValueError, AttributeError) as error:
            raise StoreFormatError(f"{self.name}: {RECORD} has no usable block rows: {error}") from error
        if not is_json_object(groups := record.get("groups")):
            raise StoreFormatError(f"{self.name}: {RECORD} lists no groups")
        self._groups = {name: _parse_group(name, entry) for name, entry in groups.items()}
        table = read_table(self._read(CLIPS, MAX_TABLE_BYTES), CLIP_SCHEMA, CLIPS)
        self._clips = [clip for _, clip in table_to_clips(table)]
        self._numbers = {clip.clip_id: number for number, clip in enumerate(self._clips)}
        self._outcomes: dict[str, dict[int, tuple[int, RowOutcome]]] = {}  # group -> number -> position, outcome
        self._tar = lru_cache(4)(self._open_tar)

    def tombstones(self) -> list[Tombstone]:
        ids = {path: record_name(path) for path in self._sums if path.startswith(f"{TOMBSTONES}/")}
        return [Tombstone.parse(self._read(path, MAX_RECORD_BYTES), name) for path, name in ids.items() if name]

    def clips(self) -> list[Clip]:
        return self._clips

    def groups(self) -> dict[str, CellGroup]:
        return self._groups

    def cells(self, name: str) -> dict[str, Cell]:
        return {
            self._clips[number].clip_id: Cell(is_ok=outcome.state == "ok", digest=outcome.digest)
            for number, (_, outcome) in self._outcomes_of(name).items()
        }

    def load(self, name: str, clip_id: str, specs: Mapping[str, ArraySpec]) -> LoadedCell:
        position, outcome = self._outcomes_of(name)[self._numbers[clip_id]]
        if outcome.state != "ok":
            return LoadedCell(outcome=outcome, chunks={})
        read = self._read_from_tar if self._format == "webdataset" else self._read_safetensors
        stored = read(name, self._numbers[clip_id], position, specs)
        check_cell(self.name, clip_id, outcome, stored)
        return LoadedCell(outcome=outcome, chunks={array: encode_row(specs[array], stored[array]) for array in specs})

    def media(self) -> dict[str, str]:
        return {
            self._clips[number].clip_id: outcome.media_sha256
            for name in self._groups
            for number, (_, outcome) in self._outcomes_of(name).items()
            if outcome.state == "ok" and outcome.media_sha256
        }

    def reference_clips(self, name: str) -> ReferenceClips | None:
        kind, group = name.split("/")
        key, identity = reference_clip_key(kind, group), self._groups[name].identity
        if key not in self._sums:
            return None
        return ReferenceClips.parse(self._read(key, max_reference_clip_bytes(kind, identity)), kind, identity)

    def samples(self) -> dict[str, list[Sample]]:
        samples: dict[str, list[Sample]] = {}
        for path in self._sums:
            if (match := _SAMPLES_FILE.fullmatch(path)) and SAMPLES_NAME.fullmatch(match[1]):
                table = read_table(self._read(path, MAX_TABLE_BYTES), SAMPLE_SCHEMA, path)
                samples[match[1]] = table_to_samples(table)
        return samples

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

    def _outcomes_of(self, name: str) -> dict[int, tuple[int, RowOutcome]]:
        """Number of the clip -> position among the group's cells, and outcome."""
        if name not in self._outcomes:
            path, kind = f"cells/{name}.parquet", name.split("/")[0]
            lines = read_table(self._read(path, MAX_TABLE_BYTES), CELL_SCHEMA, path).to_pylist()
            outcomes: dict[int, tuple[int, RowOutcome]] = {}
            for position, line in enumerate(lines):
                number: int = line.pop("number")
                if not 0 <= number < len(self._clips) or self._clips[number].kind != kind or number in outcomes:
                    raise StoreFormatError(f"{self.name}: {path} lists clip {number}, which is none of its kind")
                if line["state"] not in ("ok", "failed"):
                    raise StoreFormatError(f"{self.name}: {path} has the state {line['state']!r}")
                outcomes[number] = (position, RowOutcome(**line))
            self._outcomes[name] = outcomes
        return self._outcomes[name]

    def _read_from_tar(self, name: str, number: int, position: int, specs: Mapping[str, ArraySpec]) -> Stored:
        size = self.block_rows[name.split("/")[0]]
        limit = size * (sum(spec.row_bytes + _HEADER_BYTES for spec in specs.values()) + 4 * _HEADER_BYTES) + (1 << 20)
        path = tar_path(f"data/{name}", position // size)
        data, members = self._tar(path, limit)
        stored: dict[str, np.ndarray] = {}
        for array, spec in specs.items():
            offset, length = members.get(f"{number:09d}.{array}.npy", (0, 0))
            stored[array] = _npy(data[offset : offset + length], spec, path)
        return stored

    def _open_tar(self, path: str, limit: int) -> tuple[memoryview, dict[str, tuple[int, int]]]:
        """The bytes of a tar, and offset and size of its members."""
        data = self._read(path, limit)
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                members = {m.name: (m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()}
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            raise StoreFormatError(f"{self.name}: {path} is not a plain tar ({error})") from error
        return memoryview(data), members

    def _read_safetensors(self, name: str, number: int, position: int, specs: Mapping[str, ArraySpec]) -> Stored:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = clip_path(f"data/{name}", number)
        limit = sum(spec.row_bytes for spec in specs.values()) + 16 * _HEADER_BYTES
        try:
            arrays = load(self._read(path, limit))
        except (SafetensorError, KeyError, ValueError) as error:
            raise StoreFormatError(f"{self.name}: {path} is not a safetensors file ({error})") from error
        for array, spec in specs.items():
            items = arrays.get(array)
            if items is None or items.shape != spec.row_shape or items.dtype != np.dtype(spec.dtype):
                raise StoreFormatError(f"{self.name}: {path} does not hold {array} {spec.row_shape} {spec.dtype}")
        return {array: arrays[array] for array in specs}


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


def _parse_group(name: str, entry: Any) -> CellGroup:
    kind, _, group = name.partition("/")
    if kind not in KINDS or not GROUP_NAME.fullmatch(group) or not is_json_object(entry):
        raise StoreFormatError(f"{RECORD} names the group {name[:100]!r}")
    identity = parse_identity(entry.get("identity"), name)
    weights, batch, codec = entry.get("weights"), entry.get("batch_shape"), entry.get("codec")
    if (
        type(weights) is not str
        or len(weights) >= 1000
        or type(batch) is not int
        or not 1 <= batch <= 1 << 20
        or codec not in CODECS
        or identity.group_name != group
    ):
        raise StoreFormatError(f"{RECORD}: {name} must have its identity, weights, batch_shape and codec")
    array_specs(identity, kind, blocks=0, block_rows=1)  # refuses rows of impossible size
    return CellGroup(identity=identity, weights=weights, batch_shape=batch, codec=codec)
