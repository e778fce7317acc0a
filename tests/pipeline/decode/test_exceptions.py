"""Whatever a media library raises ends as the clip's reason, with the digest of the bytes that failed."""

from __future__ import annotations

import errno
import hashlib
import pickle
import struct
import zlib

import av
import decord
import pytest
from PIL import Image, UnidentifiedImageError

from mervcache.errors import RunStoppedError, UserError
from pipeline.decode.container import OpenVideo
from pipeline.decode.decoders import DECODERS, decode_clip
from pipeline.decode.sampling import FailedClipError

AV_ERRORS = sorted(
    (kind for kind in vars(av.error).values() if isinstance(kind, type) and issubclass(kind, av.error.FFmpegError)),
    key=lambda kind: kind.__name__,
)
PYTHON_ERRORS = {
    struct.error("unpack requires a buffer of 4 bytes"): "struct.error",
    zlib.error("Error -3"): "zlib.error",
    OverflowError("too large"): "OverflowError",
    AttributeError("no codec"): "AttributeError",
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"): "UnicodeDecodeError",
    NotImplementedError(): "NotImplementedError",
    AssertionError(): "AssertionError",
    ZeroDivisionError(): "ZeroDivisionError",
    RecursionError(): "RecursionError",
    pickle.UnpicklingError(): "UnpicklingError",
    BufferError(): "BufferError",
}


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.fixture
def clip_file(studio):
    return studio.film("a.mp4", frames=12)


def reason_of(studio, path, **options) -> str:
    with pytest.raises(FailedClipError) as caught:
        decode_clip(studio.job(path, **options))
    assert caught.value.media_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(studio.folder) not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", AV_ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_of_ffmpeg_is_the_clips(kind, studio, clip_file, monkeypatch) -> None:
    """Some are OSErrors with the number of a failing disk, though the file's bytes can be read."""
    error = kind(errno.EIO, "Input/output error", str(clip_file))
    for place in ("packets", "to_rgb"):
        with monkeypatch.context() as patched:
            patched.setattr(OpenVideo, place, raising(error))
            expected = (
                "decoding needs more memory" if issubclass(kind, MemoryError) else "damaged file: Input/output error"
            )
            assert reason_of(studio, clip_file).startswith(expected)
    with monkeypatch.context() as patched:
        patched.setitem(DECODERS, "frames/1", raising(error))
        assert reason_of(studio, clip_file).startswith(expected)


@pytest.mark.parametrize("error", PYTHON_ERRORS, ids=PYTHON_ERRORS.get)
def test_every_other_error_is_named(error, studio, clip_file, monkeypatch) -> None:
    monkeypatch.setattr(OpenVideo, "to_rgb", raising(error))
    assert reason_of(studio, clip_file) == f"decoder failed: {PYTHON_ERRORS[error]}"


@pytest.mark.parametrize("error", PYTHON_ERRORS, ids=PYTHON_ERRORS.get)
def test_every_error_of_pillow_is_named(error, studio, monkeypatch) -> None:
    path = studio.folder / "a.png"
    Image.new("RGB", (9, 9)).save(path)
    monkeypatch.setattr(Image.Image, "convert", raising(error))
    assert reason_of(studio, path, kind="image") == f"damaged image: {PYTHON_ERRORS[error]}"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SyntaxError("broken PNG file"), "damaged image: SyntaxError"),
        (Image.DecompressionBombError("bomb"), "image is larger than Pillow's limit"),
        (UnidentifiedImageError("what"), "not an image in a known format"),
        (OSError("image file is truncated"), "damaged image: its data cannot be read"),
        (MemoryError(), "decoding needs more memory than a decode process may use"),
    ],
    ids=repr,
)
def test_the_reasons_of_pillows_own_errors_are_those_that_stores_hold(error, reason, studio, monkeypatch) -> None:
    path = studio.folder / "a.png"
    Image.new("RGB", (9, 9)).save(path)
    monkeypatch.setattr(Image.Image, "convert", raising(error))
    assert reason_of(studio, path, kind="image") == reason


@pytest.mark.parametrize(
    "error",
    [
        decord.DECORDError("no"),
        decord.DECORDLimitReachedError("no"),
        RuntimeError(),
        IndexError(),
        ValueError(),
        TypeError(),
    ],
    ids=repr,
)
def test_every_error_of_decord_is_the_clips(error, studio, clip_file, monkeypatch) -> None:
    monkeypatch.setattr(decord.VideoReader, "get_batch", raising(error))
    assert reason_of(studio, clip_file, decoder="decord") == "decord cannot decode the file"


@pytest.mark.parametrize("error", [UserError("no such setting"), RunStoppedError("the share is gone")], ids=repr)
def test_what_is_no_fault_of_the_clip_stays_what_it_is(error, studio, clip_file, monkeypatch) -> None:
    for decoder in ("frames/1", "decord", "ffmpeg"):
        with monkeypatch.context() as patched:
            patched.setitem(DECODERS, decoder, raising(error))
            with pytest.raises(type(error), match=str(error)):
                decode_clip(studio.job(clip_file, decoder=decoder))


def test_a_stream_of_an_unknown_codec_is_no_video(studio, clip_file) -> None:
    content = clip_file.read_bytes()
    path = studio.bytes("b.mp4", content.replace(b"avc1", b"zzzz"))
    assert reason_of(studio, path) == "not a video: the codec of its stream is unknown"
