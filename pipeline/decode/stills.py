"""Stills and what is made of them: images, GIFs and folders of frames, all through Pillow.

As in the public reference code (princetonvisualai/merv), an image is `Image.open(path).convert("RGB")`: an EXIF
orientation is **not** applied, transparency is dropped, an animation gives its first frame. A GIF as a video is all its
frames, without a clock; a folder is its images in natural order at 3 frames per second (as for VLEP).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from mervcache.errors import MediaError
from pipeline.decode.collector import FrameCollector
from pipeline.decode.container import check_pixels
from pipeline.decode.job import Reading
from pipeline.decode.source import Source
from pipeline.media import FrameFolder, frame_order

NAME = "pillow"
FOLDER_FPS = 3.0
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's others include scripts (EPS)


def read_image(source: Source, collector: FrameCollector) -> Reading:
    """One still image: N = 1, no clock."""
    if isinstance(source.media, FrameFolder):
        raise MediaError("not an image: the path is a folder")
    collector.choose(1, 0.0)
    with source.open() as file, _opened(file) as image:
        collector.add(0, _to_rgb(image))
    return Reading(num_frames=1, fps=0.0, decoder=NAME)


def read_gif(source: Source, collector: FrameCollector) -> Reading:
    """Every frame of a GIF, composed as it is shown; frames depend on those before, so they are read in order."""
    with source.open() as file, _opened(file) as image:
        num_frames = image.n_frames
        wanted = collector.choose(num_frames, 0.0)
        for number in wanted:
            image.seek(number)
            collector.add(number, _to_rgb(image))
    return Reading(num_frames=num_frames, fps=0.0, decoder=NAME)


def read_folder(source: Source, collector: FrameCollector) -> Reading:
    """A folder's images in natural order: frame_2 before frame_10."""
    paths = sorted(source.media.paths, key=lambda path: frame_order(path.name))
    for number in collector.choose(len(paths), FOLDER_FPS):
        with open(paths[number], "rb") as file, _opened(file) as image:
            collector.add(number, _to_rgb(image))
    return Reading(num_frames=len(paths), fps=FOLDER_FPS, decoder=NAME)


@contextmanager
def _opened(file: BinaryIO) -> Iterator[Image.Image]:
    """An image whose size has been checked; anything Pillow cannot read becomes the clip's error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning and notes on odd files: ours is an error
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                check_pixels(*image.size)
                yield image
    except UnidentifiedImageError:
        raise MediaError("not an image in a known format") from None
    except Image.DecompressionBombError:
        raise MediaError("image is larger than Pillow's limit") from None
    except (SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, OverflowError) as error:
        raise MediaError(f"damaged image: {type(error).__name__}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise MediaError("damaged image: its data cannot be read") from error


def _to_rgb(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image.convert("RGB"))
