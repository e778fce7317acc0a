"""Near-duplicates among a store's clips, and evaluation clips that training has seen, from pooled tokens.

Two clips are near-duplicates where the cosine of their centred mean tokens reaches a threshold for every encoder that
holds both. Exact ones have media of equal sha256. Leakage is a pair of which one clip has questions to score and the
other is trained on. Conversations name videos, so a window is trained on or scored where its video is.

C clips, D width of an encoder.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.clips import Sample
from featurestore.store import FeatureStore
from featurestore.windows import videos_in_windows, window_length
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import UserError
from mervcache.reprs import brief
from pipeline.vectors import chosen_encoders, pool_clips

ROWS_AT_ONCE = 1024  # of the matrix of cosines
THRESHOLD = 0.98


@dataclass(frozen=True, kw_only=True)
class DuplicatePair:
    """Two clips alike, in the order of the store."""

    first: str
    second: str
    cosines: Mapping[str, float]  # by encoder
    is_exact: bool  # the media have the same bytes, and the clips the same span of them
    is_leak: bool  # one is trained on and the other scored


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """What was compared and found; pairs by falling least cosine."""

    store: str
    snapshot: str
    encoders: tuple[str, ...]
    threshold: float
    clips: int  # compared: those with tokens of every encoder
    without: int  # clips that lack tokens of one, which were not compared
    shared: int  # clips that are themselves both trained on and scored
    pairs: tuple[DuplicatePair, ...]
    leaked: tuple[str, ...]  # clips or videos trained on that are scored too, or alike to one that is
    repeated: tuple[str, ...]  # further clips trained on: of those alike all but the first

    def __repr__(self) -> str:
        found = f"{len(self.pairs)} pairs, {len(self.leaks)} leaks among {self.clips} clips"
        return brief(self, f"in {self.store}: {found} at cosine {self.threshold:g}")

    @property
    def leaks(self) -> tuple[DuplicatePair, ...]:
        """The pairs between a clip with trained and one with scored conversations."""
        return tuple(pair for pair in self.pairs if pair.is_leak)

    def groups(self) -> list[list[str]]:
        """Clips connected by pairs, each group in the order of the pairs: keep one of each to have no duplicates."""
        return _groups((pair.first, pair.second) for pair in self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, as `--json` prints it."""
        return asdict(self) | {"leaks": len(self.leaks), "groups": self.groups()}


def find_duplicates(
    store: FeatureStore,
    encoders: Sequence[str] | None = None,
    *,
    threshold: float = THRESHOLD,
    progress: ProgressLine = SILENT,
) -> Duplicates:
    """Compare every clip with every other by the vectors of each encoder, less their mean.

    Time grows with the square of the clips, memory with their number: 100,000 clips of width 1,024 are 10^13
    multiplications, minutes on one machine, and 400 MB per encoder.

    Parameters
    ----------
    store
        An open store.
    encoders
        Keys that must all agree on a pair; default: all.
    threshold
        Least cosine of a pair, in each encoder.
    progress
        Counts clips.

    Raises
    ------
    UserError
        The store lacks an encoder, or tokens are not finite.
    """
    chosen = chosen_encoders(store, encoders)
    if not -1 <= threshold <= 1:
        raise UserError(f"the threshold is a cosine, from -1 to 1, got {threshold}")
    table = store.clips
    is_complete = np.all([table[name].to_numpy() for name in chosen], axis=0)
    clip_ids = table["clip_id"].filter(is_complete).to_pylist()
    vectors = [pool_clips(store, name, clip_ids, progress=progress).normalised() for name in chosen]
    spans = _span_keys(table.filter(is_complete).to_pylist(), store.media_sha256(encoder=chosen[0]))
    trained, scored = _uses(store.samples())
    videos = _videos_of_windows(store, trained | scored)

    def named(first: str, second: str) -> list[tuple[str, str]]:
        """Two clips as conversations name them, in both orders; none for two windows of one video."""
        pairs = product(videos.get(first, [first]), videos.get(second, [second]))
        return [sides for one, other in pairs if one != other for sides in ((one, other), (other, one))]

    pairs = []
    for first, second, cosines in _alike(vectors, threshold):
        one, other = clip_ids[first], clip_ids[second]
        pairs.append(
            DuplicatePair(
                first=one,
                second=other,
                cosines=dict(zip(chosen, cosines, strict=True)),
                is_exact=spans[first] is not None and spans[first] == spans[second],
                is_leak=any(clip in trained and alike in scored for clip, alike in named(one, other)),
            )
        )
    pairs.sort(key=lambda pair: -min(pair.cosines.values()))
    sides = [sides for pair in pairs for sides in named(pair.first, pair.second)]
    leaked = (trained & scored) | {clip for clip, alike in sides if clip in trained and alike in scored}
    others = trained - leaked
    repeated = [[clip for clip in group if clip in others][1:] for group in _groups(sides)]
    return Duplicates(
        store=store.path,
        snapshot=store.snapshot,
        encoders=tuple(chosen),
        threshold=threshold,
        clips=len(clip_ids),
        without=len(table) - len(clip_ids),
        shared=len(trained & scored),
        pairs=tuple(pairs),
        leaked=tuple(sorted(leaked)),
        repeated=tuple(sorted(chain.from_iterable(repeated))),
    )


def _videos_of_windows(store: FeatureStore, named: Collection[str]) -> dict[str, list[str]]:
    """Window -> the videos among `named` that it is of; {} in a store of whole clips."""
    if all(window_length(identity.frame_rule) is None for identity in store.encoders.values()):
        return {}
    found: dict[str, list[str]] = defaultdict(list)
    for video, windows in sorted(videos_in_windows(named, set(store.clips["clip_id"].to_pylist())).items()):
        for window in windows:
            found[window].append(video)
    return dict(found)


def _groups(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    group_of: dict[str, list[str]] = {}
    for first, second in pairs:
        one, other = group_of.get(first, [first]), group_of.get(second, [second])
        if one is not other:
            one = one + other
        group_of |= dict.fromkeys(one, one)
    return list({id(group): group for group in group_of.values()}.values())


def _alike(vectors: Sequence[NDArray[np.float32]], threshold: float) -> Iterable[tuple[int, int, list[float]]]:
    """(first, second, cosine by encoder) of pairs that reach the threshold for all encoders."""
    num_clips = len(vectors[0])
    for start in range(0, num_clips, ROWS_AT_ONCE):
        cosines = [values_CD[start : start + ROWS_AT_ONCE] @ values_CD[start:].T for values_CD in vectors]
        is_alike = np.triu(np.all([found >= threshold for found in cosines], axis=0), k=1)
        for row, column in np.argwhere(is_alike):
            yield start + int(row), start + int(column), [float(found[row, column]) for found in cosines]


def _span_keys(rows: Sequence[Mapping[str, Any]], media_sha256: Mapping[str, str]) -> list[tuple | None]:
    """What two clips of the same bytes share; None where the digest of the media is not recorded."""
    return [
        (digest, row["start_s"], row["end_s"], row["end_frame"])
        if (digest := media_sha256.get(row["clip_id"]))
        else None
        for row in rows
    ]


def _uses(samples: Iterable[Sample]) -> tuple[set[str], set[str]]:
    """Clips that are trained on, and clips with questions that are scored."""
    clips: dict[bool, set[str]] = defaultdict(set)
    for sample in samples:
        if sample.clip_id is not None:
            clips[sample.stage == "eval" or sample.split == "heldout"].add(sample.clip_id)
    return clips[False], clips[True]
