"""Which store a command means when its path is left out or mistyped."""

from __future__ import annotations

from pathlib import Path

import pytest

from featurestore.layout import ROOT_METADATA
from featurestore.locate import (
    check_is_another,
    check_room_for_store,
    find_store,
    names_of,
    no_store_at,
    store_first,
    stores_under,
)
from featurestore.writer import StoreWriter
from mervcache.errors import UserError


@pytest.fixture
def features(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    StoreWriter.open_or_create(tmp_path / "features/one.zarr")
    (tmp_path / "features/not-a-store.zarr").mkdir()
    return tmp_path / "features"


def test_a_path_given_is_taken_as_it_is(features):
    assert str(find_store("elsewhere/any.zarr")) == "elsewhere/any.zarr"


def test_a_url_stays_a_url_and_a_file_url_is_a_folder(features):
    assert find_store("s3://bucket/any.zarr/") == "s3://bucket/any.zarr"
    assert str(find_store("file:///data/any%20one.zarr")) == "/data/any one.zarr"
    assert "merv-pipeline push" in no_store_at("s3://bucket/any.zarr")


def test_the_only_store_is_found_and_folders_without_metadata_are_none(features):
    assert str(find_store(None)) == "features/one.zarr"
    assert stores_under(features) == [features / "one.zarr"]


def test_two_stores_are_listed_and_none_says_how_to_make_one(features, tmp_path, monkeypatch):
    StoreWriter.open_or_create(features / "two.zarr")
    with pytest.raises(
        UserError, match=r"2 stores under features/, give the path of one: features/one\.zarr, features/t"
    ):
        find_store(None)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match=r"no store under .*/empty/features: make one with `merv-pipeline extract`"):
        find_store(None)


def test_a_mistyped_path_is_answered_with_the_stores_nearby(features):
    absolute = features.resolve() / "onne.zarr"
    expected = f"there is no feature store at features/onne.zarr ({absolute}); nearby: features/one.zarr"
    assert no_store_at("features/onne.zarr") == expected
    assert no_store_at(absolute).startswith(f"there is no feature store at {absolute}; nearby: ")
    assert no_store_at("onne.zarr").endswith("nearby: features/one.zarr")


def test_an_address_with_one_slash_is_a_typing_mistake(features):
    with pytest.raises(
        UserError, match=r"s3:/lab/x\.zarr is neither a folder nor an address; did you mean s3://lab/x\."
    ):
        find_store("s3:/lab/x.zarr")


def test_a_place_where_no_store_can_be_is_refused_before_anything_is_made(features, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for place in ("notes.txt", "notes.txt/below.zarr"):
        with pytest.raises(UserError, match=r"a store is a folder, and .*notes\.txt is a file"):
            check_room_for_store(place)
    check_room_for_store("new/folder/lab.zarr")
    check_room_for_store("features/one.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features", "notes.txt"]


def test_a_store_stands_before_the_names_that_are_looked_for_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / ROOT_METADATA).touch()
    assert store_first(["a.zarr", "clip"], None) == (Path("a.zarr"), ["clip"])
    assert store_first(["clip", "a.zarr"], "b.zarr") == (Path("b.zarr"), ["clip", "a.zarr"])
    with pytest.raises(UserError, match=r"the store goes first: a\.zarr clip"):
        store_first(["clip", "a.zarr"], None)
    with pytest.raises(UserError, match=r"a\.zarr is the store: name a clip behind it"):
        store_first(["a.zarr"], None)


def test_names_with_commas_are_cut_and_empty_ones_left_out():
    assert names_of("dinov2") == ["dinov2"]
    assert names_of(" dinov2, siglip ,,") == ["dinov2", "siglip"]
    assert names_of(" , ") == []


def test_a_store_is_not_written_to_its_own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, destination in (("a.zarr", tmp_path / "a.zarr"), ("s3://b/a.zarr", "s3://b/a.zarr/")):
        with pytest.raises(UserError, match="is the store itself: name another place"):
            check_is_another(source, destination)
    check_is_another("a.zarr", "s3://b/a.zarr")
    check_is_another("a.zarr", "b.zarr")
