"""Untrusted stores: whatever is in one, reading ends soon, in little memory, with a clear error."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featurestore.maintenance.verify import verify_store
from featurestore.parquet import own_digest_holds, read_table, table_bytes
from featurestore.parquet_guard import read_struct
from featurestore.schemas import CLIP_SCHEMA
from featurestore.store import FeatureStore
from mervcache.errors import MervCacheError, StoreError, StoreFormatError
from tests.featurestore.crafted import CHANGES, change, exercise, newest_record, write_json
from tests.featurestore.single_readers import cases_of, read_one
from tests.featurestore.sound_store import add_unpublished, build

pytestmark = pytest.mark.slow

DRAWN = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


class Drawn:
    """Decisions of hypothesis."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def integer(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, max(low, high)))

    def pick(self, items):
        return self._data.draw(st.sampled_from(list(items)))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    kit = build(tmp_path_factory.mktemp("sound") / "store.zarr")
    add_unpublished(kit)
    return kit.path


@pytest.fixture
def store(sound, tmp_path) -> Path:
    shutil.copytree(sound, tmp_path / "copy.zarr")
    return tmp_path / "copy.zarr"


def test_a_sound_store_is_read_without_an_error(store):
    assert exercise(store) == []


@pytest.mark.parametrize("kind", sorted(set(CHANGES), key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
@DRAWN
@given(data=st.data())
def test_whatever_is_changed_only_errors_that_a_caller_expects_come_of_it(sound, tmp_path_factory, kind, data):
    store = tmp_path_factory.mktemp("case") / "store.zarr"
    shutil.copytree(sound, store)
    kind(store, Drawn(data))
    assert exercise(store) == []
    shutil.rmtree(store, ignore_errors=True)


@DRAWN
@given(data=st.data())
def test_several_changes_at_once_are_no_different(sound, tmp_path_factory, data):
    store = tmp_path_factory.mktemp("case") / "store.zarr"
    shutil.copytree(sound, store)
    for _ in range(3):
        try:
            change(store, Drawn(data))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
            break  # what an earlier change left cannot be changed again
    assert exercise(store) == []
    shutil.rmtree(store, ignore_errors=True)


@settings(DRAWN, max_examples=300)
@given(data=st.data())
def test_each_reader_by_itself_meets_changed_bytes_with_an_error_or_not_at_all(readers, data):
    choices = Drawn(data)
    name, _, error = read_one(choices.pick(readers), choices)
    assert error is None, name


@pytest.fixture(scope="module")
def readers(sound):
    return cases_of(sound)


@pytest.mark.parametrize("value", [0, 127, 255])
def test_no_byte_of_a_parquet_footer_ends_the_process(sound, value):
    data = (sound / "clips/part-00000.parquet").read_bytes()
    for place in range(len(data) - 1, len(data) - 1200, -1):
        changed = data[:place] + bytes([value]) + data[place + 1 :]
        with contextlib.suppress(MervCacheError):
            read_table(changed, CLIP_SCHEMA, "a part")


def bomb(rows: int, length: int) -> bytes:
    """A clip part of one long path, named `rows` times."""
    once = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * length]))
    columns = dict.fromkeys(("clip_id", "dataset", "path", "kind"), once)
    columns |= {"row": pa.array(np.arange(rows))}
    columns |= {name: pa.nulls(rows, CLIP_SCHEMA.field(name).type) for name in ("start_s", "end_s", "end_frame")}
    schema = pa.schema(
        [pa.field(n, columns[n].type, nullable=CLIP_SCHEMA.field(n).nullable) for n in CLIP_SCHEMA.names]
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=schema), sink, compression="zstd", store_schema=False)
    return sink.getvalue().to_pybytes()


def test_a_parquet_bomb_is_refused_before_it_is_decoded():
    data = bomb(1_000_000, 1_000_000)
    assert len(data) < 2_000_000
    with pytest.raises(StoreFormatError, match=r"(would take more|claims over) .* in memory"):
        read_table(data, CLIP_SCHEMA, "a part")


