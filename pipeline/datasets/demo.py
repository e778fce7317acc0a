"""The demo dataset: synthetic clips with known answers, rendered on the spot.

Comes in: how many clips, their size, a seed. Goes out: files under the root (drawn once; what is there is kept) and
samples in three sets: "demo-align" (one caption per training clip), "demo-finetune" (training questions, one-word
answers) and "demo-eval" (held-out clips, the same questions as multiple choice). `demo.json` says what the files were
drawn with, so that two settings are never mixed; a rendering that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from featurestore.clips import Turn
from mervcache.errors import UserError
from pipeline.datasets.base import DatasetSpec, ListingBuilder, Option
from pipeline.datasets.demo_scene import SPLITS, Question, Scene, make_scene, questions_of

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
    from pipeline.datasets.demo_render import render_file  # numpy and FFmpeg, only where something is drawn

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
