"""Images, GIFs and folders of frames."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mervcache.errors import MediaError
from pipeline.decode.decoders import decode_clip
from pipeline.views import ResizeRule, View

VIEW = View(rule=ResizeRule(size=16), num_frames=32)
OTHER = View(rule=ResizeRule(size=8, filter="bilinear", antialias=False, fit="centre-crop"), num_frames=16)


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def small(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif"])
def test_image_is_one_frame_of_every_view(suffix, studio) -> None:
    picture().save(studio.folder / f"a.{suffix}")
    decoded = decode_clip(studio.job(studio.folder / f"a.{suffix}", kind="image", views=(VIEW, OTHER)))
    with Image.open(studio.folder / f"a.{suffix}") as image:
        assert np.array_equal(decoded.frames[VIEW], small(image)[None])
    assert decoded.frames[OTHER].shape == (1, 8, 8, 3)
    assert (decoded.decoder, decoded.num_frames, decoded.fps) == ("pillow", 1, 0.0)


def test_exif_orientation_is_not_applied_as_in_the_reference(studio) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture().save(studio.folder / "a.png", exif=exif)
    decoded = decode_clip(studio.job(studio.folder / "a.png", kind="image", views=(VIEW,)))
    assert np.array_equal(decoded.frames[VIEW][0], small(picture()))


def test_every_frame_of_a_gif_is_numbered(studio) -> None:
    colours = [(i * 5, 255 - i * 5, 40) for i in range(40)]
    images = [Image.new("RGB", (20, 20), colour) for colour in colours]
    images[0].save(studio.folder / "a.gif", save_all=True, append_images=images[1:], duration=40, loop=0)
    decoded = decode_clip(studio.job(studio.folder / "a.gif", views=(VIEW,)))
    wanted = np.linspace(0, 39, 32, dtype=int)
    assert decoded.num_frames == 40
    assert np.abs(decoded.frames[VIEW].mean(axis=(1, 2)) - np.array(colours)[wanted]).max() <= 3
    with pytest.raises(MediaError, match="no frame rate"):
        decode_clip(studio.job(studio.folder / "a.gif", views=(VIEW,), end_s=1.0))


def test_folder_of_frames_is_read_in_natural_order_at_three_per_second(studio) -> None:
    (studio.folder / "clip").mkdir()
    for number in range(1, 13):
        Image.new("RGB", (20, 20), (number * 20, 0, 0)).save(studio.folder / "clip" / f"{number}.png")
    decoded = decode_clip(studio.job(studio.folder / "clip", views=(VIEW,)))
    seen = (decoded.frames[VIEW][:, 0, 0, 0] // 20).tolist()
    assert seen == [1 + i for i in np.linspace(0, 11, 32, dtype=int)]
    assert (decoded.num_frames, decoded.fps) == (12, 3.0)
    part = decode_clip(studio.job(studio.folder / "clip", views=(VIEW,), start_s=1.0, end_s=2.0))
    assert set((part.frames[VIEW][:, 0, 0, 0] // 20).tolist()) == {4, 5, 6}


def png_of_declared_size(width: int, height: int) -> bytes:
    """A PNG of 60 bytes that declares a huge size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 10)), (b"IEND", b""))
    packed = b""
    for kind, data in chunks:
        packed += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + packed


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_image_past_the_pixel_cap_is_refused_by_its_header(side, studio, monkeypatch) -> None:
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("pixels were decoded"))
    path = studio.bytes("bomb.png", png_of_declared_size(side, side))
    with pytest.raises(MediaError, match="larger than"):
        decode_clip(studio.job(path, kind="image", views=(VIEW,)))


def truncated_jpeg(studio) -> bytes:
    picture(size=(200, 200)).save(studio.folder / "whole.jpg")
    return (studio.folder / "whole.jpg").read_bytes()[:4000]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda _: b"no image at all", "not an image in a known format"),
        (lambda _: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
        (truncated_jpeg, "damaged image"),
        (lambda _: png_of_declared_size(50, 50), "damaged image"),
        (lambda studio: studio.film("v.mp4").read_bytes(), "not an image in a known format"),
    ],
)
def test_what_is_no_image_fails_the_clip(content, reason, studio) -> None:
    path = studio.bytes("a.jpg", content(studio))
    with pytest.raises(MediaError, match=reason) as caught:
        decode_clip(studio.job(path, kind="image", views=(VIEW,)))
    assert str(studio.folder) not in str(caught.value)


def test_broken_frame_in_a_folder_and_in_a_gif_fails_the_clip(studio) -> None:
    (studio.folder / "clip").mkdir()
    picture().save(studio.folder / "clip" / "1.png")
    (studio.folder / "clip" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(MediaError, match="image"):
        decode_clip(studio.job(studio.folder / "clip", views=(VIEW,)))
    gif = studio.film("a.gif", "gif", pixels="rgb8").read_bytes()
    path = studio.bytes("b.gif", gif[: len(gif) // 2])
    with pytest.raises(MediaError, match="damaged image"):
        decode_clip(studio.job(path, views=(VIEW,)))


def test_folder_asked_for_as_an_image_is_an_error_of_the_clip(studio) -> None:
    (studio.folder / "clip").mkdir()
    picture().save(studio.folder / "clip" / "1.png")
    with pytest.raises(MediaError, match="the path is a folder"):
        decode_clip(studio.job(studio.folder / "clip", kind="image", views=(VIEW,)))
