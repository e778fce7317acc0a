"""Record: what a run says about its data, its model and its software, beside its settings.

RUN/config.yaml   settings          RUN/run.json   this record
RUN/llm/          tokenizer, and sizes or all of an LLM that is nowhere else

Metrics: metrics.jsonl in a run's folder, a line per step, and all lines are one curve.

A line has loss, gradient norm, learning rates, tokens and speed; that of a step behind which was a validation has its
metrics too, as `val_...`. A resumed run drops the lines behind its checkpoint, since it takes these steps again.

Scores: what a run was measured at, kept in the run's own folder, so that its card can say it.

    RUN/scores/SPLIT.json             all questions of a split
    RUN/scores/SPLIT-first-N.json     those of an evaluation with a limit: it never takes the place of a whole one

Comes in: the JSON of an evaluation and where it was made. Goes out: one file per split, replaced by the newest
evaluation; read back, one record per file. A run's folder may be read-only (somebody else's): then nothing is kept and
the caller is told, since the evaluation itself has succeeded.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from mervcache.errors import UserError
from mervcache.files import replace_text
from trainer.config import RECORD_FILE
from trainer.data.tokens import TokenShape

LLM_FOLDER = "llm"
IMPORT_FILE = "imported.json"  # of a run made of a foreign checkpoint: where its weights come from
PACKAGES = ("merv-pipeline", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "peft")
UNBOUND = "unbound:"  # begins the identity in an imported run, whose weights do not say what made their tokens


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run says about its data and its size, beside its settings."""

    store: str  # where the tokens were read from
    data_digest: str
    num_samples: int
    dropped: Mapping[str, int]
    shapes: Mapping[str, TokenShape]  # of the encoders used
    parameters: Mapping[str, Mapping[str, int]]  # part -> total, trained
    num_visual_tokens: int
    num_steps: int
    snapshot: str = ""  # of that store: a resumed run reads the same one, whatever was added since
    started_from: str = ""  # with `init`: what was loaded of which run, and what was not
    encoders: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # identity fields and weights label
    software: Mapping[str, str] = field(default_factory=dict)  # package -> version the run was started with
    tokens: str = "from cache"  # or "end to end"
    live: Mapping[str, Any] | None = None  # of an end-to-end run: the extraction's settings, a resumed run reads them

    def write(self, run: Path) -> None:
        (run / RECORD_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, run: Path) -> RunRecord:
        record = json.loads((run / RECORD_FILE).read_text())
        shapes = {
            encoder: TokenShape(**{**shape, "grid": tuple(shape["grid"])})
            for encoder, shape in record["shapes"].items()
        }
        return cls(**{**record, "shapes": shapes})


def software_versions() -> dict[str, str]:
    """Installed versions of what computes, and of Python."""
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {"python": platform.python_version(), **{name: installed[name] for name in PACKAGES if name in installed}}


METRICS_FILE = "metrics.jsonl"


def open_metrics(path: Path, start: int) -> TextIO:
    """The metrics file open for appending, without lines of steps that will be done again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) < start]
        replace_text(path, "".join(line + "\n" for line in kept))  # the curve so far is nowhere else
    return path.open("a")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All steps' metrics of a run."""
    return [json.loads(line) for line in (Path(run) / METRICS_FILE).read_text().splitlines()]


def _step_of(line: str) -> float:
    """The step of a line; a line that a kill cut short belongs to no step that is kept."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


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
