"""Crafted JSON of the kept corpus; digests are right, so that the check that a case is about has to refuse it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from featurestore.identity import FeatureIdentity
from featurestore.records import COLUMNS
from featurestore.zarr_metadata import document_bytes
from mervcache.files import canonical_json, record_digest

IDENTITY = FeatureIdentity(
    encoder="dinov2",
    architecture={"class": "Tiny"},
    weights_sha256="a" * 64,
    layer="last",
    num_frames=16,
    frame_rule="linspace-32/2",
    decode="frames/1",
    preprocessing={"size": 28},
    still_period=2,
    grid=(2, 2, 2),
    pooling="adaptive-avg",
    width=4,
)
Case = tuple[str, bytes, str, str, str]  # name, bytes, reader, error and words of it, why


def sealed(record: dict[str, Any]) -> bytes:
    """A record as its writer leaves it, with a digest that is right."""
    return (canonical_json(record | {"digest": record_digest(record)}) + "\n").encode()


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def root(**changes: Any) -> bytes:
    record = {"format": 1, "datasets": ["lab"], "block_rows": {"video": 64, "image": 256}} | changes
    return document_bytes({"zarr_format": 3, "node_type": "group", "attributes": {"merv_cache": record}})


def roots() -> Iterator[Case]:
    yield "root-deep", nested(5000), "root", "StoreFormatError: not readable JSON", "nested until the parser gives up"
    yield "root-text", b"\xff\xfe{}", "root", "StoreFormatError: not readable JSON", "no UTF-8"
    yield "root-newer", root(format=2), "root", "StoreFormatError: has format 2", "a format that is not known yet"
    yield "root-true", root(format=True), "root", "StoreFormatError: has format True", "true equals 1 in Python"
    rows = {"video": 2**62, "image": 256}
    yield (
        "root-rows",
        root(block_rows=rows),
        "root",
        "StoreFormatError: block rows of video must",
        "an index of 2**66 bytes",
    )
    yield (
        "root-names",
        root(datasets=[{}]),
        "root",
        "StoreFormatError: must be a list of names",
        "a name that is no text",
    )


def group(**changes: Any) -> bytes:
    attributes = {"identity": IDENTITY.to_dict() | changes, "weights": "pretrained", "batch_shape": 1}
    text = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes})  # lets NaN through
    return text.encode()


def groups() -> Iterator[Case]:
    def case(name: str, words: str, why: str, **changes: Any) -> Case:
        return f"group-{name}", group(**changes), "group", f"StoreFormatError: {words}", why

    huge = {"grid": [2**20, 2**20, 2**20]}
    yield case("petabyte", "must be positive integers of at most", "a clip of a petabyte", **huge)
    yield case("negative", "must be positive integers", "sizes below zero", width=-4)
    yield case("true", "must be positive integers", "true is no size", width=True)
    yield case("path", "encoder names are lower case", "a name that climbs out", encoder="../../etc/x")
    yield case("nan", "holds no usable identity", "NaN has no canonical text", architecture={"x": float("nan")})
    yield case("long", "must be positive integers", "a text of megabytes in every message", layer="x" * 3000)
    yield case("other", "not of its own folder", "another group's identity", width=8)
    yield case("unknown", "unknown fields", "fields that decide bytes and are not known", dilation=2)


def receipt(**changes: Any) -> dict[str, Any]:
    rows = {name: [None] * 4 for name in COLUMNS} | {"state": ["ok", "failed", "skipped", "empty"]}
    rows |= {"digest": ["0" * 32, None, None, None], "scope": [None, "clip", None, None]}
    rows |= {"reason": [None, "cut off", None, None]}
    shards = {"tokens": {"sha256": "a" * 64, "bytes": 100}}
    whose = {"kind": "video", "group": IDENTITY.group_name, "block": 0}
    return {"format": 1, **whose, "rows": rows, "shards": shards} | changes


def receipts() -> Iterator[Case]:
    def case(name: str, words: str, why: str, **changes: Any) -> Case:
        return f"receipt-{name}", sealed(receipt(**changes)), "receipt", words, why

    rows = receipt()["rows"]
    shard = {"sha256": "a" * 64, "bytes": 100}
    yield case("bytes", "StoreFormatError: has size -1", "a negative size", shards={"tokens": shard | {"bytes": -1}})
    yield case(
        "huge", "StoreFormatError: has size", "a size past any disk", shards={"tokens": shard | {"bytes": 10**30}}
    )
    yield case(
        "sha",
        "StoreFormatError: malformed sha256",
        "a digest that no bytes have",
        shards={"tokens": shard | {"sha256": "z"}},
    )
    yield case("shard", "StoreFormatError: must list the shards", "a shard outside the group", shards={"../x": shard})
    yield case("number", "StoreFormatError: has number", "a count of 400 digits", number=10**400, replaces="x")
    yield case(
        "rows", "StoreFormatError: must list 4 rows", "more rows than a block has", rows=rows | {"state": ["empty"] * 5}
    )
    state = ["ok", {"a": []}, "skipped", "empty"]
    yield case(
        "types", "StoreFormatError: must hold text or null", "a mapping for a text", rows=rows | {"state": state}
    )
    reason = [None, "x" * 501, None, None]
    yield case(
        "reason", "StoreFormatError: reason of 501 characters", "a reason of any length", rows=rows | {"reason": reason}
    )
    yield case("other", "StoreDamagedError: its own digest", "another block's receipt", block=1)
    data = sealed(receipt()).replace(b'"block":0', b'"block": 0')
    yield "receipt-space", data, "receipt", "StoreDamagedError: its own digest", "white space that no digest covers"


def snapshot(**changes: Any) -> tuple[bytes, str]:
    """A record and the id that belongs to it."""
    record = {"format": 1, "sequence": 1, "parent": None, "parts": {}, "samples": {}, "groups": {}} | {
        "block_rows": {"video": 64, "image": 256},
        "table_sha256": "a" * 64,
    }
    record |= changes
    return sealed(record), f"{1:08d}-{record_digest(record)[:12]}"


def snapshots() -> Iterator[Case]:
    def case(name: str, words: str, why: str, **changes: Any) -> Case:
        data, snapshot_id = snapshot(**changes)
        return f"snapshot-{name}@{snapshot_id}", data, "snapshot", words, why

    identity = IDENTITY.to_dict()
    good = {"identity": identity, "weights": "w", "batch_shape": 1, "stored_bytes": 0, "receipts": {}}
    good |= {"counts": dict.fromkeys(("ok", "failed", "skipped", "empty"), 0)}
    name = f"video/{IDENTITY.group_name}"
    entry = {"key": "samples/../../../etc/passwd", "sha256": "a" * 64}
    yield case("samples", "StoreFormatError: names samples", "a key that climbs out", samples={"mix": entry})
    parts = {"clips/../zarr.json": "a" * 64}
    yield case("parts", "StoreFormatError: names clip parts", "a part that is no part", parts=parts)
    yield case("group", "StoreFormatError: group", "a group that climbs out", groups={"video/../../x": good})
    block = {name: good | {"receipts": {"1_0": "a"}}}
    yield case("block", "StoreDamagedError: its own digest", "Python reads 1_0 as a number", groups=block)
    endless = {name: good | {"receipts": {"9" * 400: "a"}}}
    yield case("blocks", "StoreFormatError: block '9999", "a block of 400 digits", groups=endless)
    yield case("list", "StoreFormatError: malformed", "a list for a mapping", groups=[])
    kinds = {"video": 2**40, "image": 1}
    yield case("rows", "StoreFormatError: block rows of video", "blocks of a trillion rows", block_rows=kinds)


def tombstone(**changes: Any) -> bytes:
    return sealed(
        {"format": 1, "clips": ["lab/a.mp4"], "reason": "asked", "date": "2026-01-01", "erased": []} | changes
    )


def others() -> Iterator[Case]:
    yield (
        "tombstone-text",
        tombstone(clips="abc"),
        "tombstone",
        "StoreDamagedError: its own digest",
        "a text is a list of letters",
    )
    yield (
        "tombstone-type",
        tombstone(clips=[1]),
        "tombstone",
        "StoreDamagedError: its own digest",
        "a number for a clip",
    )
    yield "tombstone-deep", nested(5000), "tombstone", "StoreFormatError: not readable JSON", "nested without end"
    yield (
        "journal-nan",
        b'{"digest":"0","record":{"x":NaN}}\n',
        "journal",
        "StoreDamagedError: own digest",
        "NaN has no canonical text",
    )
    yield "journal-list", b"[]\n", "journal", "StoreDamagedError: own digest", "no mapping at all"

    def listing(objects: Any) -> bytes:
        return json.dumps({"format": 1, "objects": objects}).encode()

    yield "listing-path", listing({"../../x": 1}), "listing", "StoreFormatError: a name that no store has", "climbs out"
    yield (
        "listing-root",
        listing({"/etc/passwd": 1}),
        "listing",
        "StoreFormatError: a name that no store has",
        "absolute",
    )
    yield "listing-true", listing({"zarr.json": True}), "listing", "StoreFormatError: the size True", "true is no size"
    yield "listing-less", listing({"zarr.json": -1}), "listing", "StoreFormatError: the size -1", "less than nothing"
