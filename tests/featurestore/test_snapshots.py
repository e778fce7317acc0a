"""Snapshots: immutable, incremental, and never lost to a race."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from featurestore.objects.local import LocalObjects
from featurestore.snapshots import Snapshot, load_snapshot, publish, read_snapshot_table
from mervcache.errors import StoreDamagedError, StoreError, StoreFormatError


def snapshot_files(kit) -> list[str]:
    return sorted(path.name for path in (kit.path / "snapshots").iterdir())


def test_a_snapshot_names_rows_and_digests_of_every_clip(kit, make):
    kit.writer().add_clips([*(make.video(n) for n in range(5)), make.image(0)])
    snapshot_id = kit.fill(broken=("videos/3.mp4",))
    objects = LocalObjects(kit.path)
    snapshot = load_snapshot(objects, snapshot_id)
    table = read_snapshot_table(objects, snapshot)
    group = make.identity().group_name
    assert table["clip_id"].to_pylist() == [*(f"tiny/videos/{n}.mp4" for n in range(5)), "tiny/images/0.jpg"]
    assert table[f"{group}.row"].to_pylist() == [0, 1, 2, -1, 4, 0]
    receipt = kit.group(make.identity()).receipt(0)
    assert table[f"{group}.digest"].to_pylist()[:4] == [row.digest for row in receipt.rows[:4]]
    assert table[f"{group}.failed_reason"].to_pylist()[3] == "the file is cut off"
    summary = snapshot.groups[f"video/{group}"]
    assert summary.counts == {"ok": 4, "failed": 1, "skipped": 0, "empty": 3}
    assert summary.receipts["0"] == receipt.digest
    assert (snapshot.sequence, snapshot.parent, list(snapshot.parts)) == (1, None, ["clips/part-00000.parquet"])


def test_nothing_new_writes_no_new_snapshot(kit, make):
    kit.writer().add_clips([make.video(0)])
    first = kit.fill()
    assert kit.writer().publish_snapshot() == first
    assert snapshot_files(kit) == [f"{first}.json", f"{first}.parquet"]


def test_a_snapshot_builds_on_its_parent_and_does_not_read_its_receipts_again(kit, make):
    writer = kit.writer()
    writer.add_clips([make.video(n) for n in range(4)])
    first = kit.fill()
    receipt = kit.path / "receipts" / "video" / make.identity().group_name / "00000000.json"
    receipt.write_text("unreadable")  # it would raise if it was parsed
    writer.add_clips([make.video(n) for n in range(6)])
    second = kit.fill()
    snapshot = load_snapshot(LocalObjects(kit.path), second)
    assert (snapshot.sequence, snapshot.parent) == (2, first)
    assert kit.open().rows([f"tiny/videos/{n}.mp4" for n in range(6)], encoder="dinov2").tolist() == [0, 1, 2, 3, 4, 5]


def test_step_by_step_and_all_at_once_give_the_same_table(kit, make, tmp_path):
    once = make.kit(tmp_path / "once")
    for store in (kit, once):
        writer = store.writer()
        for batch in (range(3), range(7), range(9)):
            writer.add_clips([make.video(n) for n in batch])
            if store is kit:
                store.fill(broken=("videos/1.mp4",))
    once.fill(broken=("videos/1.mp4",))
    tables = []
    for store in (kit, once):
        objects = LocalObjects(store.path)
        tables.append(read_snapshot_table(objects, load_snapshot(objects, store.open().snapshot)))
    assert tables[0].equals(tables[1])


def test_the_newest_good_row_of_a_clip_wins_whatever_the_order_of_commits(kit, make):
    identity = make.identity()
    writer = kit.writer()
    writer.add_clips([make.video(0), make.video(1)])
    writer.add_clips([make.video(0), make.video(1)], retry=True)
    writer.add_clips([make.video(1)], retry=True)
    clips = make.clips_by_row(writer)["video"]
    group = kit.group(identity)
    ids = ["tiny/videos/0.mp4", "tiny/videos/1.mp4"]

    make.fill_block(group.begin(1), clips, identity, noise=1).commit()  # rows 4, 5: the first retry
    writer.publish_snapshot()
    make.fill_block(group.begin(0), clips, identity).commit()  # rows 0, 1: older, committed later
    writer.publish_snapshot()
    assert kit.open().rows(ids, encoder="dinov2").tolist() == [4, 5]
    make.fill_block(group.begin(2), clips, identity, broken=("videos/1.mp4",)).commit()  # row 8 fails
    writer.publish_snapshot()
    assert kit.open().rows(ids, encoder="dinov2").tolist() == [4, 5]
    assert kit.open().quarantine.num_rows == 0
    expected = make.floats(clips[4], identity, 1)["tokens"].astype(np.float16)
    assert np.array_equal(kit.open().read(ids[:1], encoder="dinov2")[0], expected)


def test_the_newest_failure_is_the_one_that_is_told(kit, make):
    writer = kit.writer()
    writer.add_clips([make.video(0)])
    writer.add_clips([make.video(0)], retry=True)
    group = kit.group(make.identity())
    for block, reason in ((1, "second try"), (0, "first try")):
        block_writer = group.begin(block)
        block_writer.fail(4 * block, reason)
        block_writer.commit()
        writer.publish_snapshot()
    assert kit.open().quarantine.to_pylist() == [
        {
            "clip_id": "tiny/videos/0.mp4",
            "path": "videos/0.mp4",
            "encoder": "dinov2",
            "reason": "second try",
            "scope": "clip",
        }
    ]


def test_racing_publishers_all_survive_and_the_newest_has_everything(kit, make):
    writer = kit.writer()
    writer.add_clips([make.video(n) for n in range(24)])
    clips = make.clips_by_row(writer)["video"]
    group = kit.group(make.identity())
    barrier, ids, errors = threading.Barrier(3), [], []

    def work(blocks):
        try:
            barrier.wait()
            for block in blocks:
                make.fill_block(
                    kit.writer().open_group("video", group.name).begin(block), clips, group.identity
                ).commit()
                ids.append(publish(LocalObjects(kit.path), writer.block_rows))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(blocks,)) for blocks in ([0, 3], [1, 4], [2, 5])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for snapshot_id in ids:
        assert load_snapshot(LocalObjects(kit.path), snapshot_id).id == snapshot_id
    store = kit.open()
    assert store.rows(store.clips["clip_id"].to_pylist(), encoder="dinov2").tolist() == list(range(24))


def test_an_older_snapshot_can_be_opened_and_says_what_it_said(kit, make):
    from featurestore.store import FeatureStore

    writer = kit.writer()
    writer.add_clips([make.video(0)])
    first = kit.fill()
    writer.add_clips([make.video(1)])
    kit.fill()
    assert len(FeatureStore.open(kit.path, snapshot=first)) == 1
    assert len(kit.open()) == 2
    with pytest.raises(StoreError, match="there is no snapshot 00000009-0123456789ab; the newest are: 0000"):
        FeatureStore.open(kit.path, snapshot="00000009-0123456789ab")


def test_a_damaged_snapshot_is_refused(kit, make):
    kit.writer().add_clips([make.video(0)])
    snapshot_id = kit.fill()
    for name in (f"{snapshot_id}.json", f"{snapshot_id}.parquet"):
        file = kit.path / "snapshots" / name
        data = file.read_bytes()
        file.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
        with pytest.raises((StoreDamagedError, StoreFormatError)):
            kit.open()
        file.write_bytes(data)
    assert len(kit.open()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"parts": {"../../etc/passwd": "a" * 64}},
        {"parts": {"clips/part-00001.parquet": "a" * 64}},
        {"samples": {"x": {"key": "/etc/passwd", "sha256": "a" * 64}}},
        {"samples": {"x": {"key": "samples/y.parquet", "sha256": "a" * 64}}},
        {"groups": {"video/../x": {}}},
        {"groups": []},
        {"sequence": "1"},
        {"block_rows": {"video": 0}},
    ],
)
def test_a_forged_snapshot_cannot_name_what_is_not_the_stores(kit, make, change):
    import hashlib

    from mervcache.files import canonical_json

    kit.writer().add_clips([make.video(0)])
    content = json.loads((kit.path / "snapshots" / f"{kit.fill()}.json").read_text())
    del content["digest"]
    content |= change
    digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    data = (canonical_json(content | {"digest": digest}) + "\n").encode()
    with pytest.raises((StoreFormatError, StoreDamagedError)):
        Snapshot.parse(data, f"00000001-{digest[:12]}")


def test_blocks_committed_after_the_snapshot_are_counted_until_the_next_one(kit, make):
    writer = kit.writer()
    writer.add_clips([make.video(number) for number in range(8)])
    group = kit.group(make.identity())
    for block in (0, 1):
        block_writer = group.begin(block)
        for row in block_writer.planned:
            block_writer.fail(row, "the file is cut off")
        block_writer.commit()
        if block == 0:
            writer.publish_snapshot()
            assert kit.open().unpublished_blocks() == 0
    assert kit.open().unpublished_blocks() == 1
    writer.publish_snapshot()
    assert kit.open().unpublished_blocks() == 0
