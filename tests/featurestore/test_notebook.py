"""What a notebook shows of a store: one line, a table as HTML, a data frame, token maps."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from featurestore import Clip, FeatureStore
from featurestore.token_maps import PrincipalColours
from mervcache.errors import ClipUnavailableError, UserError

CLIPS = [
    Clip(dataset="toy", path="a $x$ <b>.mp4", kind="video"),
    Clip(dataset="toy", path="still.png", kind="image"),
    Clip(dataset="toy", path="broken.mp4", kind="video"),
]
VIDEO, STILL, BROKEN = (clip.clip_id for clip in CLIPS)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        (encoder, clip): {"tokens": rng.standard_normal((steps, 2, 2, 8)).astype(np.float16)}
        for encoder in ("one", "two")
        for clip, steps in ((VIDEO, 4), (STILL, 1))
    }


@pytest.fixture
def store(tmp_path, toy_identity, write_store, arrays):
    identities = {name: toy_identity(name) for name in ("one", "two")}
    folder = tmp_path / "<script>alert(1)</script>"
    writer = write_store(folder / "toy.zarr", CLIPS, identities, arrays, failed={("one", BROKEN), ("two", BROKEN)})
    writer.publish_snapshot()
    return FeatureStore.open(folder / "toy.zarr")


class Cells(HTMLParser):
    """Rows of a table's cells, and the tags of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_a_store_is_one_line_and_a_table_of_its_encoders(store):
    assert "\n" not in repr(store)
    assert {"one", "two", store.snapshot} <= set(re.split(r"[ ,:>]+", repr(store)))
    cells = Cells()
    cells.feed(store._repr_html_())
    assert "script" not in cells.tags
    head, *rows = cells.rows
    shown = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["encoder"] for row in shown] == ["one", "two"]
    for row in shown:
        assert row["identity"] == store.encoders[row["encoder"]].id
        assert (row["grid"], row["width"], row["weights"]) == ("4x2x2", "8", "random:0")
        assert (row["video"], row["image"], row["failed"]) == ("1", "1", "1")


def test_an_address_is_shown_without_its_credentials(store, monkeypatch):
    monkeypatch.setattr(store, "path", "http://user:secret@host/s.zarr?sig=abc")
    assert "secret" not in repr(store) + store._repr_html_()
    assert "sig=abc" not in repr(store) + store._repr_html_()


def test_the_data_frame_has_the_columns_of_clips(store):
    pytest.importorskip("pandas")
    frame = store.to_pandas()
    assert list(frame.columns) == store.clips.column_names
    assert frame["clip_id"].tolist() == [VIDEO, STILL, BROKEN]
    assert frame.set_index("clip_id")["one"].to_dict() == {VIDEO: True, STILL: True, BROKEN: False}


@pytest.mark.parametrize(("module", "extra"), [("pandas", "pandas"), ("matplotlib", "plot")])
def test_an_extra_that_is_not_installed_is_named(store, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=re.escape(f"merv-pipeline[{extra}]")):
        store.to_pandas() if module == "pandas" else store.plot(VIDEO)


def pictures(figure) -> list[list[np.ndarray]]:
    """The pictures of a figure by row, uint8 [H, W, 3]."""
    rows: dict[float, list[np.ndarray]] = {}
    for axis in figure.axes:
        for image in axis.images:
            rows.setdefault(axis.get_subplotspec().rowspan.start, []).append(np.asarray(image.get_array()))
    return [rows[row] for row in sorted(rows)]


def test_a_figure_has_a_row_of_maps_per_encoder_and_a_column_per_step(store, arrays, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    figure = store.plot(VIDEO, num_steps=3)
    figure.savefig(tmp_path / "maps.png")  # the id is text, not mathematics
    shown = pictures(figure)
    assert [len(row) for row in shown] == [3, 3]
    for encoder, row in zip(("one", "two"), shown, strict=True):
        tokens = arrays[encoder, VIDEO]["tokens"][[0, 1, 3]]
        np.testing.assert_array_equal(np.stack(row), PrincipalColours.fit(tokens[None]).maps(tokens[None])[0])


def test_several_clips_share_their_colours_and_a_still_is_shown_once(store, arrays):
    pytest.importorskip("matplotlib").use("agg")
    video, still = pictures(store.plot([VIDEO, STILL], encoders=["two"]))
    both = np.concatenate([arrays["two", clip]["tokens"] for clip in (VIDEO, STILL)])
    expected = PrincipalColours.fit(both[None]).maps(both[None])[0]
    np.testing.assert_array_equal(np.stack([*video, *still]), expected)


def test_what_cannot_be_plotted_is_an_error(store):
    pytest.importorskip("matplotlib").use("agg")
    with pytest.raises(ClipUnavailableError, match="broken"):
        store.plot(BROKEN)
    with pytest.raises(UserError, match="three"):
        store.plot(VIDEO, encoders=["three"])
    with pytest.raises(UserError, match="num_steps=0"):
        store.plot(VIDEO, num_steps=0)
