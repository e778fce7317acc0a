"""Clips are found by a whole id or an end of one, and an error names a few ids and no more."""

from __future__ import annotations

import pytest

from featurestore.clip_names import clips_named
from mervcache.errors import UserError

IDS = ["d/films/v1.mp4", "d/films/v11.mp4", "d/old/1.mp4", "d/old/xv1.mp4", "d/old/v1.mp4#t=0.0,2.0"]


def test_an_id_or_an_end_that_no_other_clip_has_names_a_clip():
    assert clips_named(IDS, ["d/old/xv1.mp4", "films/v1.mp4", "v11.mp4", "=0.0,2.0", "xv1.mp4"]) == [
        "d/old/xv1.mp4",
        "d/films/v1.mp4",
        "d/films/v11.mp4",
        "d/old/v1.mp4#t=0.0,2.0",
        "d/old/xv1.mp4",
    ]


def test_an_end_after_a_slash_goes_before_an_end_within_a_name():
    assert clips_named(IDS, ["v1.mp4", "1.mp4"]) == ["d/films/v1.mp4", "d/old/1.mp4"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            ".mp4",
            "'.mp4' is the end of 4 clip ids, give more of one: d/films/v1.mp4, d/films/v11.mp4, d/old/1.mp4, ...",
        ),
        ("films/", "'films/' is part of 2 clip ids, give one, or its end: d/films/v1.mp4, d/films/v11.mp4"),
        ("v1.mp5", "no clip of this store is named 'v1.mp5'; near: "),
        ("d/films/v1.avi", "no clip of this store is named 'd/films/v1.avi'; near: d/films/v1.mp4"),
        ("zzzzzz", "no clip of this store is named 'zzzzzz'; its ids are like d/films/v1.mp4"),
        ("", "no clip of this store is named ''"),
    ],
)
def test_what_fits_several_clips_or_none_is_told_with_at_most_three_ids(name, message):
    with pytest.raises(UserError) as error:
        clips_named(IDS, [name])
    assert str(error.value).startswith(message)
    assert str(error.value).count("d/") <= 4  # one may stand in the name itself
