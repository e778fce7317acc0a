"""The demo dataset: synthetic clips with known answers, rendered on the spot.

Comes in: how many clips, their size, a seed. Goes out: files under the root (drawn once; what is there is kept) and
samples in three sets: "demo-align" (one caption per training clip), "demo-finetune" (training questions, one-word
answers) and "demo-eval" (held-out clips, the same questions as multiple choice). `demo.json` says what the files were
drawn with, so that two settings are never mixed; a rendering that was interrupted goes on where it stopped.

Demo scenes: what a synthetic clip shows, and the questions whose answers follow from it.

Comes in: a seed, a split and a number. Goes out: a `Scene` (plain values, nothing drawn) and its `Question`s. Every
answer is one word out of four. Answers come in shuffled blocks that hold every answer equally often, drawn apart for
every property of a scene, so that over any number of clips they are balanced and say nothing of each other: a model
that does not look scores 1 in 4, and the wording of a question never depends on its answer.

Demo render: a scene's pixels, and the file that holds them.

Comes in: a `Scene`. Goes out: an H.264 MP4 or a PNG whose bytes are the same on every call: colours become YUV here and
not in the encoder's own conversion, which gave other bytes from call to call (PyAV 18, x264 with one thread), and the
container is told to leave versions out.

T frames, H W height and width, C channels.
"""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.clips import Turn
from mervcache.errors import UserError
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

# Families take turns in this order; motion has most, because it is what needs video and is learnt last.
FAMILIES = ("direction", "order", "count", "direction", "position", "order", "text", "direction", "still", "order")
STILL_FAMILIES = ("count", "position", "text", "single")  # what the stills show, in turn


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
    path: tuple[tuple[float, float], ...]  # corners of the way of the centre; one point where nothing moves
    copies: tuple[tuple[float, float], ...]  # offsets of every copy of the shape from that way
    word: str  # on the screen, "" for none
    background: tuple[int, int]  # grey level at the top and at the bottom
    directions: tuple[str, ...] = ()  # first, last
    place: str = ""

    @property
    def name(self) -> str:
        """The file, relative to the root."""
        return f"{self.split}/{self.number:05d}.{'png' if self.is_still else 'mp4'}"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about a scene."""

    category: str
    text: str
    answer: str
    options: tuple[str, ...]


def make_scene(seed: int, split: str, number: int) -> Scene:
    """Scene `number` of a split: a pure function of its arguments, whatever else is rendered."""
    family = FAMILIES[number % len(FAMILIES)]
    turn = _times_before(family, number)
    is_still = family == "still"
    if is_still:
        family, turn = STILL_FAMILIES[turn % len(STILL_FAMILIES)], turn // len(STILL_FAMILIES)

    def draw(what: str, choices: tuple[str, ...]) -> str:
        return _balanced(f"{seed}/{split}/{is_still}/{family}/{what}", choices, turn)

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
    return Scene(**common, **_LAYOUTS[family](rng, draw))


def questions_of(scene: Scene) -> tuple[Question, ...]:
    """Every question that the scene can answer."""
    colour = _question("colour", "What colour is it?", scene.colour, COLOURS)
    shape = _question("shape", "What shape is it?", scene.shape, SHAPES)
    if scene.family == "direction":
        return (_question("direction", "Which way does it move?", scene.directions[0], DIRECTIONS), colour, shape)
    if scene.family == "order":
        first, last = scene.directions
        return (
            _question("order", "Which way does it move first?", first, DIRECTIONS),
            _question("order", "Which way does it move last?", last, DIRECTIONS),
        )
    if scene.family == "count":
        return (_question("count", "How many shapes are there?", COUNTS[len(scene.copies) - 1], COUNTS), colour)
    if scene.family == "position":
        return (_question("position", "Where is the shape?", scene.place, PLACES), shape)
    if scene.family == "text":
        return (_question("text", "What word is written?", scene.word.lower(), tuple(w.lower() for w in WORDS)), colour)
    return (shape, colour)


def _question(category: str, text: str, answer: str, options: tuple[str, ...]) -> Question:
    return Question(category=category, text=text, answer=answer, options=options)


def _times_before(family: str, number: int) -> int:
    """How many scenes of the family come before `number`."""
    rounds, rest = divmod(number, len(FAMILIES))
    return rounds * FAMILIES.count(family) + FAMILIES[:rest].count(family)


def _balanced(key: str, choices: tuple[str, ...], turn: int) -> str:
    """The `turn`-th of an endless row of shuffled blocks, each of which holds every choice once."""
    block, position = divmod(turn, len(choices))
    shuffled = list(choices)
    random.Random(f"{key}/{block}").shuffle(shuffled)
    return shuffled[position]


def _direction(rng: random.Random, draw) -> dict:
    direction = draw("direction", DIRECTIONS)
    return _moving(rng, (direction,), length=0.44)


def _order(rng: random.Random, draw) -> dict:
    first, last = draw("way", WAYS).split()
    return _moving(rng, (first, last), length=0.36)


def _moving(rng: random.Random, directions: tuple[str, ...], length: float) -> dict:
    """A way of `length` per direction, placed so that its middle is near the frame's middle."""
    corners = [(0.0, 0.0)]
    for direction in directions:
        dx, dy = STEP_OF_DIRECTION[direction]
        corners.append((corners[-1][0] + dx * length, corners[-1][1] + dy * length))
    low = [min(c[axis] for c in corners) for axis in (0, 1)]
    high = [max(c[axis] for c in corners) for axis in (0, 1)]
    shift = [0.5 - (low[axis] + high[axis]) / 2 + rng.uniform(-0.06, 0.06) for axis in (0, 1)]
    path = tuple((x + shift[0], y + shift[1]) for x, y in corners)
    return {
        "size": rng.uniform(0.36, 0.42),
        "path": path,
        "copies": ((0.0, 0.0),),
        "word": "",
        "directions": directions,
    }


