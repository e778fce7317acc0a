"""Canary clips: two videos and a still that every machine renders to the same bytes, and what encoders make of them.

Comes in: nothing, or a store whose groups have no canaries yet. Goes out: media, their small frames, their tokens as
the store keeps them. Pictures are whole-number arithmetic and the files are written by hand (raw frames in an AVI, a
PPM), so no library takes part before the clip is decoded: everything after that point, the container's reader, frame
choice, colour conversion, resizing and the encoder, is what a parity check looks at. There are two videos because two
clips are one forward on a CPU; they hold moving shapes, text that counts, and noise, which no resize filter forgives.

Media files written by hand: raw pictures in the plainest containers that decoders read.

No encoder and no library takes part, so that the same pictures are the same bytes on every machine.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featurestore.clips import Clip
from featurestore.identity import FeatureIdentity
from featurestore.layout import CANARIES, reference_clip_groups
from featurestore.reference_clips import ReferenceClip, ReferenceClips, put_reference_clips
from featurestore.storage_dtypes import OverflowedTokens, to_stored
from featurestore.writer import StoreWriter
from mervcache.errors import MediaError
from mervcache.files import sha256_hex
from pipeline.config import EngineSettings

if TYPE_CHECKING:
    from pipeline.decode.sampling import Decoded
    from pipeline.worker.engine import Engine, TokenEncoder


def ppm(picture_HWC: np.ndarray) -> bytes:
    """A binary PPM of uint8 [H, W, 3]."""
    height, width = picture_HWC.shape[:2]
    return f"P6\n{width} {height}\n255\n".encode() + picture_HWC.tobytes()


def avi(pictures_HWC: Iterable[np.ndarray], *, width: int, height: int, fps: int) -> bytes:
    """An AVI of raw I420 frames with an index (AVI RIFF File Reference, Microsoft)."""
    frames = [i420(picture) for picture in pictures_HWC]
    size = width * height * 3 // 2
    main = struct.pack("<14I", 1_000_000 // fps, size * fps, 0, 0x10, len(frames), 0, 1, size, width, height, *[0] * 4)
    stream = b"vidsI420" + struct.pack(
        "<IHHIIIIIIII4H", 0, 0, 0, 0, 1, fps, 0, len(frames), size, 0, 0, 0, 0, width, height
    )
    picture = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 12, b"I420", size, 0, 0, 0, 0)
    header = _list(b"hdrl", _chunk(b"avih", main), _list(b"strl", _chunk(b"strh", stream), _chunk(b"strf", picture)))
    index = b"".join(
        struct.pack("<4sIII", b"00db", 0x10, 4 + number * (size + 8), size) for number in range(len(frames))
    )
    movie = _list(b"movi", *(_chunk(b"00db", frame) for frame in frames))
    return _chunk(b"RIFF", b"AVI " + header + movie + _chunk(b"idx1", index))


def i420(picture_HWC: np.ndarray) -> bytes:
    """uint8 RGB of even sides -> planes Y, U, V in limited range, ITU-R BT.601 in whole numbers, U and V halved."""
    red, green, blue = (picture_HWC[..., channel].astype(np.int32) for channel in range(3))
    luma = (66 * red + 129 * green + 25 * blue + 128 >> 8) + 16
    blueness = (-38 * red - 74 * green + 112 * blue + 128 >> 8) + 128
    redness = (112 * red - 94 * green - 18 * blue + 128 >> 8) + 128
    return b"".join(plane.astype(np.uint8).tobytes() for plane in (luma, _halved(blueness), _halved(redness)))


def _halved(plane: np.ndarray) -> np.ndarray:
    """Mean of each 2 x 2 pixels, rounded."""
    return (plane[::2, ::2] + plane[1::2, ::2] + plane[::2, 1::2] + plane[1::2, 1::2] + 2) >> 2


def _list(name: bytes, *chunks: bytes) -> bytes:
    return _chunk(b"LIST", name + b"".join(chunks))


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


RENDERING = "canaries/1"  # of the pictures below: other pictures get another number
WIDTH, HEIGHT = 320, 240  # larger than an encoder's input, and not square: a crop and a shrinking filter have work
NUM_FRAMES, FPS = 36, 15  # more than the 32 that are sampled, so that choosing is not taking all
DRIFT = 4  # pixels per frame
CLIPS: dict[str, tuple[str, ...]] = {"video": ("scene", "noise"), "image": ("still",)}
_FILES = {"scene": "scene.avi", "noise": "noise.avi", "still": "still.ppm"}
_FONT = {  # 5 x 7 pixels, a row in five bits
    "M": (17, 27, 21, 21, 17, 17, 17),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "R": (30, 17, 17, 30, 20, 18, 17),
    "V": (17, 17, 17, 17, 17, 10, 4),
    "0": (14, 17, 19, 21, 25, 17, 14),
    "1": (4, 12, 4, 4, 4, 4, 14),
    "2": (14, 17, 1, 2, 4, 8, 31),
    "3": (31, 2, 4, 2, 1, 17, 14),
    "4": (2, 6, 10, 18, 31, 2, 2),
    "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14),
    "7": (31, 1, 2, 4, 8, 8, 8),
    "8": (14, 17, 17, 14, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12),
}


def scene(number: int) -> np.ndarray:
    """Frame `number` of a disc and a square that cross over a gradient, under a text that counts: uint8 [H, W, 3]."""
    y, x = np.ogrid[0:HEIGHT, 0:WIDTH]
    picture = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    picture[..., 0], picture[..., 1], picture[..., 2] = x * 3 // 5, y * 4 // 5, (x + y + 4 * number) % 256
    picture[(x - 40 - 6 * number) ** 2 + (y - 90) ** 2 <= 38**2] = (235, 60, 40)
    picture[(abs(x - 280 + 6 * number) <= 30) & (abs(y - 150) <= 30)] = (30, 70, 225)
    for place, letter in enumerate(f"MERV {number:02d}"):
        _write(picture, letter, left=20 + 42 * place, top=190)
    return picture


def noise(number: int) -> np.ndarray:
    """Frame `number` of a coloured texture of whole-number noise that drifts to the left: uint8 [H, W, 3]."""
    return _texture()[:, DRIFT * number : DRIFT * number + WIDTH]


@lru_cache(1)
def _texture() -> np.ndarray:
    """Every 3 x 3 pixels of one colour, by a hash of their place modulo 2**32."""
    width = WIDTH + DRIFT * NUM_FRAMES
    y, x, channel = np.ogrid[0 : HEIGHT // 3, 0 : width // 3 + 1, 0:3]
    places = (x * 374761393 + y * 668265263 + channel * 2246822519) % 2**32
    mixed = (places ^ places >> 13) * 1274126177 % 2**32
    return (mixed >> 24).astype(np.uint8).repeat(3, axis=0).repeat(3, axis=1)[:, :width]


def still() -> np.ndarray:
    """The scene on the left and the noise on the right: uint8 [H, W, 3]."""
    return np.concatenate([scene(22)[:, : WIDTH // 2], noise(22)[:, : WIDTH // 2]], axis=1)


def _write(picture: np.ndarray, letter: str, *, left: int, top: int, scale: int = 5) -> None:
    for row, bits in enumerate(_FONT.get(letter, ())):
        for column in range(5):
            if bits >> (4 - column) & 1:
                y, x = top + row * scale, left + column * scale
                picture[y : y + scale, x : x + scale] = (250, 250, 240)


@lru_cache(3)
def media_bytes(name: str) -> bytes:
    """The file of a canary."""
    if name == "still":
        return ppm(still())
    draw: Callable[[int], np.ndarray] = {"scene": scene, "noise": noise}[name]
    return avi((draw(number) for number in range(NUM_FRAMES)), width=WIDTH, height=HEIGHT, fps=FPS)


def decode_reference_clips(engine: Engine, runs: Sequence[TokenEncoder], kind: str) -> dict[str, Decoded]:
    """The small frames of a kind's canaries, in every view that the encoders ask for, through the decode processes."""
    from pipeline.worker.engine import decode_job

    with tempfile.TemporaryDirectory(prefix="merv-canaries-") as root:
        futures = {}
        for name in CLIPS[kind]:
            (Path(root) / _FILES[name]).write_bytes(media_bytes(name))
            clip = Clip(dataset="canaries", path=_FILES[name], kind=kind)
            futures[name] = engine.pool.submit(decode_job(root, clip, runs))
        return {name: future.result() for name, future in futures.items()}


