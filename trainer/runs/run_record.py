"""What a run's folder says about the run: its record, the metrics of every step, and its scores.

RUN/config.yaml                   the settings
RUN/run.json                      the record: data, model and software
RUN/llm/                          tokenizer, and the sizes of a fresh LLM
RUN/metrics.jsonl                 a line per step; validation metrics begin with `val_`
RUN/scores/SPLIT.json             the newest evaluation on all questions of a split
RUN/scores/SPLIT-first-N.json     that on the first N of them, which never replaces one on all
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

LLM_FOLDER, SCORES_FOLDER = "llm", "scores"
METRICS_FILE = "metrics.jsonl"
IMPORT_FILE = "imported.json"  # of a run made of a foreign checkpoint: where its weights come from
PACKAGES = ("merv-pipeline", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "peft")
UNBOUND = "unbound:"  # begins the identity in an imported run, whose weights do not say what made their tokens


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run's data, sizes and software."""

    store: str  # where the tokens were read from
    data_digest: str
    num_samples: int
    dropped: Mapping[str, int]
    shapes: Mapping[str, TokenShape]  # of the encoders used
    parameters: Mapping[str, Mapping[str, int]]  # part -> total, trained
    num_visual_tokens: int
    num_steps: int
    snapshot: str = ""  # of that store: a resumed run reads the same one, whatever was added since
    started_from: str = ""  # with `init`: what was loaded from which run, and what was not
    encoders: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # identity fields and weights label
    software: Mapping[str, str] = field(default_factory=dict)  # package -> version the run was started with
    tokens: str = "from cache"  # or "end to end"
    live: Mapping[str, Any] | None = None  # of an end-to-end run: the extraction's settings, a resumed run reads them

    def write(self, run: Path) -> None:
        (run / RECORD_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, run: Path) -> RunRecord:
        record = json.loads((run / RECORD_FILE).read_text())
        shapes = {encoder: TokenShape.from_dict(shape) for encoder, shape in record["shapes"].items()}
        return cls(**{**record, "shapes": shapes})


def software_versions() -> dict[str, str]:
    """Package -> installed version, of the packages that compute, and of Python."""
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {"python": platform.python_version(), **{name: installed[name] for name in PACKAGES if name in installed}}


def open_metrics(path: Path, start: int) -> TextIO:
    """The metrics file open for appending, without the lines of steps that will be done again."""

    def is_kept(line: str) -> bool:
        try:
            return json.loads(line)["step"] < start
        except ValueError:
            return False  # cut short by a kill

    if path.exists():
        kept = [line for line in path.read_text().splitlines() if is_kept(line)]
        replace_text(path, "".join(line + "\n" for line in kept))
    return path.open("a")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of all steps of a run."""
    return [json.loads(line) for line in (Path(run) / METRICS_FILE).read_text().splitlines()]


@dataclass(frozen=True, kw_only=True)
class ScoreSource:
    """The questions of an evaluation, and the state of the store they are about."""

    split: str
    limit: int | None  # at most so many questions; None: all
    store: str  # path
    snapshot: str  # id of the store's snapshot


def write_scores(run: Path, result: Mapping[str, Any], source: ScoreSource) -> Path:
    """Write `result` with what it was measured on to the run's folder; an interrupted write leaves the old file."""
    folder = Path(run) / SCORES_FOLDER
    folder.mkdir(exist_ok=True)
    record = {
        "split": source.split,
        "limit": source.limit,
        "store": Path(source.store).name,  # a path says more about a machine than about a score
        "snapshot": source.snapshot,
        **result,
    }
    part = "" if source.limit is None else f"-first-{source.limit}"
    name = re.sub(r"[^\w-]", "_", source.split)  # a split's name may hold what a path is made of
    return replace_text(folder / f"{name}{part}.json", json.dumps(record, indent=1) + "\n")


def read_scores(run: Path) -> list[dict[str, Any]]:
    """Every record of a run's scores, by file name; UserError for a file that is none."""
    records = []
    for path in sorted((Path(run) / SCORES_FOLDER).glob("*.json")):
        try:
            record = json.loads(path.read_text())
            if not {"split", "snapshot", "scores", "beside", "step"} <= record.keys():
                raise ValueError("entries are missing")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} holds no scores of this version ({error}); remove it, or evaluate again"
            ) from error
        records.append(record)
    return records
