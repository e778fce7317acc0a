"""Crafted stores: valid ones changed on purpose, by bytes and by structure, and everything a reader would do with them.

Shared by `test_hostile.py` (hypothesis chooses) and `tests/stress/fuzz.py` (a random generator chooses). A change keeps
digests and checksums right wherever it can, as anybody can compute them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.locate import ROOT_METADATA
from featurestore.maintenance.verify import verify_store
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter
from mervcache.errors import MervCacheError
from mervcache.files import canonical_json

DEEP = 3000
HUGE = (2**31 - 1, 2**31, 2**40, 2**62, 2**63, 2**64 - 1, 10**400)


class Choices(Protocol):
    """Where decisions come from."""

    def integer(self, low: int, high: int) -> int: ...

    def pick(self, items: Sequence[Any]) -> Any: ...


def deep_list() -> list:
    value: list = []
    for _ in range(DEEP):
        value = [value]
    return value


# ------------------------------------------------------------------ what a reader does


def exercise(path: Path) -> list[BaseException]:
    """Open, list, read and verify; returns whatever was raised that is not documented."""
    unexpected: list[BaseException] = []

    def attempt(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except MervCacheError as error:
            if not str(error):
                unexpected.append(error)
        except Exception as error:  # that is what is looked for
            unexpected.append(error)
        return None

    store = attempt(lambda: FeatureStore.open(path))
    if store is not None:
        for call in (
            *(lambda: store.clips, lambda: store.quarantine, store.samples, store.journal, store.info),
            *(store.unpublished_blocks, lambda: repr(store), lambda: len(store)),
        ):
            attempt(call)
        clips = attempt(lambda: store.clips)
        for key in attempt(lambda: list(store.encoders)) or []:
            _read(attempt, store, key, clips)
    attempt(lambda: verify_store(path, "full", workers=1))
    attempt(lambda: _write_nothing(path))
    return unexpected


def _read(attempt: Callable, store: FeatureStore, key: str, clips: pa.Table | None) -> None:
    ids = clips.filter(clips[key])["clip_id"].to_pylist()[:2] if clips is not None else []
    for clip_id in ids:
        attempt(lambda clip_id=clip_id: store.read([clip_id], encoder=key))
        attempt(lambda clip_id=clip_id: store.read([clip_id], encoder=key, frames=[0]))
    if attempt(lambda: store.encoders[key].prefix_tokens):
        attempt(lambda: store.read_prefix(ids, encoder=key))
    attempt(lambda: store.data_digest(ids, [key]))


def _write_nothing(path: Path) -> None:
    """What a writer reads before it writes."""
    writer = StoreWriter.open(path)
    writer.clips()
    for kind in ("video", "image"):
        for name in writer.encoder_groups(kind):
            group = writer.open_group(kind, name)
            for block in sorted(group.committed_blocks())[:2]:
                group.receipt(block)


# ------------------------------------------------------------------ changes


def change(path: Path, choices: Choices) -> str:
    """Change one thing in the store at `path`; returns what, in words."""
    return choices.pick(CHANGES)(path, choices)


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and "tmp" not in file.relative_to(path).parts)


def change_bytes(path: Path, choices: Choices) -> str:
    """Bits flipped, ranges overwritten, cut, doubled or swapped for those of another file."""
    file = choices.pick(files_of(path))
    data = bytearray(file.read_bytes())
    place = choices.integer(0, max(0, len(data) - 1))
    length = choices.integer(1, 64)
    how = choices.pick(("flip", "overwrite", "cut", "delete", "double", "zeros", "splice", "empty"))
    if how == "flip" and data:
        data[place] ^= 1 << choices.integer(0, 7)
    elif how == "overwrite":
        data[place : place + length] = bytes(choices.integer(0, 255) for _ in range(length))
    elif how == "cut":
        del data[place:]
    elif how == "delete":
        del data[place : place + length]
    elif how == "double":
        data[place:place] = data[place : place + length]
    elif how == "zeros":
        data[place : place + length] = bytes(length)
    elif how == "splice":
        other = choices.pick(files_of(path)).read_bytes()
        data[place : place + length] = other[:length]
    elif how == "empty":
        data.clear()
    file.write_bytes(data)
    return f"{how} at {place} of {file.relative_to(path)}"


def hostile_value(choices: Choices) -> Any:
    kind = choices.integer(0, 13)
    if kind == 0:
        return choices.pick(HUGE)
    if kind == 1:
        return -choices.pick(HUGE)
    if kind == 2:
        return deep_list()
    return choices.pick(
        (
            *(None, True, False, 0, -1, 1, 7, 1.5, float("inf"), float("nan"), 1e308, "", "x", "../../etc/passwd"),
            *("/etc/passwd", "a\0b", "\ud800", "x" * 100_000, [], {}, [[]], {"a": {}}, [None], ["x", 1], "NaN"),
            *("dinov2-000000000000", "video/dinov2-0123456789ab", "00000000", [2**31, 2**31], {"": None}),
        )
    )


def change_json_value(value: Any, choices: Choices, depth: int = 0) -> Any:
    """One entry somewhere inside is replaced, removed, added or repeated."""
    if isinstance(value, dict) and value and (depth < 2 or choices.integer(0, 3)):
        key = choices.pick(sorted(value))
        how = choices.integer(0, 9)
        if how == 0:
            return {k: v for k, v in value.items() if k != key}
        if how == 1:
            return value | {choices.pick(("x", "", "digest", "number", "\ud800", "a" * 999)): hostile_value(choices)}
        return value | {key: change_json_value(value[key], choices, depth + 1)}
    if isinstance(value, list) and value and choices.integer(0, 3):
        place = choices.integer(0, len(value) - 1)
        how = choices.integer(0, 5)
        if how == 0:
            return value[:place]
        if how == 1:
            return [*value, value[place]]
        return [*value[:place], change_json_value(value[place], choices, depth + 1), *value[place + 1 :]]
    return hostile_value(choices)


def change_json(path: Path, choices: Choices) -> str:
    """A JSON file by its structure, its digest made right again, and its name where that holds the digest."""
    files = [file for file in files_of(path) if file.suffix == ".json"]
    file = choices.pick(files)
    document = change_json_value(json.loads(file.read_bytes()), choices)
    top = file.relative_to(path).parts[0]
    text = write_json(file, document, top if choices.integer(0, 4) else "raw")
    return f"{file.relative_to(path)} now {text[:300]!r}"


def write_json(file: Path, document: Any, top: str) -> str:
    """Put a document where a store has it, as a forger would: canonical, digest and name right."""
    try:
        if top in ("receipts", "snapshots", "tombstones"):
            content = {name: value for name, value in document.items() if name != "digest"}
            digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()
            text = canonical_json(content | {"digest": digest}) + "\n"
            file = rename_with_digest(file, top, content, digest)
        elif top == "journal":
            digest = hashlib.sha256(canonical_json(document["record"]).encode()).hexdigest()
            text = canonical_json({"record": document["record"], "digest": digest}) + "\n"
        elif file.name == ROOT_METADATA and "attributes" in document:
            record = document["attributes"].get("merv_cache", document["attributes"])
            if record.pop("digest", None):
                record["digest"] = hashlib.sha256(canonical_json(record).encode()).hexdigest()[:32]
            text = json.dumps(document, sort_keys=True, indent=2) + "\n"
        else:
            text = json.dumps(document, sort_keys=True, indent=2) + "\n"
    except (TypeError, AttributeError, KeyError, ValueError, RecursionError):
        try:
            text = json.dumps(document)
        except RecursionError:
            text = "[" * DEEP * 30 + "]" * DEEP * 30
    file.write_text(text, errors="surrogatepass")
    return text


def rename_with_digest(file: Path, top: str, content: dict, digest: str) -> Path:
    if top == "snapshots":
        sequence = content.get("sequence")
        name = f"{sequence:08d}-{digest[:12]}" if type(sequence) is int and 0 <= sequence < 10**8 else file.stem
    else:
        name = digest[:16] if top == "tombstones" else file.stem
    table = file.with_suffix(".parquet")
    if name != file.stem:
        if table.exists():
            table.rename(file.with_name(f"{name}.parquet"))
        file = file.rename(file.with_name(f"{name}.json"))
    return file


def newest_record(path: Path) -> Path:
    return max((path / "snapshots").glob("*.json"))


def change_identity(path: Path, choices: Choices) -> str:
    """An identity that no encoder has, everywhere under its new name: folders, snapshot, columns, receipts."""
    record_file = newest_record(path)
    record = json.loads(record_file.read_bytes())
    name = choices.pick(sorted(record["groups"]))
    kind, group = name.split("/")
    field = choices.pick(sorted(record["groups"][name]["identity"]))
    value = hostile_value(choices)
    if field == "grid" and choices.integer(0, 1):
        value = [choices.pick((1, 4, 2**10, 2**20, 2**26)) for _ in range(3)]
    if field in ("width", "still_period", "prefix_tokens", "num_frames") and choices.integer(0, 1):
        value = choices.pick((1, 2**10, 2**20, 2**26, 2**31))
    identity = record["groups"][name]["identity"] | {field: value}
    try:
        digest = hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:12]
    except (ValueError, RecursionError):
        digest = group.rpartition("-")[2]
    renamed = f"{group.rpartition('-')[0]}-{digest}"
    for folder in (path / kind, path / "receipts" / kind):
        if renamed != group and (folder / group).exists():
            (folder / group).rename(folder / renamed)
    document_file = path / kind / renamed / "zarr.json"
    document = json.loads(document_file.read_bytes())
    document["attributes"]["identity"] = identity
    write_json(document_file, document, kind)
    entry = record["groups"].pop(name) | {"identity": identity}
    record["groups"][f"{kind}/{renamed}"] = entry
    table_file = record_file.with_suffix(".parquet")
    table = pq.read_table(table_file)
    table = table.rename_columns([c.replace(f"{group}.", f"{renamed}.") for c in table.column_names])
    write_table(table_file, table, choices, plain=True)
    record["table_sha256"] = hashlib.sha256(table_file.read_bytes()).hexdigest()
    write_json(record_file, record, "snapshots")
    is_deep = isinstance(value, list) and value and isinstance(value[0], list)
    return f"{name}: {field} = {'lists in lists' if is_deep else str(value)[:80]}"


def change_array(path: Path, choices: Choices) -> str:
    """An array's document: shapes, chunks, codecs."""
    file = choices.pick([file for file in files_of(path) if file.name == ROOT_METADATA and len(file.parents) > 0])
    document = json.loads(file.read_bytes())
    if document.get("node_type") != "array":
        return change_json(path, choices)
    codec = choices.pick(("gzip", "zstd", "blosc", "numcodecs.pickle", "numcodecs.bz2", "vlen-utf8", "transpose", "x"))
    how = choices.integer(0, 4)
    if how == 0:
        document["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": codec}]
    elif how == 1:
        document["chunk_grid"]["configuration"]["chunk_shape"] = [
            choices.pick((1, 2, 2**10, 2**20, 2**31 - 1)) for _ in document["shape"]
        ]
        document["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    elif how == 2:
        document["shape"] = [choices.pick((0, 1, 8, 2**31, 2**62)) for _ in document["shape"]]
    elif how == 3:
        document["codecs"][0]["configuration"]["codecs"] = [{"name": codec, "configuration": hostile_value(choices)}]
    else:
        document["codecs"][0]["configuration"] = change_json_value(document["codecs"][0]["configuration"], choices)
    write_json(file, document, "video")
    return f"{file.relative_to(path)}: way {how}, {codec}"


def write_table(file: Path, table: pa.Table, choices: Choices, *, plain: bool = False) -> None:
    options: dict[str, Any] = {"compression": "zstd", "data_page_version": "1.0"}
    if not plain:
        options["compression"] = choices.pick(("zstd", "gzip", "snappy", "none", "brotli", "lz4"))
        options["data_page_version"] = choices.pick(("1.0", "2.0"))
        options["use_dictionary"] = choices.pick((True, False))
        options["row_group_size"] = choices.pick((1, 100, 1 << 20))
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    file.write_bytes(sink.getvalue())


def change_table(path: Path, choices: Choices) -> str:
    """A Parquet file by its columns; snapshots name its new digest."""
    file = choices.pick([file for file in files_of(path) if file.suffix == ".parquet"])
    table, how = pq.read_table(file), choices.integer(0, 8)
    name = choices.pick(table.column_names)
    place, field = table.column_names.index(name), table.schema.field(name)
    try:
        if how == 0:
            table = table.drop_columns([name])
        elif how == 1:
            table = table.append_column(choices.pick((name, "x", "")), table[name])
        elif how == 2:
            values = table[name].to_pylist()
            values[choices.integer(0, len(values) - 1)] = None
            table = table.set_column(place, pa.field(name, field.type, nullable=True), pa.array(values, field.type))
        elif how == 3:
            values = [choices.pick((0, -1, -(2**63), 2**63 - 1, 2**40, 3)) for _ in range(table.num_rows)]
            column = pa.array(values if pa.types.is_integer(field.type) else list(map(str, values)))
            table = table.set_column(place, pa.field(name, column.type, nullable=field.nullable), column)
        elif how == 4 and pa.types.is_string(field.type):
            raw = [
                choices.pick((b"\xff\xfe", b"../..", b"", b"tiny/videos/0.mp4", b"\0")) for _ in range(table.num_rows)
            ]
            column = pa.Array.from_buffers(pa.string(), len(raw), pa.array(raw, pa.binary()).buffers())
            table = table.set_column(place, field, column)
        elif how == 5 and pa.types.is_string(field.type):  # a bomb: one long text, many times
            rows = choices.pick((1000, 100_000))
            long = pa.array(["x" * choices.pick((100, 1_000_000))])
            column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), long)
            rest = table.take(pa.array([0] * rows)) if table.num_rows else table
            if rest.num_rows == rows:
                table = rest.set_column(place, pa.field(name, column.type, nullable=field.nullable), column)
        elif how == 6 and table.num_rows:
            table = table.take(pa.array([0] * choices.pick((2, 10_000, 300_000))))
        elif how == 7:
            table = table.slice(0, choices.integer(0, table.num_rows))
        elif how == 8:
            table = table.take(pa.array(list(reversed(range(table.num_rows)))))
        write_table(file, table, choices, plain=how not in (6, 7) or bool(choices.integer(0, 2)))
    except (pa.ArrowException, ValueError, TypeError, IndexError) as error:
        return f"{file.relative_to(path)}: no change ({error})"
    reseal_snapshots(path, file)
    return f"{file.relative_to(path)}: way {how} on {name}"


