"""Stills of every pixel mode: scaled where black and white are defined, refused by name where they are not."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from mervcache.errors import MediaError
from pipeline.decode.decoders import decode_clip
from pipeline.views import ResizeRule, View

SIDE = 64
VIEW = View(rule=ResizeRule(size=SIDE), num_frames=32)
RAMP = np.tile(np.arange(SIDE) * 1024, (SIDE, 1)).astype(np.uint16)  # 0, 1024, ..., 64512
HIGH = (RAMP >> 8).astype(np.uint8)  # the 8 high bits: 0, 4, ..., 252


def read(studio, name: str, view: View = VIEW) -> np.ndarray:
    return decode_clip(studio.job(studio.folder / name, kind="image", views=(view,))).frames[view][0]


def tiff(values: bytes, bits: int, *, photometric: int = 1, sample_format: int = 1, order: str = "<") -> bytes:
    """A TIFF of one strip of SIDE x SIDE grey values, tag by tag."""
    tags = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: photometric, 277: 1, 278: SIDE, 279: len(values)}
    tags |= {273: 8, 339: sample_format}  # the values begin at byte 8
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(values))
    return head + values + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0)


def packed_12_bit(values: np.ndarray) -> bytes:
    pairs = values.reshape(-1, 2).tolist()
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)


WIDE = {
    "16-bit PNG": ("a.png", lambda path: Image.fromarray(RAMP).save(path)),
    "16-bit TIFF": ("a.tif", lambda path: Image.fromarray(RAMP).save(path)),
    "compressed 16-bit TIFF": ("a.tif", lambda path: Image.fromarray(RAMP).save(path, compression="tiff_lzw")),
    "big-endian TIFF": ("a.tif", lambda path: path.write_bytes(tiff(RAMP.astype(">u2").tobytes(), 16, order=">"))),
    "TIFF where white is 0": (
        "a.tif",
        lambda path: path.write_bytes(tiff((65535 - RAMP).astype("<u2").tobytes(), 16, photometric=0)),
    ),
    "12-bit TIFF": ("a.tif", lambda path: path.write_bytes(tiff(packed_12_bit(RAMP >> 4), 12))),
    "PGM up to 65535": (
        "a.ppm",
        lambda path: path.write_bytes(b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes()),
    ),
    "PGM up to 4095": (
        "a.ppm",
        lambda path: path.write_bytes(b"P5 64 64 4095\n" + (RAMP >> 4).astype(">u2").tobytes()),
    ),
    "plain PGM": ("a.ppm", lambda path: path.write_text("P2 64 64 65535\n" + " ".join(map(str, RAMP.ravel())))),
    "16-bit RGB PNG": ("a.png", lambda path: path.write_bytes(rgb_png())),
}


def rgb_png() -> bytes:
    import zlib

    rows = b"".join(b"\0" + np.repeat(row[:, None], 3, axis=1).astype(">u2").tobytes() for row in RAMP)
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


@pytest.mark.parametrize("name", WIDE)
def test_a_ramp_of_more_than_eight_bits_stays_that_ramp(name, studio) -> None:
    file, write = WIDE[name]
    write(studio.folder / file)
    assert np.abs(read(studio, file).astype(int) - HIGH[..., None]).max() <= 1  # 12 bits end at 4095, not at 65535


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (tiff((RAMP / 65535).astype("<f4").tobytes(), 32, sample_format=3), "F"),
        (tiff(RAMP.astype("<i2").tobytes(), 16, sample_format=2), "I"),
        (tiff(RAMP.astype("<u4").tobytes(), 32), "I"),
        (tiff(RAMP.astype("<i4").tobytes(), 32, sample_format=2), "I"),
        (b"Pf 64 64\n-1.0\n" + (RAMP / 65535).astype("<f4").tobytes(), "F"),
    ],
)
def test_values_without_a_defined_black_and_white_are_refused_with_their_mode(content, mode, studio) -> None:
    studio.bytes("a.tif", content)
    with pytest.raises(MediaError, match=f"^image of mode {mode}, whose values have no defined black and white$"):
        read(studio, "a.tif")


def coloured() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))


@pytest.mark.parametrize(
    ("mode", "file"),
    [
        *[(mode, "a.tif") for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")],
        *[(mode, "a.png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")],
        *[(mode, "a.jpg") for mode in ("L", "RGB", "CMYK", "YCbCr")],
        *[(mode, "a.bmp") for mode in ("1", "L", "P", "RGB")],
        *[(mode, "a.webp") for mode in ("RGB", "RGBA")],
        *[(mode, "a.gif") for mode in ("P", "L")],
    ],
)
def test_modes_of_eight_bits_are_those_of_pillow(mode, file, studio) -> None:
    source = coloured().convert("RGBA").convert("LA").convert("PA") if mode == "PA" else None
    if mode == "LAB":
        source = Image.merge("LAB", coloured().split())
    (source or coloured().convert(mode)).save(studio.folder / file)
    with Image.open(studio.folder / file) as image:
        assert np.array_equal(read(studio, file), np.asarray(image.convert("RGB")))


def test_transparency_of_a_palette_is_not_applied(studio) -> None:
    coloured().convert("P").save(studio.folder / "a.png", transparency=bytes(range(256)))
    with Image.open(studio.folder / "a.png") as image:
        assert np.array_equal(read(studio, "a.png"), np.asarray(image.convert("RGB")))


def test_an_animated_picture_is_its_first_frame(studio) -> None:
    others = [Image.new("RGB", (SIDE, SIDE), (0, 0, 9)), Image.new("RGB", (SIDE, SIDE), (9, 9, 9))]
    for file in ("a.png", "a.webp", "a.tif"):
        lossless = {"lossless": True} if file == "a.webp" else {}
        coloured().save(studio.folder / file, save_all=True, append_images=others, **lossless)
        assert np.array_equal(read(studio, file), np.asarray(coloured()))


TURNED = View(rule=ResizeRule(size=SIDE, exif="apply"), num_frames=32)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file", ["a.jpg", "a.png", "a.webp"])
def test_exif_orientation_is_applied_on_request_and_else_ignored(orientation, file, studio) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    coloured().resize((90, 40)).save(studio.folder / file, exif=exif)
    with Image.open(studio.folder / file) as image:
        stored, upright = (small(each) for each in (image, ImageOps.exif_transpose(image)))
    assert np.array_equal(read(studio, file, TURNED), upright)
    assert np.array_equal(read(studio, file, VIEW), stored)
    both = decode_clip(studio.job(studio.folder / file, kind="image", views=(VIEW, TURNED))).frames
    assert np.array_equal(both[TURNED][0], upright)
    assert np.array_equal(both[VIEW][0], stored)


def small(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("view", [VIEW, TURNED])
def test_a_tiff_is_turned_by_pillow_itself_once(view, studio) -> None:
    coloured().resize((90, 40)).save(studio.folder / "a.tif", tiffinfo={0x0112: 6})
    expected = small(coloured().resize((90, 40)).transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(read(studio, "a.tif", view), expected)


def test_frames_of_a_folder_are_turned_on_request(studio) -> None:
    (studio.folder / "clip").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 8
    coloured().resize((90, 40)).save(studio.folder / "clip" / "1.png", exif=exif)
    frames = decode_clip(studio.job(studio.folder / "clip", views=(VIEW, TURNED))).frames
    assert np.array_equal(frames[VIEW][0], small(coloured().resize((90, 40))))
    assert np.array_equal(frames[TURNED][0], small(coloured().resize((90, 40)).transpose(Image.Transpose.ROTATE_90)))


def test_exif_that_cannot_be_read_turns_nothing(studio) -> None:
    coloured().save(studio.folder / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(read(studio, "a.jpg", TURNED), read(studio, "a.jpg", VIEW))
