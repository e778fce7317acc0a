"""Effective rank of what enters and of what leaves the projectors of a run, or of the tokens of a store alone.

The effective rank (Roy and Vetterli, 2007) is the exponential of the entropy of the singular values, normalised to sum
1: between 1 and the rank. The singular values are those of the matrix of N tokens by D channels without its mean, taken
from its D x D covariance, which is summed in float64, so a store of any size fits in memory. arXiv 2606.03879 relates
the rank before the projector to scores; its formula was not available, so values are not compared with its own.

B clips, T time, H W height width, K prefix tokens, D width, P tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featurestore import FeatureStore
from mervcache.errors import MervCacheError, UserError
from trainer.ablation.document import Column, Document, Section
from trainer.ablation.visual import load_visual, open_tokens
from trainer.data.order import derive_seed
from trainer.data.tokens import ClipTokens, Part, PrefixedTokens, StoreTokens, TokenSource, grid_of
from trainer.model.projectors import Projector
from trainer.runs.run_record import RunRecord

FORMULA = (
    "exp(-sum p log p), p = singular values / their sum, of the matrix of tokens by channels without its mean"
    " (Roy and Vetterli, 2007)"
)
NUM_CLIPS = 64
CLIPS_AT_ONCE = 4  # a raw grid of 16 x 16 x 16 x 1024 is 32 MiB a clip in float64


@dataclass(frozen=True, kw_only=True)
class EffectiveRank:
    """An effective rank, and what bounds it: it is at most the smaller of `width` and `tokens` - 1."""

    rank: float
    tokens: int  # N
    width: int  # D


@dataclass(frozen=True, kw_only=True)
class EncoderRanks:
    """Of one encoder; `leaves` is None where there is no projector."""

    encoder: str
    enters: EffectiveRank
    leaves: EffectiveRank | None = None


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """Ranks of all encoders on one sample of clips."""

    rows: tuple[EncoderRanks, ...]
    store: str
    snapshot: str
    run: str  # name; "" of a store alone
    step: int | None
    clips: int  # in the sample
    stills: int  # of them
    available: int  # clips with tokens of every encoder, from which the sample is drawn
    without: int  # other clips of the store
    seed: int
    formula: str = FORMULA

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Covariance:
    """Sums over tokens for their D x D covariance, in float64.

    The mean of the first tokens is taken off all: a constant part far above what differs would take the precision.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift_D: Tensor | None = None
        self._total_D = self._products_DD = torch.zeros((), dtype=torch.float64)

    def add(self, tokens_PD: Tensor) -> None:
        """Add tokens of any floating dtype."""
        exact_PD = tokens_PD.double()
        if self._shift_D is None:
            self._shift_D = exact_PD.mean(0)
        exact_PD = exact_PD - self._shift_D
        self.count += len(exact_PD)
        self._total_D = self._total_D.to(exact_PD.device) + exact_PD.sum(0)
        self._products_DD = self._products_DD.to(exact_PD.device) + exact_PD.T @ exact_PD

    def matrix(self) -> Tensor:
        """covariance_DD, divided by N."""
        mean_D = self._total_D / self.count
        return self._products_DD / self.count - torch.outer(mean_D, mean_D)

    def rank(self) -> EffectiveRank:
        """The effective rank of the tokens; UserError for values that are not finite."""
        covariance_DD = self.matrix()
        if not torch.isfinite(covariance_DD).all():
            raise UserError("the tokens hold values that are not finite, so they have no effective rank")
        return EffectiveRank(rank=effective_rank(covariance_DD), tokens=self.count, width=len(covariance_DD))


