"""The demo dataset: synthetic clips with known answers, rendered into the root on first use.

Samples come in three sets: "demo-align" (one caption per training clip), "demo-finetune" (training questions, one-word
answers) and "demo-eval" (held-out clips, the same questions as multiple choice). Answers are one word out of four and
balanced: they come in shuffled blocks that hold every answer equally often, drawn independently for every property of a
scene, so a model that does not look scores 1 in 4. Files have the same bytes on every call.

T frames, H W height and width, C channels.
"""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from featurestore.clips import Clip, Turn
from mervcache.errors import UserError
from mervcache.files import replace_text
from pipeline.datasets.base import DatasetSpec, ListingBuilder, Option

SPLITS = ("train", "heldout")

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow")
COUNTS = ("one", "two", "three", "four")
PLACES = ("left", "right", "top", "bottom")
DIRECTIONS = ("left", "right", "up", "down")
WORDS = ("GO", "NO", "HI", "OK")

STEP_OF_DIRECTION = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y down
# first and last direction, across each other: in one frame alone both could have come first
WAYS = ("left up", "left down", "right up", "right down", "up left", "up right", "down left", "down right")

# Families take turns in this order; most show motion, because it needs video and is learnt last.
FAMILIES = ("direction", "order", "count", "direction", "position", "order", "text", "direction", "still", "order")
STILL_FAMILIES = ("count", "position", "text", "single")  # of the stills, in turn

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

