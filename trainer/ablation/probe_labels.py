"""Labels of clips for probes, and cross-validation folds that keep every video whole.

Labels come from a table or from a column of the store's samples. Folds are a pure function of clip ids, labels and
seed: neither the order of the table nor that of the store matters.

N clips, V videos, C classes.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from featurestore.clips import Sample
from mervcache.console import plural
from mervcache.errors import UserError, unknown_name
from trainer.ablation.results import video_of
from trainer.data.order import derive_seed

COLUMNS = ("category", "source")  # of samples, that name a class
ANSWERS = ("answer", "answers", "answer_index", "options", "correct", "predicted")
WHY_NO_ANSWERS = (
    "the answer of a multiple-choice question is an index into that question's own options, not a class: index 1 is"
    " another thing in every question; write a table with the columns clip_id and label instead, and give it with"
    " --labels"
)
LEAST_VIDEOS = 2  # of a class: one to learn from and one to test


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The class of every clip that has one, and what could not be used."""

    by_clip: Mapping[str, str]
    source: str  # where they come from
    left_out: Mapping[str, int] = field(default_factory=dict)  # what, in words -> how many


def read_labels(path: Path) -> Labels:
    """Read a .csv or .parquet table with the columns clip_id and label; UserError where it is none.

    Clips without a label (empty, null, NaN) are counted. A clip that has two different labels is an error.
    """
    path = Path(path)
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"--labels {path} ends in none of {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"--labels {path}: there is no such file")
    found: dict[str, str] = {}
    without = 0
    for clip_id, value in readers[path.suffix.lower()](path):
        label = _label(value, path)
        if clip_id is None or label is None:
            without += 1
        elif found.setdefault(str(clip_id), label) != label:
            raise UserError(f"{path} gives clip {clip_id!r} two labels, {found[str(clip_id)]!r} and {label!r}")
    left_out = {"lines without a clip or a label": without} if without else {}
    return Labels(by_clip=found, source=str(path), left_out=left_out)


def labels_from_samples(samples: Iterable[Sample], column: str) -> Labels:
    """Label clips by a column of their samples; clips whose samples differ in it are ambiguous and counted."""
    if column in ANSWERS:
        raise UserError(f"--category {column}: {WHY_NO_ANSWERS}")
    if column not in COLUMNS:
        raise UserError(unknown_name("column of the samples", column, COLUMNS))
    values: dict[str, set[str]] = {}
    for sample in samples:
        if sample.clip_id is not None:
            values.setdefault(sample.clip_id, set()).update(filter(None, [getattr(sample, column)]))
    without = sum(not each for each in values.values())
    several = sum(len(each) > 1 for each in values.values())
    reasons = {f"clips without a {column}": without, f"clips whose samples differ in {column}": several}
    found = {clip: next(iter(each)) for clip, each in values.items() if len(each) == 1}
    if several and not found:
        raise UserError(
            f"no clip has one {column}: the samples of all {several:,} differ in it; choose sets of samples with"
            " --samples, or write a table with the columns clip_id and label"
        )
    left_out = {reason: count for reason, count in reasons.items() if count}
    return Labels(by_clip=found, source=f"{column} of the samples", left_out=left_out)


def _label(value: Any, path: Path) -> str | None:
    """A class as text; None for no label."""
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)  # a column of integers with gaps is one of floats
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str | int | float):
        raise UserError(f"{path}: a label is a text or a number, got {str(value)[:80]!r}")
    text = str(value).strip()
    return None if text.lower() in ("", "nan") else text


