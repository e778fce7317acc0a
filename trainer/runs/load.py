"""Loads a trained model from a folder alone: a run, a chain of stages (its last one), or an export.

Nothing in the folder is a pickle, and every file is compared with its digest before use.
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
from mervcache.files import record_digest
from mervcache.reprs import brief
from trainer.config import CONFIG_FILE, RECORD_FILE, TrainConfig, read_config
from trainer.model.llm import FRESH_PREFIX, LoadedLLM, holds_shape, is_adapter, load_llm, load_saved_shape
from trainer.model.video_llm import Built, build, llm_dtype, new_llm
from trainer.runs import checkpoint
from trainer.runs.checkpoint import LLM_PREFIX, load_exactly
from trainer.runs.integrity import check_digests, llm_file_names, unseal
from trainer.runs.run_record import RunRecord
from trainer.runs.stage_folders import EXPORT_FILE, LLM_FOLDER, check_llm_is_there, last_stage, no_checkpoint
from trainer.runs.weight_names import check_order, to_model_names

FORMAT = 1
ADAPTER_FOLDER = "adapter"
ADAPTER_FILE, ADAPTER_PREFIX = "adapter_model.safetensors", "base_model.model."  # peft's names
LLMWeights = Literal["named", "whole", "adapter"]
LLM_NOTES: dict[LLMWeights, str] = {  # for the model card
    "named": "The LLM was frozen; its weights are not in this folder and are loaded from where they are published.",
    "whole": "The LLM's weights are in `llm/`.",
    "adapter": "The LLM's LoRA adapters are in `adapter/`; the weights they change are loaded from where they are"
    " published.",
}


_LOCAL = (
    "The LLM was read from a folder of the machine that trained this, which `llm` in `config.yaml` names: this folder"
    " cannot be loaded without that one, and whether its weights are published is not recorded."
)
LOCAL_LLM_NOTES: dict[str, str] = {  # of an LLM that is no model hub's
    "named": f"**The LLM's weights are not here.** {_LOCAL}",
    "adapter": f"**Of the LLM only the LoRA adapters are here, in `adapter/`.** {_LOCAL}",
}


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A trained model with what it was trained on."""

    built: Built
    record: RunRecord
    step: int  # steps done
    weights_digest: str = ""  # of the files that hold the trained weights

    def __repr__(self) -> str:
        encoders = ", ".join(self.record.encoder_order or self.record.shapes) or "text only"
        trained = f"{self.record.num_samples} samples of {self.record.store or 'no store'}"
        return brief(self, f"{encoders} under {self.built.config.llm}: step {self.step}, trained on {trained}")


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """The content of an exported folder's export.json."""

    format: int
    step: int
    data_digest: str
    llm: LLMWeights
    llm_dtype: str
    is_merged: bool  # LoRA adapters were added to the weights
    llm_revision: str | None  # commit of the Hub's LLM
    sha256: Mapping[str, str]  # file -> digest; before 0.2 of weights alone


def load_run(run: Path, *, best: bool = False, llm: LoadedLLM | str | None = None) -> LoadedRun:
    """The newest checkpoint of a run, or of a chain's last stage, or an export, as a model in evaluation mode.

    `best`: instead of the newest, the checkpoint with the best validation. `llm`: where the run's LLM is now, if it has
    moved since training, or the LLM itself if it is loaded already and was not trained. Raises UserError for a folder
    without one, StoreDamagedError for weights that differ from their digests.
    """
    run = last_stage(Path(run))
    if is_export(run):
        return load_export(run, llm=llm if isinstance(llm, str) else None)
    folder = checkpoint.best(run) if best else checkpoint.newest_finite(run)
    if best and folder is None and checkpoint.newest(run):
        raise UserError(f"no checkpoint of {run} was validated: train with --eval-every, or leave out --best")
    if folder is None:
        raise UserError(no_checkpoint(run))
    state = checkpoint.load_state(folder)
    config = read_config(run)
    record = RunRecord.read(run)
    if isinstance(llm, str):
        if state.files is not None:
            state.files.check_llm(Path(llm), run)
        llm = _moved_llm(config, run, llm)
    built = _rebuild(config, record, llm or resumed_llm(config, run))
    checkpoint.load_model(folder, built.model, with_llm=built.saves_llm)
    built.model.eval()
    return LoadedRun(built=built, record=record, step=state.step, weights_digest=state.sha256[checkpoint.MODEL_FILE])


def load_export(folder: str | Path, *, llm: str | None = None) -> LoadedRun:
    """The model in an exported folder, in evaluation mode: equal to `load_run` of the run it was made from.

    `llm`: where the LLM is now, if it is not in the folder and has moved.
    """
    folder = Path(folder)
    record = _checked_record(folder)
    config, run_record = read_config(folder), RunRecord.read(folder)
    # Merged adapters are part of a whole LLM; building it as LoRA would add fresh ones.
    built_as = replace(config, train_llm="full") if record.is_merged else config
    built = _rebuild(built_as, run_record, _load_llm(folder, record, config, llm))
    expected = {name for name in built.model.state_dict() if not name.startswith(LLM_PREFIX) or is_adapter(name)}
    check_order(built.model.encoders, run_record.encoder_order, folder)
    load_exactly(built.model, _read_parts(folder, record), expected, folder)
    built.model.eval()
    return LoadedRun(
        built=built, record=run_record, step=record.step, weights_digest=record_digest(dict(record.sha256))
    )


