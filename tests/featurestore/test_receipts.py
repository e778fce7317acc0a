"""Receipts: canonical, and never trusted."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from featurestore.records import Receipt, RowOutcome, row_digest
from mervcache.errors import MervCacheError, StoreDamagedError, StoreFormatError
from mervcache.files import canonical_json

PLACE = {"kind": "video", "group": "dinov2-0123456789ab", "block": 3}


def receipt_of() -> Receipt:
    rows = (
        RowOutcome(state="ok", digest="d" * 32, media_sha256="a" * 64, decoder="frames/1"),
        RowOutcome(state="failed", scope="clip", reason="the file is cut off", media_sha256="b" * 64),
        RowOutcome(state="skipped"),
        RowOutcome(state="empty"),
    )
    return Receipt(**PLACE, rows=rows, shards={"tokens": {"sha256": "c" * 64, "bytes": 1000}})


def test_a_receipt_comes_back_from_its_bytes():
    receipt = receipt_of()
    assert Receipt.parse(receipt.to_bytes(), **PLACE, block_rows=4) == receipt
    assert receipt.counts == {"ok": 1, "failed": 1, "skipped": 1, "empty": 1}
    assert receipt.stored_bytes == 1000
    assert receipt.first_row() == 12
    assert [receipt.outcome(row).state for row in range(12, 16)] == ["ok", "failed", "skipped", "empty"]


def test_rows_are_stored_as_columns():
    rows = json.loads(receipt_of().to_bytes())["rows"]
    assert rows["state"] == ["ok", "failed", "skipped", "empty"]
    assert rows["reason"] == [None, "the file is cut off", None, None]


def test_every_flipped_bit_of_a_receipt_is_found():
    data = receipt_of().to_bytes()
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((StoreDamagedError, StoreFormatError)):
            Receipt.parse(bytes(damaged), **PLACE, block_rows=4)


def test_a_receipt_of_another_block_or_encoder_is_refused():
    data = receipt_of().to_bytes()
    for change in ({"block": 4}, {"group": "vivit-0123456789ab"}, {"kind": "image"}):
        with pytest.raises(StoreDamagedError, match="does not match its own digest"):
            Receipt.parse(data, **PLACE | change, block_rows=4)


def forged(**changes) -> bytes:
    """A receipt with other contents and the right digest for them, as anybody could make it."""
    import hashlib

    content = json.loads(receipt_of().to_bytes())
    del content["digest"]
    content |= changes
    digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return (canonical_json(content | {"digest": digest}) + "\n").encode()


def with_column(name, values):
    rows = json.loads(receipt_of().to_bytes())["rows"]
    return {"rows": rows | {name: values}}


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": None},
        {"rows": {}},
        with_column("extra", [None] * 4),
        with_column("state", ["ok"] * 3),
        with_column("state", ["ok"] * 100_000),
        with_column("state", "okay"),
        with_column("state", ["ok", "ok", "skipped", "empty"]),
        with_column("state", ["gone", "failed", "skipped", "empty"]),
        with_column("state", [None, "failed", "skipped", "empty"]),
        with_column("digest", ["../../x", None, None, None]),
        with_column("digest", ["D" * 32, None, None, None]),
        with_column("digest", [7, None, None, None]),
        with_column("digest", [["d"], None, None, None]),
        with_column("reason", [None, "x" * 501, None, None]),
        with_column("reason", [None, "", None, None]),
        with_column("scope", [None, "planet", None, None]),
        with_column("media_sha256", ["a" * 63, None, None, None]),
        with_column("decoder", ["x" * 101, None, None, None]),
        {"shards": None},
        {"shards": {}},
        {"shards": {"../tokens": {"sha256": "c" * 64, "bytes": 1}}},
        {"shards": {"tokens": {"sha256": "c" * 64}}},
        {"shards": {"tokens": {"sha256": "c" * 64, "bytes": -1}}},
        {"shards": {"tokens": {"sha256": "c" * 64, "bytes": True}}},
        {"shards": {"tokens": {"sha256": "c" * 64, "bytes": 1 << 60}}},
        {"shards": {"tokens": {"sha256": "zz", "bytes": 1}}},
        {"shards": {"tokens": "x"}},
        {"format": 2},
        {"block": "3"},
    ],
)
def test_a_forged_receipt_is_refused_whatever_its_digest_says(changes):
    with pytest.raises((StoreFormatError, StoreDamagedError)):
        Receipt.parse(forged(**changes), **PLACE, block_rows=4)


def test_random_json_never_gets_further_than_a_store_error():
    rng = random.Random(0)
    atoms = [None, True, 0, -1, 1 << 70, 1.5, "", "ok", "rows", [], {}, [[]], {"rows": 1}]
    fields = [*json.loads(receipt_of().to_bytes()), "x"]
    for _ in range(500):
        document = {name: rng.choice(atoms) for name in rng.sample(fields, rng.randrange(len(fields)))}
        with pytest.raises(MervCacheError):
            Receipt.parse(json.dumps(rng.choice([document, list(document), 1, None])).encode(), **PLACE, block_rows=4)


def test_a_row_digest_covers_values_shape_dtype_and_array():
    ones = np.ones((2, 2), dtype=np.float16)
    digests = [
        row_digest({"tokens": ones}),
        row_digest({"tokens": ones * 2}),
        row_digest({"tokens": ones.reshape(4)}),
        row_digest({"tokens": ones.view(np.uint16)}),
        row_digest({"prefix": ones}),
        row_digest({"prefix": ones, "tokens": ones}),
    ]
    assert len(set(digests)) == len(digests)
    assert row_digest({"tokens": ones.astype(">f2")}) == digests[0]
    assert row_digest({"tokens": ones, "prefix": ones}) == digests[-1]
