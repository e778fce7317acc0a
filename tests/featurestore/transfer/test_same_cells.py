"""A cell is the same where media, span and identity are, whatever path two labs know the media by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
import pytest

from featurestore.clips import Clip
from featurestore.maintenance.tombstone import tombstone
from featurestore.maintenance.verify import verify_store
from featurestore.transfer.export import ExportCells, export
from featurestore.transfer.merge import StoreCells, combine
from mervcache.files import sha256_hex


def media_by_name(clip: Clip) -> str:
    """Files of one name are copies of each other, in whatever folder."""
    return sha256_hex(PurePosixPath(clip.path).name.encode())


def film(number: int, **span) -> Clip:
    """What the other lab calls `tiny/videos/NUMBER.mp4`."""
    return Clip(dataset="lab", path=f"archive/films/{number}.mp4", kind="video", **span)


@pytest.fixture
def labs(make, tmp_path):
    """Two stores in folders of their own: videos 0..3 here, films 2..5 there."""
    here = make.kit(tmp_path / "here/a.zarr", media=media_by_name)
    there = make.kit(tmp_path / "elsewhere/stores/b.zarr", media=media_by_name)
    here.writer().add_clips([make.video(n) for n in range(4)])
    there.writer().add_clips([film(n) for n in range(2, 6)])
    return here, there


@pytest.fixture
def union(make, tmp_path):
    """The union of sources, sound, and what was counted."""

    def combined(*sources):
        out = make.kit(tmp_path / "union.zarr")
        done = combine(sources, out.path)
        assert verify_store(out.path, "full") == []
        return out.open(), done

    return combined


def tokens(store, clip: Clip, encoder: str = "dinov2") -> np.ndarray:
    return store.read([clip.clip_id], encoder=encoder)


def test_the_first_stores_tokens_stand_under_every_name_of_the_media(labs, make, union):
    here, there = labs
    here.fill()
    there.fill()
    store, done = union(StoreCells(here.path), StoreCells(there.path))
    assert (done.clips, done.cells, done.renamed) == (8, 8, 2)
    for number in (2, 3):
        assert np.array_equal(tokens(store, film(number)), tokens(here.open(), make.video(number)))
    for number in (4, 5):
        assert np.array_equal(tokens(store, film(number)), tokens(there.open(), film(number)))


def test_an_encoder_that_one_lab_ran_serves_the_names_of_the_other(labs, make, union):
    here, there = labs
    here.fill()
    there.fill(make.identity(encoder="siglip"))
    store, done = union(StoreCells(here.path), StoreCells(there.path))
    assert done.renamed == 4
    have = {clip["clip_id"]: (clip["dinov2"], clip["siglip"]) for clip in store.clips.to_pylist()}
    assert have == {
        **{make.video(n).clip_id: (True, n >= 2) for n in range(4)},
        **{film(n).clip_id: (n <= 3, True) for n in range(2, 6)},
    }
    assert np.array_equal(tokens(store, make.video(2), "siglip"), tokens(there.open(), film(2), "siglip"))
    ids = [film(n).clip_id for n in range(2, 6)]
    assert store.data_digest(ids, ["siglip"]) == there.open().data_digest(ids, ["siglip"])


def test_an_export_knows_its_media_as_well(labs, make, union, tmp_path):
    here, there = labs
    here.fill()
    there.fill(make.identity(encoder="siglip"))
    export(StoreCells(there.path), tmp_path / "files", format="safetensors")
    store, done = union(StoreCells(here.path), ExportCells(tmp_path / "files"))
    assert done.renamed == 4
    assert np.array_equal(tokens(store, make.video(3), "siglip"), tokens(there.open(), film(3), "siglip"))


def test_what_failed_under_one_name_is_taken_from_another(labs, make, union):
    here, there = labs
    here.fill(broken=("videos/2.mp4",))
    here.fill(make.identity(encoder="siglip"))  # which knows the media of the clip that failed
    there.fill()
    store, _ = union(StoreCells(here.path), StoreCells(there.path))
    assert store.quarantine.num_rows == 0
    assert np.array_equal(tokens(store, make.video(2)), tokens(there.open(), film(2)))


def test_another_span_of_the_same_media_is_another_cell(make, union, tmp_path):
    here, there = (make.kit(tmp_path / name, media=media_by_name) for name in ("a.zarr", "b.zarr"))
    here.writer().add_clips([film(0, start_s=0.0, end_s=2.0)])
    here.fill()
    there.writer().add_clips([replace(film(0, start_s=0.0, end_s=3.0), dataset="other")])
    there.fill(make.identity(encoder="siglip"))
    _, done = union(StoreCells(here.path), StoreCells(there.path))
    assert (done.cells, done.renamed) == (2, 0)


def test_other_media_under_a_clips_name_are_left_aside(make, union, tmp_path):
    here = make.kit(tmp_path / "a.zarr", media=media_by_name)
    there = make.kit(tmp_path / "b.zarr", media=lambda clip: "e" * 64)
    for kit in (here, there):
        kit.writer().add_clips([make.video(0), make.video(1)])
    here.fill()
    there.fill(make.identity(encoder="siglip"))
    store, done = union(StoreCells(here.path), StoreCells(there.path))
    assert (done.other_media, done.cells) == (2, 2)
    assert list(store.encoders) == ["dinov2"]


def test_what_was_taken_back_does_not_come_back_under_another_name(labs, make, union):
    here, there = labs
    here.fill()
    there.fill(make.identity(encoder="siglip"))
    tombstone(there.path, [film(3).clip_id], reason="licence")
    store, _ = union(StoreCells(here.path), StoreCells(there.path))
    have = {clip["clip_id"]: clip["siglip"] for clip in store.clips.to_pylist()}
    assert (have[make.video(2).clip_id], have[make.video(3).clip_id]) == (True, False)
    assert film(3).clip_id not in have
