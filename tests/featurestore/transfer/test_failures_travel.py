"""What failed and what was taken back is part of a store, whatever way the store takes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from featurestore.maintenance.tombstone import tombstone
from featurestore.maintenance.verify import verify_store
from featurestore.store import FeatureStore
from featurestore.transfer.export import ExportCells, export
from featurestore.transfer.merge import StoreCells, combine
from featurestore.transfer.selection import Selection
from featurestore.transfer.sync import push, transfer

BOTH, ONE = Selection(), Selection(encoders=("dinov2",))


def by_export(source: Path, out: Path, selection: Selection) -> None:
    export(StoreCells(source), out.with_suffix(".files"), format="webdataset", selection=selection)
    combine([ExportCells(out.with_suffix(".files"))], out)


WAYS: dict[str, Callable[[Path, Path, Selection], object]] = {
    "push": lambda source, out, selection: push(source, out, selection=selection),
    "pull": lambda source, out, selection: transfer(source, out, selection=selection),
    "subset": lambda source, out, selection: combine([StoreCells(source)], out, selection=selection),
    "union": lambda source, out, selection: combine([StoreCells(source)] * 2, out, selection=selection),
    "export and import": by_export,
}


@pytest.fixture(scope="module")
def failed(make, tmp_path_factory):
    """A still and five videos: one fails with every encoder, one with one of them, one failed once and was retried."""
    kit = make.kit(tmp_path_factory.mktemp("failed") / "store.zarr")
    kit.writer().add_clips([*(make.video(n) for n in range(5)), make.image(0)])
    kit.fill(broken=("videos/1.mp4", "videos/3.mp4", "videos/4.mp4"))
    kit.fill(make.identity(encoder="siglip"), broken=("videos/1.mp4",))
    kit.writer().add_clips([make.video(4)], retry=True)
    kit.fill()
    return kit


@pytest.fixture(scope="module")
def removed(failed, make, tmp_path_factory):
    """The same with one clip taken back."""
    kit = make.kit(tmp_path_factory.mktemp("removed") / "store.zarr")
    shutil.copytree(failed.path, kit.path)
    tombstone(kit.path, [make.video(0).clip_id], reason="the licence was withdrawn", date="2026-11-22")
    return kit


def quarantine_of(store: FeatureStore) -> list[tuple[str, str, str, str]]:
    rows = store.quarantine.to_pylist()
    return sorted((row["encoder"], row["path"], row["reason"], row["scope"]) for row in rows)


CUT = ("the file is cut off", "clip")
OF_DINOV2 = [("dinov2", "videos/1.mp4", *CUT), ("dinov2", "videos/3.mp4", *CUT)]


@pytest.mark.parametrize(("way", "selection"), [*((way, BOTH) for way in WAYS), ("pull", ONE), ("subset", ONE)])
def test_the_quarantine_goes_where_the_store_goes(failed, tmp_path, way, selection):
    WAYS[way](failed.path, tmp_path / "out.zarr", selection)
    expected = OF_DINOV2 + ([("siglip", "videos/1.mp4", *CUT)] if selection is BOTH else [])
    assert quarantine_of(FeatureStore.open(tmp_path / "out.zarr")) == expected
    assert verify_store(tmp_path / "out.zarr", "full") == []


def test_an_older_snapshot_tells_the_quarantine_of_its_time(kit, make):
    kit.writer().add_clips([make.video(n) for n in range(3)])
    first = kit.fill(broken=("videos/1.mp4", "videos/2.mp4"))
    kit.writer().add_clips([make.video(1)], retry=True)
    kit.fill()
    assert [path for _, path, *_ in quarantine_of(FeatureStore.open(kit.path, snapshot=first))] == [
        "videos/1.mp4",
        "videos/2.mp4",
    ]
    assert [path for _, path, *_ in quarantine_of(kit.open())] == ["videos/2.mp4"]


@pytest.mark.parametrize("way", WAYS)
def test_a_removal_goes_where_the_store_goes_and_holds_there(removed, make, tmp_path, way):
    out = make.kit(tmp_path / "out.zarr")
    WAYS[way](removed.path, out.path, BOTH)
    store = out.open()
    assert make.video(0).clip_id not in store.clips["clip_id"].to_pylist()
    assert [tombstone.reason for tombstone in store.tombstones.values()] == ["the licence was withdrawn"]
    assert out.writer().add_clips([make.video(0)]) == []