def _read_csv(path: Path) -> list[tuple[Any, Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            _check_columns(path, reader.fieldnames or [])
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not readable CSV in UTF-8: {error}") from error
    if odd := [number for number, row in enumerate(rows, 1) if None in row or row["label"] is None]:
        raise UserError(f"{path}, row {odd[0]} has another number of cells than the heading; quote cells with commas")
    return [(row["clip_id"].strip() or None, row["label"]) for row in rows]


def _read_parquet(path: Path) -> list[tuple[Any, Any]]:
    try:
        _check_columns(path, pq.read_schema(path).names)
        table = pq.read_table(path, columns=["clip_id", "label"])
        return list(zip(table["clip_id"].to_pylist(), table["label"].to_pylist(), strict=True))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not readable Parquet: {error}") from error


def _check_columns(path: Path, names: Sequence[str]) -> None:
    lacking = [name for name in ("clip_id", "label") if name not in names]
    if not lacking:
        return
    reason = f"; of its columns, {', '.join(names) or 'none'}, " if names else "; it is empty"
    if answers := [name for name in names if name in ANSWERS]:
        reason += f"{answers[0]} is no label: {WHY_NO_ANSWERS}"
    elif names:
        reason += "name one of them so"
    raise UserError(f"{path} has no column {' and no column '.join(lacking)}{reason}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Classes:
    """Clips in the order of their ids, and the class of each."""

    clip_ids: tuple[str, ...]
    names: tuple[str, ...]  # of the classes, sorted
    label_N: NDArray[np.int64]

    @property
    def counts(self) -> dict[str, int]:
        """Clips by class."""
        return dict(zip(self.names, np.bincount(self.label_N, minlength=len(self.names)).tolist(), strict=True))

    @property
    def video_N(self) -> NDArray[np.int64]:
        """Number of each clip's video."""
        return np.unique([video_of(clip) for clip in self.clip_ids], return_inverse=True)[1]


def classes_of(
    by_clip: Mapping[str, str], left_out: Mapping[str, int] = MappingProxyType({})
) -> tuple[Classes, dict[str, int]]:
    """Clips by class, and how many were left out because their class has too few videos to be learnt and tested.

    UserError where less than two classes are left; it names what was `left_out` before.
    """
    videos: dict[str, set[str]] = {}
    for clip, label in by_clip.items():
        videos.setdefault(label, set()).add(video_of(clip))
    names = sorted(label for label, found in videos.items() if len(found) >= LEAST_VIDEOS)
    if len(names) < 2:
        only = f"one class, {names[0]!r}," if names else "no class"
        before = "".join(f"; left out: {count:,} {what}" for what, count in left_out.items())
        raise UserError(
            f"a probe tells classes apart, and {only} has clips of {LEAST_VIDEOS} or more videos"
            f" ({len(by_clip):,} clips, {len(videos):,} different labels{before})"
        )
    clips = sorted(clip for clip, label in by_clip.items() if label in set(names))
    number = {label: index for index, label in enumerate(names)}
    left_out = {}
    if rare := len(videos) - len(names):
        which = plural(rare, "class") if rare == 1 else f"{rare:,} classes"
        left_out[f"clips of {which} with less than {LEAST_VIDEOS} videos"] = len(by_clip) - len(clips)
    labels = np.array([number[by_clip[clip]] for clip in clips], dtype=np.int64)
    return Classes(clip_ids=tuple(clips), names=tuple(names), label_N=labels), left_out


def assign_folds(clip_ids: Sequence[str], label_N: NDArray[np.int64], folds: int, *seed: str | int) -> NDArray:
    """The fold of each clip: all clips of a video in one, the classes spread evenly, the rest by chance.

    Videos are placed one after another, those with the most clips first and then in the order of a digest of seed and
    name: each where its classes are rarest so far, relative to their size, then where the fewest clips are.
    """
    names, video_N = np.unique([video_of(clip) for clip in clip_ids], return_inverse=True)
    if len(names) < folds:
        raise UserError(f"{len(names)} videos make no {folds} folds, because a video stays in one; give fewer --folds")
    count_VC = np.zeros((len(names), int(label_N.max()) + 1))
    np.add.at(count_VC, (video_N, label_N), 1)
    total_C = np.maximum(count_VC.sum(axis=0), 1)
    place_FC = np.zeros((folds, count_VC.shape[1]))
    fold_V = np.empty(len(names), dtype=np.int64)
    digest = [derive_seed("folds", *seed, name) for name in names.tolist()]
    for video in sorted(range(len(names)), key=lambda v: (-count_VC[v].sum(), digest[v], names[v])):
        own = np.flatnonzero(count_VC[video])
        crowd_F = (place_FC[:, own] * (count_VC[video, own] / total_C[own])).sum(axis=1)
        fold = int(np.lexsort((place_FC.sum(axis=1), np.round(crowd_F, 9)))[0])
        fold_V[video] = fold
        place_FC[fold] += count_VC[video]
    return fold_V[video_N]


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Rows of clips to learn from and to test on, and the same within those to learn from."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    inner: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...] = ()


def make_splits(classes: Classes, *, folds: int, inner_folds: int, seed: int) -> list[Split]:
    """Outer folds, each with inner folds of its training part: every clip is tested once."""
    fold_N = assign_folds(classes.clip_ids, classes.label_N, folds, seed, "outer")
    splits = []
    for fold in range(folds):
        train, test = np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold)
        label = classes.label_N[train]
        if len(np.unique(label)) < 2:
            raise UserError(f"without fold {fold + 1} of {folds}, one class is left to learn; give more --folds")
        inside = assign_folds([classes.clip_ids[row] for row in train], label, inner_folds, seed, "inner", fold)
        inner = tuple((train[inside != each], train[inside == each]) for each in range(inner_folds))
        splits.append(Split(train=train, test=test, inner=inner))
    return splits