def test_texts_that_repeat_honestly_are_read():
    assert read_table(bomb(1000, 1000), CLIP_SCHEMA, "a part").num_rows == 1000


def test_the_size_of_a_table_is_measured_and_not_guessed():
    rows = 300_000  # a column of few texts: the worst guess is 300 times too high
    values = pa.array([f"{n % 97:0100}" for n in range(rows)])
    schema = pa.schema([("a", pa.string()), ("b", pa.int64())])
    data = table_bytes(pa.table({"a": values, "b": pa.array(np.random.default_rng(0).integers(0, 1 << 60, rows))}))
    assert read_table(data, schema, "a table")["a"].equals(pa.chunked_array([values]))
    assert own_digest_holds(data)


@pytest.mark.parametrize("data", [b"\x15\x80", b"\x1c" * 100, b"\x19\xf5", b"\x15" + b"\xff" * 30, b"\x18\x7f", b""])
def test_page_headers_that_make_no_sense_are_errors(data):
    with pytest.raises((ValueError, IndexError)):
        read_struct(data, 0)


def test_pipes_and_devices_are_not_waited_for(store):
    key = next((store / "video").rglob("tokens/c/0/0/0/0/0"))
    key.unlink()
    os.mkfifo(key)
    opened = FeatureStore.open(store)
    for encoder in opened.encoders:
        ids = opened.clips.filter(opened.clips[encoder])["clip_id"].to_pylist()
        if encoder in key.as_posix():
            with pytest.raises(StoreError, match="no plain file"):
                opened.read(ids, encoder=encoder)
    assert any("no plain file" in finding.problem for finding in verify_store(store, "full"))


def test_an_endless_file_is_not_loaded(store):
    for name in ("zarr.json", "clips/part-00000.parquet", "journal/run-1-driver.json"):
        with open(store / name, "r+b") as file:
            file.truncate(1 << 42)
    with pytest.raises(StoreFormatError, match=r"more than the .* that such a file can need"):
        FeatureStore.open(store)
    found = {finding.key: finding.problem for finding in verify_store(store, "full")}
    assert "more than" in found["clips/part-00000.parquet"]


def test_a_clip_of_a_petabyte_is_refused_by_its_identity(store):
    record_file = newest_record(store)
    record = json.loads(record_file.read_bytes())
    name = next(name for name in record["groups"] if "dinov2" in name and name.startswith("image"))
    record["groups"][name]["identity"] |= {"grid": [2**20, 2**15, 2**15], "still_period": 1}
    write_json(record_file, record, "snapshots")
    with pytest.raises(MervCacheError):
        FeatureStore.open(store)


@pytest.mark.parametrize("name", [2**31 - 1, None, ["blosc"]])
def test_a_codec_that_is_named_by_no_text_is_refused(store, name):
    opened = FeatureStore.open(store)
    clip = opened.clips.filter(opened.clips["dinov2"])["clip_id"].to_pylist()[0]
    file = store / "video" / opened.encoders["dinov2"].group_name / "tokens/zarr.json"
    document = json.loads(file.read_bytes())
    document["codecs"][0]["configuration"]["codecs"][1]["name"] = name
    file.write_text(json.dumps(document))
    with pytest.raises(StoreError):
        FeatureStore.open(store).read([clip], encoder="dinov2")


def test_other_codecs_are_refused_before_a_chunk_is_read(store):
    opened = FeatureStore.open(store)
    clip = opened.clips.filter(opened.clips["dinov2"])["clip_id"].to_pylist()[0]
    file = store / "video" / opened.encoders["dinov2"].group_name / "tokens/zarr.json"
    document = json.loads(file.read_bytes())
    document["codecs"][0]["configuration"]["codecs"][1] = {"name": "gzip", "configuration": {"level": 1}}
    file.write_text(json.dumps(document))
    with pytest.raises(StoreFormatError, match="codecs that are not read here"):
        FeatureStore.open(store).read([clip], encoder="dinov2")
