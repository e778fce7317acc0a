"""Export: a store as plain files for other tools, WebDataset tars or one safetensors file per clip.

    OUT/export.json                       format, identities, block rows
    OUT/clips.parquet                     clips in order; a clip's number below is its line here
    OUT/samples/NAME.parquet              conversations
    OUT/cells/KIND/GROUP.parquet          per clip: state, reason, digests
    OUT/data/KIND/GROUP/00000012.tar      webdataset: NUMBER.tokens.npy and so on, NUMBER.json
    OUT/data/KIND/GROUP/000000012.safetensors
    OUT/canaries/KIND/GROUP.safetensors   as in the store
    OUT/tombstones/ID.json                as in the store: removals hold wherever its clips go
    OUT/SHA256SUMS                        of all of them: `sha256sum -c SHA256SUMS`

Arrays are as stored (bfloat16 as its bits in uint16), so an import gives the same rows and digests back.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from featurestore.clips import Clip
from featurestore.columns import clips_to_table, samples_to_table
from featurestore.digests import canonical_json, sha256_hex
from featurestore.errors import UserError, unknown_name
from featurestore.layout import canary_key, tombstone_key
from featurestore.lookup import encoder_keys
from featurestore.metadata import array_specs
from featurestore.parts import table_bytes
from featurestore.places.by_url import in_parallel
from featurestore.places.objects import machine_faults
from featurestore.progress import SILENT, Progress
from featurestore.share.cells import CellGroup, CellSource, LoadedCell, decoded_cell
from featurestore.share.selection import Selection

RECORD, CLIPS, SUMS = "export.json", "clips.parquet", "SHA256SUMS"
FORMAT = 1
CELL_SCHEMA = pa.schema(
    [pa.field("number", pa.int64(), nullable=False)]
    + [pa.field(name, pa.string()) for name in ("state", "scope", "reason", "digest", "media_sha256", "decoder")]
)
Row = tuple[int, Clip, Mapping[str, np.ndarray]]  # number, clip, stored arrays


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
    progress: Progress = SILENT,
) -> Exported:
    """Write the selected cells into an empty folder."""
    if format not in FORMATS:
        raise UserError(unknown_name("format", format, FORMATS))
    selection, folder = selection or Selection(), Path(out)
    selection = selection.with_samples(sample for samples in source.samples().values() for sample in samples)
    clips = source.clips()
    selection.check(clips)
    clips = [clip for clip in clips if selection.takes(clip)]
    wanted = set(selection.groups(encoder_keys(source.groups())))
    groups = {name: group for name, group in source.groups().items() if name.split("/")[1] in wanted}
    files = _Files(folder)
    _put_head(files, source, selection, format, clips, groups)
    cells = {name: source.cells(name) for name in groups}
    done = Exported(folder=str(folder), clips=len(clips))
    progress.start(sum(sum(clip.clip_id in cells[name] for clip in clips) for name in groups))
    for name in groups:
        numbered = [(number, clip) for number, clip in enumerate(clips) if clip.clip_id in cells[name]]
        done.cells += _export_group(source, files, name, numbered, format, progress)
        if canaries := source.canaries(name):
            files.put(canary_key(*name.split("/")), canaries.to_bytes())
    files.close()
    done.files, done.bytes = len(files.sums), files.bytes
    return done


def _put_head(
    files: _Files,
    source: CellSource,
    selection: Selection,
    format: str,
    clips: list[Clip],
    groups: Mapping[str, CellGroup],
) -> None:
    """Everything but cells: what the export is, its clips, removals and conversations."""
    record = {
        name: {"identity": g.identity.to_dict(), "weights": g.weights, "batch_shape": g.batch_shape, "codec": g.codec}
        for name, g in groups.items()
    }
    head = {"format": FORMAT, "as": format, "block_rows": dict(source.block_rows), "groups": record}
    files.put(RECORD, (canonical_json(head | {"from": source.provenance()}) + "\n").encode())
    files.put(CLIPS, table_bytes(clips_to_table(enumerate(clips))))
    for stone in source.tombstones():
        files.put(tombstone_key(stone.id), stone.to_bytes())
    ids = {clip.clip_id for clip in clips}
    for name, samples in source.samples().items():
        of_split = [sample for sample in samples if selection.split in (None, sample.split)]
        mine = [sample for sample in of_split if sample.clip_id is None or sample.clip_id in ids]
        files.put(f"samples/{name}.parquet", table_bytes(samples_to_table(mine)))


def _export_group(
    source: CellSource,
    files: _Files,
    name: str,
    numbered: list[tuple[int, Clip]],
    format: str,
    progress: Progress,
) -> int:
    kind = name.split("/")[0]
    group, size = source.groups()[name], source.block_rows[kind]
    specs = array_specs(group.identity, kind, blocks=0, block_rows=size, codec=group.codec)
    lines: list[dict] = []
    for block in range(0, len(numbered), size):
        part = numbered[block : block + size]
        loaded = in_parallel(lambda pair: source.load(name, pair[1].clip_id, specs), part, source.parallel_reads)
        lines += [{"number": number} | _outcome(cell) for (number, _), cell in zip(part, loaded, strict=True)]
        rows = [
            (number, clip, decoded_cell(cell, specs))
            for (number, clip), cell in zip(part, loaded, strict=True)
            if cell.outcome.state == "ok"
        ]
        for path, data in FORMATS[format](f"data/{name}", block // size, rows) if rows else ():
            files.put(path, data)
        progress.advance(len(part))
    files.put(f"cells/{name}.parquet", table_bytes(pa.Table.from_pylist(lines, schema=CELL_SCHEMA)))
    return len(lines)


def _outcome(cell: LoadedCell) -> dict[str, str | None]:
    return {name: getattr(cell.outcome, name) for name in CELL_SCHEMA.names[1:]}


def _tar(folder: str, block: int, rows: list[Row]) -> Iterator[tuple[str, bytes]]:
    """One tar per block; the same rows give the same bytes."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, clip, stored in rows:
            for name, array in stored.items():
                item = io.BytesIO()
                np.save(item, array, allow_pickle=False)
                _add(tar, f"{number:09d}.{name}.npy", item.getvalue())
            told = {field: getattr(clip, field) for field in clip.__dataclass_fields__} | {"clip_id": clip.clip_id}
            _add(tar, f"{number:09d}.json", json.dumps(told, sort_keys=True).encode())
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


class _Files:
    """A folder in the making, with the checksum of every file; the list of sums is written last."""

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
