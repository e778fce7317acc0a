"""Small crafted files are refused, each for its reason; `make_corpus.py` wrote them once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurestore.objects.base import parse_listing
from featurestore.parquet import read_table
from featurestore.records import Receipt, Tombstone, parse_journal
from featurestore.schemas import CLIP_SCHEMA, SAMPLE_SCHEMA, table_to_clips, table_to_samples
from featurestore.shards import decode_row, parse_index
from featurestore.snapshots import Snapshot
from featurestore.zarr_metadata import parse_group, parse_root
from mervcache import errors
from tests.featurestore.hostile_corpus.binary_cases import SPEC, clips, parquet
from tests.featurestore.hostile_corpus.json_cases import IDENTITY, group, receipt, root, sealed, snapshot

FOLDER = Path(__file__).parent / "hostile_corpus"
CASES = json.loads((FOLDER / "cases.json").read_text())
SHARD_BYTES = 1 << 20  # of the shard that an index belongs to

GROUP = IDENTITY.group_name

READERS: dict[str, Callable[[bytes, dict], Any]] = {
    "root": lambda data, case: parse_root(data),
    "group": lambda data, case: parse_group(data, "video", GROUP),
    "receipt": lambda data, case: Receipt.parse(data, kind="video", group=GROUP, block=0, block_rows=4),
    "snapshot": lambda data, case: Snapshot.parse(data, case["id"]),
    "tombstone": lambda data, case: Tombstone.parse(data, "0" * 16),
    "journal": lambda data, case: parse_journal(data, "run"),
    "listing": lambda data, case: parse_listing(data),
    "part": lambda data, case: table_to_clips(read_table(data, CLIP_SCHEMA, "a part")),
    "samples": lambda data, case: table_to_samples(read_table(data, SAMPLE_SCHEMA, "samples")),
    "chunk": lambda data, case: decode_row(SPEC, np.frombuffer(data, np.uint8), np.empty(SPEC.row_shape, SPEC.dtype)),
    "index": lambda data, case: parse_index(SPEC, data, SHARD_BYTES),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
def test_a_file_of_the_corpus_is_refused_for_its_reason(case):
    with pytest.raises(getattr(errors, case["error"])) as refusal:
        READERS[case["reader"]]((FOLDER / case["file"]).read_bytes(), case)
    assert case["words"] in str(refusal.value)
    assert len(str(refusal.value)) < 1000


def test_every_file_is_listed_and_all_of_them_are_small():
    files = sorted(file.name for file in FOLDER.glob("*.case"))
    assert files == sorted(case["file"] for case in CASES)
    assert sum((FOLDER / name).stat().st_size for name in files) < 200_000
    assert {case["reader"] for case in CASES} == set(READERS)


def test_what_the_corpus_is_made_of_is_accepted_when_nothing_is_crafted():
    """So that a case is refused for what was changed, and not for what all of them share."""
    READERS["root"](root(), {})
    READERS["group"](group(), {})
    READERS["receipt"](sealed(receipt()), {})
    data, snapshot_id = snapshot()
    READERS["snapshot"](data, {"id": snapshot_id})
    READERS["part"](parquet(clips()), {})