MANIFEST = "demo.json"
LABELS = "directions.csv"  # clip_id,label of the videos with one direction, for `merv-eval probe`
RENDERER = 1  # raised whenever the same seed draws other pixels
MAX_CLIPS = 1_000_000
STAGES = ("align", "finetune", "eval")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One clip's content, in units of the frame's side: x to the right, y down, 0..1."""

    split: str
    number: int  # within its split
    family: str  # "direction", "order", "count", "position", "text" or "single"
    is_still: bool
    shape: str
    colour: str
    size: float  # of a shape's side, or of the text's width
    path: tuple[tuple[float, float], ...]  # corners of the path of the centre; one point where nothing moves
    copies: tuple[tuple[float, float], ...]  # offsets of every copy of the shape from that path
    word: str  # on the screen, "" for none
    background: tuple[int, int]  # grey level at the top and at the bottom
    directions: tuple[str, ...] = ()  # first, last
    place: str = ""

    @property
    def name(self) -> str:
        """The file, relative to the root."""
        return f"{self.split}/{self.number:05d}.{'png' if self.is_still else 'mp4'}"


class Question(NamedTuple):
    """One question about a scene."""

    category: str
    text: str
    answer: str
    options: tuple[str, ...]


def collect(builder: ListingBuilder, options: Mapping[str, Any]) -> None:
    """Draw what is not there, then list everything."""
    counts = {"train": _number(options, "train", 0), "heldout": _number(options, "heldout", 0)}
    settings = {
        "renderer": RENDERER,
        "seed": _number(options, "seed", 0),
        "size": _number(options, "size", 32),
        "num_frames": _number(options, "num_frames", 2),
    }
    if settings["size"] % 4:
        raise UserError(f"demo size must be a multiple of 4 pixels (4:2:0 colour), got {settings['size']}")
    scenes = [make_scene(settings["seed"], split, n) for split in SPLITS for n in range(counts[split])]
    render_missing(builder.root, scenes, settings, counts)
    for stage in STAGES:
        if builder.wants(stage):
            builder.declare_samples(f"{builder.name}-{stage}")
    for scene in scenes:
        _add_samples(builder, scene)
    try:
        _write_labels(builder.root, builder.name, scenes)
    except OSError as error:  # of a root that was drawn before and cannot be written to
        builder.notes.append(f"{LABELS} is not written: {error.strerror}")


def render_missing(root: Path, scenes: Iterable[Scene], settings: Mapping[str, int], counts: Mapping[str, int]) -> int:
    """Draw the scenes whose files are not there; returns how many. About 10 ms each.

    `demo.json` records the settings that files were drawn with, so that two settings are never mixed; an interrupted
    rendering is continued.
    """
    try:
        drawn_with = json.loads((root / MANIFEST).read_text())["settings"]
    except FileNotFoundError:
        if root.is_dir() and any((root / split).exists() for split in SPLITS):
            raise UserError(
                f"{root} holds {' or '.join(SPLITS)} but no {MANIFEST}; give the demo a root of its own"
            ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{root / MANIFEST} cannot be read ({error}); remove {root} to draw anew") from error
    else:
        if drawn_with != dict(settings):
            raise UserError(
                f"{root} was drawn with {drawn_with}, the request is {dict(settings)}; give another --root, or remove "
                "that folder"
            )

    present = {split: set(os.listdir(root / split)) if (root / split).is_dir() else set() for split in SPLITS}
    absent = [scene for scene in scenes if scene.name.split("/")[1] not in present[scene.split]]
    if not absent:
        return 0
    try:
        for split in SPLITS:
            (root / split).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the demo cannot be drawn into {root}: {error.strerror}; give another --root") from error
    _write_manifest(root, settings, counts, is_complete=False)
    for scene in absent:
        render_file(scene, root / scene.name, size=settings["size"], num_frames=settings["num_frames"])
    _write_manifest(root, settings, counts, is_complete=True)
    return len(absent)


def _write_manifest(root: Path, settings: Mapping[str, int], counts: Mapping[str, int], is_complete: bool) -> None:
    record = {"settings": dict(settings), "counts": dict(counts), "is_complete": is_complete}
    temporary = root / f".{MANIFEST}.{os.getpid()}.part"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, root / MANIFEST)


def _write_labels(root: Path, dataset: str, scenes: Iterable[Scene]) -> None:
    """The direction of every video that moves in one: no frame alone shows it."""
    rows = [
        f"{Clip(dataset=dataset, path=scene.name, kind='video').clip_id},{scene.directions[0]}"
        for scene in scenes
        if scene.family == "direction"
    ]
    text = "\n".join(["clip_id,label", *rows]) + "\n"
    path = root / LABELS
    if not path.is_file() or path.read_text() != text:
        replace_text(path, text)


def _add_samples(builder: ListingBuilder, scene: Scene) -> None:
    """The clip, a caption for stage "align" and the questions for "finetune" or "eval"."""
    is_training = scene.split == "train"
    stage = "finetune" if is_training else "eval"
    with_caption = is_training and builder.wants("align")
    if not (with_caption or builder.wants(stage)):
        return
    clip_id = builder.add_clip(scene.name, "image" if scene.is_still else "video")
    stem = scene.name.rpartition(".")[0]
    token = "<image>" if scene.is_still else "<video>"  # once, in the first human turn, as in the training data

    def turns(question: str, answer: str) -> tuple[Turn, Turn]:
        return Turn(role="human", text=f"{token}\n{question}"), Turn(role="gpt", text=answer)

    if with_caption:
        builder.add_sample(
            f"{builder.name}-align",
            stem,
            clip_id,
            turns("Describe it.", caption_of(scene)),
            stage="align",
            source="demo",
            category="caption",
        )
    for i, question in enumerate(questions_of(scene) if builder.wants(stage) else ()):
        choice = {"options": question.options, "answer_index": question.options.index(question.answer)}
        builder.add_sample(
            f"{builder.name}-{stage}",
            f"{stem}/{i}",
            clip_id,
            turns(question.text, question.answer),
            stage=stage,
            split=scene.split,
            source="demo",
            category=question.category,
            **({} if is_training else choice),
        )


def caption_of(scene: Scene) -> str:
    """A sentence that answers every question about the scene."""
    if scene.word:
        return f"the word {scene.word.lower()} in {scene.colour}"
    if scene.family == "count":
        counted = len(scene.copies)
        plural = "" if counted == 1 else "es" if scene.shape == "cross" else "s"
        return f"{COUNTS[counted - 1]} {scene.colour} {scene.shape}{plural}"
    tail = f" moving {' then '.join(scene.directions)}" if scene.directions else ""
    place = f" at the {scene.place}" if scene.place else ""
    return f"a {scene.colour} {scene.shape}{place}{tail}"


def _number(options: Mapping[str, Any], name: str, least: int) -> int:
    value = options[name]
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise UserError(f"demo option {name} must be a whole number, got {value!r}") from None
    if not least <= number <= MAX_CLIPS:
        raise UserError(f"demo option {name} must be {least}..{MAX_CLIPS}, got {number}")
    return number


def make_scene(seed: int, split: str, number: int) -> Scene:
    """Scene `number` of a split: a pure function of its arguments, whatever else is rendered."""
    family = FAMILIES[number % len(FAMILIES)]
    rounds, rest = divmod(number, len(FAMILIES))
    turn = rounds * FAMILIES.count(family) + FAMILIES[:rest].count(family)  # scenes of the family before this one
    is_still = family == "still"
    if is_still:
        family, turn = STILL_FAMILIES[turn % len(STILL_FAMILIES)], turn // len(STILL_FAMILIES)

    def draw(what: str, choices: tuple[str, ...]) -> str:
        """The `turn`-th of an endless sequence of shuffled blocks, each of which holds every choice once."""
        block, position = divmod(turn, len(choices))
        shuffled = list(choices)
        random.Random(f"{seed}/{split}/{is_still}/{family}/{what}/{block}").shuffle(shuffled)
        return shuffled[position]

    rng = random.Random(f"{seed}/{split}/{number}")
    common = {
        "split": split,
        "number": number,
        "family": family,
        "is_still": is_still,
        "shape": draw("shape", SHAPES),
        "colour": draw("colour", COLOURS),
        "background": (rng.randint(10, 90), rng.randint(10, 90)),
    }
    return Scene(**common, **_layout(family, rng, draw))


def _layout(family: str, rng: random.Random, draw: Callable[[str, tuple[str, ...]], str]) -> dict[str, Any]:
    """The fields of a scene that depend on its family."""
    if family == "direction":
        return _moving(rng, (draw("direction", DIRECTIONS),), length=0.44)
    if family == "order":
        first, last = draw("way", WAYS).split()
        return _moving(rng, (first, last), length=0.36)
    if family == "count":
        number = COUNTS.index(draw("count", COUNTS)) + 1
        cells = rng.sample([(-0.24, -0.24), (0.24, -0.24), (-0.24, 0.24), (0.24, 0.24)], number)
        copies = tuple((x + rng.uniform(-0.04, 0.04), y + rng.uniform(-0.04, 0.04)) for x, y in cells)
        return {"size": rng.uniform(0.28, 0.36), "path": ((0.5, 0.5),), "copies": copies, "word": ""}
    if family == "position":
        place = draw("place", PLACES)
        dx, dy = STEP_OF_DIRECTION[DIRECTIONS[PLACES.index(place)]]
        along, across = rng.uniform(0.24, 0.28), rng.uniform(-0.08, 0.08)
        point = (0.5 + dx * along + dy * across, 0.5 + dy * along + dx * across)
        return {"size": rng.uniform(0.34, 0.42), "path": (point,), "copies": ((0.0, 0.0),), "word": "", "place": place}
    if family == "text":
        point = (0.5 + rng.uniform(-0.06, 0.06), 0.5 + rng.uniform(-0.12, 0.12))
        return {"size": rng.uniform(0.7, 0.84), "path": (point,), "copies": (), "word": draw("word", WORDS)}
    point = (0.5 + rng.uniform(-0.15, 0.15), 0.5 + rng.uniform(-0.15, 0.15))  # "single"
    return {"size": rng.uniform(0.45, 0.6), "path": (point,), "copies": ((0.0, 0.0),), "word": ""}


def _moving(rng: random.Random, directions: tuple[str, ...], length: float) -> dict[str, Any]:
    """A path of `length` per direction, placed so that its middle is near the frame's middle."""
    corners = [(0.0, 0.0)]
    for direction in directions:
        dx, dy = STEP_OF_DIRECTION[direction]
        corners.append((corners[-1][0] + dx * length, corners[-1][1] + dy * length))
    low = [min(c[axis] for c in corners) for axis in (0, 1)]
    high = [max(c[axis] for c in corners) for axis in (0, 1)]
    shift = [0.5 - (low[axis] + high[axis]) / 2 + rng.uniform(-0.06, 0.06) for axis in (0, 1)]
    path = tuple((x + shift[0], y + shift[1]) for x, y in corners)
    size = rng.uniform(0.36, 0.42)
    return {"size": size, "path": path, "copies": ((0.0, 0.0),), "word": "", "directions": directions}


