"""What a run's folder says about the run: its record, the metrics of every step, and its scores.

RUN/config.yaml                   the settings
RUN/run.json                      the record: data, model and software
RUN/llm/                          tokenizer, and the sizes of an LLM whose weights the checkpoints hold
RUN/metrics.jsonl                 a line per step; validation metrics begin with `val_`; `skipped` is 1 where the step
                                  changed nothing, and null is a number that was not finite
RUN/micro_batch.json              what a micro-batch may hold since memory ran out, see `trainer.loop.accumulate`
RUN/scores/                       see `score_files.py`
RUN/predictions/                  every prediction as a line, see `predictions.py`
RUN/atlas/NAME.parquet            what each encoder contributes to every clip, see `trainer.ablation.atlas`
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from mervcache.errors import StoreDamagedError, UserError
from mervcache.files import record_digest, replace_text
from mervcache.reprs import brief
from mervcache.text import redact, redact_all
from trainer.config import RECORD_FILE
from trainer.data.tokens import TokenShape
from trainer.paths import recorded_path
from trainer.runs.score_files import (
    FIRST_PROTOCOL,
    GRIDS,
    MASKED,
    OPEN_ENDED_FOLDER,
    SCORES_FOLDER,
    open_scores_file,
    scores_file,
)
from trainer.runs.stage_folders import METRICS_FILE, no_record, read_record_file

IMPORT_FILE = "imported.json"  # of a run made of a foreign checkpoint: where its weights come from
PACKAGES = ("merv-pipeline", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "peft")
_SCORED = frozenset(("split", "snapshot", "scores", "beside", "step"))  # entries of every record of scores
UNBOUND = "unbound:"  # begins the identity in an imported run, whose weights do not say what made their tokens


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run's data, sizes and software."""

    store: str  # where the tokens were read from: a URL, or a path that is relative to the folder in its run.json
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
    encoder_order: tuple[str, ...] = ()  # of `shapes`, which the fusion reads in this order
    padding: Mapping[str, Any] = field(default_factory=dict)  # whether batches have an attention mask and why, and the
    # length by which rescaled rotary positions are computed; empty: written before masks were left out
    num_questions: int = 0  # of the store that `merv-eval run` asks by default
    wanted: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # encoder -> what an unbound import wants

    def __repr__(self) -> str:
        what = f"{self.num_steps} steps on {self.num_samples} samples of {self.store or 'no store'}"
        encoders = ", ".join(self.encoder_order or self.shapes) or "text only"
        return brief(self, f"{what}: {encoders}; {self.num_visual_tokens} visual tokens, {self.tokens}")

    def write(self, run: Path) -> None:
        (run / RECORD_FILE).write_text(json.dumps(redact_all(asdict(self)), indent=1) + "\n")

    def located(self, run: Path) -> RunRecord:
        """The record as the folder `run` holds it: local paths relative to the folder, so that both can move."""
        live = self.live
        if live and isinstance(root := live.get("root"), str):
            live = {**live, "root": recorded_path(root, run)}
        return replace(self, store=recorded_path(self.store, run) if self.store else "", live=live)

    @classmethod
    def read(cls, run: Path) -> RunRecord:
        """The record in a run's folder; StoreDamagedError where it is missing or holds something else."""
        record = read_record_file(run)
        try:
            shapes = {encoder: TokenShape.from_dict(shape) for encoder, shape in record["shapes"].items()}
            # Before `encoder_order` was recorded it was that of `shapes`.
            order = tuple(record.get("encoder_order") or shapes)
            return cls(**{**record, "shapes": {name: shapes[name] for name in order}, "encoder_order": order})
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreDamagedError(no_record(run, f"it is not a record of this version ({error})")) from error


def software_versions() -> dict[str, str]:
    """Package -> installed version, of the packages that compute, and of Python."""
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {"python": platform.python_version(), **{name: installed[name] for name in PACKAGES if name in installed}}


def open_metrics(path: Path, start: int) -> TextIO:
    """The metrics file open for appending, without the lines of steps that will be done again."""
    if path.exists():
        kept = [line for line in _lines(path) if (row := _parse_row(line)) is not None and row["step"] < start]
        replace_text(path, "".join(line + "\n" for line in kept))
    return path.open("a")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of all steps of a run; [] if there are none.

    A kill or a power cut may have cut the last line short: it is left out. StoreDamagedError for any other odd line.
    """
    path = Path(run) / METRICS_FILE
    lines = _lines(path) if path.is_file() else []
    rows = [_parse_row(line) for line in lines]
    if rows and rows[-1] is None:
        rows.pop()
    whole = [row for row in rows if row is not None]
    if len(whole) < len(rows):
        raise StoreDamagedError(f"line {rows.index(None) + 1} of {path} is not a row of metrics; remove that line")
    return whole


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()


def _parse_row(line: str) -> dict[str, Any] | None:
    """A row of metrics; None for a line that is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


@dataclass(frozen=True, kw_only=True)
class ScoreSource:
    """The questions of an evaluation, and the state of the store they are about."""

    split: str
    limit: int | None  # at most so many questions; None: all
    store: str  # path
    snapshot: str  # id of the store's snapshot


def write_answers(path: Path, result: Mapping[str, Any]) -> Path:
    """Write the answers of a run in several conditions."""
    path.parent.mkdir(exist_ok=True)
    return replace_text(path, json.dumps(result, indent=1) + "\n")


def write_scores(run: Path, result: Mapping[str, Any], source: ScoreSource) -> Path:
    """Write `result` with what it was measured on to the run's folder; an interrupted write leaves the old file."""
    folder = Path(run) / SCORES_FOLDER
    folder.mkdir(exist_ok=True)
    path = scores_file(run, source.split, protocol=result.get("protocol", FIRST_PROTOCOL), limit=source.limit)
    return replace_text(path, json.dumps({**_origin(source), **result}, indent=1) + "\n")


def write_open_scores(run: Path, result: Mapping[str, Any], source: ScoreSource) -> Path:
    """Write scores of open-ended answers to the run's folder; those of different judges are different files."""
    judge = result["judge"]
    name = "" if judge is None else f"{judge['version']}-{record_digest(judge)[:8]}"
    path = open_scores_file(run, source.split, judge=name, limit=source.limit)
    path.parent.mkdir(parents=True, exist_ok=True)
    return replace_text(path, json.dumps({**_origin(source), **result}, indent=1) + "\n")


def _origin(source: ScoreSource) -> dict[str, Any]:
    """What scores are of; a path says more about a machine than about a score."""
    store = Path(redact(source.store)).name
    return {"split": source.split, "limit": source.limit, "store": store, "snapshot": source.snapshot}


def read_open_scores(run: Path) -> list[dict[str, Any]]:
    """Every record of open-ended answers of a run, by file name; UserError for a file that is none."""
    folder = Path(run) / SCORES_FOLDER / OPEN_ENDED_FOLDER
    return [_read_scores(path, {*_SCORED, "judge", "max_new_tokens"}) for path in sorted(folder.glob("*.json"))]


def read_scores(run: Path) -> list[dict[str, Any]]:
    """Every record of scores on all encoders and tokens of a run, by file name; UserError for a file that is none."""
    paths = sorted((Path(run) / SCORES_FOLDER).glob("*.json"))
    whole = [path for path in paths if not path.name.endswith((MASKED, GRIDS))]
    return [{"protocol": FIRST_PROTOCOL, **_read_scores(path, _SCORED)} for path in whole]


def _read_scores(path: Path, entries: Set[str]) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        if not entries <= record.keys():
            raise ValueError("entries are missing")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no scores of this version ({error}); remove it, or evaluate again") from error
    return record