def effective_rank(covariance_DD: Tensor) -> float:
    """Effective rank of the centred tokens that have this covariance; 0 where all of them are equal.

    A covariance's eigenvalues are the squares of the singular values. Those below D x epsilon of the largest are
    rounding errors, and left out, as numpy's `matrix_rank` does.
    """
    eigenvalues_D = torch.linalg.eigvalsh(covariance_DD)
    least = len(eigenvalues_D) * torch.finfo(eigenvalues_D.dtype).eps * eigenvalues_D.max()
    singular = eigenvalues_D[eigenvalues_D > least.clamp_min(0)].sqrt()
    if not len(singular):
        return 0.0
    share = singular / singular.sum()
    return float((-(share * share.log()).sum()).exp())


def ranks_of_run(
    run: Path, store: str | None = None, *, clips: int = NUM_CLIPS, seed: int = 0, best: bool = False
) -> RankReport:
    """Ranks before and behind every projector of a run, on clips of its store or of another with the same encoders."""
    part = load_visual(run, best=best)
    path, _, source = open_tokens(part, store)
    drawn = draw_clips(path, source, clips, seed)
    rows = tuple(_measured(source, drawn.clip_ids, part.projectors))
    return drawn.report(rows, run=Path(run).resolve().name, step=part.step)


def ranks_of_store(path: str, encoders: Sequence[str] = (), *, clips: int = NUM_CLIPS, seed: int = 0) -> RankReport:
    """Ranks of a store's tokens: what would enter the projectors of a run with these encoders, or with all of them."""
    opened = FeatureStore.open(path)
    source = StoreTokens(opened, list(encoders) or list(opened.encoders))
    drawn = draw_clips(path, source, clips, seed)
    return drawn.report(tuple(_measured(source, drawn.clip_ids, {})))


@dataclass(frozen=True, kw_only=True)
class SweepRanks:
    """Ranks of several runs, all on one sample of clips."""

    by_run: Mapping[str, tuple[EncoderRanks, ...]]
    missing: Mapping[str, str]  # run -> why it was not measured
    notes: tuple[str, ...]


def ranks_of_runs(
    runs: Mapping[str, Path], store: str | None = None, *, clips: int = NUM_CLIPS, seed: int = 0
) -> SweepRanks:
    """Ranks of runs of one store by name; what several of them read is measured once.

    The clips are drawn from those that have tokens of every encoder of the run that has most.
    """
    by_run: dict[str, tuple[EncoderRanks, ...]] = {}
    missing: dict[str, str] = {}
    entering: dict[tuple[str, tuple[Part, ...]], EffectiveRank] = {}
    drawn: DrawnClips | None = None
    for name in sorted(runs, key=lambda name: -len(RunRecord.read(runs[name]).shapes)):
        try:
            part = load_visual(runs[name])
            path, _, source = open_tokens(part, store)
            drawn = drawn or draw_clips(path, source, clips, seed)
            by_run[name] = tuple(_measured(source, drawn.clip_ids, part.projectors, entering))
        except MervCacheError as error:
            missing[name] = str(error)
    notes = rank_notes(drawn.report(())) if drawn else ()
    return SweepRanks(by_run=by_run, missing=missing, notes=notes)


@dataclass(frozen=True, kw_only=True)
class DrawnClips:
    """A sample of the clips that have tokens of every encoder."""

    clip_ids: list[str]
    facts: Mapping[str, Any]

    def report(self, rows: tuple[EncoderRanks, ...], run: str = "", step: int | None = None) -> RankReport:
        return RankReport(rows=rows, run=run, step=step, clips=len(self.clip_ids), **self.facts)


def draw_clips(path: str, source: StoreTokens, clips: int | None, seed: int) -> DrawnClips:
    """Clips with tokens of every encoder, in an order that follows from seed and ids alone."""
    listed = FeatureStore.open(path, snapshot=source.snapshot).clips["clip_id"].to_pylist()
    available = source.available(listed)
    if not available:
        raise UserError(f"no clip of {path} has tokens of every encoder ({', '.join(source.shapes)}); name fewer")
    drawn = sorted(available, key=lambda clip_id: (derive_seed("rank", seed, clip_id), clip_id))[:clips]
    facts = {
        "store": path,
        "snapshot": source.snapshot,
        "stills": len(source.stills(drawn)),
        "available": len(available),
        "without": len(listed) - len(available),
        "seed": seed,
    }
    return DrawnClips(clip_ids=drawn, facts=facts)