def questions_of(scene: Scene) -> tuple[Question, ...]:
    """Every question that the scene can answer."""
    colour = Question("colour", "What colour is it?", scene.colour, COLOURS)
    shape = Question("shape", "What shape is it?", scene.shape, SHAPES)
    if scene.family == "direction":
        return (Question("direction", "Which way does it move?", scene.directions[0], DIRECTIONS), colour, shape)
    if scene.family == "order":
        first, last = scene.directions
        return (
            Question("order", "Which way does it move first?", first, DIRECTIONS),
            Question("order", "Which way does it move last?", last, DIRECTIONS),
        )
    if scene.family == "count":
        return (Question("count", "How many shapes are there?", COUNTS[len(scene.copies) - 1], COUNTS), colour)
    if scene.family == "position":
        return (Question("position", "Where is the shape?", scene.place, PLACES), shape)
    if scene.family == "text":
        return (Question("text", "What word is written?", scene.word.lower(), tuple(w.lower() for w in WORDS)), colour)
    return (shape, colour)


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
    if scene.word:
        return _text_cover(scene, size)[None]
    steps = num_frames if len(scene.path) > 1 else 1
    corners = np.array(scene.path, np.float32)
    along = np.linspace(0, len(corners) - 1, steps)
    centres_T2 = np.stack([np.interp(along, np.arange(len(corners)), corners[:, axis]) for axis in (0, 1)], axis=1)
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    cover = np.zeros((steps, size, size), np.float32)
    for offset in scene.copies:
        x_T1W = pixels[None, None, :] - (centres_T2[:, 0] + offset[0]).astype(np.float32)[:, None, None]
        y_TH1 = pixels[None, :, None] - (centres_T2[:, 1] + offset[1]).astype(np.float32)[:, None, None]
        distance = _distance(scene.shape, x_T1W, y_TH1, np.float32(scene.size / 2))
        cover = np.maximum(cover, np.clip(0.5 - distance * size, 0, 1))  # one pixel of soft edge
    return cover