def _count(rng: random.Random, draw) -> dict:
    number = COUNTS.index(draw("count", COUNTS)) + 1
    cells = rng.sample([(-0.24, -0.24), (0.24, -0.24), (-0.24, 0.24), (0.24, 0.24)], number)
    copies = tuple((x + rng.uniform(-0.04, 0.04), y + rng.uniform(-0.04, 0.04)) for x, y in cells)
    return {"size": rng.uniform(0.28, 0.36), "path": ((0.5, 0.5),), "copies": copies, "word": ""}


def _position(rng: random.Random, draw) -> dict:
    place = draw("place", PLACES)
    dx, dy = STEP_OF_DIRECTION[DIRECTIONS[PLACES.index(place)]]
    along, across = rng.uniform(0.24, 0.28), rng.uniform(-0.08, 0.08)
    point = (0.5 + dx * along + dy * across, 0.5 + dy * along + dx * across)
    return {"size": rng.uniform(0.34, 0.42), "path": (point,), "copies": ((0.0, 0.0),), "word": "", "place": place}


def _text(rng: random.Random, draw) -> dict:
    point = (0.5 + rng.uniform(-0.06, 0.06), 0.5 + rng.uniform(-0.12, 0.12))
    return {"size": rng.uniform(0.7, 0.84), "path": (point,), "copies": (), "word": draw("word", WORDS)}


def _single(rng: random.Random, draw) -> dict:
    point = (0.5 + rng.uniform(-0.15, 0.15), 0.5 + rng.uniform(-0.15, 0.15))
    return {"size": rng.uniform(0.45, 0.6), "path": (point,), "copies": ((0.0, 0.0),), "word": ""}


_LAYOUTS = {
    "direction": _direction,
    "order": _order,
    "count": _count,
    "position": _position,
    "text": _text,
    "single": _single,
}

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


MANIFEST = "demo.json"
RENDERER = 1  # raised whenever the same seed draws other pixels
MAX_CLIPS = 1_000_000


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
        _add(builder, scene)