@torch.no_grad()
def _measured(
    source: TokenSource,
    clip_ids: Sequence[str],
    projectors: Mapping[str, Projector],
    entering: dict[tuple[str, tuple[Part, ...]], EffectiveRank] | None = None,
) -> Iterator[EncoderRanks]:
    """Projectors run in float32 whatever the run's precision: rounding to 16 bits is noise of full rank.

    `entering` holds what earlier runs have measured of the same tokens, and gets what is measured here.
    """
    known = {} if entering is None else entering
    reads = {encoder: projector.resampler.reads for encoder, projector in projectors.items()}
    keys = {e: (source.shapes[e].identity, reads.get(e, ())) for e in projectors or source.shapes}
    enters = {encoder: Covariance() for encoder, key in keys.items() if key not in known}
    leaves = {encoder: Covariance() for encoder in projectors}
    for start in range(0, len(clip_ids), CLIPS_AT_ONCE):
        fetched = source.fetch(clip_ids[start : start + CLIPS_AT_ONCE])
        for encoder in keys:
            tokens = fetched[encoder]
            if encoder in projectors:
                device = next(projectors[encoder].parameters()).device
                tokens = tokens.to(device)
                leaves[encoder].add(projectors[encoder](tokens).flatten(0, 1))
            for tokens_PD in _entering(tokens) if encoder in enters else ():
                enters[encoder].add(tokens_PD)
    for encoder, key in keys.items():
        try:
            behind = leaves[encoder].rank() if encoder in leaves else None
            if encoder in enters:
                known[key] = enters[encoder].rank()
            yield EncoderRanks(encoder=encoder, enters=known[key], leaves=behind)
        except UserError as error:
            raise UserError(f"{encoder}: {error}") from error


def _entering(tokens: ClipTokens) -> Iterable[Tensor]:
    """tokens_PD as a source gives them: the grid, the class tokens, or both; no projector reads registers."""
    if isinstance(tokens, PrefixedTokens):
        yield tokens.prefix_BTKD[:, :, 0].flatten(0, 1)
    if (grid_BTHWD := grid_of(tokens)) is not None:
        yield grid_BTHWD.flatten(0, 3)


def rank_document(report: RankReport) -> Document:
    """The report as a table."""
    columns, rows = [Column(name="encoder")], [[row.encoder] for row in report.rows]
    sides = {"enters": "entering", "leaves": "leaving"} if report.run else {"enters": "entering"}
    for side, name in sides.items():
        columns += [
            Column(name=f"effective rank {name}", unit="decimal"),
            Column(name=f"channels {name}", unit="count"),
            Column(name=f"tokens {name}", unit="count"),
        ]
        for cells, row in zip(rows, report.rows, strict=True):
            found = getattr(row, side)
            cells += [None] * 3 if found is None else [found.rank, found.width, found.tokens]
    subject = f"run {report.run} at step {report.step}" if report.run else "the encoders"
    title = f"Effective rank: {subject}"
    section = Section(title=title, columns=tuple(columns), rows=tuple(map(tuple, rows)), notes=rank_notes(report))
    return Document(title=title, sections=(section,))


def rank_notes(report: RankReport) -> tuple[str, ...]:
    """The formula, and the sample that the ranks are of."""
    notes = [
        f"{report.formula}.",
        f"N = {report.clips} clips ({report.stills} of them stills) drawn with seed {report.seed} from"
        f" {report.available} that have tokens of every encoder, of {report.store} at {report.snapshot}; a still's time"
        " steps repeat, as a projector reads them.",
    ]
    if report.without:
        notes.append(f"{report.without} other clips of the store lack tokens of an encoder and were not drawn from.")
    return tuple(notes)