def change_pages(path: Path, choices: Choices) -> str:
    """Bytes of a Parquet file, its digest in snapshots made right: what a decoder meets past all checks."""
    file = choices.pick([file for file in files_of(path) if file.suffix == ".parquet"])
    data = bytearray(file.read_bytes())
    for _ in range(choices.integer(1, 6)):
        data[choices.integer(0, len(data) - 1)] = choices.pick((0, 1, 127, 128, 255, choices.integer(0, 255)))
    file.write_bytes(data)
    reseal_snapshots(path, file)
    return f"bytes of {file.relative_to(path)}"


def reseal_snapshots(path: Path, file: Path) -> None:
    """Every snapshot that names the file names its new digest."""
    key, sha256 = file.relative_to(path).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()
    for record_file in sorted((path / "snapshots").glob("*.json")):
        if not record_file.is_file():  # an earlier change has made it a pipe without a writer
            continue
        record = json.loads(record_file.read_bytes())
        if key in record["parts"]:
            record["parts"][key] = sha256
        for entry in record["samples"].values():
            if entry["key"] == key:
                entry["sha256"] = sha256
        if file == record_file.with_suffix(".parquet"):
            record["table_sha256"] = sha256
        write_json(record_file, record, "snapshots")


def change_shard(path: Path, choices: Choices) -> str:
    """A chunk or the index of a shard, its checksum made right: what a decompressor meets past the checksum."""
    shards = [file for file in files_of(path) if "/c/" in file.as_posix()]
    file = choices.pick(shards)
    data = bytearray(file.read_bytes())
    rows = 4 if "video" in file.relative_to(path).parts else 3
    start = len(data) - rows * 16 - 4
    if start < 0:
        return change_bytes(path, choices)
    index = [list(struct.unpack_from("<QQ", data, start + 16 * row)) for row in range(rows)]
    row = choices.pick([row for row in range(rows) if index[row][0] != 2**64 - 1] or [0])
    offset, length = index[row]
    if choices.integer(0, 2) and length <= len(data) and length > 20:
        for _ in range(choices.integer(1, 4)):
            at = choices.integer(0, min(31, length - 5)) if choices.integer(0, 1) else choices.integer(0, length - 5)
            data[offset + at] = choices.pick((0, 1, 2, 64, 127, 128, 255, choices.integer(0, 255)))
        struct.pack_into(
            "<I", data, offset + length - 4, google_crc32c.value(bytes(data[offset : offset + length - 4]))
        )
        what = f"chunk {row}"
    else:
        value = choices.pick((0, 1, 4, 5, 16, 20, len(data), 2**31, 2**62, 2**64 - 1, choices.integer(0, len(data))))
        index[row][choices.integer(0, 1)] = value
        struct.pack_into("<QQ", data, start + 16 * row, *index[row])
        struct.pack_into("<I", data, len(data) - 4, google_crc32c.value(bytes(data[start:-4])))
        what = f"index {row} = {index[row]}"
    file.write_bytes(data)
    return f"{what} of {file.relative_to(path)}"


