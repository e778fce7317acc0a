"""Exported: the folder that `trainer/give/export.py` writes, as a model again.

Nothing in the folder is a pickle, and every weight is compared with its digest before use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from featurestore.errors import StoreDamagedError, UserError
from trainer.config import TrainConfig, read_config
from trainer.model.adapt import is_adapter
from trainer.model.build import LoadedRun, new_llm, rebuild
from trainer.model.llm import LoadedLLM, load_llm
from trainer.runs.record import LLM_FOLDER, RunRecord

FORMAT = 1
EXPORT_FILE, ADAPTER_FOLDER = "export.json", "adapter"
ADAPTER_FILE, ADAPTER_PREFIX = "adapter_model.safetensors", "base_model.model."  # peft's names
LLMWeights = Literal["named", "whole", "adapter"]
WORDS: dict[LLMWeights, str] = {
    "named": "The LLM was frozen; its weights are not in this folder and are loaded from where they are published.",
    "whole": "The LLM's weights are in `llm/`.",
    "adapter": "The LLM's LoRA adapters are in `adapter/`; the weights they change are loaded from where they are"
    " published.",
}


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """What an exported folder says about itself."""

    format: int
    step: int
    data_digest: str
    llm: LLMWeights
    llm_dtype: str
    is_merged: bool  # LoRA adapters were added to the weights
    llm_revision: str | None  # commit of the Hub's LLM
    sha256: Mapping[str, str]  # file of weights -> digest


def load_export(folder: str | Path) -> LoadedRun:
    """The model in an exported folder, in evaluation mode: what `load_run` gives for the run it was made from."""
    folder = Path(folder)
    record = _read_record(folder)
    if weight_digests(folder) != dict(record.sha256):
        odd = {file for file, _ in weight_digests(folder).items() ^ record.sha256.items()}
        raise StoreDamagedError(
            f"weights in {folder} differ from their digests: {', '.join(sorted(odd))}; copy it again"
        )
    config, run_record = read_config(folder), RunRecord.read(folder)
    # Adapters that were merged are part of a whole LLM; to build it as LoRA would put fresh ones beside them.
    built_as = replace(config, train_llm="full") if record.is_merged else config
    built = rebuild(built_as, run_record, _load_llm(folder, record, config))
    files = sorted(folder.glob("*.safetensors"))
    weights = {name: tensor for path in files for name, tensor in load_file(path).items()}
    if record.llm == "adapter":
        weights |= read_adapter(folder / ADAPTER_FOLDER)
    expected = {name for name in built.model.state_dict() if not name.startswith("llm.") or is_adapter(name)}
    if set(weights) != expected:
        odd = sorted(set(weights) ^ expected)
        raise UserError(f"{folder} holds another model than its config builds; differing tensors: {', '.join(odd[:5])}")
    built.model.load_state_dict(weights, strict=False)
    built.model.eval()
    return LoadedRun(built=built, record=run_record, step=record.step)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The adapters under the names that our model has for them."""
    names = {}
    for name, value in load_file(folder / ADAPTER_FILE).items():
        stem, _, kind = name.removeprefix(ADAPTER_PREFIX).rpartition(".")
        names[f"llm.{stem}.default.{kind}"] = value
    return names


def _load_llm(folder: Path, record: ExportRecord, config: TrainConfig) -> LoadedLLM:
    if record.llm != "whole":
        return new_llm(config, ())
    llm = load_llm(str(folder / LLM_FOLDER), dtype=getattr(torch, record.llm_dtype))
    return replace(llm, is_fresh=True)  # what it was before is not known here: to export it again is to copy it


def _read_record(folder: Path) -> ExportRecord:
    try:
        record = ExportRecord(**json.loads((folder / EXPORT_FILE).read_text()))
        if (
            record.format != FORMAT
            or record.llm not in WORDS
            or record.llm_dtype not in ("float32", "bfloat16", "float16")
        ):
            raise ValueError(f"format {record.format}, llm {record.llm!r} of {record.llm_dtype!r}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is no export of this version: {error}; export the run again") from error
    return record


def weight_digests(folder: Path) -> dict[str, str]:
    """Every file of weights in the folder, by its path in it."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
