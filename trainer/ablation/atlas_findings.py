"""What an atlas shows: the clips that activate an encoder, correlations with properties of clips, change.

Correlations are Spearman's rho over clips of one kind, with percentile intervals of a bootstrap over media files: spans
of one file are not independent. p values are adjusted by Holm for all correlations of one call.

C clips, E encoders, K quantities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mervcache.errors import UserError
from trainer.ablation.atlas import Atlas, Properties
from trainer.ablation.statistics import LEVEL, Floats, Resampling, holm, percentile_interval, two_sided_p

MIN_MEDIA = 10  # files; a percentile interval over fewer is too short
PERCENTILES = (10, 50, 90)

# What arXiv 2501.01426 says about the weights of its trained model: encoder, property, sign of the correlation.
PUBLISHED = (
    ("vivit", "motion", 1, "clips with motion"),
    ("siglip", "edges", 1, "clips with text"),
    ("dinov2", "motion", -1, "static scenes"),
    ("languagebind", "motion", -1, "static scenes"),
)


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Spearman's rho between a measure of an encoder and something else, over clips."""

    measure: str  # "norm", "share" or "weight"
    encoder: str
    other: str  # the property
    kind: str  # of the clips
    clips: int
    media: int  # files
    rho: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None  # adjusted for all correlations of one call
    reason: str = ""  # why there is no rho or no interval

    @property
    def is_away(self) -> bool:
        """Whether the interval is away from 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def is_away_after_holm(self) -> bool:
        return self.p_holm is not None and self.p_holm <= 1 - LEVEL


def correlations(atlas: Atlas, properties: Properties, *, draws: int, seed: int = 0) -> list[Correlation]:
    """Of every measure, encoder and property, and of every kind of clip that has the property."""
    found: list[Correlation] = []
    for name, values in properties.items():
        for kind in sorted(set(atlas.kinds), reverse=True):  # video first
            rows = [
                row
                for row, clip_id in enumerate(atlas.clip_ids)
                if atlas.kinds[row] == kind and values.get(clip_id) is not None
            ]
            if rows:
                other_C = np.array([values[atlas.clip_ids[row]] for row in rows], dtype=np.float64)
                found += _correlations(atlas, rows, other_C, name, kind, draws=draws, seed=seed)
    adjusted = iter(holm([each.p for each in found if each.p is not None]))
    return [replace(each, p_holm=next(adjusted)) if each.p is not None else each for each in found]


def _correlations(
    atlas: Atlas, rows: Sequence[int], other_C: Floats, name: str, kind: str, *, draws: int, seed: int
) -> list[Correlation]:
    quantities = [
        (m, e, values_CE[rows, place])
        for m, values_CE in atlas.measures.items()
        for place, e in enumerate(atlas.encoders)
    ]
    blank = [
        Correlation(measure=m, encoder=e, other=name, kind=kind, clips=len(rows), media=_num_media(atlas, rows))
        for m, e, _ in quantities
    ]
    return rank_correlations(blank, [values_C for *_, values_C in quantities], other_C, atlas, rows, draws, seed)


def rank_correlations(
    blank: Sequence[Correlation],
    one_KC: Sequence[Floats],
    other_C: Floats,
    atlas: Atlas,
    rows: Sequence[int],
    draws: int,
    seed: int,
) -> list[Correlation]:
    """The correlations with rho and its interval where they can be computed, else with the reason."""
    is_enough = blank[0].media >= MIN_MEDIA
    resampling = Resampling(media_numbers(atlas, rows), draws=draws if is_enough else 1, seed=seed)
    result = resampling.rank_correlations(np.stack(one_KC), other_C)
    (low_K, high_K), p_K = percentile_interval(result.draws_BK), two_sided_p(result.draws_BK)
    found = []
    for place, each in enumerate(blank):
        rho = float(result.estimate_K[place])
        if np.isnan(rho):
            constant = "the property" if np.ptp(other_C) == 0 else f"the {each.measure} of {each.encoder}"
            found.append(replace(each, reason=f"{constant} is the same for every clip"))
        elif not is_enough:
            reason = f"no interval: {each.media} media files, at least {MIN_MEDIA} are needed"
            found.append(replace(each, rho=rho, reason=reason))
        else:
            interval = {"low": float(low_K[place]), "high": float(high_K[place]), "p": float(p_K[place])}
            found.append(replace(each, rho=rho, **interval))
    return found


def media_numbers(atlas: Atlas, rows: Sequence[int]) -> np.ndarray:
    """A number of each clip's media file."""
    return np.unique([atlas.media[row] for row in rows], return_inverse=True)[1]


