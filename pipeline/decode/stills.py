"""Images, GIFs and folders of frames, read by Pillow under every decoder's name.

As in the reference code (princetonvisualai/merv): no transparency and the first frame of an animated image; EXIF
orientation only for the views that apply it. Values of more than 8 bits are scaled where black and white are defined.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mervcache.errors import MediaError, MervCacheError
from pipeline.decode.container import check_pixels
from pipeline.decode.sampling import FrameCollector, Reading, exception_name
from pipeline.media import FrameFolder, Source, frame_order

FOLDER_FPS = 3.0  # of a folder of frames, as for VLEP in the reference
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's others include scripts (EPS)
EIGHT_BIT = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"))
SIXTEEN_BIT = frozenset(("I;16", "I;16B", "I;16L", "I;16N"))  # unsigned
SCALED_TO_16_BIT = frozenset(("PPM", "PNG"))  # formats whose mode I holds 0 to 65535
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF
UPRIGHT = 1  # EXIF orientation of a picture that needs no turn
TURNS = {  # EXIF orientation -> the picture as it was taken
    2: lambda stored_HWC: stored_HWC[:, ::-1],
    3: lambda stored_HWC: stored_HWC[::-1, ::-1],
    4: lambda stored_HWC: stored_HWC[::-1],
    5: lambda stored_HWC: stored_HWC.transpose(1, 0, 2),
    6: lambda stored_HWC: np.rot90(stored_HWC, -1),
    7: lambda stored_HWC: stored_HWC[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored_HWC: np.rot90(stored_HWC),
}


def read_image(source: Source, collector: FrameCollector) -> Reading:
    """One still image: N = 1, no clock."""
    if isinstance(source.media, FrameFolder):
        raise MediaError("not an image: the path is a folder")
    collector.choose(1, 0.0)
    with source.open() as file:
        _add_picture(collector, 0, file)
    return Reading(num_frames=1, fps=0.0, decoder="pillow")


def read_gif(source: Source, collector: FrameCollector) -> Reading:
    """Every frame of a GIF, composed as it is shown; a frame depends on those before, so they are read in order."""
    with source.open() as file, _open_image(file) as image:
        num_frames: int = image.n_frames  # pyright: ignore[reportAttributeAccessIssue]: of the classes of Pillow's formats
        for number in collector.choose(num_frames, 0.0):
            image.seek(number)
            collector.add(number, _to_rgb(image))
    return Reading(num_frames=num_frames, fps=0.0, decoder="pillow")


def read_folder(source: Source, collector: FrameCollector) -> Reading:
    """A folder's images in natural order: frame_2 before frame_10."""
    assert isinstance(source.media, FrameFolder)
    paths = sorted(source.media.paths, key=lambda path: frame_order(path.name))
    for number in collector.choose(len(paths), FOLDER_FPS):
        with open(paths[number], "rb") as file:
            _add_picture(collector, number, file)
    return Reading(num_frames=len(paths), fps=FOLDER_FPS, decoder="pillow")


def _add_picture(collector: FrameCollector, number: int, file: BinaryIO) -> None:
    upright_HWC = None
    with _open_image(file) as image:
        stored_HWC = _to_rgb(image)
        if collector.applies_exif:  # read after the pixels: a TIFF has then been turned by Pillow, a PNG has it last
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, UPRIGHT))
            upright_HWC = turn(stored_HWC) if turn else None
    collector.add(number, stored_HWC, upright_HWC=upright_HWC)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]. Wider values keep their 8 high bits, as Pillow reads 16-bit RGB."""
    image.load()
    if image.mode in EIGHT_BIT:
        return np.asarray(image.convert("RGB"))
    if image.mode == "La":  # grey, multiplied with its transparency
        return np.asarray(image.convert("LA").convert("RGB"))
    tags = getattr(image, "tag_v2", {})
    is_scaled = image.mode == "I" and image.format in SCALED_TO_16_BIT
    if image.mode not in SIXTEEN_BIT and not is_scaled:
        raise MediaError(f"image of mode {image.mode}, whose values have no defined black and white")
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    grey_HW = np.asarray(image).astype(np.int64) >> (bits - 8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey_HW = 255 - grey_HW
    return np.repeat(grey_HW.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


@contextmanager
def _open_image(file: BinaryIO) -> Iterator[Image.Image]:
    """An image whose size has been checked; anything Pillow cannot read becomes the clip's error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's size warning, an error here, and its notes on odd files
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                check_pixels(*image.size)
                yield image
    except (MervCacheError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise MediaError("not an image in a known format") from None
    except Image.DecompressionBombError:
        raise MediaError("image is larger than Pillow's limit") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise MediaError("damaged image: its data cannot be read") from error
    except Exception as error:  # Pillow's parsers raise anything: SyntaxError, struct.error, zlib.error, ...
        raise MediaError(f"damaged image: {exception_name(error)}") from error
