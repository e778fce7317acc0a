"""Probes: how well small classifiers tell classes of clips apart from the stored tokens of each set of encoders.

    from trainer.ablation.probe import probe
    report = probe("features/lab.zarr", {"lab/a.mp4": "running", "lab/b.mp4": "sitting", ...})
    best = report.rows[0]

No LLM is trained. All probes see the same clips, those that have tokens of every encoder, and the same folds, in which
a video's clips stay together. Rankings by probes can be compared with those of a sweep's retrained runs.

N clips, K probes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import isqrt
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from featurestore import FeatureIdentity, FeatureStore
from featurestore.encoder_keys import chosen_keys
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import UserError, unknown_name
from mervcache.reprs import brief
from trainer.ablation.probe_features import (
    CHUNK_BYTES,
    Plan,
    ProbeName,
    Readout,
    check_memory,
    exact_levels,
    held_bytes,
    is_mean_exact,
    read_dtypes,
    read_features,
    working_bytes,
)
from trainer.ablation.probe_labels import (
    Classes,
    Labels,
    classes_of,
    labels_from_samples,
    make_splits,
    read_labels,
)
from trainer.ablation.probe_models import ATTENTIVE_FORMULA, LINEAR_FORMULA, predict_attentive, predict_linear
from trainer.ablation.probe_sweep import Agreement, compare_with_sweep
from trainer.ablation.results import read_results
from trainer.ablation.statistics import DRAWS, LEVEL, Resampling
from trainer.ablation.sweep import ALL, expand_subsets, with_keys
from trainer.config import in_paper_order
from trainer.data.batches import named_samples
from trainer.data.tokens import StoreTokens, TokenShape

FOLDS, INNER_FOLDS = 5, 3
MAX_MEMORY = 8 * 10**9
PROBES: tuple[ProbeName, ...] = get_args(ProbeName)
FORMULAS = {"linear": LINEAR_FORMULA, "attentive": ATTENTIVE_FORMULA}


@dataclass(frozen=True, kw_only=True)
class ProbeRow:
    """One probe: its scores on clips that it did not learn from."""

    probe: ProbeName
    encoders: tuple[str, ...]
    tokens_per_frame: int | None  # None: as `reads` says
    reads: str
    accuracy: float
    low: float  # of its interval
    high: float
    balanced_accuracy: float  # mean over classes of the share that is recognised
    chosen: tuple[float, ...]  # by fold: l2 of a linear probe, rounds of an attentive one
    predicted: tuple[str, ...] = field(repr=False)  # by clip

    @property
    def readout(self) -> Readout:
        return Readout(probe=self.probe, tokens_per_frame=self.tokens_per_frame)


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """All probes, the best first, and what they were measured on."""

    store: str
    snapshot: str
    labels: str  # where they come from
    classes: Mapping[str, int]  # -> clips
    clips: tuple[str, ...] = field(repr=False)
    videos: int
    majority: float  # accuracy of always saying the most frequent class
    folds: int
    seed: int
    draws: int
    memory_bytes: int
    left_out: Mapping[str, int]  # what could not be used, in words -> how many
    not_computed: Mapping[str, str]  # probe -> reason
    identities: Mapping[str, str]  # encoder that is stored several times -> what sets it apart
    notes: tuple[str, ...]
    rows: tuple[ProbeRow, ...]
    agreement: tuple[Agreement, ...] = ()

    def __repr__(self) -> str:
        best = f"; best {'+'.join(self.rows[0].encoders)} {self.rows[0].accuracy:.3f}" if self.rows else ""
        clips = f"{len(self.rows)} probes of {len(self.clips)} clips in {len(self.classes)} classes"
        return brief(self, f"in {self.store}: {clips}, chance {self.majority:.3f}{best}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def probe(
    store: FeatureStore | str | Path,
    labels: Mapping[str, str] | str | Path | None = None,
    *,
    category: str | None = None,
    samples: Sequence[str] = (),
    encoders: Sequence[str] = (),
    subsets: Sequence[str] = (ALL,),
    probes: Sequence[ProbeName] = PROBES,
    grids: Sequence[int] | str = (),
    folds: int = FOLDS,
    seed: int = 0,
    draws: int = DRAWS,
    max_memory: int = MAX_MEMORY,
    sweep: str | Path | None = None,
    progress: ProgressLine = SILENT,
) -> ProbeReport:
    """Rank sets of encoders by cross-validated probes on labelled clips of a store.

    Parameters
    ----------
    labels
        Clip id -> class, or a .csv or .parquet table with the columns clip_id and label.
    category
        Instead: a column of the store's samples, "category" or "source"; `samples` chooses sets of them.
    encoders
        Keys of the store, all by default; an encoder that is stored several times has a key for each identity. Clips
        without tokens of one of them are left out, whatever the subsets: rankings of equal `encoders` are comparable.
    subsets
        Rules of a sweep ("all", "leave-one-out", "alone") or encoders joined by "+". A rule makes no set that holds
        one encoder twice.
    grids
        Tokens per frame to read, exact ones only, or "all"; by default a linear probe reads the mean of the stored
        tokens and an attentive one all of them.
    probes
        "linear", "attentive" or both.
    folds, seed
        Parts of the clips for cross-validation, and the seed that draws them.
    draws
        Bootstrap draws of an interval.
    max_memory
        Bytes of tokens to hold at once.
    sweep
        Folder of a sweep on this store, whose retrained scores the probes' ranking is compared with.
    progress
        Counts steps.

    Raises
    ------
    UserError
        Labels that name no two classes, or too little memory.
    """
    opened = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    found = _labels(opened, labels, category, samples)
    keys = _encoders(opened, encoders)
    source = StoreTokens(opened, keys)
    if source.has_windows:
        raise UserError("a probe reads one clip per label, these tokens are of windows: probe a store of whole clips")
    chosen = _subsets(with_keys(subsets, opened), keys, opened.encoders)
    readouts = _readouts(probes, grids, source.shapes)
    used = [key for key in keys if any(key in subset for subset in chosen)]
    plan, not_computed = _plan(readouts, used, source.shapes)
    results = None if sweep is None else read_results(Path(sweep), store=opened.path)
    kept, left_out = _available(found, opened, source)
    classes, rare = classes_of(kept, left_out)
    left_out |= rare

    num_clips = len(classes.clip_ids)
    held = held_bytes(plan, source.shapes, num_clips, read_dtypes(opened))
    working = working_bytes(plan, chosen, num_clips)
    check_memory(held, working, max_memory, num_clips)
    tasks = [(r, s) for r in readouts for s in chosen if all((encoder, r) in plan for encoder in s)]
    if not tasks:
        raise UserError(f"nothing can be probed: {'; '.join(f'{w}: {r}' for w, r in not_computed.items())}")
    progress.start(num_clips * len({encoder for encoder, _ in plan}))
    features = read_features(opened, classes.clip_ids, plan, source.shapes, progress)
    rows_N = np.flatnonzero(features.is_finite_N)
    if len(rows_N) < num_clips:
        names = ", ".join(f"{name} {count}" for name, count in features.num_unfinite.items())
        left_out[f"clips whose tokens are not finite ({names})"] = num_clips - len(rows_N)
        classes, rows_N, rare = _without(classes, rows_N, left_out)
        left_out |= rare
        features.keep(rows_N)

    splits = make_splits(classes, folds=folds, inner_folds=INNER_FOLDS, seed=seed)
    progress.start(len(tasks))
    predictions = []
    for readout, subset in tasks:
        arrays = [features.arrays[encoder, readout] for encoder in subset]
        if readout.probe == "linear":
            predictions.append(predict_linear(arrays, classes.label_N, splits))
        else:
            predictions.append(predict_attentive(arrays, classes.label_N, splits, seed))
        progress.advance()

    is_right_KN = np.array([each.class_N == classes.label_N for each in predictions], dtype=np.float64)
    scores = Resampling(classes.video_N, draws=draws, seed=seed)(is_right_KN[None])
    low_K, high_K = scores.interval()
    rows = [
        ProbeRow(
            probe=readout.probe,
            encoders=subset,
            tokens_per_frame=readout.tokens_per_frame,
            reads=str(readout),
            accuracy=float(scores.estimate_K[k]),
            low=float(low_K[k]),
            high=float(high_K[k]),
            balanced_accuracy=_balanced(is_right_KN[k], classes),
            chosen=predictions[k].chosen,
            predicted=tuple(classes.names[label] for label in predictions[k].class_N),
        )
        for k, (readout, subset) in enumerate(tasks)
    ]
    agreement = ()
    if results is not None:
        places: dict[Readout, dict[tuple[str, ...], int]] = {}
        for k, (readout, subset) in enumerate(tasks):
            places.setdefault(readout, {})[subset] = k
        agreement = compare_with_sweep(scores, places, results, draws=draws, seed=seed)
    order = sorted(range(len(rows)), key=lambda k: (-rows[k].accuracy, len(rows[k].encoders), k))
    return ProbeReport(
        store=opened.path,
        snapshot=opened.snapshot,
        labels=found.source,
        classes=classes.counts,
        clips=classes.clip_ids,
        videos=len(np.unique(classes.video_N)),
        majority=max(classes.counts.values()) / len(classes.clip_ids),
        folds=folds,
        seed=seed,
        draws=draws,
        memory_bytes=held + working + CHUNK_BYTES,
        left_out=left_out,
        not_computed=not_computed,
        identities=_identities(used, opened.encoders),
        notes=tuple(_notes(readouts, used, source.shapes)),
        rows=tuple(rows[k] for k in order),
        agreement=agreement,
    )


def _labels(
    store: FeatureStore, labels: Mapping[str, str] | str | Path | None, category: str | None, samples: Sequence[str]
) -> Labels:
    if (labels is None) == (category is None):
        raise UserError("give labels of clips: a table with --labels, or a column of the samples with --category")
    if labels is None:
        return labels_from_samples(named_samples(samples, store.sample_names, store.samples), str(category))
    if samples:
        raise UserError("--samples chooses whose --category is read; a table of --labels names its clips itself")
    if isinstance(labels, Mapping):
        return Labels(by_clip={str(clip): str(label) for clip, label in labels.items()}, source="given labels")
    return read_labels(Path(labels))


def _encoders(store: FeatureStore, names: Sequence[str]) -> list[str]:
    """Keys of the store, each once; a name that is stored several times stands for all of its keys."""
    keys = {key: store.encoders[key] for key in in_paper_order(store.encoders)}
    return chosen_keys(names, keys) if names else list(keys)


def _subsets(
    rules: Sequence[str], keys: Sequence[str], identities: Mapping[str, FeatureIdentity]
) -> list[tuple[str, ...]]:
    """Sets of encoders; those that hold one encoder twice only where they are named."""
    named = set(expand_subsets([rule for rule in rules if "+" in rule], keys))

    def is_wanted(subset: tuple[str, ...]) -> bool:
        names = [identities[key].encoder for key in subset]
        return len(set(names)) == len(names) or subset in named

    chosen = [subset for subset in expand_subsets(rules, keys) if is_wanted(subset)]
    if not chosen:
        raise UserError(f"--subsets {','.join(rules)} makes no set of encoders")
    return chosen


def _readouts(probes: Sequence[str], grids: Sequence[int] | str, shapes: Mapping[str, TokenShape]) -> list[Readout]:
    if unknown := [name for name in probes if name not in PROBES]:
        raise UserError(unknown_name("probe", unknown[0], PROBES))
    if not probes:
        raise UserError(f"--probes names none of {', '.join(PROBES)}")
    if grids == ALL:
        grids = sorted({level for shape in shapes.values() for level in exact_levels(shape)})
    elif isinstance(grids, str):
        raise UserError(f"--grids are tokens per frame, such as 1,4,16, or {ALL}; got {grids!r}")
    if odd := [grid for grid in grids if grid < 1 or isqrt(grid) ** 2 != grid]:
        raise UserError(f"--grids are tokens per frame, squares such as 1, 4, 16, 64; got {odd[0]}")
    levels: Sequence[int | None] = list(dict.fromkeys(grids)) or [None]
    names = cast("list[ProbeName]", list(dict.fromkeys(probes)))
    return [Readout(probe=name, tokens_per_frame=level) for name in names for level in levels]


def _plan(
    readouts: Sequence[Readout], keys: Sequence[str], shapes: Mapping[str, TokenShape]
) -> tuple[Plan, dict[str, str]]:
    """What to keep of each encoder; a grid that the store does not hold exactly is not made up."""
    plan, not_computed = {}, {}
    for readout in readouts:
        for key in keys:
            reason = readout.why_not(shapes[key]) if readout.tokens_per_frame is not None else ""
            if reason:
                not_computed[f"{readout.probe} probes of {key} at {readout}"] = reason
            else:
                plan[key, readout] = readout.shape(shapes[key])
    return plan, not_computed


def _available(found: Labels, store: FeatureStore, source: StoreTokens) -> tuple[dict[str, str], dict[str, int]]:
    """The labelled clips that have tokens of every encoder, and how many others there are, by reason."""
    listed = set(store.clips["clip_id"].to_pylist())
    known = found.by_clip.keys() & listed
    if not known:
        example, own = next(iter(found.by_clip), None), min(listed, default=None)
        raise UserError(
            f"no clip of {found.source} is in {store.path}: {len(found.by_clip):,} labelled clips, the first is"
            f" {example!r}; the store's are like {own!r}"
        )
    available = source.available(known)
    left_out = dict(found.left_out)
    if unknown := len(found.by_clip) - len(known):
        left_out["labelled clips that are not in the store"] = unknown
    if len(available) < len(known):
        left_out["labelled clips without tokens of every encoder probed"] = len(known) - len(available)
    return {clip: found.by_clip[clip] for clip in sorted(available)}, left_out


def _without(classes: Classes, rows_N: NDArray, left_out: Mapping[str, int]) -> tuple[Classes, NDArray, dict[str, int]]:
    """The classes of some of the clips, the rows of these, and what that leaves out besides."""
    kept = {classes.clip_ids[row]: classes.names[classes.label_N[row]] for row in rows_N}
    fewer, rare = classes_of(kept, left_out)
    row_of = {clip: row for row, clip in enumerate(classes.clip_ids)}
    return fewer, np.array([row_of[clip] for clip in fewer.clip_ids]), rare


def _balanced(is_right_N: NDArray, classes: Classes) -> float:
    return float(np.mean([is_right_N[classes.label_N == label].mean() for label in range(len(classes.names))]))


def _identities(keys: Sequence[str], identities: Mapping[str, FeatureIdentity]) -> dict[str, str]:
    """Of encoders that are stored several times: the fields in which the identities differ."""
    texts = {}
    for key in keys:
        others = [identities[other] for other in keys if identities[other].encoder == identities[key].encoder]
        names = [f.name for f in fields(FeatureIdentity) if len({str(getattr(o, f.name)) for o in others}) > 1]
        if names:
            texts[key] = "; ".join(f"{name}: {getattr(identities[key], name)}" for name in names)
    return texts


def _notes(readouts: Sequence[Readout], keys: Sequence[str], shapes: Mapping[str, TokenShape]) -> list[str]:
    """How the numbers are made."""
    probes = dict.fromkeys(readout.probe for readout in readouts)
    notes = [f"{name.capitalize()} probe: {FORMULAS[name]}." for name in probes]
    notes.append(
        f"Accuracy on clips that were not learnt from; intervals: {LEVEL:.0%}, bootstrap over videos. Probes of one"
        " fold share what they learn from, which intervals do not cover."
    )
    reads_mean = any(each == Readout(probe="linear") for each in readouts)
    if reads_mean and (inexact := [key for key in keys if not is_mean_exact(shapes[key])]):
        notes.append(
            f"The mean of the stored tokens of {', '.join(inexact)} is not exactly that of the encoder's own grid,"
            " which the stored one averages in windows that overlap."
        )
    return notes