def encode_reference_clips(run: TokenEncoder, kind: str, batch: int, decoded: Mapping[str, Decoded]) -> ReferenceClips:
    """The canaries as a group of this encoder keeps them, each in a slot of the group's own batch shape.

    One whose tokens do not fit the storage dtype is left out, as a clip's would be quarantined.
    """
    from pipeline.worker.engine import encode_batch

    names, clips, rows = list(decoded), [], []
    for start in range(0, len(names), batch):
        part = names[start : start + batch]
        frames = {slot: decoded[name].frames[run.view] for slot, name in enumerate(part)}
        arrays, _ = encode_batch(run, frames, range(batch))
        for slot, name in enumerate(part):
            try:
                rows.append(to_stored({key: a[slot] for key, a in arrays.items()}, run.identity.storage_dtype))
            except OverflowedTokens:
                continue
            clips.append(_reference_clip(name, decoded[name], frames[slot]))
    return ReferenceClips(
        kind=kind, identity=run.identity, rendering=RENDERING, clips=tuple(clips), arrays=_stacked(rows, run, kind)
    )


def _reference_clip(name: str, decoded: Decoded, frames: np.ndarray) -> ReferenceClip:
    shaped = f"{frames.shape}\n".encode() + np.ascontiguousarray(frames).tobytes()
    return ReferenceClip(name=name, media_sha256=decoded.media_sha256, frames_sha256=sha256_hex(shaped))