def render_missing(root: Path, scenes: Iterable[Scene], settings: Mapping[str, int], counts: Mapping[str, int]) -> int:
    """Draw the scenes whose files are not there; returns how many. About 10 ms each."""
    _check_manifest(root, settings)
    present = {split: set(os.listdir(root / split)) if (root / split).is_dir() else set() for split in SPLITS}
    absent = [scene for scene in scenes if scene.name.split("/")[1] not in present[scene.split]]
    if not absent:
        return 0

    _make_folders(root)
    _write_manifest(root, settings, counts, is_complete=False)
    for scene in absent:
        render_file(scene, root / scene.name, size=settings["size"], num_frames=settings["num_frames"])
    _write_manifest(root, settings, counts, is_complete=True)
    return len(absent)


def _check_manifest(root: Path, settings: Mapping[str, int]) -> None:
    """Files drawn with other settings must not be mixed with ours: ids would not tell them apart."""
    try:
        found = json.loads((root / MANIFEST).read_text())["settings"]
    except FileNotFoundError:
        if root.is_dir() and any((root / split).exists() for split in SPLITS):
            raise UserError(
                f"{root} holds {' or '.join(SPLITS)} but no {MANIFEST}; give the demo a root of its own"
            ) from None
        return
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{root / MANIFEST} cannot be read ({error}); remove {root} to draw anew") from error
    if found != dict(settings):
        raise UserError(
            f"{root} was drawn with {found}, asked for is {dict(settings)}; give another --root, or remove that folder"
        )


def _make_folders(root: Path) -> None:
    try:
        for split in SPLITS:
            (root / split).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the demo cannot be drawn into {root}: {error.strerror}; give another --root") from error


def _write_manifest(root: Path, settings: Mapping[str, int], counts: Mapping[str, int], is_complete: bool) -> None:
    record = {"settings": dict(settings), "counts": dict(counts), "is_complete": is_complete}
    temporary = root / f".{MANIFEST}.{os.getpid()}.part"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, root / MANIFEST)


def _add(builder: ListingBuilder, scene: Scene) -> None:
    """The clip, a caption for stage "align" and the questions for "finetune" or "eval"."""
    stage = "finetune" if scene.split == "train" else "eval"
    wanted = [name for name in (stage, "align" if scene.split == "train" else stage) if builder.wants(name)]
    if not wanted:
        return
    clip_id = builder.add_clip(scene.name, "image" if scene.is_still else "video")
    stem = scene.name.rpartition(".")[0]
    if "align" in wanted:
        turns = _turns(scene, "Describe it.", caption_of(scene))
        builder.add_sample(
            f"{builder.name}-align", stem, clip_id, turns, stage="align", source="demo", category="caption"
        )
    if stage in wanted:
        for i, question in enumerate(questions_of(scene)):
            _add_question(builder, scene, clip_id, f"{stem}/{i}", question, stage)


def _add_question(
    builder: ListingBuilder, scene: Scene, clip_id: str, record_id: str, question: Question, stage: str
) -> None:
    choice = {"options": question.options, "answer_index": question.options.index(question.answer)}
    builder.add_sample(
        f"{builder.name}-{stage}",
        record_id,
        clip_id,
        _turns(scene, question.text, question.answer),
        stage=stage,
        split=scene.split,
        source="demo",
        category=question.category,
        **(choice if stage == "eval" else {}),
    )


def _turns(scene: Scene, question: str, answer: str) -> tuple[Turn, Turn]:
    """As the training data have it: the token stands once, in the first human turn."""
    token = "<image>" if scene.is_still else "<video>"
    return Turn(role="human", text=f"{token}\n{question}"), Turn(role="gpt", text=answer)


def caption_of(scene: Scene) -> str:
    """A sentence that says everything the questions ask."""
    if scene.word:
        return f"the word {scene.word.lower()} in {scene.colour}"
    if scene.family == "count":
        counted = len(scene.copies)
        plural = "" if counted == 1 else "es" if scene.shape == "cross" else "s"
        return f"{('one', 'two', 'three', 'four')[counted - 1]} {scene.colour} {scene.shape}{plural}"
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


STAGES = ("align", "finetune", "eval")

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
