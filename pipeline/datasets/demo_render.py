"""Demo render: a scene's pixels, and the file that holds them.

Comes in: a `Scene`. Goes out: an H.264 MP4 or a PNG whose bytes are the same on every call: colours become YUV here and
not in the encoder's own conversion, which gave other bytes from call to call (PyAV 18, x264 with one thread), and the
container is told to leave versions out.

T frames, H W height and width, C channels.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np

from pipeline.datasets.demo_scene import Scene

FRAMES_PER_SECOND = 16

RGB = {"red": (225, 45, 40), "green": (40, 190, 70), "blue": (50, 90, 235), "yellow": (240, 215, 50)}

# Five columns by seven rows, one string per row; the letters of the words that scenes show.
GLYPHS = {
    "G": (".###.", "#...#", "#....", "#.###", "#...#", "#...#", ".###."),
    "O": (".###.", "#...#", "#...#", "#...#", "#...#", "#...#", ".###."),
    "N": ("#...#", "##..#", "##..#", "#.#.#", "#..##", "#..##", "#...#"),
    "H": ("#...#", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "I": ("#####", "..#..", "..#..", "..#..", "..#..", "..#..", "#####"),
    "K": ("#...#", "#..#.", "#.#..", "##...", "#.#..", "#..#.", "#...#"),
}

GREY_UV = 128.0  # colour difference of every grey


def render_file(scene: Scene, path: Path, *, size: int, num_frames: int) -> None:
    """Write the scene's file under a temporary name, then rename: a file that is there is whole."""
    cover_THW = draw_cover(scene, size=size, num_frames=1 if scene.is_still else num_frames)
    if scene.is_still:
        data = encode_png(paint_rgb(scene, cover_THW)[0])
    else:
        data = encode_mp4(paint_yuv420(scene, cover_THW), num_frames)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def draw_cover(scene: Scene, *, size: int, num_frames: int) -> np.ndarray:
    """How much of each pixel the shapes or the text cover, float32 [T, H, W] in 0..1; T is 1 where nothing moves."""
    return _text_cover(scene, size)[None] if scene.word else _shape_cover(scene, size, num_frames)


def paint_rgb(scene: Scene, cover_THW: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3]: the colour over the grey background."""
    ground_H11 = _shades(scene, cover_THW.shape[1])[:, None, None]
    colour_C = np.array(RGB[scene.colour], np.float32)
    return np.rint(ground_H11 + cover_THW[..., None] * (colour_C - ground_H11)).astype(np.uint8)


def paint_yuv420(scene: Scene, cover_THW: np.ndarray) -> np.ndarray:
    """uint8 [T, 3 H / 2, W], planes as FFmpeg lays them out: Y, then U and V at half size.

    Painted in YUV directly, which is a third of the arithmetic of painting RGB and converting.
    """
    num_frames, height, width = cover_THW.shape
    y, u, v = yuv_of(RGB[scene.colour])
    ground_H1 = (16 + _shades(scene, height) * (219 / 255))[:, None]
    luma_THW = ground_H1 + cover_THW * (y - ground_H1)
    half = cover_THW[:, ::2] + cover_THW[:, 1::2]
    half = (half[:, :, ::2] + half[:, :, 1::2]) / 4  # cover of each 2 x 2 square
    chroma = [(GREY_UV + half * (c - GREY_UV)).reshape(num_frames, height // 4, width) for c in (u, v)]
    planes_THW = np.concatenate([luma_THW, *chroma], axis=1)
    planes_THW += np.float32(0.5)  # rounds where the cast cuts off, in place
    return planes_THW.astype(np.uint8)


def yuv_of(rgb: tuple[int, int, int]) -> tuple[np.float32, np.float32, np.float32]:
    """ITU-R BT.601, limited range: what a player assumes for a small video that does not say."""
    r, g, b = (np.float32(c / 255) for c in rgb)
    y = 16 + 65.481 * r + 128.553 * g + 24.966 * b
    u = 128 - 37.797 * r - 74.203 * g + 112.0 * b
    v = 128 + 112.0 * r - 93.786 * g - 18.214 * b
    return np.float32(y), np.float32(u), np.float32(v)


def _shades(scene: Scene, height: int) -> np.ndarray:
    """Grey level of every row, float32 [H] in 0..255."""
    return np.linspace(*scene.background, height, dtype=np.float32)


def _shape_cover(scene: Scene, size: int, num_frames: int) -> np.ndarray:
    """Every copy of the shape along its way, with one pixel of soft edge."""
    steps = num_frames if len(scene.path) > 1 else 1
    corners = np.array(scene.path, np.float32)
    along = np.linspace(0, len(corners) - 1, steps)
    centres_T2 = np.stack([np.interp(along, np.arange(len(corners)), corners[:, axis]) for axis in (0, 1)], axis=1)
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    cover = np.zeros((steps, size, size), np.float32)
    for offset in scene.copies:
        x_T1W = pixels[None, None, :] - (centres_T2[:, 0] + offset[0]).astype(np.float32)[:, None, None]
        y_TH1 = pixels[None, :, None] - (centres_T2[:, 1] + offset[1]).astype(np.float32)[:, None, None]
        inside = _DISTANCES[scene.shape](x_T1W, y_TH1, np.float32(scene.size / 2))
        cover = np.maximum(cover, np.clip(0.5 - inside * size, 0, 1))
    return cover


def _circle(x, y, half):
    return np.sqrt(x * x + y * y) - half


def _square(x, y, half):
    return np.maximum(np.abs(x), np.abs(y)) - half * np.float32(0.9)


def _triangle(x, y, half):
    """Point up; the sides' slope is 2."""
    side = (2 * np.abs(x) - (y + half)) / np.float32(np.sqrt(5))
    return np.maximum(side, y - half)


def _cross(x, y, half):
    arm = half * np.float32(0.36)
    upright = np.maximum(np.abs(x) - arm, np.abs(y) - half)
    level = np.maximum(np.abs(x) - half, np.abs(y) - arm)
    return np.minimum(upright, level)


# shape -> signed distance to its edge, negative inside, in units of the frame's side
_DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}


def _text_cover(scene: Scene, size: int) -> np.ndarray:
    """The word in whole cells of the bitmap font, float32 [H, W] of 0 and 1."""
    rows = [".".join(GLYPHS[letter][row] for letter in scene.word) for row in range(7)]
    bitmap = np.array([[cell == "#" for cell in row] for row in rows])
    cell = max(1, int(scene.size * size) // bitmap.shape[1])  # pixels
    word = np.kron(bitmap, np.ones((cell, cell), bool))
    left, top = (int(scene.path[0][axis] * size) - word.shape[1 - axis] // 2 for axis in (0, 1))
    left, top = (min(max(v, 0), size - word.shape[1 - axis]) for axis, v in ((0, left), (1, top)))
    cover = np.zeros((size, size), np.float32)
    cover[top : top + word.shape[0], left : left + word.shape[1]] = word
    return cover


def encode_png(frame_HWC: np.ndarray) -> bytes:
    from PIL import Image  # rooms that only list datasets need no imaging

    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def encode_mp4(planes_THW: np.ndarray, num_frames: int) -> bytes:
    """H.264 with 4:2:0 colour, one thread; a single frame is held for the whole clip."""
    import av  # loads FFmpeg's libraries: only where something is rendered

    size = planes_THW.shape[2]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        options = {"preset": "ultrafast", "crf": "18", "threads": "1"}
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(planes_THW[min(i, len(planes_THW) - 1)], format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
