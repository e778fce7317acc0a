"""Values per question by key and seed, and which keys can be compared over which seeds.

A statistic over several keys is of the same seeds for all of them: those that have the most keys. What it leaves out is
named; nothing is averaged over what happens to be there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.ablation.document import Cell, Estimate, NotComputed, Unit
from trainer.ablation.results import RETRAINED, VISUAL_SETTING, Answers, Results, Setting, Subset
from trainer.ablation.statistics import Draws, Floats, Resampling, two_sided_p


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A value per question."""

    name: str
    level: Unit  # of a mean
    difference: Unit  # of a difference of means
    take: Callable[[Answers], Floats | None]


ACCURACY = Metric(name="accuracy", level="share", difference="points", take=lambda answers: answers.credit_Q)
MARGIN = Metric(name="log-likelihood margin", level="nats", difference="nats", take=lambda answers: answers.margin_Q)
METRICS = (ACCURACY, MARGIN)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The seeds over which keys are compared, and the keys that every one of these seeds has."""

    seeds: tuple[int, ...]
    keys: frozenset[Hashable]
    left_out: tuple[int, ...]  # seeds that have some of the keys, but not all that the chosen seeds have


@dataclass(kw_only=True)
class Panel:
    """Values per question of each key (a subset of encoders, a fusion, ...) and seed; and what is missing, why."""

    values: dict[Any, dict[int, Floats]] = field(default_factory=dict)
    missing: dict[Any, dict[int, str]] = field(default_factory=dict)

    def add(self, key: Hashable, seed: int, value_Q: Floats) -> None:
        self.values.setdefault(key, {})[seed] = value_Q

    def mark_missing(self, key: Hashable, seed: int, reason: str) -> None:
        """A planned run has no answers."""
        self.missing.setdefault(key, {})[seed] = reason

    def add_from(self, other: Panel, other_key: Hashable, key: Hashable) -> None:
        """What another panel has of a key, under a new key."""
        for seed, value_Q in other.values.get(other_key, {}).items():
            self.add(key, seed, value_Q)
        for seed, reason in other.missing.get(other_key, {}).items():
            self.mark_missing(key, seed, reason)

    @property
    def keys(self) -> list[Any]:
        """All keys, also those without answers."""
        return list(dict.fromkeys([*self.values, *self.missing]))

    def seeds_of(self, key: Hashable) -> tuple[int, ...]:
        """The seeds that have answers."""
        return tuple(sorted(self.values.get(key, {})))

    def choose(self, keys: Iterable[Hashable]) -> Choice:
        """The seeds that have the most of `keys`, and which keys these are."""
        keys = list(keys)
        seeds = sorted({seed for part in (self.values, self.missing) for by_seed in part.values() for seed in by_seed})
        scored = {seed: frozenset(key for key in keys if seed in self.values.get(key, {})) for seed in seeds}
        most = max(scored.values(), key=len, default=frozenset())
        chosen = tuple(seed for seed, found in scored.items() if most and found >= most)
        left_out = tuple(seed for seed, found in scored.items() if found and seed not in chosen)
        return Choice(seeds=chosen, keys=most, left_out=left_out)

    def stack(self, keys: Sequence[Hashable], seeds: Sequence[int]) -> Floats:
        """Values [S, K, Q]."""
        return np.array([[self.values[key][seed] for key in keys] for seed in seeds])

    def why_not(self, keys: Iterable[Hashable], choice: Choice) -> NotComputed | None:
        """The reason why a statistic of all `keys` cannot be computed over the chosen seeds, if so."""
        lacking = [key for key in keys if key not in choice.keys]
        by_reason: dict[str, list[str]] = {}
        for key in lacking:
            by_reason.setdefault(_reasons(self.missing.get(key, {})), []).append(name_of(key))
        parts = [f"no answers of {', '.join(names)} ({reason})" for reason, names in by_reason.items()]
        return NotComputed("; ".join(parts)) if lacking else None

    def left_out(self, keys: Iterable[Hashable], choice: Choice, what: str) -> list[str]:
        """Notes on the seeds that a statistic leaves out because they lack runs."""
        keys, by_lack = [key for key in keys if key in choice.keys], {}
        for seed in choice.left_out:
            lacking = ", ".join(name_of(key) for key in keys if seed not in self.values[key])
            by_lack.setdefault(lacking, []).append(seed)
        return [
            f"{what}: of seed {seeds_text(choice.seeds)} only; seed {seeds_text(seeds)} has no {lacking}."
            for lacking, seeds in by_lack.items()
        ]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A sweep's results and the resampling that all its statistics share."""

    results: Results
    resampling: Resampling

    @property
    def encoders(self) -> Subset:
        return self.results.encoders

    @property
    def subsets(self) -> list[Subset]:
        """All subsets of the encoders by bit mask, as `statistics.shapley_values` takes them."""
        n = len(self.encoders)
        return [tuple(e for i, e in enumerate(self.encoders) if mask >> i & 1) for mask in range(1 << n)]

    def panels(self, block: str, metric: Metric) -> dict[Setting, Panel]:
        """Of every setting of a block: the values of every subset.

        Retrained text-only runs have no fusion, projector or grid, so they are in every panel that agrees in the rest.
        """
        panels: dict[Setting, Panel] = {}
        baselines: dict[Setting, Panel] = {}
        for member in [*self.results.answers, *self.results.missing]:
            if member.block != block:
                continue
            is_baseline = block == RETRAINED and not member.subset
            panel = (baselines if is_baseline else panels).setdefault(member.setting, Panel())
            answers = self.results.answers.get(member)
            value_Q = None if answers is None else metric.take(answers)
            if value_Q is not None:
                panel.add(member.subset, member.seed, value_Q)
            else:
                reason = "its answers have no log-likelihoods" if answers else self.results.missing[member]
                panel.mark_missing(member.subset, member.seed, reason)
        for setting, baseline in baselines.items():
            served = [s for s in panels if s.without(*VISUAL_SETTING) == setting.without(*VISUAL_SETTING)]
            for place in served or [setting]:
                panels.setdefault(place, Panel()).add_from(baseline, (), ())
        entries = self.results.record["runs"].values()
        place = {setting: number for number, entry in enumerate(entries) for setting in Setting.all_of(entry)}
        return dict(sorted(panels.items(), key=lambda item: place[item[0]]))

    def resample(self, panel: Panel, keys: Sequence[Hashable], seeds: tuple[int, ...]) -> dict[Hashable, Cell]:
        """The mean of every key."""
        if not keys or not seeds:
            return {}
        return dict(zip(keys, estimates(self.resampling(panel.stack(keys, seeds)), seeds), strict=True))


def estimates(found: Draws, seeds: tuple[int, ...], *, tested: bool = False) -> list[Cell]:
    """Cells of the quantities; `tested`: with the p value of "it is 0"."""
    low, high = found.interval()
    p = two_sided_p(found.draws_BK).tolist() if tested else [None] * len(low)
    return [
        Estimate(value=value, low=a, high=b, p=q, seeds=seeds)
        for value, a, b, q in zip(found.estimate_K.tolist(), low.tolist(), high.tolist(), p, strict=True)
    ]


def name_of(key: Hashable) -> str:
    """A subset of encoders as `languagebind+dinov2` or `text-only`; else the key itself."""
    return ("+".join(map(str, key)) or "text-only") if isinstance(key, tuple) else str(key)


def seeds_text(seeds: Iterable[int]) -> str:
    return " ".join(map(str, seeds))


def _reasons(reasons: dict[int, str]) -> str:
    """`seed 0: it has not begun`."""
    by_reason: dict[str, list[int]] = {}
    for seed, reason in reasons.items():
        by_reason.setdefault(reason, []).append(seed)
    found = (f"seed {seeds_text(seeds)}: {reason}" for reason, seeds in by_reason.items())
    return "; ".join(found) or "no run of the sweep with these seeds"
