"""Preflight checks: a run that its store refuses ends before anything is listed (here no media exist)."""

import pytest

from jobs.clusters import ClusterError
from mervcache.errors import IdentityConflictError, UserError
from pipeline.forecast import forecast


@pytest.fixture
def ask(lab, extracted, tmp_path):
    """Ask for a run on the store that everybody shares, of media that do not exist."""

    def ask_with(**changes):
        return lab.extract(**{"store": extracted.store, "root": tmp_path / "nowhere", **changes})

    return ask_with


def test_other_settings_of_an_encoder_are_told_without_its_weights(ask):
    with pytest.raises(IdentityConflictError, match=r"grid: stored \[8, 3, 3\], requested \[8, 2, 2\]") as refused:
        ask(grid=[8, 2, 2])
    assert "weights_sha256" not in str(refused.value)


def test_a_grid_that_would_repeat_places_is_refused_unless_it_is_named(ask):
    with pytest.raises(UserError, match=r"grid 8x5x5 is finer than the \d+x4x4 of .*--grid raw"):
        ask(grid=[8, 5, 5], new_identity=True)
    with pytest.raises(UserError, match="nowhere"):  # the run ends where the media should be
        ask(grid=[8, 5, 5], upsample=True, new_identity=True)


def test_other_block_rows_are_told(ask):
    with pytest.raises(UserError, match="this store has blocks of 4 video rows, got 8"):
        ask(block_rows={"video": 8})


def test_a_folder_of_something_else_is_told_and_left_as_it_is(ask, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    with pytest.raises(UserError, match=r"thesis is not empty and not a feature store \(it holds 'chapter1.tex'\)"):
        ask(store=tmp_path / "thesis")
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


def test_a_scheduler_that_is_none_is_told_though_there_may_be_nothing_to_do(ask):
    with pytest.raises(ClusterError, match="unknown scheduler 'slrm'"):
        ask(scheduler="slrm")


def test_a_plan_is_not_made_for_a_place_where_no_store_can_be(lab, tmp_path):
    (tmp_path / "film.mp4").touch()
    with pytest.raises(UserError, match="is not empty and not a feature store"):
        forecast(lab.config(store=tmp_path))


def test_settings_that_fit_are_let_in(ask):
    for changes in ({}, {"grid": [8, 2, 2], "new_identity": True}):
        with pytest.raises(UserError, match="nowhere"):  # and the run ends where the media should be
            ask(**changes)
