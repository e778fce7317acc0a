"""Names of the files in which a run keeps its scores. Imports no torch.

RUN/scores/SPLIT.json             the newest evaluation on all questions of a split, by likelihood
RUN/scores/SPLIT-first-N.json     that on the first N of them, which never replaces one on all
RUN/scores/SPLIT-masked.json      answers with subsets of the run's encoders, see `trainer.evaluate.evaluate_masked`
RUN/scores/SPLIT-grids.json       answers at each of the run's nested grids, see `trainer.evaluate.evaluate_grids`
RUN/scores/SPLIT-letters*.json    each of these by letters, which are other figures
RUN/scores/open-ended/SPLIT.json  open-ended answers, matched; SPLIT-JUDGE.json: those that a judge has judged
"""

from __future__ import annotations

import re
from pathlib import Path

SCORES_FOLDER, OPEN_ENDED_FOLDER = "scores", "open-ended"
MASKED, GRIDS = "-masked.json", "-grids.json"  # end the names of files of answers in several conditions
FIRST_PROTOCOL = "likelihood"  # the only one of version 0.1, whose scores name none


def scores_file(run: Path, split: str, *, protocol: str = FIRST_PROTOCOL, limit: int | None = None) -> Path:
    """Where the scores on all encoders and tokens are kept."""
    return _choices_file(run, split, protocol, limit, ".json")


def masked_scores_file(run: Path, split: str, *, protocol: str = FIRST_PROTOCOL, limit: int | None = None) -> Path:
    """Where answers with subsets of the encoders are kept."""
    return _choices_file(run, split, protocol, limit, MASKED)


def grid_scores_file(run: Path, split: str, *, protocol: str = FIRST_PROTOCOL, limit: int | None = None) -> Path:
    """Where answers at nested grids are kept."""
    return _choices_file(run, split, protocol, limit, GRIDS)


def open_scores_file(run: Path, split: str, *, judge: str = "", limit: int | None = None) -> Path:
    """Where the scores of open-ended answers are kept; `judge` tells judges apart."""
    part = f"-{_stem(judge)}" if judge else ""
    return _file(run, f"{OPEN_ENDED_FOLDER}/{_stem(split)}{part}{_first(limit)}.json")


def _choices_file(run: Path, split: str, protocol: str, limit: int | None, ending: str) -> Path:
    part = "" if protocol == FIRST_PROTOCOL else f"-{protocol}"
    return _file(run, f"{_stem(split)}{part}{_first(limit)}{ending}")


def _file(run: Path, name: str) -> Path:
    return Path(run) / SCORES_FOLDER / name


def _first(limit: int | None) -> str:
    return "" if limit is None else f"-first-{limit}"


def _stem(split: str) -> str:
    """A split's name may hold what a path is made of."""
    return re.sub(r"[^\w-]", "_", split)
