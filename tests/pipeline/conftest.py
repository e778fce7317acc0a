"""A small Video-LLaVA folder, toy encoders and a place to extract them: what the tests of extraction share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.config import ExtractConfig, read_config
from tests.pipeline.slurm_site import slurm_site

__all__ = ["slurm_site"]  # fixtures of modules beside this one

ENCODERS = ("languagebind", "dinov2", "vivit", "siglip")
TOY = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
ARCHITECTURE = {name: TOY | ({"position_grid": 5} if name == "dinov2" else {}) for name in ENCODERS}
# name -> codec, frames, rate, width, height
VIDEOS = {
    "videochatgpt_tune/v0.mp4": ("libx264", 40, Fraction(25), 64, 48),
    "videochatgpt_tune/v1.mp4": ("libx264", 33, Fraction(30000, 1001), 48, 64),
    "videochatgpt_tune/v2.mp4": ("mpeg4", 12, Fraction(10), 64, 64),
    "videochatgpt_tune/v3.mp4": ("libx264", 77, Fraction(30000, 1001), 96, 48),
    "videochatgpt_tune/v4.mp4": ("libx264", 5, Fraction(4), 48, 48),
    "valley/v5.mp4": ("libx264", 32, Fraction(24000, 1001), 64, 48),
    "valley/v6.mp4": ("mpeg4", 50, Fraction(50), 64, 48),
    "valley/v7.mp4": ("libx264", 1, Fraction(1), 64, 48),
    "valley/v8.mp4": ("libx264", 64, Fraction(30), 48, 48),
}
IMAGES = {f"llava_image_tune/coco/{n}.{kind}": kind for n, kind in enumerate(("png", "jpg", "png", "bmp", "jpg"))}


def film(path: Path, codec: str, frames: int, rate: Fraction, width: int, height: int) -> Path:
    """A video of a bright block that wanders over a slowly changing gradient."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=rate, options={"g": "12", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(scene(number, width, height), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def scene(number: int, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]."""
    across, down = np.linspace(0, 200, width), np.linspace(0, 200, height)[:, None]
    picture = np.stack([across + 0 * down, down + 0 * across, (across + down) / 2 + number], axis=-1)
    x, y = number * 5 % (width - 12), number * 3 % (height - 12)
    picture[y : y + 12, x : x + 12] = (255, 40 + number * 2, 255 - number * 3)
    return picture.clip(0, 255).astype(np.uint8)


def turn(media: str, question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": f"<{media}>\n{question}"}, {"from": "gpt", "value": answer}]


def annotate(root: Path, videos: Iterable[str], images: Iterable[str]) -> None:
    """Both stages' annotation files: captions of the first three clips, a question about every clip, one text."""
    media = [("video", path) for path in videos] + [("image", path) for path in images]
    captions = [
        {"id": f"c{n}", kind: path, "conversations": turn(kind, "Describe it.", "A block.")}
        for n, (kind, path) in enumerate(media[:3])
    ]
    questions = [
        {"id": f"q{n}", kind: path, "conversations": turn(kind, "What moves?", "A block.")}
        for n, (kind, path) in enumerate(media)
    ]
    text = {"id": "t0", "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}
    (root / "valley_llavaimage.json").write_text(json.dumps(captions))
    (root / "videochatgpt_llavaimage_tune.json").write_text(json.dumps([*questions, text]))


def hashes(folder: Path, tops: Iterable[str] = ("zarr.json", "clips", "samples", "video", "image", "receipts")) -> dict:
    """Relative path -> sha256 of every file that is a function of the input."""
    files = [file for top in tops for file in [folder / top, *(folder / top).rglob("*")] if file.is_file()]
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def settings(root: Path, store: Path, **changes) -> dict:
    """What a config file for the toy encoders would say."""
    names = changes.get("encoders", ENCODERS)
    return {
        "dataset": "videollava",
        "root": str(root),
        "store": str(store),
        "encoders": list(names),
        "weights": "random:0",
        "architecture": {name: ARCHITECTURE[name] for name in names},
        "compute_dtype": "float32",
        "grid": [8, 3, 3],
        "block_rows": {"video": 4, "image": 4},
        "batch": {"video": 2, "image": 2},
        "threads": 1,
        "decode_processes": 1,
        "device": "cpu",
        "canaries": False,  # half a second a store; the finished store below has them
        **changes,
    }


class Lab:
    """Extracts the toy encoders of one media folder into stores under another folder."""

    ENCODERS = ENCODERS
    VIDEOS = VIDEOS
    IMAGES = IMAGES
    film = staticmethod(film)
    annotate = staticmethod(annotate)
    hashes = staticmethod(hashes)

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder

    @property
    def store(self) -> Path:
        return self.folder / "store.zarr"

    def settings(self, **changes) -> dict:
        return settings(changes.pop("root", self.root), changes.pop("store", self.store), **changes)

    def config(self, **changes) -> ExtractConfig:
        return read_config(None, self.settings(**changes))

    def extract(self, **changes):
        """Run an extraction in this process; returns its summary."""
        from pipeline.extract import extract

        return extract(self.config(**changes), quiet=True)

    def extraction(self, **changes):
        """A run that has listed its clips; returns the `Extraction`, which is not opened yet."""
        from pipeline.datasets import list_clips
        from pipeline.extract import Extraction, check_request
        from pipeline.summary import ExtractSummary

        config = self.config(**changes)
        objects, view = check_request(config)
        listing = list_clips(config)
        summary = ExtractSummary.begin(config, listing)
        return Extraction(config=config, listing=listing, summary=summary, objects=objects, existing=view)

    def plan(self, **changes):
        """What a run does before its first block: (extraction, blocks, tasks); rows are allocated."""
        from jobs.clusters import ClusterRequest, connect
        from pipeline.run_encoders import describe

        extraction = self.extraction(**changes)
        with connect(ClusterRequest()) as client, extraction.open(describe(client, extraction.config)):
            extraction.register()
            if extraction.config.retry_quarantine:
                extraction.retry_quarantine(client)
            blocks = extraction.plan()
            tasks = [task.arguments[0] for task in extraction.tasks(blocks)]
        return extraction, blocks, tasks

    def copy_of_root(self, name: str = "media") -> Path:
        """A copy of the media that a test may spoil; the lab reads it from now on."""
        import shutil

        copy = self.folder / name
        shutil.copytree(self.root, copy, symlinks=True)
        self.root = copy
        return copy


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Toy matrices are far too small to share; idle threads would spin."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def media_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine videos and five stills in Video-LLaVA's layout; nobody changes them."""
    root = tmp_path_factory.mktemp("videollava")
    for path, (codec, frames, rate, width, height) in VIDEOS.items():
        film(root / path, codec, frames, rate, width, height)
    for number, path in enumerate(IMAGES):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(7 * number, 50 + number, 40)).save(root / path)
    annotate(root, VIDEOS, IMAGES)
    return root


@pytest.fixture(scope="session")
def extracted(media_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A finished store of all four encoders; nobody changes it. `lab.summary` is what the run said."""
    lab = Lab(media_root, tmp_path_factory.mktemp("extracted"))
    lab.summary = lab.extract(canaries=True)
    return lab


@pytest.fixture
def lab(media_root: Path, tmp_path: Path) -> Lab:
    """A lab of one test, without a store yet."""
    return Lab(media_root, tmp_path)
