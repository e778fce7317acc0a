"""Scores: what a run was measured at, kept in the run's own folder, so that its card can say it.

    RUN/scores/SPLIT.json             all questions of a split
    RUN/scores/SPLIT-first-N.json     those of an evaluation with a limit: it never takes the place of a whole one

Comes in: the JSON of an evaluation and where it was made. Goes out: one file per split, replaced by the newest
evaluation; read back, one record per file. A run's folder may be read-only (somebody else's): then nothing is kept and
the caller is told, since the evaluation itself has succeeded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mervcache.errors import UserError
from trainer.runs.files import replace_text

SCORES_FOLDER = "scores"


@dataclass(frozen=True, kw_only=True)
class ScoreSource:
    """Which questions were asked, of which state of which store."""

    split: str
    limit: int | None  # at most so many questions; None: all
    store: str  # path
    snapshot: str  # id of the store's snapshot

    @property
    def file_name(self) -> str:
        """The split's name with nothing in it that a path could be made of."""
        safe = re.sub(r"[^\w-]", "_", self.split)
        return f"{safe}.json" if self.limit is None else f"{safe}-first-{self.limit}.json"


def write_scores(run: Path, result: Mapping[str, Any], source: ScoreSource) -> Path:
    """Keep `result` with what it was measured on; an interrupted write leaves the old file."""
    folder = Path(run) / SCORES_FOLDER
    folder.mkdir(exist_ok=True)
    record = {
        "split": source.split,
        "limit": source.limit,
        "store": Path(source.store).name,  # a path says more about a machine than about a score
        "snapshot": source.snapshot,
        **result,
    }
    return replace_text(folder / source.file_name, json.dumps(record, indent=1) + "\n")


def read_scores(run: Path) -> list[dict[str, Any]]:
    """Every record of a run, by file name."""
    return [_read(path) for path in sorted((Path(run) / SCORES_FOLDER).glob("*.json"))]


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        if not {"split", "snapshot", "scores", "beside", "step"} <= record.keys():
            raise ValueError("entries are missing")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} holds no scores of this version ({error}); remove it, or evaluate again") from error
    return record
