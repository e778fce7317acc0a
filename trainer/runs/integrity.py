"""Digests of what a run reads besides its weights: its record, its LLM's files and its settings.

They are kept in every checkpoint's state.json, which holds a digest of itself. A file that was edited, lost or added
since the run began is an error, because a resumed run or an evaluation would give other numbers without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from mervcache.config import load_yaml, overlay
from mervcache.errors import StoreDamagedError, UserError
from mervcache.files import file_sha256, record_digest
from mervcache.reprs import was_and_is
from trainer.config import CONFIG_FILE, RECORD_FILE, TrainConfig
from trainer.paths import found_path
from trainer.runs.run_record import IMPORT_FILE
from trainer.runs.stage_folders import LLM_FOLDER

DIGEST = "digest"  # key of a sealed record: the digest of its other entries
WEIGHTS = (".safetensors",)
# Settings that change neither weights nor losses beyond the rounding of sums, so they may differ in a resumed run.
FREE_ON_RESUME = {
    "activation_checkpointing",
    "allow_fresh_frozen",
    "attn_implementation",
    "checkpoint_every",
    "checkpoint_minutes",
    "deterministic",
    "device_memory",
    "eval_every",
    "eval_limit",
    "eval_split",
    "fused_loss",
    "init_partial",
    "keep_checkpoints",
    "letters_template",
    "log_every",
    "max_skipped_in_row",
    "prefetch_batches",
    "protocol",
    "trackers",
}


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run read when it began."""

    settings: Mapping[str, Any] = field(default_factory=dict)  # of config.yaml, those that may not change
    sha256: Mapping[str, str] = field(default_factory=dict)  # path in the run's folder -> digest
    llm_sha256: Mapping[str, str] = field(default_factory=dict)  # file of the LLM's own folder -> digest

    @classmethod
    def of(cls, run: Path, llm: str | None = None, *, with_weights: bool = False) -> RunFiles:
        """Of a run's folder, and of `llm` where that is a local folder; `with_weights`: its weights too."""
        digests = {name: file_sha256(run / name) for name in run_file_names(run)}
        settings = fixed_settings(run) if (run / CONFIG_FILE).is_file() else {}
        folder = Path(llm) if llm is not None else None
        return cls(settings=settings, sha256=digests, llm_sha256=llm_digests(folder, with_weights=with_weights))

    def check(self, run: Path) -> None:
        """Raise StoreDamagedError unless the run's folder, and its LLM's, still hold what was read."""
        if not self.sha256:
            return  # written before digests were kept
        check_digests(run, self.sha256, run_file_names(run), "the run")
        found = fixed_settings(run)
        if changed := [name for name in self.settings if not _is_same(name, self.settings, found)]:
            values = "; ".join(was_and_is(name, self.settings[name], found.get(name)) for name in changed)
            raise StoreDamagedError(
                f"{run / CONFIG_FILE} was changed after the run began ({values}); put the values back, or start a new"
                " run with another --out"
            )
        self.check_llm(Path(found_path(str(self.settings.get("llm")), run)), run)

    def check_llm(self, folder: Path, run: Path) -> None:
        """Raise StoreDamagedError for a `folder` with another LLM than the one that `run` was trained with."""
        if self.llm_sha256 and folder.is_dir():
            has_weights = any(name.endswith(WEIGHTS) for name in self.llm_sha256)
            names = llm_file_names(folder, with_weights=has_weights)
            check_digests(folder, self.llm_sha256, names, f"the run {run}")


def _is_same(name: str, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether a setting is as recorded. One of several parts may have got a new part since: its default is the same."""
    if name not in found:
        return False
    default = getattr(TrainConfig(), name, None)
    if not is_dataclass(default):
        return found[name] == recorded[name]
    try:
        return overlay(default, found[name]) == overlay(default, recorded[name])
    except (UserError, TypeError):  # a value that no version takes
        return False


def fixed_settings(run: Path) -> dict[str, Any]:
    """The settings in a run's config.yaml that a resumed run may not change."""
    settings = load_yaml(run / CONFIG_FILE)
    free = free_settings(settings.get("loss"))
    return {name: value for name, value in settings.items() if name not in free}


def free_settings(loss: str | None) -> set[str]:
    """Names of the settings that may change. A loss per token is one sum, however it is cut into micro-batches."""
    return FREE_ON_RESUME | ({"micro_batch_size", "token_budget"} if loss == "per_token" else set())


def run_file_names(run: Path) -> list[str]:
    """Files of a run's folder that a resumed run or an evaluation reads, besides settings and checkpoints."""
    single = [name for name in (RECORD_FILE, IMPORT_FILE) if (run / name).is_file()]
    llm = [f"{LLM_FOLDER}/{name}" for name in llm_file_names(run / LLM_FOLDER, with_weights=True)]
    return single + llm


def llm_file_names(folder: Path, *, with_weights: bool) -> list[str]:
    """Files of an LLM's folder: sizes, tokenizer, templates, and its weights on request."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    suffixes = (".json", ".jinja", ".model", ".txt", *(WEIGHTS if with_weights else ()))
    return [name for name in names if name.endswith(suffixes) and not any(p[0] == "." for p in Path(name).parts)]


def llm_digests(folder: Path | None, *, with_weights: bool) -> dict[str, str]:
    """File -> digest of an LLM's folder; {} for a Hub id, whose cached files are named by their digests."""
    if folder is None or not folder.is_dir():
        return {}
    return {name: file_sha256(folder / name) for name in llm_file_names(folder, with_weights=with_weights)}


def check_digests(folder: Path, recorded: Mapping[str, str], names: Sequence[str], user: str) -> None:
    """Raise StoreDamagedError unless `folder` holds exactly the files `recorded`, whose bytes have these digests."""
    missing = sorted(name for name in recorded if not (folder / name).is_file())
    added = sorted(set(names) - set(recorded))
    changed = sorted(
        name for name, digest in recorded.items() if name not in missing and file_sha256(folder / name) != digest
    )
    found = [
        (name, kind) for kind, names in (("missing", missing), ("changed", changed), ("added", added)) for name in names
    ]
    if found:
        listed = ", ".join(f"{name} ({kind})" for name, kind in sorted(found))
        raise StoreDamagedError(
            f"files that {user} reads in {folder} differ from their digests: {listed}; put them back from a copy"
        )


def seal(record: Mapping[str, Any]) -> str:
    """The JSON text of a record with a digest of itself."""
    record = json.loads(json.dumps(record, allow_nan=False))
    return json.dumps({**record, DIGEST: record_digest(record)}, indent=1, sort_keys=True) + "\n"


def unseal(path: Path) -> dict[str, Any]:
    """The record in a file, after it was compared with its digest, if it has one.

    Raises OSError or ValueError for a file that cannot be read, StoreDamagedError for one that was changed.
    """
    record = json.loads(path.read_text())
    if not isinstance(record, dict):
        raise ValueError(f"a mapping was expected, got {type(record).__name__}")
    digest = record.pop(DIGEST, None)
    if digest is not None and digest != record_digest(record):
        raise StoreDamagedError(f"{path} differs from its digest; put it back from a copy")
    return record