def _num_media(atlas: Atlas, rows: Sequence[int]) -> int:
    return len({atlas.media[row] for row in rows})


@dataclass(frozen=True, kw_only=True)
class Activation:
    """A clip, and by how much its value of an encoder exceeds the encoder's mean."""

    row: int
    ratio: float  # value / mean over the clips of the atlas


def most_activating(atlas: Atlas, encoder: str, count: int) -> list[Activation]:
    """The clips with the largest `Atlas.activation` of the encoder relative to its mean, one of each media file."""
    ratio_C = atlas.relative(atlas.activation)[:, atlas.encoders.index(encoder)]
    found: list[Activation] = []
    seen: set[str] = set()
    for row in sorted(range(len(ratio_C)), key=lambda row: (-ratio_C[row], atlas.clip_ids[row])):
        if len(found) < count and atlas.media[row] not in seen:
            seen.add(atlas.media[row])
            found.append(Activation(row=row, ratio=float(ratio_C[row])))
    return found


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Values of one encoder over a group of clips, relative to the encoder's mean over all of them."""

    dataset: str
    kind: str
    encoder: str
    clips: int
    low: float
    median: float
    high: float  # low and high: percentiles 10 and 90


def spreads(atlas: Atlas, measure: str) -> list[Spread]:
    """By dataset and kind, and encoder."""
    relative_CE = atlas.relative(measure)
    groups = sorted(set(zip(atlas.datasets, atlas.kinds, strict=True)))
    found = []
    for dataset, kind in groups:
        rows = [r for r, group in enumerate(zip(atlas.datasets, atlas.kinds, strict=True)) if group == (dataset, kind)]
        ends_3E = np.percentile(relative_CE[rows], PERCENTILES, axis=0)
        for place, encoder in enumerate(atlas.encoders):
            low, median, high = (float(value) for value in ends_3E[:, place])
            found.append(
                Spread(dataset=dataset, kind=kind, encoder=encoder, clips=len(rows), low=low, median=median, high=high)
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Change:
    """One encoder in two checkpoints, over the same clips."""

    encoder: str
    measure: str  # "share" or "weight"
    before: float  # means
    after: float
    mean_abs: float  # mean over clips of the absolute difference
    order: Correlation  # between both over clips: whether the same clips activate it


def select(atlas: Atlas, clip_ids: Sequence[str]) -> Atlas:
    """The atlas of some of its clips, in their order."""
    places = {clip_id: place for place, clip_id in enumerate(atlas.clip_ids)}
    rows = [places[clip_id] for clip_id in clip_ids]
    return replace(
        atlas,
        clip_ids=tuple(clip_ids),
        datasets=tuple(atlas.datasets[row] for row in rows),
        kinds=tuple(atlas.kinds[row] for row in rows),
        media=tuple(atlas.media[row] for row in rows),
        weight_CE=None if atlas.weight_CE is None else atlas.weight_CE[rows],
        norm_CE=atlas.norm_CE[rows],
    )


def changes(before: Atlas, after: Atlas, *, draws: int, seed: int = 0) -> list[Change]:
    """Per encoder that both have: shares of the norm, which any width of LLM allows, and weights where both have them.

    Both are over the same clips, in the same order.
    """
    if before.clip_ids != after.clip_ids:
        raise ValueError("two atlases are compared over the same clips")
    shared = [encoder for encoder in after.encoders if encoder in before.encoders]
    if not shared:
        raise UserError(
            f"{before.run} has none of the encoders of {after.run}: {', '.join(before.encoders)} and"
            f" {', '.join(after.encoders)}; compare runs that share one"
        )
    rows = range(len(after.clip_ids))
    found = []
    for measure in ("share", "weight"):
        one_CE, other_CE = (atlas.share_CE if measure == "share" else atlas.weight_CE for atlas in (before, after))
        if one_CE is None or other_CE is None:
            continue
        for encoder in shared:
            one_C, other_C = one_CE[:, before.encoders.index(encoder)], other_CE[:, after.encoders.index(encoder)]
            blank = Correlation(
                measure=measure,
                encoder=encoder,
                other=f"the {measure} of {before.run} at step {before.step}",
                kind="",
                clips=len(rows),
                media=_num_media(after, rows),
            )
            found.append(
                Change(
                    encoder=encoder,
                    measure=measure,
                    before=float(one_C.mean()),
                    after=float(other_C.mean()),
                    mean_abs=float(np.abs(other_C - one_C).mean()),
                    order=rank_correlations([blank], [other_C], one_C, after, rows, draws, seed)[0],
                )
            )
    return found