def _stacked(rows: list[dict[str, np.ndarray]], run: TokenEncoder, kind: str) -> dict[str, np.ndarray]:
    from featurestore.zarr_metadata import array_specs

    specs = array_specs(run.identity, kind, blocks=0, block_rows=1)
    empty = {name: np.empty((0, *spec.row_shape), spec.dtype) for name, spec in specs.items()}
    return {name: np.stack([row[name] for row in rows]) if rows else empty[name] for name in specs}


@dataclass(frozen=True, kw_only=True)
class ReferenceClipTask:
    """Groups that have no canaries yet; small and picklable."""

    store: str
    engine: EngineSettings
    groups: Mapping[str, Mapping[str, int]]  # kind -> encoder -> batch shape


def missing_reference_clips(
    store: StoreWriter, identities: Mapping[str, FeatureIdentity], kinds: Iterable[str]
) -> dict[str, dict[str, int]]:
    """Kind -> encoder -> batch shape of the groups that have no canaries yet, by listing names."""
    missing: dict[str, dict[str, int]] = {}
    for kind in kinds:
        present = reference_clip_groups(store.objects.list_names(f"{CANARIES}/{kind}"))
        for name, group in ((name, identity.group_name) for name, identity in identities.items()):
            if group not in present:
                missing.setdefault(kind, {})[name] = store.open_group(kind, group).batch_shape
    return missing


def write_reference_clips(task: ReferenceClipTask) -> dict[str, list[str]]:
    """Run on a worker: put the canaries that are missing; returns "written" groups and "problems" in words.

    A decoder that cannot read our files costs the certificate, never the extraction.
    """
    from pipeline.worker.engine import engine_for

    engine, objects = engine_for(task.engine), StoreWriter.open(task.store).objects
    written: list[str] = []
    problems: list[str] = []
    for kind, batches in task.groups.items():
        runs = {name: engine.encoders[name] for name in batches}
        try:
            decoded = decode_reference_clips(engine, list(runs.values()), kind)
        except MediaError as error:
            problems.append(f"{kind}: {error}")
            continue
        for name, run in runs.items():
            if put_reference_clips(objects, encode_reference_clips(run, kind, batches[name], decoded)):
                written.append(f"{kind}/{run.identity.group_name}")
    return {"written": written, "problems": problems}