def _distance(shape: str, x: np.ndarray, y: np.ndarray, half: np.float32) -> np.ndarray:
    """Signed distance to the shape's edge, negative inside, in units of the frame's side."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - half
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - half * np.float32(0.9)
    if shape == "triangle":  # point up; the sides' slope is 2
        side = (2 * np.abs(x) - (y + half)) / np.float32(np.sqrt(5))
        return np.maximum(side, y - half)
    arm = half * np.float32(0.36)  # "cross"
    upright = np.maximum(np.abs(x) - arm, np.abs(y) - half)
    level = np.maximum(np.abs(x) - half, np.abs(y) - arm)
    return np.minimum(upright, level)


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


def paint_rgb(scene: Scene, cover_THW: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3]: the colour over the grey background."""
    ground_H11 = _shades(scene, cover_THW.shape[1])[:, None, None]
    colour_C = np.array(RGB[scene.colour], np.float32)
    return np.rint(ground_H11 + cover_THW[..., None] * (colour_C - ground_H11)).astype(np.uint8)


def paint_yuv420(scene: Scene, cover_THW: np.ndarray) -> np.ndarray:
    """uint8 [T, 3 H / 2, W], planes as FFmpeg lays them out: Y, then U and V at half size.

    Painted in YUV directly: the encoder's own conversion from RGB gives other bytes from call to call (PyAV 18).
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
    """ITU-R BT.601, limited range: what a player assumes for a small video without colour tags."""
    r, g, b = (np.float32(c / 255) for c in rgb)
    y = 16 + 65.481 * r + 128.553 * g + 24.966 * b
    u = 128 - 37.797 * r - 74.203 * g + 112.0 * b
    v = 128 + 112.0 * r - 93.786 * g - 18.214 * b
    return np.float32(y), np.float32(u), np.float32(v)


def _shades(scene: Scene, height: int) -> np.ndarray:
    """Grey level of every row, float32 [H] in 0..255."""
    return np.linspace(*scene.background, height, dtype=np.float32)


def encode_png(frame_HWC: np.ndarray) -> bytes:
    from PIL import Image  # only where something is rendered

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


SPEC = DatasetSpec(
    name="demo",
    summary="synthetic clips with known answers, rendered on the spot; nothing to download",
    default_root="data/demo",
    download="Nothing to download: the clips are drawn into the root on first use.",
    collect=collect,
    stages=STAGES,
    options={
        "train": Option(default=1200, help="training clips"),
        "heldout": Option(default=200, help="held-out clips"),
        "size": Option(default=96, help="width and height in pixels, a multiple of 4"),
        "num_frames": Option(default=32, help="frames per video, at 16 per second"),
        "seed": Option(default=0, help="another seed draws other clips"),
    },
    makes_root=True,
)
