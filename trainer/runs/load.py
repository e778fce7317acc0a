"""Load: a run's folder -> its model, ready to use.

A folder is enough: of a run, of a chain of stages (its last one), or an export.

Rebuild: settings and record of a run -> its model as it was trained, before any weights are put in.

Exported: the folder that `trainer/runs/export.py` writes, as a model again.

Nothing in the folder is a pickle, and every weight is compared with its digest before use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from mervcache.errors import StoreDamagedError, UserError
from mervcache.files import file_sha256
from trainer.config import TrainConfig, read_config
from trainer.model.llm import LoadedLLM, holds_shape, is_adapter, load_llm, load_saved_shape
from trainer.model.video_llm import Built, build, llm_dtype, new_llm
from trainer.runs import checkpoint
from trainer.runs.checkpoint import LLM_PREFIX, put_in
from trainer.runs.run_record import LLM_FOLDER, RunRecord
from trainer.runs.stage_folders import last_stage, no_checkpoint


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A trained model with what it was trained on."""

    built: Built
    record: RunRecord
    step: int  # steps done


def rebuild(config: TrainConfig, record: RunRecord, llm: LoadedLLM) -> Built:
    """The model of a run as it was trained, before its weights are put in."""
    built = build(config, record.shapes, llm)
    if config.train_encoders:
        from trainer.end_to_end import empty_encoders  # the pipeline's encoders: only where a run has trained some

        built.model.join(empty_encoders(config, record.encoders))
    return built


def resumed_llm(config: TrainConfig, run: Path) -> LoadedLLM:
    """The LLM of a run that has begun: its shape alone where the run's checkpoints hold all of its weights."""
    if holds_shape(run / LLM_FOLDER):
        if config.llm_quant is not None:
            raise UserError(f"llm_quant is for an LLM as it is published, and {run} holds one that was trained")
        return load_saved_shape(run / LLM_FOLDER, llm_dtype(config))
    return new_llm(config, ())


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


def is_export(folder: Path) -> bool:
    """Whether the folder says that it is an export."""
    return (folder / EXPORT_FILE).is_file()


def load_export(folder: str | Path) -> LoadedRun:
    """The model in an exported folder, in evaluation mode: what `load_run` gives for the run it was made from."""
    folder = Path(folder)
    record = _checked_record(folder)
    config, run_record = read_config(folder), RunRecord.read(folder)
    # Adapters that were merged are part of a whole LLM; to build it as LoRA would put fresh ones beside them.
    built_as = replace(config, train_llm="full") if record.is_merged else config
    built = rebuild(built_as, run_record, _load_llm(folder, record, config))
    expected = {name for name in built.model.state_dict() if not name.startswith(LLM_PREFIX) or is_adapter(name)}
    put_in(built.model, _read_parts(folder, record), expected, folder)
    built.model.eval()
    return LoadedRun(built=built, record=run_record, step=record.step)


def read_weights(folder: Path) -> tuple[int, dict[str, Tensor]]:
    """Steps done, and every weight in an exported folder under its name in our model, an LLM's that lies there too."""
    record = _checked_record(folder)
    weights = _read_parts(folder, record)
    if record.llm == "whole":
        llm = _load_llm(folder, record, read_config(folder)).model
        weights |= {LLM_PREFIX + name: value for name, value in llm.state_dict().items()}
    return record.step, weights


def _read_parts(folder: Path, record: ExportRecord) -> dict[str, Tensor]:
    """What lies beside the LLM: the parts of the model, and adapters."""
    weights = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    return weights | (read_adapter(folder / ADAPTER_FOLDER) if record.llm == "adapter" else {})


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The adapters under the names that our model has for them."""
    names = {}
    for name, value in load_file(folder / ADAPTER_FILE).items():
        stem, _, kind = name.removeprefix(ADAPTER_PREFIX).rpartition(".")
        names[f"{LLM_PREFIX}{stem}.default.{kind}"] = value
    return names


def _load_llm(folder: Path, record: ExportRecord, config: TrainConfig) -> LoadedLLM:
    if record.llm != "whole":
        return new_llm(config, ())
    llm = load_llm(str(folder / LLM_FOLDER), dtype=getattr(torch, record.llm_dtype))
    return replace(llm, is_fresh=True)  # what it was before is not known here: to export it again is to copy it


def _checked_record(folder: Path) -> ExportRecord:
    """What the folder says of itself, after its weights have been compared with their digests."""
    record = _read_record(folder)
    found = weight_digests(folder)
    if odd := sorted({file for file, _ in found.items() ^ record.sha256.items()}):
        raise StoreDamagedError(f"weights in {folder} differ from their digests: {', '.join(odd)}; copy it again")
    return record


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
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in sorted(folder.rglob("*.safetensors"))}


def load_run(run: Path, *, best: bool = False) -> LoadedRun:
    """The newest checkpoint of a run, or of a chain's last stage, or an export, as a model in evaluation mode.

    `best`: instead of the newest, the one with the best validation.
    """
    run = last_stage(Path(run))
    if is_export(run):
        return load_export(run)
    folder = checkpoint.newest(run)
    if best and folder is not None:
        folder = checkpoint.best(run)
        if folder is None:
            raise UserError(f"no checkpoint of {run} was validated: train with --eval-every, or leave out --best")
    if folder is None:
        raise UserError(no_checkpoint(run))
    config = read_config(run)
    record = RunRecord.read(run)
    built = rebuild(config, record, resumed_llm(config, run))
    state = checkpoint.load_state(folder)
    checkpoint.load_model(folder, built.model, with_llm=built.saves_llm)
    built.model.eval()
    return LoadedRun(built=built, record=record, step=state.step)
