"""A block is committed once, from the bytes on disk, whichever writer put them."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from featurestore.layout import receipt_key, shard_key
from featurestore.maintenance.repair import repair_store
from featurestore.maintenance.verify import verify_store
from featurestore.objects.local import LocalObjects
from featurestore.records import LOST, row_digest
from featurestore.shards import Shard, build_shard, encode_row
from mervcache.errors import StoreDamagedError, UserError

FULL = {"prefix_tokens": 3, "storage_dtype": "uint8"}  # an identity with every array


@pytest.fixture
def block(kit, make):
    """(group, clips by row) of a store with one block of three clips."""

    def begin(**identity):
        writer = kit.writer()
        writer.add_clips([make.video(n) for n in range(3)])
        return kit.group(make.identity(**identity)), make.clips_by_row(writer)["video"]

    return begin


def committed_files(kit) -> dict[str, bytes]:
    return {p.relative_to(kit.path).as_posix(): p.read_bytes() for p in kit.path.rglob("*") if p.is_file()}


def test_a_receipt_tells_of_every_row_and_shard(kit, make, block):
    group, clips = block(**FULL)
    receipt = make.fill_block(group.begin(0), clips, group.identity, broken=("videos/1.mp4",)).commit()
    assert [row.state for row in receipt.rows] == ["ok", "failed", "ok", "empty"]
    assert (receipt.rows[1].scope, receipt.rows[1].reason) == ("clip", "the file is cut off")
    assert (receipt.rows[0].media_sha256, receipt.rows[0].decoder) == ("b" * 64, "frames/1")
    assert list(receipt.shards) == ["prefix", "scale", "offset", "tokens"]
    for name, record in receipt.shards.items():
        data = (kit.path / shard_key("video", group.name, name, 0)).read_bytes()
        assert record == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert group.receipt(0) == receipt
    assert group.committed_blocks() == {0}
    assert group.missing_blocks() == []


def test_the_row_digest_is_over_what_zarr_reads(kit, make, block):
    import zarr

    group, clips = block(**FULL)
    receipt = make.fill_block(group.begin(0), clips, group.identity).commit()
    stored = {name: zarr.open_array(kit.path / "video" / group.name / name, mode="r")[2] for name in group.specs}
    assert receipt.rows[2].digest == row_digest(stored)


def test_a_planned_row_without_an_outcome_stops_the_commit(make, block):
    group, clips = block()
    writer = group.begin(0)
    writer.add(0, make.floats(clips[0], group.identity), media_sha256=None, decoder=None)
    with pytest.raises(UserError, match="2 planned rows have no outcome, one is row 1"):
        writer.commit()
    assert group.committed_blocks() == set()


def test_rows_are_taken_once_and_only_if_planned(make, block):
    group, clips = block()
    writer = group.begin(0)
    arrays = make.floats(clips[0], group.identity)
    writer.add(0, arrays, media_sha256=None, decoder=None)
    for again in (lambda: writer.add(0, arrays, media_sha256=None, decoder=None), lambda: writer.fail(0, "x")):
        with pytest.raises(UserError, match="row 0 of block 0 has an outcome already"):
            again()
    with pytest.raises(UserError, match="row 3 is not planned"):
        writer.skip(3)
    with pytest.raises(UserError, match="holds no clip"):
        group.begin(1)
    with pytest.raises(UserError, match="row 4 is not in block 0"):
        group.begin(0, [4])


def test_arrays_of_another_shape_are_a_mistake_not_a_failure_of_the_clip(make, block):
    group, clips = block()
    with pytest.raises(UserError, match=r"must have arrays .*\(4, 2, 2, 8\).*got .*\(4, 2, 2, 9\)"):
        group.begin(0).add(0, {"tokens": np.zeros((4, 2, 2, 9))}, media_sha256=None, decoder=None)
    arrays = make.floats(clips[0], group.identity) | {"prefix": np.zeros((4, 1, 8))}
    with pytest.raises(UserError, match="prefix"):
        group.begin(0).add(0, arrays, media_sha256=None, decoder=None)


def test_the_order_in_which_rows_finish_does_not_change_a_byte(make, block, kit, tmp_path):
    group, clips = block()
    forward = make.fill_block(group.begin(0), clips, group.identity)
    other = make.kit(tmp_path / "other")
    other.writer().add_clips([make.video(n) for n in range(3)])
    backward = other.group(group.identity).begin(0)
    for row in (2, 0, 1):
        backward.add(row, make.floats(clips[row], group.identity), media_sha256="b" * 64, decoder="frames/1")
    assert forward.commit() == backward.commit()
    assert {k: v for k, v in committed_files(kit).items() if not k.startswith("tmp/")} == {
        k: v for k, v in committed_files(other).items() if not k.startswith("tmp/")
    }


def test_overflow_fails_the_row_for_this_encoder_with_the_hint(make, block):
    group, clips = block()
    writer = group.begin(0)
    arrays = make.floats(clips[0], group.identity)
    arrays["tokens"][0, 0, 0, 0] = 1e6
    writer.add(0, arrays, media_sha256="b" * 64, decoder="frames/1")
    for row in (1, 2):
        writer.skip(row)
    rows = writer.commit().rows
    assert (rows[0].state, rows[0].scope) == ("failed", "encoder")
    assert rows[0].reason == "tokens overflow float16; store it as bfloat16 (--storage-dtype bfloat16)"
    assert [row.state for row in rows[1:]] == ["skipped", "skipped", "empty"]


def test_who_comes_second_gets_the_receipt_of_the_first(make, block):
    group, clips = block()
    slow = make.fill_block(group.begin(0), clips, group.identity, noise=1)
    first = make.fill_block(group.begin(0), clips, group.identity).commit()
    assert slow.commit() == first


@pytest.mark.parametrize("array", ["scale", "tokens"])
def test_a_shard_that_does_not_read_back_as_it_was_written_has_no_receipt(array, make, block, kit, monkeypatch):
    """A disk that loses a bit between the write and the read; the next attempt sets the shard aside."""
    group, clips = block(**FULL)
    damaged, put = shard_key("video", group.name, array, 0), LocalObjects.put_exclusive

    def put_with_a_flipped_bit(self, key, data):
        if key == damaged:
            data = bytearray(b"".join(data))
            data[10] ^= 1
        put(self, key, bytes(data) if key == damaged else data)

    monkeypatch.setattr(LocalObjects, "put_exclusive", put_with_a_flipped_bit)
    with pytest.raises(StoreDamagedError, match=array):
        make.fill_block(group.begin(0), clips, group.identity).commit()
    assert group.committed_blocks() == set()
    monkeypatch.undo()
    receipt = make.fill_block(group.begin(0), clips, group.identity).commit()
    assert [row.state for row in receipt.rows] == ["ok", "ok", "ok", "empty"]
    assert not verify_store(kit.path, "full")


def orphan(kit, group, clips, make, rows, noise, arrays) -> None:
    """The shards that a killed attempt left: some arrays, some rows, no receipt."""
    from featurestore.storage_dtypes import to_stored

    stored = {
        row: to_stored(make.floats(clips[row], group.identity, noise), group.identity.storage_dtype) for row in rows
    }
    for name in arrays:
        spec = group.specs[name]
        pieces = build_shard(spec, {row: encode_row(spec, stored[row][name]) for row in rows})
        group.objects.put_exclusive(shard_key("video", group.name, name, 0), pieces)


@pytest.mark.parametrize("identity", [{}, FULL], ids=["float16", "uint8+prefix"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_an_orphan_of_equal_bytes_is_completed_to_an_undisturbed_block(make, block, kit, tmp_path, identity, count):
    group, clips = block(**identity)
    orphan(kit, group, clips, make, [0, 1, 2], 0, list(group.specs)[:count])
    receipt = make.fill_block(group.begin(0), clips, group.identity).commit()
    assert [row.state for row in receipt.rows] == ["ok", "ok", "ok", "empty"]
    other = make.kit(tmp_path / "other")
    other.writer().add_clips([make.video(n) for n in range(3)])
    assert make.fill_block(other.group(group.identity).begin(0), clips, group.identity).commit() == receipt


def test_an_orphan_with_other_bytes_is_the_truth_and_rows_that_it_lacks_are_lost(make, block, kit):
    group, clips = block()
    orphan(kit, group, clips, make, [0, 2], 7, ["tokens"])
    before = committed_files(kit)
    receipt = make.fill_block(group.begin(0), clips, group.identity).commit()
    assert [row.state for row in receipt.rows] == ["ok", "failed", "ok", "empty"]
    assert (receipt.rows[1].reason, receipt.rows[1].scope) == (LOST, "encoder")
    key = shard_key("video", group.name, "tokens", 0)
    assert committed_files(kit)[key] == before[key]
    shard = Shard(group.specs["tokens"], group.objects.open(key))
    assert receipt.rows[0].digest == row_digest({"tokens": shard.decode(0)})
    assert np.array_equal(shard.decode(0), make.floats(clips[0], group.identity, 7)["tokens"].astype(np.float16))


def test_a_row_that_failed_with_us_but_stands_in_the_orphan_is_ok(make, block, kit):
    group, clips = block()
    orphan(kit, group, clips, make, [0, 1, 2], 0, ["tokens"])
    receipt = make.fill_block(group.begin(0), clips, group.identity, broken=("videos/1.mp4",)).commit()
    assert [row.state for row in receipt.rows] == ["ok", "ok", "ok", "empty"]


@pytest.mark.parametrize("sidecar", ["prefix", "scale", "offset"])
def test_tokens_are_never_paired_with_the_sidecar_of_another_attempt(make, block, kit, sidecar):
    group, clips = block(**FULL)
    orphan(kit, group, clips, make, [0, 1], 7, [sidecar])  # row 2 is absent there
    receipt = make.fill_block(group.begin(0), clips, group.identity).commit()
    assert [row.reason for row in receipt.rows[:3]] == [LOST] * 3
    assert [row.state for row in receipt.rows] == ["failed"] * 3 + ["empty"]


def test_after_two_interrupted_attempts_a_third_adopts_what_is_whole(make, block, kit):
    group, clips = block(**FULL)
    orphan(kit, group, clips, make, [0, 1, 2], 7, ["prefix", "scale", "offset", "tokens"])
    receipt = make.fill_block(group.begin(0), clips, group.identity, noise=8).commit()
    assert [row.state for row in receipt.rows] == ["ok", "ok", "ok", "empty"]
    kit.writer().publish_snapshot()
    read = kit.open().read([clips[1].clip_id], encoder="dinov2")[0]
    assert np.abs(read - make.floats(clips[1], group.identity, 7)["tokens"]).max() < 0.02


TEARS = {
    "a flipped bit": lambda data: data[:5] + bytes([data[5] ^ 1]) + data[6:],
    "cut in a row": lambda data: data[:20],
    "cut in the index": lambda data: data[:-3],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "a row cut out": lambda data: data[10:],
    "bytes of no row": lambda data: b"0123" + data,
}


@pytest.mark.parametrize("array", ["prefix", "scale", "tokens"])
@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_orphan_is_set_aside_and_the_block_is_committed_as_if_it_had_not_been_there(
    make, block, kit, array, tear
):
    group, clips = block(**FULL)
    expected = make.fill_block(group.begin(0), clips, group.identity).commit()
    (kit.path / receipt_key("video", group.name, 0)).unlink()  # the receipt: the shards are orphans now
    file = kit.path / shard_key("video", group.name, array, 0)
    torn = TEARS[tear](file.read_bytes())
    file.write_bytes(torn)
    assert [finding.key for finding in verify_store(kit.path, "full") if finding.severity == "damage"] == [
        shard_key("video", group.name, array, 0)
    ]
    assert make.fill_block(group.begin(0), clips, group.identity).commit() == expected
    assert [path.read_bytes() for path in (kit.path / "tmp/torn").iterdir()] == [torn]
    kit.writer().publish_snapshot()
    assert verify_store(kit.path, "full") == []


def test_repair_removes_a_torn_orphan_which_the_next_extraction_computes_again(make, block, kit):
    group, clips = block()
    orphan(kit, group, clips, make, [0, 1, 2], 0, ["tokens"])
    key = shard_key("video", group.name, "tokens", 0)
    (kit.path / key).write_bytes(b"torn")
    (done,) = repair_store(kit.path)
    assert (done.key, done.is_mended) == (key, True)
    assert not (kit.path / key).exists()
    assert make.fill_block(group.begin(0), clips, group.identity).commit().counts["ok"] == 3


def test_reasons_are_cut_and_never_empty(make, block):
    group, _ = block()
    writer = group.begin(0)
    writer.fail(0, "x" * 1000, scope="encoder")
    writer.fail(1, "  ")
    writer.skip(2)
    rows = writer.commit().rows
    assert (len(rows[0].reason), rows[1].reason) == (500, "no reason given")
    assert json.loads(group.receipt(0).to_bytes())["rows"]["scope"] == ["encoder", "clip", None, None]


def test_a_block_where_all_failed_is_committed_with_an_empty_shard(make, block, kit):
    group, clips = block()
    broken = tuple(clip.path for clip in clips.values())
    receipt = make.fill_block(group.begin(0), clips, group.identity, broken=broken).commit()
    assert receipt.counts == {"ok": 0, "failed": 3, "skipped": 0, "empty": 1}
    import zarr

    assert np.isnan(zarr.open_array(kit.path / "video" / group.name / "tokens", mode="r")[:]).all()
