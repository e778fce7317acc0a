"""Checkpoints of a run: weights and optimizer state as safetensors and JSON, in folders written whole or not at all.

    RUN/checkpoints/step-00000400/
        model.safetensors       trained weights and measured constants; all of the LLM where its weights are fresh
        optimizer.safetensors   AdamW's two moments by parameter name
        state.json              step, data digest, encoder identities, validation, sha256 of the two files

Nothing else is state: order and random numbers are functions of the seed and the step, the learning rate of the step.
Tensors are full, so one process or any number of ranks can read them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featurestore.locate import check_room
from mervcache.errors import StoreDamagedError, UserError
from mervcache.files import apply_umask, file_sha256, replace_text
from trainer.config import CONFIG_FILE, TrainConfig, read_config
from trainer.model.llm import save_shape
from trainer.model.video_llm import Built, VideoLLM
from trainer.runs.run_record import LLM_FOLDER, RunRecord
from trainer.runs.weight_names import check_order, to_file_names, to_model_names

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
LLM_PREFIX = "llm."  # of its names in the model
MOMENTS = ("exp_avg", "exp_avg_sq")
# Settings that change neither weights nor losses beyond the rounding of sums, so they may differ in a resumed run.
FREE_ON_RESUME = {
    "activation_checkpointing",
    "allow_fresh_frozen",
    "checkpoint_every",
    "checkpoint_minutes",
    "deterministic",
    "eval_every",
    "eval_limit",
    "eval_split",
    "init_partial",
    "keep_checkpoints",
    "letters_template",
    "log_every",
    "prefetch_batches",
    "protocol",
    "trackers",
}


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """The content of state.json."""

    step: int  # steps done
    data_digest: str
    identities: Mapping[str, str]  # encoder -> identity of the tokens it was trained on
    sha256: Mapping[str, str]  # file -> digest
    validation: Mapping[str, float] = field(default_factory=dict)  # metrics of this step; empty: not validated


def checkpoint_to_resume(out: Path, config: TrainConfig, resume: bool) -> Path | None:
    """The checkpoint to resume from, None for a new run; UserError for a run that exists or had other settings."""
    check_room(out, "run", "--out")
    if not (out / CONFIG_FILE).exists():
        return None
    if not resume:
        raise UserError(f"{out} holds a run already; go on with --resume auto, or choose another --out")
    before = read_config(out)
    # A loss per token is one sum, however it is cut into micro-batches; the mean of micro-batches is not.
    free = FREE_ON_RESUME | ({"micro_batch_size"} if config.loss == "per_token" else set())
    names = [field.name for field in fields(config) if field.name not in free]
    if changed := [name for name in names if getattr(before, name) != getattr(config, name)]:
        values = "; ".join(f"{name} was {getattr(before, name)!r}, is {getattr(config, name)!r}" for name in changed)
        raise UserError(
            f"{out} was started with other settings ({values}); resume with the same, or choose another --out"
        )
    return newest(out)


def write_folder(out: Path, built: Built, record: RunRecord, *, is_new: bool) -> None:
    """Write settings, record and tokenizer before the first step; of a resumed run only the settings change."""
    out.mkdir(parents=True, exist_ok=True)
    if is_new:
        save_shape(built.llm, out / LLM_FOLDER)
        record.write(out)
    replace_text(out / CONFIG_FILE, built.config.to_yaml())


def save(
    run: Path,
    *,
    step: int,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    data_digest: str,
    identities: Mapping[str, str],  # in the order of the model's encoders
    keep: int,
    validation: Mapping[str, float] | None = None,
) -> Path:
    """Write one checkpoint, then remove all but the newest `keep` and the best by validation."""
    folder = _checkpoints(run) / f"step-{step:08d}"
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    encoders = list(identities)
    save_file(to_file_names(_on_cpu(weights), encoders), temporary / MODEL_FILE)
    save_file(to_file_names(_on_cpu(optimizer), encoders), temporary / OPTIMIZER_FILE)
    apply_umask(temporary)
    digests = {name: file_sha256(temporary / name) for name in (MODEL_FILE, OPTIMIZER_FILE)}
    state = CheckpointState(
        step=step,
        data_digest=data_digest,
        identities=dict(identities),
        sha256=digests,
        validation=dict(validation or {}),
    )
    (temporary / STATE_FILE).write_text(json.dumps(asdict(state), indent=1, sort_keys=True))
    for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE):
        _sync(temporary / name)
    shutil.rmtree(folder, ignore_errors=True)  # the same step, written by a run that was resumed from before it
    temporary.rename(folder)
    _sync(folder.parent)
    for old in set(checkpoints(run)[:-keep]) - {best(run)}:
        shutil.rmtree(old)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in _checkpoints(run).glob("step-*") if (path / STATE_FILE).is_file())


def newest(run: Path) -> Path | None:
    """The last complete checkpoint of a run."""
    return (checkpoints(run) or [None])[-1]


def best(run: Path) -> Path | None:
    """The checkpoint with the best validation, the earlier one of equals; None if none was validated."""
    validated = [folder for folder in checkpoints(run) if _read_state(folder).validation]
    return max(validated, key=lambda folder: goodness(_read_state(folder).validation), default=None)


def best_goodness(run: Path) -> tuple[float, float] | None:
    """`goodness` of the best checkpoint; None if none was validated."""
    folder = best(run)
    return goodness(_read_state(folder).validation) if folder is not None else None


def goodness(validation: Mapping[str, float]) -> tuple[float, float]:
    """Sort key of checkpoints: accuracy where it was measured, then the smaller loss."""
    return validation.get("val_accuracy", -1.0), -validation["val_loss"]


def load_state(folder: Path) -> CheckpointState:
    """A checkpoint's state, after its files have been compared with their digests."""
    state = _read_state(folder)
    for name in (MODEL_FILE, OPTIMIZER_FILE):
        if state.sha256.get(name) != file_sha256(folder / name):
            raise StoreDamagedError(
                f"{folder / name} differs from its digest; remove {folder} to use an older checkpoint"
            )
    return state