def change_names(path: Path, choices: Choices) -> str:
    """Files become links, folders, pipes or endless; names are added that nobody gave."""
    file = choices.pick(files_of(path))
    how = choices.integer(0, 8)
    if how < 6:
        file.unlink()
    if how == 0:
        file.symlink_to(choices.pick(("/etc/passwd", "/dev/zero", file, "..", "/proc/self/environ")))
    elif how == 1:
        file.mkdir()
    elif how == 2:
        os.mkfifo(file)
    elif how == 3:
        with open(file, "wb") as sparse:
            sparse.truncate(choices.pick((1 << 40, 1 << 33, 300 << 20)))
    elif how == 4:
        pass  # it is gone
    elif how == 5:
        file.symlink_to(choices.pick(files_of(path)))
    elif how == 6:
        name = choices.pick(("part-00007.parquet", "x.999999.parquet", "99999999.json", "99999999-000000000000.json"))
        (file.parent / name).write_bytes(file.read_bytes())
    elif how == 7:
        folder = choices.pick([file.parent for file in files_of(path)])
        (folder / choices.pick(("loop", "c", "zarr.json", "tombstones"))).symlink_to(path) if not (
            folder / "loop"
        ).is_symlink() and not (folder / "c").exists() and not (folder / "zarr.json").exists() else None
    else:
        (path / choices.pick(("tombstones", "samples", "video", "receipts"))).joinpath("é" * 60).mkdir(
            parents=True, exist_ok=True
        )
    return f"way {how} with {file.relative_to(path)}"


CHANGES = (
    change_bytes,
    change_json,
    change_json,
    change_identity,
    change_array,
    change_table,
    change_pages,
    change_shard,
    change_names,
)
