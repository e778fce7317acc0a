"""Coloured films and pictures in Video-LLaVA's layout, and toy encoders: for tests that encode live."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

TOY = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 50, 220), "white": (240, 240, 240)}
VIDEOS = {f"films/{name}.mp4": name for name in COLOURS}
IMAGES = {f"pictures/{name}.png": name for name in ("red", "green", "blue")}
BROKEN = "films/broken.mp4"  # annotated, there, and cut off in the middle of its bytes


def settings(root: Path, **changes) -> dict:
    """What an extraction config says."""
    names = ("languagebind", "dinov2", "vivit", "siglip")
    return {
        "dataset": "videollava",
        "root": str(root),
        "encoders": list(names),
        "weights": "random:0",
        "architecture": {name: TOY | ({"position_grid": 5} if name == "dinov2" else {}) for name in names},
        "compute_dtype": "float32",
        "grid": [4, 2, 2],
        "prefix_tokens": True,
        "batch": {"video": 2, "image": 3},
        "threads": 1,
        "decode_processes": 1,
        "device": "cpu",
        **changes,
    }


def make_media(root: Path) -> Path:
    """Four films, one that is broken, three pictures, and a question about each."""
    for path, colour in VIDEOS.items():
        film(root / path, COLOURS[colour])
    whole = (root / "films/red.mp4").read_bytes()
    (root / BROKEN).write_bytes(whole[: len(whole) // 2])
    (root / "pictures").mkdir(parents=True)
    for path, colour in IMAGES.items():
        Image.fromarray(scene(0, COLOURS[colour])).save(root / path)
    media = [("video", path) for path in (*VIDEOS, BROKEN)] + [("image", path) for path in IMAGES]
    records = [
        {"id": f"q{number}", kind: path, "conversations": turns(kind, {**VIDEOS, **IMAGES}.get(path, "red"))}
        for number, (kind, path) in enumerate(media)
    ]
    (root / "videochatgpt_llavaimage_tune.json").write_text(json.dumps(records))
    caption = {"id": "c0", "video": next(iter(VIDEOS)), "conversations": turns("video", "A red film.")}
    (root / "valley_llavaimage.json").write_text(json.dumps([caption]))
    return root


def turns(kind: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": f"<{kind}>\nWhat colour is it?"}, {"from": "gpt", "value": answer}]


def film(path: Path, colour: tuple[int, int, int], frames: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=Fraction(10), options={"g": "10", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(frames):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(scene(number, colour), format="rgb24")))
        output.mux(stream.encode(None))
    return path


def scene(number: int, colour: tuple[int, int, int]) -> np.ndarray:
    """uint8 [48, 64, 3]: a coloured ground and a dark block that wanders."""
    picture = np.empty((48, 64, 3), np.uint8)
    picture[:] = colour
    x, y = number % 52, number * 2 % 36
    picture[y : y + 12, x : x + 12] = 20
    return picture
