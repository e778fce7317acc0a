"""Measurements come back from the journal; what is no such record is left out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from featurestore import quality
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter
from mervcache.errors import StoreFormatError

ROW = quality.LossRow(dtype="float16", loss=1.5, by_modality={"video": 2})
RECORD = quality.LossRecord(
    time="2026-11-22T09:00:00Z",
    snapshot="00000001-0123456789ab",
    run="my run (2)",
    step=3,
    split="heldout",
    samples=4,
    weights="random:0, pretrained",
    rows=(ROW, replace(ROW, loss=None)),
)


@pytest.fixture
def place(tmp_path):
    StoreWriter.open_or_create(tmp_path / "store.zarr").publish_snapshot()
    return tmp_path / "store.zarr"


def test_records_come_back_the_oldest_first_and_others_are_left_out(place):
    late = replace(RECORD, time="2026-11-22T09:00:01Z")
    for record in (late, RECORD, replace(RECORD, time="yesterday")):
        quality.keep_record(place, record)
    StoreWriter.open(place).journal("other-1", quality.to_record(RECORD))
    assert quality.read_records(FeatureStore.open(place), quality.DISTORTION_PREFIX) == [RECORD, late]


def test_a_damaged_journal_has_no_records(place):
    key = quality.keep_record(place, RECORD)
    (place / key).write_bytes((place / key).read_bytes()[:-9])
    assert quality.read_records(FeatureStore.open(place), quality.DISTORTION_PREFIX) == []


@pytest.mark.parametrize("rows", [[{"dtype": "float16"}], "many", None, [3], [{}], 1001, {"loss": 1}, {"more": 1}])
def test_rows_that_are_too_many_or_of_other_fields_are_refused(rows):
    record = quality.to_record(RECORD)
    row = record["rows"][0]
    rows = [row] * rows if isinstance(rows, int) else [row | rows | {"x": 1}] if isinstance(rows, dict) else rows
    with pytest.raises(StoreFormatError, match="journal x"):
        quality.parse_record(record | {"rows": rows}, "x")
    assert len(quality.parse_record(record | {"rows": [row] * 1000}, "x").rows) == 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [("step", 1.5), ("step", True), ("step", None), ("samples", "4"), ("run", 3), ("run", "x" * 201), ("split", None)],
)
def test_a_field_of_another_type_is_refused(field, value):
    with pytest.raises(StoreFormatError, match=f"journal x: {field} is"):
        quality.parse_record(quality.to_record(RECORD) | {field: value}, "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, "1", None, [1]])
def test_a_number_is_one_that_a_float_holds(value):
    assert not quality.is_number(value)
    assert quality.is_number(-(10**300))


def test_the_time_of_a_record_is_one_that_is_believed():
    assert quality.is_time(quality.now())
    assert not quality.is_time("2026-11-22 09:00:00")
