"""Demo scenes: what a synthetic clip shows, and the questions whose answers follow from it.

Comes in: a seed, a split and a number. Goes out: a `Scene` (plain values, nothing drawn) and its `Question`s. Every
answer is one word out of four. Answers come in shuffled blocks that hold every answer equally often, drawn apart for
every property of a scene, so that over any number of clips they are balanced and say nothing of each other: a model
that does not look scores 1 in 4, and the wording of a question never depends on its answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

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
