"""Tags: names of snapshots that do not change unless they are moved on purpose, and travel with the store."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from featurestore.maintenance.repair import repair_store
from featurestore.maintenance.tombstone import tombstone
from featurestore.maintenance.verify import verify_store
from featurestore.objects.open import open_objects
from featurestore.store import FeatureStore
from featurestore.tags import Tag, read_tags, tag_snapshot
from featurestore.transfer.selection import Selection
from featurestore.transfer.sync import push, transfer
from mervcache.errors import StoreDamagedError, StoreError, StoreFormatError, StoreNotFoundError, UserError
from tests.featurestore.sound_store import sample


@pytest.fixture
def tagged(kit, make):
    """A store whose first snapshot is tagged v1: two clips and a sample; the newest has four and a later version."""
    for numbers in ((0, 1), (2, 3)):
        clips = [make.video(number) for number in numbers]
        kit.writer().add_clips(clips)
        kit.writer().add_samples("mix", [sample(number, clip) for number, clip in zip(numbers, clips, strict=True)])
        kit.fill()
        if numbers == (0, 1):
            tag_snapshot(kit.path, "v1")
    return kit


def test_a_tag_opens_the_store_as_it_was(tagged):
    old, new = FeatureStore.open(tagged.path, snapshot="v1"), tagged.open()
    assert (len(old), len(new)) == (2, 4)
    assert old.snapshot == new.tags["v1"] == FeatureStore.open(tagged.path, snapshot=old.snapshot).snapshot
    assert [each.sample_id for each in old.samples("mix")] == ["0", "1"]
    with pytest.raises(StoreError, match="there is no tag 'v2'; the tags of this store are: v1"):
        FeatureStore.open(tagged.path, snapshot="v2")


def test_a_tag_stays_unless_it_is_moved_on_purpose(tagged):
    first, newest = tagged.open().tags["v1"], tagged.open().snapshot
    assert tag_snapshot(tagged.path, "v1", snapshot=first).number == 1
    with pytest.raises(UserError, match=rf"the tag v1 names snapshot {first}, not {newest}.*--force"):
        tag_snapshot(tagged.path, "v1")
    assert tagged.open().tags == {"v1": first}
    assert tag_snapshot(tagged.path, "v1", force=True).number == 2
    assert tagged.open().tags == {"v1": newest}
    assert tag_snapshot(tagged.path, "copy", snapshot="v1").snapshot == newest


def test_of_two_that_make_one_tag_at_once_the_second_is_refused(kit, make):
    ids = []
    for number in range(2):
        kit.writer().add_clips([make.video(number)])
        ids.append(kit.fill())
    barrier, refused = threading.Barrier(2), []

    def name(snapshot):
        barrier.wait()
        try:
            tag_snapshot(kit.path, "v1", snapshot=snapshot)
        except UserError:
            refused.append(snapshot)

    threads = [threading.Thread(target=name, args=(snapshot,)) for snapshot in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1
    assert kit.open().tags == {"v1": ({*ids} - {*refused}).pop()}


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a..b", "a b", "x" * 101, "00000003-0123456789ab", "é"])
def test_a_name_that_is_no_tag_is_refused(tagged, name):
    with pytest.raises(UserError, match="a tag is letters, digits"):
        tag_snapshot(tagged.path, name)


def test_what_is_not_there_cannot_be_tagged(tagged, kit, tmp_path):
    with pytest.raises(StoreError, match="there is no snapshot 00000009-0123456789ab"):
        tag_snapshot(tagged.path, "v2", snapshot="00000009-0123456789ab")
    with pytest.raises(StoreNotFoundError):
        tag_snapshot(tmp_path / "nowhere.zarr", "v2")
    with pytest.raises(UserError, match="not written in place"):
        tag_snapshot("hf://datasets/lab/feats", "v2")


def test_a_crafted_tag_is_refused():
    good = Tag(name="v1", snapshot="00000003-0123456789ab")
    assert Tag.parse(good.to_bytes(), "v1") == good
    for data in (b"", b"[]", b"{}", good.to_bytes().replace(b"00000003-0123456789ab", b"../../../etc/passwd00")):
        with pytest.raises(StoreFormatError):
            Tag.parse(data, "v1")
    for data in (good.to_bytes()[:-1], good.to_bytes().replace(b"0123456789ab", b"0123456789ac")):
        with pytest.raises(StoreDamagedError):
            Tag.parse(data, "v1")
    with pytest.raises(StoreDamagedError):
        Tag.parse(good.to_bytes(), "v2")


def test_a_copy_has_the_tags_and_the_snapshots_that_they_name(tagged, tmp_path):
    copy = tmp_path / "copy.zarr"
    assert push(tagged.path, copy).tags == {"v1": False}
    old = FeatureStore.open(copy, snapshot="v1")
    assert (len(old), len(FeatureStore.open(copy))) == (2, 4)
    assert old.samples("mix") == FeatureStore.open(tagged.path, snapshot="v1").samples("mix")
    ids = old.clips["clip_id"].to_pylist()
    assert np.array_equal(old.read(ids, encoder="dinov2"), tagged.open().read(ids, encoder="dinov2"))
    assert verify_store(copy, "full") == []
    assert "tags/v1.json" in (copy / "listing.json").read_text()
    tag_snapshot(tagged.path, "v1", force=True)
    assert push(tagged.path, copy).tags == {"v1": True}
    assert FeatureStore.open(copy).tags == tagged.open().tags


def test_another_tag_of_that_name_is_refused_before_anything_is_sent_and_a_newer_one_stays(tagged, tmp_path, make):
    copy = tmp_path / "copy.zarr"
    transfer(tagged.path, copy)
    newest = tag_snapshot(copy, "v1", force=True).snapshot
    transfer(tagged.path, copy)
    assert FeatureStore.open(copy).tags == {"v1": newest}
    tag_snapshot(tagged.path, "paper", snapshot="v1")
    tag_snapshot(copy, "paper")
    tagged.writer().add_clips([make.video(9)])
    tagged.fill()
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"the tag paper names snapshot .* here and .* at the destination; nothing"):
        transfer(tagged.path, copy)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before


def test_a_part_of_a_store_has_no_tags_and_says_so(tagged, tmp_path, caplog):
    done = transfer(tagged.path, tmp_path / "part.zarr", selection=Selection(kind="video"))
    assert done.tags == {}
    assert "1 tags are not sent" in caplog.text
    assert FeatureStore.open(tmp_path / "part.zarr").tags == {}


def test_a_removal_applies_to_tagged_snapshots_and_their_copies(tagged, tmp_path, make):
    tombstone(tagged.path, [make.video(0).clip_id], reason="licence")
    transfer(tagged.path, tmp_path / "copy.zarr")
    for path in (tagged.path, tmp_path / "copy.zarr"):
        old = FeatureStore.open(path, snapshot="v1")
        assert old.clips["clip_id"].to_pylist() == [make.video(1).clip_id]
        with pytest.raises(StoreError, match="held conversations about clips removed"):
            old.samples("mix")
        assert verify_store(path, "full") == []


def test_damaged_tags_and_lost_snapshots_are_found_and_fetched_from_a_copy(tagged, tmp_path):
    copy, snapshot = tmp_path / "copy.zarr", tagged.open().tags["v1"]
    transfer(tagged.path, copy)
    for suffix in (".json", ".parquet"):
        (tagged.path / f"snapshots/{snapshot}{suffix}").unlink()
    assert [finding.key for finding in verify_store(tagged.path)] == ["tags/v1.json"]
    assert all(each.is_mended for each in repair_store(tagged.path, other=copy))
    assert verify_store(tagged.path, "full") == []
    file = tagged.path / "tags/v1.json"
    file.write_bytes(file.read_bytes().replace(b'"number":1', b'"number":2'))
    assert [finding.key for finding in verify_store(tagged.path)] == ["tags/v1.json"]
    assert all(each.is_mended for each in repair_store(tagged.path, other=copy))
    assert read_tags(open_objects(tagged.path)) == read_tags(open_objects(copy))


def test_a_bucket_has_tags(tagged, s3):
    push(tagged.path, s3)
    first = FeatureStore.open(s3, cache=False).tags["v1"]
    assert FeatureStore.open(s3, snapshot="v1", cache=False).snapshot == first
    with pytest.raises(UserError, match="--force"):
        tag_snapshot(s3, "v1")
    assert tag_snapshot(s3, "v1", force=True).number == 2
    assert FeatureStore.open(s3, snapshot="v1", cache=False).snapshot == tagged.open().snapshot
