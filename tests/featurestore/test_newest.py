"""A bucket's `newest.json`: right after every publication and removal, and never needed."""

from __future__ import annotations

import pytest

from featurestore.layout import NEWEST, SNAPSHOTS, TOMBSTONES
from featurestore.maintenance.tombstone import tombstone
from featurestore.maintenance.verify import verify_store
from featurestore.newest import Newest, list_newest, read_newest, update_newest
from featurestore.objects.open import open_objects
from featurestore.objects.remote import RemoteObjects
from featurestore.store import FeatureStore
from featurestore.transfer.sync import push
from mervcache.errors import ClipUnavailableError, StoreFormatError

IDS = [f"tiny/videos/{n}.mp4" for n in range(4)]


@pytest.fixture
def far(kit, make, s3):
    """The URL of a pushed store of 4 videos."""
    kit.writer().add_clips([make.video(n) for n in range(4)])
    kit.fill()
    push(kit.path, s3)
    return s3


@pytest.fixture
def listings(monkeypatch):
    """Prefixes that were listed in a bucket."""
    listed: list[str] = []
    list_names = RemoteObjects.list_names

    def counted(self, prefix):
        listed.append(prefix)
        return list_names(self, prefix)

    monkeypatch.setattr(RemoteObjects, "list_names", counted)
    return listed


def test_a_snapshot_is_found_without_listing(far, kit, make, listings):
    first = FeatureStore.open(far, cache=False)
    kit.writer().add_clips([make.video(n) for n in range(4, 8)])
    kit.fill()
    push(kit.path, far)
    listings.clear()
    second = FeatureStore.open(far, cache=False)
    assert (len(first), len(second)) == (4, 8)
    assert listings == []


def test_a_removal_applies_at_once_and_to_older_snapshots(far, listings):
    before = FeatureStore.open(far, cache=False).snapshot
    tombstone(far, IDS[:1], reason="consent withdrawn")
    listings.clear()
    for store in (FeatureStore.open(far, cache=False), FeatureStore.open(far, snapshot=before, cache=False)):
        with pytest.raises(ClipUnavailableError, match="was removed"):
            store.read(IDS[:1], encoder="dinov2")
    assert listings == []
    assert verify_store(far) == []


def test_a_store_without_it_is_listed(far, listings):
    objects = open_objects(far)
    objects.delete(NEWEST)
    assert len(FeatureStore.open(far, cache=False)) == 4
    assert {SNAPSHOTS, TOMBSTONES} <= set(listings)


def test_a_damaged_one_is_not_believed_and_is_reported(far):
    objects = open_objects(far)
    good = objects.get(NEWEST)
    for data in (b"", b"{}", good[:-2], good.replace(b'"tombstones":[]', b'"tombstones":["../../x"]'), b"[1]"):
        objects.replace(NEWEST, data)
        assert read_newest(objects) == list_newest(objects)
        assert [finding.key for finding in verify_store(far)] == [NEWEST]
    update_newest(objects)
    assert objects.get(NEWEST) == good
    assert verify_store(far) == []


def test_a_stale_one_is_reported(far):
    objects = open_objects(far)
    objects.replace(NEWEST, Newest(snapshot="00000001-0123456789ab", tombstones=()).to_bytes())
    assert [finding.key for finding in verify_store(far)] == [NEWEST]


def test_an_update_that_lost_its_race_lists_again(far, monkeypatch):
    """Another publisher puts a newer snapshot and its own update between this one's listing and its swap."""
    objects = open_objects(far)
    objects.replace(NEWEST, Newest(snapshot=None, tombstones=()).to_bytes())
    newer = "99999999-0123456789ab"
    swap, races = RemoteObjects.compare_and_swap, []

    def overtaken(self, key, old, new):
        if not races:
            races.append(key)
            self.put_exclusive(f"{SNAPSHOTS}/{newer}.json", b"{}")
            update_newest(self)
        return swap(self, key, old, new)

    monkeypatch.setattr(RemoteObjects, "compare_and_swap", overtaken)
    update_newest(objects)
    assert races == [NEWEST]
    assert read_newest(objects).snapshot == newer


def test_a_folder_has_none(kit, make):
    kit.writer().add_clips([make.video(0)])
    kit.fill()
    assert not (kit.path / NEWEST).exists()


@pytest.mark.parametrize("tombstones", [("0" * 16,), ("0" * 16, "f" * 16)])
def test_bytes_and_back(tombstones):
    newest = Newest(snapshot="00000003-0123456789ab", tombstones=tombstones)
    assert Newest.parse(newest.to_bytes()) == newest
    with pytest.raises(StoreFormatError):
        Newest.parse(newest.to_bytes().replace(b"00000003", b"00000004"))
