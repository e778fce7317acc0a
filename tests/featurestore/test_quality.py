"""Records of measurements come back from the journal; what is no such record is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from featurestore import quality
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter
from mervcache.errors import StoreFormatError


@dataclass(frozen=True, kw_only=True)
class Row:
    value: float


@dataclass(frozen=True, kw_only=True)
class Record:
    time: str
    rows: tuple[Row, ...]


def record_of(time: str, *values: float) -> Record:
    return Record(time=time, rows=tuple(Row(value=value) for value in values))


def parse(record: Mapping[str, Any], name: str) -> Record:
    values = {key: value for key, value in record.items() if key not in ("format", "by")}
    return quality.parse_values(Record, Row, values, is_sound, name)


def is_sound(key: str, value: Any) -> bool:
    return quality.is_time(value) if key == "time" else quality.is_number(value)


@pytest.fixture
def place(tmp_path):
    StoreWriter.open_or_create(tmp_path / "store.zarr").publish_snapshot()
    return tmp_path / "store.zarr"


def test_records_come_back_the_oldest_first_and_others_are_left_out(place):
    late, early = record_of("2026-11-22T09:00:01Z", 1.5), record_of("2026-11-22T09:00:00Z", 2, 3)
    for record in (late, early):
        quality.keep_measurement(place, "speed-", quality.measurement_record(record, by="hand"))
    quality.keep_measurement(place, "speed-", quality.measurement_record(record_of("yesterday", 1)))
    quality.keep_measurement(place, "other-", quality.measurement_record(early))
    assert quality.read_measurements(FeatureStore.open(place), "speed-", parse) == [early, late]


def test_a_damaged_journal_has_no_records(place):
    key = quality.keep_measurement(place, "speed-", quality.measurement_record(record_of("2026-11-22T09:00:00Z", 1)))
    (place / key).write_bytes((place / key).read_bytes()[:-9])
    assert quality.read_measurements(FeatureStore.open(place), "speed-", parse) == []


@pytest.mark.parametrize("rows", [[{"value": 1}] * 1001, "many", None, [3], [{}], [{"value": 1, "more": 1}]])
def test_rows_that_are_too_many_or_of_other_fields_are_refused(rows):
    with pytest.raises(StoreFormatError, match="journal x"):
        parse({"time": "2026-11-22T09:00:00Z", "rows": rows}, "x")
    assert len(parse({"time": "2026-11-22T09:00:00Z", "rows": [{"value": 1}] * 1000}, "x").rows) == 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, "1", None, [1]])
def test_a_number_is_one_that_a_float_holds(value):
    assert not quality.is_number(value)
    assert quality.is_number(-(10**300))


def test_the_time_of_a_record_is_one_that_is_believed():
    assert quality.is_time(quality.now())
    assert not quality.is_time("2026-11-22 09:00:00")
