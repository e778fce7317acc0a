"""A publisher who lies: tables that their digests cover and that the store's own files contradict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from featurestore.layout import snapshot_keys
from featurestore.maintenance.repair import repair_store
from featurestore.maintenance.tombstone import tombstone
from featurestore.maintenance.verify import verify_store
from featurestore.objects.open import open_objects
from featurestore.parquet import table_bytes
from featurestore.snapshots import Snapshot, load_snapshot, newest_snapshot_id, read_snapshot_table
from featurestore.transfer.export import export
from featurestore.transfer.merge import StoreCells, combine
from featurestore.transfer.sync import push, transfer
from mervcache.errors import StoreDamagedError, StoreError
from mervcache.files import sha256_hex


@pytest.fixture
def full(kit, make):
    """Two encoders, videos and stills, a failed clip, a retried one, and two snapshots."""
    kit.writer().add_clips([make.video(n) for n in range(6)] + [make.image(0)])
    kit.fill(broken=("videos/3.mp4", "videos/4.mp4"))
    kit.writer().add_clips([make.video(4)], retry=True)
    kit.writer().add_clips([make.video(n) for n in range(6, 9)])
    kit.fill()
    kit.fill(make.identity(encoder="siglip", storage_dtype="uint8"))
    return kit


def publish_instead(path, table: bytes, **changes) -> Snapshot:
    """Put this table and a record that fits it in the place of the newest snapshot, every digest computed again."""
    objects = open_objects(path)
    honest = load_snapshot(objects, newest_snapshot_id(objects))
    lying = replace(honest, table_sha256=sha256_hex(table), **changes)
    for key in snapshot_keys(honest.id):
        objects.delete(key)
    for key, data in zip(snapshot_keys(lying.id), (table, lying.to_bytes()), strict=True):
        objects.put_exclusive(key, data)
    return lying


def newest_table(path) -> pa.Table:
    objects = open_objects(path)
    return read_snapshot_table(objects, load_snapshot(objects, newest_snapshot_id(objects)))


def swapped(table: pa.Table, suffixes: tuple[str, ...]) -> pa.Table:
    """The first two clips with each other's row (and digest) of one encoder."""
    for name in [name for name in table.column_names if name.startswith("dinov2") and name.endswith(suffixes)]:
        values = table[name].to_pylist()
        values[0], values[1] = values[1], values[0]
        column = pa.array(values, table.schema.field(name).type)
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def without_a_failure(table: pa.Table) -> pa.Table:
    names = [name for name in table.column_names if name.startswith("dinov2") and ".failed" in name]
    for name in names:
        kind = table.schema.field(name).type
        none = pa.array([-1 if name.endswith("failed_row") else None] * table.num_rows, kind)
        table = table.set_column(table.column_names.index(name), name, none)
    return table


LIES = {
    "rows swapped": lambda table: swapped(table, (".row",)),
    "rows and digests swapped": lambda table: swapped(table, (".row", ".digest")),
    "failures hidden": without_a_failure,
    "a clip left out": lambda table: table.slice(0, table.num_rows - 1),
    "clips in another order": lambda table: table.take([1, 0, *range(2, table.num_rows)]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_table_that_the_receipts_contradict_is_damage_and_is_not_pulled(full, tmp_path, lie):
    assert verify_store(full.path, "full") == []

    lying = publish_instead(full.path, table_bytes(LIES[lie](newest_table(full.path))))
    table_key = snapshot_keys(lying.id)[0]
    assert [finding.key for finding in verify_store(full.path, "full")] == [table_key]
    for copy in (transfer, push):
        with pytest.raises(StoreDamagedError, match=r"does not follow from the store's own files|begin with the clips"):
            copy(full.path, tmp_path / copy.__name__)
        assert newest_snapshot_id(open_objects(tmp_path / copy.__name__)) is None
    (done,) = repair_store(full.path)
    assert done.is_mended
    assert verify_store(full.path, "full") == []
    assert full.open().snapshot != lying.id
    assert newest_table(full.path).num_rows == 10


@pytest.mark.parametrize("lie", ["rows swapped", "rows and digests swapped", "clips in another order"])
def test_stores_made_of_it_take_no_tokens_of_other_clips(full, tmp_path, lie):
    publish_instead(full.path, table_bytes(LIES[lie](newest_table(full.path))))
    with pytest.raises(StoreDamagedError):
        combine([StoreCells(full.path)], tmp_path / "union")
    with pytest.raises(StoreDamagedError):
        export(StoreCells(full.path), tmp_path / "exported", format="safetensors")


def test_what_a_reader_would_have_been_given_is_the_other_clips_tokens(full):
    """Why it matters: with two rows swapped, `read` returns what its digest in the table covers."""
    first, second = full.open().clips["clip_id"].to_pylist()[:2]
    honest = full.open().read([first, second], encoder="dinov2")
    publish_instead(full.path, table_bytes(swapped(newest_table(full.path), (".row", ".digest"))))
    assert np.array_equal(full.open().read([second, first], encoder="dinov2"), honest)


def test_counts_that_the_receipts_contradict_are_damage(full):
    snapshot = load_snapshot(open_objects(full.path), full.open().snapshot)
    name, summary = next(iter(snapshot.groups.items()))
    for change in (
        {"counts": {**summary.counts, "ok": summary.counts["ok"] + 1}},
        {"stored_bytes": summary.stored_bytes + 1},
    ):
        table = table_bytes(newest_table(full.path))
        publish_instead(full.path, table, groups={**snapshot.groups, name: replace(summary, **change)})
        (finding,) = verify_store(full.path, "full")
        assert "counts other rows or bytes" in finding.problem


@pytest.mark.parametrize("data", [b"", b"no table", b"PAR1" + bytes(40) + b"PAR1"])
def test_a_table_that_is_no_parquet_is_damage_and_is_not_pulled(full, tmp_path, data):
    lying = publish_instead(full.path, data)
    assert [finding.key for finding in verify_store(full.path, "full")] == [snapshot_keys(lying.id)[0]]
    with pytest.raises(StoreError):
        transfer(full.path, tmp_path / "there")
    assert newest_snapshot_id(open_objects(tmp_path / "there")) is None
    repair_store(full.path)
    assert verify_store(full.path, "full") == []


def test_sound_stores_pass_after_a_removal_and_in_every_copy(full, tmp_path):
    transfer(full.path, tmp_path / "before")
    tombstone(full.path, [full.open().clips["clip_id"][0].as_py()], reason="licence", all_copies=False)
    assert verify_store(full.path, "full") == []
    transfer(full.path, tmp_path / "before")  # the copy applies the removal
    transfer(full.path, tmp_path / "after")
    for copy in ("before", "after"):
        assert verify_store(tmp_path / copy, "full") == []
