"""Motion, edges and length of clips, against hand arithmetic and against films whose content is known."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from featurestore import Clip
from mervcache.errors import UserError
from pipeline.properties import edge_density, length_s, motion, properties_of
from pipeline.store_media import StoreMedia

RATE, FRAMES = 10, 40


def film(path, frames):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=Fraction(RATE), options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))


def grey(level):
    return np.full((64, 64, 3), level, np.uint8)


def written():
    """Letters on grey."""
    picture = Image.fromarray(grey(200))
    draw = ImageDraw.Draw(picture)
    for row in range(5):
        draw.text((2, 12 * row), "WORDS WORDS", fill=(10, 10, 10))
    return np.asarray(picture)


def test_motion_by_hand():
    luma_TSS = np.zeros((4, 6, 6), np.float32)
    luma_TSS[1] = 10  # differences 10, 10 and, over half the pixels, 4
    luma_TSS[3, :3] = 4
    assert motion(luma_TSS) == pytest.approx((10 + 10 + 2) / 3)


@pytest.mark.parametrize("axis", [1, 2])
def test_edges_by_hand(axis):
    """A step of 80 levels has a Sobel gradient of 4 x 80 / 8 = 40 in the two lines at it, and one of 14 has 7."""
    luma_TSS = np.zeros((1, 12, 12), np.float32)
    luma_TSS[:, 6:] = 80
    if axis == 2:
        luma_TSS = luma_TSS.transpose(0, 2, 1)
    assert edge_density(luma_TSS) == pytest.approx(2 / 10)
    assert edge_density(luma_TSS * (14 / 80)) == 0
    assert edge_density(np.concatenate([luma_TSS, 0 * luma_TSS])) == pytest.approx(1 / 10)


@pytest.mark.parametrize(
    ("span", "seconds"),
    [
        ({}, 4.0),
        ({"start_s": 1.0, "end_s": 2.5}, 1.5),
        ({"start_s": 3.0}, 1.0),
        ({"start_s": 3.0, "end_s": 9.0}, 1.0),  # the media ends at 4
        ({"end_frame": 9}, 1.0),
        ({"end_frame": 99}, 4.0),
    ],
)
def test_length_by_hand(span, seconds):
    clip = Clip(dataset="d", path="a.mp4", kind="video", **span)
    assert length_s(clip, FRAMES, RATE) == pytest.approx(seconds)
    assert length_s(clip, FRAMES, 0.0) is None


def test_a_still_has_edges_alone():
    found = properties_of(np.zeros((1, 8, 8), np.float32), Clip(dataset="d", path="a.png", kind="image"), 1, 0.0)
    assert (found.motion, found.edges, found.length_s) == (None, 0.0, None)


@pytest.fixture
def media(tmp_path, write_store, toy_identity):
    """Films and a picture in a store, one of them missing, with media under `tmp_path/media`."""
    root = tmp_path / "media"
    film(root / "still.mp4", [grey(100)] * FRAMES)
    film(root / "cut.mp4", [grey(60)] * (FRAMES // 2) + [grey(160)] * (FRAMES // 2))
    film(root / "written.mp4", [written()] * FRAMES)
    Image.fromarray(written()).save(root / "written.png")
    clips = [
        *(Clip(dataset="d", path=f"{name}.mp4", kind="video") for name in ("still", "cut", "written", "gone")),
        Clip(dataset="d", path="cut.mp4", kind="video", start_s=0.5, end_s=1.5),
        Clip(dataset="d", path="written.png", kind="image"),
    ]
    identity = toy_identity(grid=(2, 2, 2), width=4)
    arrays = {("toy", c.clip_id): {"tokens": np.zeros((*identity.grid_of(c.kind), 4), np.float16)} for c in clips}
    write_store(tmp_path / "d.zarr", clips, {"toy": identity}, arrays).publish_snapshot()
    from featurestore import FeatureStore

    return lambda folder=root: StoreMedia(FeatureStore.open(tmp_path / "d.zarr"), folder and str(folder)), clips


def test_properties_of_real_clips(media):
    opened, clips = media
    ids = [clip.clip_id for clip in clips]
    assert opened().reachable(ids) == ids
    still, cut, letters, gone, span, picture = (found for _, found in opened().measure(ids))
    assert still.motion == pytest.approx(0, abs=0.05)
    assert cut.motion == pytest.approx(100 / 31, rel=0.03)  # one of the 31 differences between 32 frames
    assert span.motion == pytest.approx(0, abs=0.05)  # before the cut
    assert (still.edges, cut.edges) == (0, 0)
    assert letters.edges > 0.1
    assert picture.edges == pytest.approx(letters.edges, rel=0.05)
    assert [c.length_s for c in (still, cut, letters, span)] == pytest.approx([4, 4, 4, 1])
    assert (picture.motion, picture.length_s) == (None, None)
    assert gone == "media file is missing"


def test_without_the_folder_of_media_no_clip_is_reachable(media, tmp_path):
    opened, clips = media
    ids = [clip.clip_id for clip in clips]
    assert opened(None).reachable(ids) == []  # the store's journal knows no run
    with pytest.raises(UserError, match="elsewhere"):
        opened(tmp_path / "elsewhere")


def test_pictures_are_frames_or_maps_of_tokens(media):
    opened, clips = media
    ids = [clip.clip_id for clip in (clips[1], clips[3], clips[5])]
    found = opened().pictures(ids, encoder="toy", count=4)
    assert list(found) == ids
    assert [(found[clip].are_frames, len(found[clip].urls)) for clip in ids] == [(True, 4), (False, 2), (True, 1)]
    urls = found[ids[0]].urls
    assert urls[0] == urls[1] != urls[2] == urls[3]  # the cut is in the middle
