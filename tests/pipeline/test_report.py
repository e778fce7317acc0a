"""The HTML page: self-contained, with pictures of the tokens that the store holds."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurestore import FeatureStore
from featurestore.token_maps import principal_maps
from pipeline.report import STEPS, write_report
from tests.browser import WIDTHS, needs_browser, open_page


class Page(HTMLParser):
    """Open tags, images and text of a page; a tag left open is an error."""

    VOID = frozenset(("meta", "img", "br", "link", "input", "hr"))

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.images += [dict(attributes)] * (tag == "img")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.text += data


def pixels(image: dict) -> np.ndarray:
    data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module")
def page(extracted, tmp_path_factory) -> tuple[Path, Page]:
    path = write_report(extracted.store, out=tmp_path_factory.mktemp("report") / "page.html", num_clips=3)
    return path, Page(path)


def test_the_page_needs_nothing_from_elsewhere(page):
    path, parsed = page
    assert parsed.open == []
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    assert not re.findall(r"https?://|src='(?!data:)|url\((?!data:)", path.read_text())


def test_each_clip_has_frames_and_a_map_per_encoder_and_instant(page, extracted):
    maps = [image for image in page[1].images if image["alt"].startswith("tokens of")]
    frames = [image for image in page[1].images if image["alt"] == "frame"]
    store = FeatureStore.open(extracted.store)
    kinds = dict(zip(store.clips["clip_id"].to_pylist(), store.clips["kind"].to_pylist(), strict=True))
    columns = [STEPS if kinds[clip] == "video" else 1 for clip in kinds if clip in page[1].text]
    assert sorted(columns) == [1, STEPS, STEPS]  # a still has one instant
    assert len(maps) == 4 * sum(columns)
    assert len(frames) == sum(columns)
    videos = store.clips.filter(np.array(store.clips["kind"].to_pylist()) == "video")["clip_id"].to_pylist()
    shown = [clip for clip in store.clips["clip_id"].to_pylist() if clip in page[1].text]
    assert shown[0] == videos[0]
    expected = principal_maps(store.read(shown, encoder="dinov2"))
    drawn = [pixels(image) for image in maps if image["alt"] == "tokens of dinov2"]
    assert all(np.array_equal(drawn[i * STEPS + t], expected[i][t]) for i in range(2) for t in range(STEPS))
    assert np.array_equal(drawn[2 * STEPS], expected[2][0])


def test_the_page_warns_of_random_weights_and_tells_sizes_and_runs(page, extracted):
    text = page[1].text
    assert "Seeded random weights, not trained ones: dinov2, languagebind, siglip, vivit." in text
    assert extracted.summary.run in text
    assert "Empty: every clip that was tried is committed." in text
    assert "8x3x3x32" in text


def test_a_page_of_some_clips_says_so(page, extracted, tmp_path):
    total = len(FeatureStore.open(extracted.store))
    assert f"3 of the {total} clips that have tokens of every encoder" in page[1].text
    path = write_report(extracted.store, out=tmp_path / "page.html", num_clips=total)
    assert "of every encoder, evenly spaced" not in Page(path).text


def test_without_the_media_the_frames_are_left_out_and_the_maps_stay(extracted, tmp_path):
    path = write_report(extracted.store, out=tmp_path / "page.html", root=str(tmp_path), num_clips=2)
    images = Page(path).images
    assert [image for image in images if image["alt"] == "frame"] == []
    assert len(images) == 4 * (STEPS + 1)  # one video, one still


def test_by_default_the_page_lies_beside_the_store_and_lists_the_quarantine_escaped(lab):
    lab.copy_of_root()
    (lab.root / "valley/a<b>&.mp4").write_bytes(b"not a film")
    lab.annotate(lab.root, ["valley/a<b>&.mp4", "valley/v5.mp4"], [])
    lab.extract(encoders=("siglip", "dinov2"))
    path = write_report(lab.store)
    assert re.search(r"<b>1</b><span>clips quarantined", path.read_text())  # by two encoders
    assert path == lab.folder / "store-report.html"
    assert "videollava/valley/a<b>&.mp4" in Page(path).text
    assert "a<b>" not in path.read_text()
    assert "not a video" in Page(path).text


def test_control_characters_of_names_are_spelled_out_on_the_page(lab):
    lab.copy_of_root()
    name = "valley/a\x9b31m\u202egpj.mp4"
    (lab.root / name).write_bytes(b"not a film")
    lab.annotate(lab.root, [name, "valley/v5.mp4"], [])
    lab.extract(encoders=("siglip",))
    page = write_report(lab.store).read_text()
    assert "\x9b" not in page
    assert "\u202e" not in page
    assert r"valley/a\x9b31m\u202egpj.mp4" in page


@needs_browser
def test_a_browser_shows_the_page_without_errors_and_without_moving_it_sideways(page, tmp_path):
    opened, console = open_page(page[0], tmp_path)
    assert console == []
    assert [one.width for one in opened] == list(WIDTHS)
    assert all(one.scroll_width <= one.width for one in opened)
