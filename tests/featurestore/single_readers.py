"""Each reader of a file by itself, on bytes changed at random: thousands of cases in the time of one whole store.

Shared by `test_hostile.py` and `tests/stress/fuzz.py`. Chunks get their checksum made right, so that the decompressor
sees them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from featurestore.identity import FeatureIdentity
from featurestore.objects.base import parse_listing
from featurestore.parquet import read_table
from featurestore.records import Receipt, Tombstone, parse_journal
from featurestore.reference_clips import ReferenceClips
from featurestore.schemas import CLIP_SCHEMA, SAMPLE_SCHEMA, table_to_clips, table_to_samples
from featurestore.shards import build_shard, decode_row, encode_row, parse_index
from featurestore.snapshots import Snapshot, snapshot_schema
from featurestore.zarr_metadata import ArraySpec, parse_array, parse_root
from mervcache.errors import MervCacheError
from tests.featurestore.crafted import Choices

Case = tuple[str, bytes, Callable[[bytes], Any]]

SPEC = ArraySpec(name="tokens", rows=4, row_shape=(4, 4, 4, 64), block_rows=4, dtype="float16")


def cases_of(store: Path) -> list[Case]:
    """(name, sound bytes, reader) of every reader."""
    found: list[Case] = []
    for file in sorted((store / "clips").glob("*.parquet")):
        found.append((file.name, file.read_bytes(), lambda data: table_to_clips(read_table(data, CLIP_SCHEMA, "part"))))
    for file in sorted((store / "samples").glob("*.parquet")):
        found.append(
            (file.name, file.read_bytes(), lambda data: table_to_samples(read_table(data, SAMPLE_SCHEMA, "samples")))
        )
    for file in sorted((store / "snapshots").glob("*.json")):
        record = Snapshot.parse(file.read_bytes(), file.stem)
        schema = snapshot_schema({name.split("/")[1] for name in record.groups})
        table = file.with_suffix(".parquet").read_bytes()
        found.append((file.name, file.read_bytes(), lambda data, name=file.stem: Snapshot.parse(data, name)))
        found.append((file.stem, table, lambda data, schema=schema: read_table(data, schema, "table", exactly=False)))
    for file in sorted((store / "receipts/video").glob("*/*.json")):
        whose = {"kind": "video", "group": file.parent.name, "block": int(file.stem), "block_rows": 4}
        found.append((file.name, file.read_bytes(), lambda data, whose=whose: Receipt.parse(data, **whose)))
    for file in sorted((store / "tombstones").iterdir()):
        found.append((file.name, file.read_bytes(), lambda data, name=file.stem: Tombstone.parse(data, name)))
    for file in sorted((store / "journal").iterdir()):
        found.append((file.name, file.read_bytes(), lambda data: parse_journal(data, "run")))
    for file in sorted((store / "video").glob("*/*/zarr.json")):
        found.append(("array", file.read_bytes(), lambda data, name=file.parent.name: parse_array(name, data)))
    for file in sorted((store / "canaries/video").iterdir()):
        identity = FeatureIdentity.from_dict(
            json.loads((store / "video" / file.stem / "zarr.json").read_text())["attributes"]["identity"]
        )
        reader = partial(ReferenceClips.parse, kind="video", identity=identity)
        found.append((file.name, file.read_bytes(), reader))
    found.append(("root", (store / "zarr.json").read_bytes(), parse_root))
    found.append(
        ("listing", b'{"format":1,"objects":{"zarr.json":280,"clips/part-00000.parquet":17}}\n', parse_listing)
    )
    return found + shard_cases()


def shard_cases() -> list[Case]:
    """Chunks that compress well and badly, and an index."""
    noise = np.random.default_rng(0).standard_normal(SPEC.row_shape).astype(np.float16)
    rows = {0: encode_row(SPEC, noise), 2: encode_row(SPEC, np.zeros(SPEC.row_shape, np.float16))}
    shard = b"".join(build_shard(SPEC, rows))
    cases: list[Case] = [("chunk", chunk, _decode) for chunk in rows.values()]
    return [*cases, ("index", shard[-SPEC.index_bytes :], lambda data: _index(data, len(shard)))]


def _sealed(data: bytes) -> bytes:
    return data[:-4] + struct.pack("<I", google_crc32c.value(data[:-4]))


def _decode(data: bytes) -> None:
    out = np.empty(SPEC.row_shape, SPEC.dtype)
    decode_row(SPEC, np.frombuffer(_sealed(data), np.uint8), out)


def _index(data: bytes, shard_bytes: int) -> None:
    parse_index(SPEC, _sealed(data), shard_bytes)


def changed(data: bytes, choices: Choices) -> bytes:
    """A few bytes anywhere; more often near the ends, where headers and footers are."""
    new = bytearray(data)
    for _ in range(choices.integer(1, 5)):
        if not new:
            break
        near = min(len(new) - 1, 40)
        place = choices.pick(
            (choices.integer(0, near), -1 - choices.integer(0, near), choices.integer(0, len(new) - 1))
        )
        how = choices.integer(0, 5)
        if how <= 2:
            new[place] = choices.pick((0, 1, 2, 127, 128, 255, choices.integer(0, 255)))
        elif how == 3:
            new[place] ^= 1 << choices.integer(0, 7)
        elif how == 4:
            del new[place : place + choices.integer(1, 8)]
        else:
            new[place:place] = bytes([choices.integer(0, 255)]) * choices.integer(1, 8)
    return bytes(new)


def read_one(case: Case, choices: Choices) -> tuple[str, bytes, BaseException | None]:
    """One changed file through its reader: (name, bytes, an undocumented exception or None)."""
    name, sound, reader = case
    data = changed(sound, choices)
    try:
        reader(data)
    except MervCacheError:
        return name, data, None
    except Exception as error:  # that is what is looked for
        return name, data, error
    return name, data, None