def resumed_llm(config: TrainConfig, run: Path, device: torch.device | None = None) -> LoadedLLM:
    """The LLM of a run that has begun: without weights where the run's checkpoints hold all of them.

    One that is not trained itself is read straight onto `device`.
    """
    if holds_shape(run / LLM_FOLDER):
        if config.llm_quant is not None:
            raise UserError(f"llm_quant is for an LLM as it is published, and {run} holds one that was trained")
        try:
            return load_saved_shape(run / LLM_FOLDER, llm_dtype(config), config.attn_implementation)
        except UserError:
            raise
        except Exception as error:  # tokenizers raises bare ones, transformers many kinds
            raise StoreDamagedError(
                f"{run / LLM_FOLDER} cannot be read ({str(error).splitlines()[0] or type(error).__name__}); put its"
                " files back from a copy of the run"
            ) from error
    if config.llm.startswith(FRESH_PREFIX):  # its words and sizes are nowhere else
        raise StoreDamagedError(f"{run / LLM_FOLDER} has no config.json; put its files back from a copy of the run")
    check_llm_is_there(run)
    return new_llm(config, (), device=device)


def read_weights(folder: Path) -> tuple[int, dict[str, Tensor]]:
    """Steps done, and every weight in an exported folder by its name in `VideoLLM`, those of a whole LLM included."""
    record = _checked_record(folder)
    weights = _read_parts(folder, record)
    if record.llm == "whole":
        llm = _load_llm(folder, record, read_config(folder)).model
        weights |= {LLM_PREFIX + name: value for name, value in llm.state_dict().items()}
    return record.step, weights


def is_export(folder: Path) -> bool:
    """Whether the folder is an export."""
    return (folder / EXPORT_FILE).is_file()


def export_files(folder: Path) -> list[str]:
    """Relative paths of the files of an export that loading it reads, besides export.json."""
    weights = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
    nested = {
        f"{name}/{file}"
        for name in (LLM_FOLDER, ADAPTER_FOLDER)
        for file in llm_file_names(folder / name, with_weights=True)
    }
    single = {name for name in (CONFIG_FILE, RECORD_FILE) if (folder / name).is_file()}
    return sorted(weights | nested | single)


def _rebuild(config: TrainConfig, record: RunRecord, llm: LoadedLLM) -> Built:
    """The model of a run as it was trained, before its weights are loaded."""
    built = build(config, record.shapes, llm)
    if config.train_encoders:
        from trainer.end_to_end import empty_encoders  # imports the pipeline: only where a run has trained encoders

        built.model.join(empty_encoders(config, record.encoders))
    return built


def _moved_llm(config: TrainConfig, run: Path, llm: str) -> LoadedLLM:
    """The LLM of a run, read from `llm`; the run's settings keep the name that they recorded."""
    if holds_shape(run / LLM_FOLDER):
        raise UserError(f"{run} holds its LLM: leave out --llm {llm}")
    return new_llm(replace(config, llm=llm), ())


def _read_parts(folder: Path, record: ExportRecord) -> dict[str, Tensor]:
    """The parts of the model besides the LLM, and adapters by their names in `VideoLLM`."""
    named = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    weights = to_model_names(named, RunRecord.read(folder).encoder_order)
    if record.llm == "adapter":
        for name, value in load_file(folder / ADAPTER_FOLDER / ADAPTER_FILE).items():
            stem, _, kind = name.removeprefix(ADAPTER_PREFIX).rpartition(".")
            weights[f"{LLM_PREFIX}{stem}.default.{kind}"] = value
    return weights


def _load_llm(folder: Path, record: ExportRecord, config: TrainConfig, moved: str | None = None) -> LoadedLLM:
    if moved is not None:
        return _moved_llm(config, folder, moved)
    if record.llm != "whole":
        check_llm_is_there(folder)
        return new_llm(config, ())
    llm = load_llm(
        str(folder / LLM_FOLDER), dtype=getattr(torch, record.llm_dtype), attention=config.attn_implementation
    )
    return replace(llm, is_fresh=True)  # what it was before is not known here: to export it again is to copy it


def _checked_record(folder: Path) -> ExportRecord:
    """The folder's export.json, after its weights have been compared with their digests."""
    try:
        if (found := json.loads((folder / EXPORT_FILE).read_text()).get("format")) != FORMAT:
            raise ValueError(f"format {found}")
        record = ExportRecord(**unseal(folder / EXPORT_FILE))
        dtypes = ("float32", "bfloat16", "float16")
        if record.llm not in LLM_NOTES or record.llm_dtype not in dtypes:
            raise ValueError(f"llm {record.llm!r} of {record.llm_dtype!r}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is no export of this version: {error}; export the run again") from error
    names = export_files(folder)
    if CONFIG_FILE not in record.sha256:  # an earlier version's: it covers weights alone
        names = [name for name in names if name.endswith(".safetensors")]
    check_digests(folder, record.sha256, names, "the export")
    return record