def _read_state(folder: Path) -> CheckpointState:
    try:
        return CheckpointState(**json.loads((folder / STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is not a checkpoint of this version: {error}") from error


def model_weights(model: nn.Module, *, with_llm: bool) -> dict[str, Tensor]:
    """The tensors of a checkpoint: all but a pretrained LLM that was not trained."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: value
        for name, value in model.state_dict().items()
        if with_llm or name in trained or not name.startswith(LLM_PREFIX)
    }


def load_model(folder: Path, model: VideoLLM, *, with_llm: bool) -> None:
    """Load the weights of the checkpoint into `model`, which must have the encoders of the run in the same order."""
    encoders = _recorded_encoders(folder)
    check_order(model.encoders, encoders, folder)
    weights = to_model_names(load_file(folder / MODEL_FILE), encoders)
    load_exactly(model, weights, set(model_weights(model, with_llm=with_llm)), folder)


def load_exactly(model: nn.Module, weights: Mapping[str, Tensor], expected: set[str], folder: Path) -> None:
    """Load the weights that `folder` holds into `model`; UserError unless they are exactly the expected tensors."""
    if wrong := sorted(set(weights) ^ expected):
        names = ", ".join(wrong[:5])
        raise UserError(f"{folder} holds another model than its config builds; differing tensors: {names}")
    model.load_state_dict(weights, strict=False)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """AdamW's moments as `NAME/exp_avg`; `names` maps id(parameter) to its name."""
    return {
        f"{names[id(parameter)]}/{moment}": state[moment]
        for parameter, state in optimizer.state.items()
        for moment in MOMENTS
    }


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, names: Mapping[int, str], step: int) -> None:
    """Load the moments of the checkpoint into `optimizer`, sharded as its parameters are."""
    moments = to_model_names(load_file(folder / OPTIMIZER_FILE), _recorded_encoders(folder))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            if f"{name}/{MOMENTS[0]}" in moments:  # absent where no gradient has reached it yet
                state = {moment: placed_like(moments[f"{name}/{moment}"], parameter) for moment in MOMENTS}
                optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}


def gather_full(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Full tensors from all ranks' shards, one at a time, on the CPU; none on ranks that say keep=False.

    Every rank must call it with the same names in the same order.
    """
    gathered = {}
    for name, value in tensors.items():
        full = full_tensor(value.detach())
        if keep:
            gathered[name] = full.cpu()
    return gathered


def full_tensor(value: Tensor) -> Tensor:
    """The tensor itself; a sharded one (FSDP's `DTensor`) gathered from all ranks."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor on the device of `parameter`, sharded as it is; every rank passes the same value."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _recorded_encoders(folder: Path) -> tuple[str, ...]:
    """The encoders of the run that a checkpoint belongs to, in order."""
    return RunRecord.read(folder.parent.parent).encoder_order


def _checkpoints(run: Path) -> Path:
    return Path(run) / "checkpoints"


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory: safetensors refuses tied weights."""
    copied: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        start = value.untyped_storage().data_ptr()
        copied[name] = value.clone() if start in seen else value
        seen.add(start)
    return copied


def _sync(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
