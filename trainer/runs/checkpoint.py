"""Checkpoints of a run: weights and optimizer state as safetensors and JSON, in folders written whole or not at all.

    RUN/checkpoints/step-00000400/
        model.safetensors       trained weights and measured constants; all of the LLM where its weights are fresh
        optimizer.safetensors   AdamW's two moments and its number of updates, by parameter name; 8-bit moments as
                                bitsandbytes keeps them
        state.json              step, skipped steps, data digest, encoder identities, validation, sha256 of the two
                                files and of the run's other files, and of itself

Nothing else is state: order and random numbers are functions of the seed and the step, the learning rate of the step.
Tensors are full, so one process or any number of ranks can read them, also those that FSDP had sharded. Weights that
are not finite are not saved.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featurestore.locate import check_room
from mervcache.config import load_yaml
from mervcache.errors import NonFiniteError, StoreDamagedError, UserError
from mervcache.files import apply_umask, file_sha256, replace_text
from mervcache.reprs import was_and_is
from trainer.config import CONFIG_FILE, TrainConfig, read_config
from trainer.model.llm import save_shape
from trainer.model.video_llm import Built, VideoLLM
from trainer.paths import PATH_SETTINGS, is_same_path
from trainer.runs.disk import disk_faults
from trainer.runs.integrity import RunFiles, fixed_settings, free_settings, seal, unseal
from trainer.runs.run_record import RunRecord
from trainer.runs.saver import write_shards
from trainer.runs.stage_folders import LLM_FOLDER
from trainer.runs.weight_names import check_order, to_file_names, to_model_names

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
LLM_PREFIX = "llm."  # of its names in the model
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"  # of a parameter: its updates, fewer than the run's steps where some were skipped
ASIDE = "nonfinite-"  # begins the name of a checkpoint that a resumed run has set aside

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """The content of state.json."""

    step: int  # steps done
    data_digest: str
    identities: Mapping[str, str]  # encoder -> identity of the tokens it was trained on
    sha256: Mapping[str, str]  # file -> digest
    # Metrics of this step; empty: not validated. None stands for a number that is not finite.
    validation: Mapping[str, float | None] = field(default_factory=dict)
    skipped: int = 0  # of the steps done, those that changed nothing because a number was not finite
    files: RunFiles | None = None  # what else the run has read; None: written before it was kept


def checkpoint_to_resume(out: Path, config: TrainConfig, resume: bool) -> Path | None:
    """The checkpoint to resume from, None for a new run; UserError for a run that exists or had other settings.

    It is the newest one with finite weights.
    """
    check_room(out, "run", "--out")
    if not (out / CONFIG_FILE).exists():
        if folder := newest(out):
            raise StoreDamagedError(
                f"{out} holds the checkpoint {folder.name} and no {CONFIG_FILE}; put it back from a copy of the run, or"
                " choose another --out"
            )
        return None
    if not resume:
        raise UserError(f"{out} holds a run already; go on with --resume auto, or choose another --out")
    before = read_config(out)
    names = [field.name for field in fields(config) if field.name not in free_settings(config.loss)]
    paths = {name for name in PATH_SETTINGS if is_same_path(getattr(before, name), getattr(config, name))}
    names = [name for name in names if name not in paths]
    if changed := [name for name in names if getattr(before, name) != getattr(config, name)]:
        values = "; ".join(was_and_is(name, getattr(before, name), getattr(config, name)) for name in changed)
        raise UserError(
            f"{out} was started with other settings ({values}); resume with the same, or choose another --out"
        )
    return newest_finite(out)


def write_folder(out: Path, built: Built, record: RunRecord, resumed: CheckpointState | None) -> RunFiles:
    """Write settings, record and tokenizer before the first step; of a resumed run only the settings change.

    Returns the digests that the run's checkpoints keep.
    """
    out.mkdir(parents=True, exist_ok=True)
    with disk_faults(out, "the run's settings"):
        if resumed is None:
            save_shape(built.llm, out / LLM_FOLDER, with_sizes=built.saves_llm)
            record.located(out).write(out)
        before = load_yaml(out / CONFIG_FILE) if resumed is not None else None
        replace_text(out / CONFIG_FILE, built.config.recorded_yaml(out, before))
    if resumed is not None and resumed.files is not None:
        return replace(resumed.files, settings=fixed_settings(out))
    return RunFiles.of(out, built.config.llm, with_weights=not built.saves_llm)


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
    skipped: int = 0,
    files: RunFiles | None = None,
    group: Any = None,
    is_writer: bool = True,
) -> Path:
    """Write one checkpoint, then remove all but the newest `keep` and the best by validation.

    `files` are the digests that `write_folder` gave; by default those of the files as they are. Where tensors are
    sharded every rank calls this, with a process group that nothing else uses meanwhile; `is_writer` is the one that
    keeps the folder. Raises NonFiniteError for weights that are not finite (of sharded ones the caller has looked at
    all, see `check_finite`) and RunStoppedError where the disk is full; nothing of it is left then.
    """
    if group is None:
        check_finite(step, weights, optimizer)
    folder = _checkpoints(run) / f"step-{step:08d}"
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid() if group is None else 'ranks'}")
    encoders = list(identities)
    num_bytes = sum(value.nbytes for value in [*weights.values(), *optimizer.values()])
    try:
        with disk_faults(run, "a checkpoint", num_bytes=num_bytes):
            if group is None:
                shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True, exist_ok=group is not None)
            for tensors, name in ((weights, MODEL_FILE), (optimizer, OPTIMIZER_FILE)):
                if group is None:
                    save_file(to_file_names(_on_cpu(tensors), encoders), temporary / name)
                else:
                    write_shards(to_file_names(tensors, encoders), temporary / name, group, is_writer=is_writer)
            if not is_writer:
                return folder
            apply_umask(temporary)
            state = CheckpointState(
                step=step,
                data_digest=data_digest,
                identities=dict(identities),
                sha256={name: file_sha256(temporary / name) for name in (MODEL_FILE, OPTIMIZER_FILE)},
                validation={name: x if isfinite(x) else None for name, x in (validation or {}).items()},  # JSON: no NaN
                skipped=skipped,
                files=files or RunFiles.of(run),
            )
            (temporary / STATE_FILE).write_text(seal(asdict(state)))
            for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE):
                _sync(temporary / name)
            shutil.rmtree(folder, ignore_errors=True)  # the same step, by a run that was resumed from before it
            temporary.rename(folder)
            _sync(folder.parent)
    except BaseException:
        if is_writer:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in set(checkpoints(run)[:-keep]) - {best(run)}:
        shutil.rmtree(old)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in _checkpoints(run).glob("step-*") if (path / STATE_FILE).is_file())


def newest(run: Path) -> Path | None:
    """The last complete checkpoint of a run."""
    return (checkpoints(run) or [None])[-1]


def newest_finite(run: Path) -> Path | None:
    """The last complete checkpoint with finite weights, which those of earlier versions need not have.

    Those that are passed over are named in the log; NonFiniteError if no other is left.
    """
    folders = checkpoints(run)
    for folder in reversed(folders):
        if not (names := list(_nonfinite_weights(folder))):
            return folder
        logger.warning(f"{folder} is left out, its weights are not finite: {_listed(names)}")
    if folders:
        raise NonFiniteError(
            f"no checkpoint of {run} has finite weights; train again with another --out, and lower learning rates"
        )
    return None


def set_aside_after(folder: Path) -> None:
    """Rename the checkpoints after `folder`, from which a run goes on: they would be taken for newer ones of it."""
    for later in (path for path in checkpoints(folder.parent.parent) if path.name > folder.name):
        aside = later.with_name(ASIDE + later.name)
        shutil.rmtree(aside, ignore_errors=True)
        later.rename(aside)
        logger.warning(f"{later.name} was set aside as {aside}; remove it when it is not needed")


def _nonfinite_weights(folder: Path) -> Iterator[str]:
    """Names of the tensors of a checkpoint that are not finite; nothing is read where `save` has checked them."""
    if read_state(folder).files is not None:
        return
    try:
        with safe_open(folder / MODEL_FILE, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                yield from nonfinite_names({name: file.get_tensor(name)})
    except (OSError, SafetensorError):
        return  # missing or damaged, which `load_state` reports


def best(run: Path) -> Path | None:
    """The checkpoint with the best validation, the earlier one of equals; None if none was validated."""
    validated = [folder for folder in checkpoints(run) if is_ranked(read_state(folder).validation)]
    return max(validated, key=lambda folder: goodness(read_state(folder).validation), default=None)


def best_goodness(run: Path) -> tuple[float, float] | None:
    """`goodness` of the best checkpoint; None if none was validated."""
    folder = best(run)
    return goodness(read_state(folder).validation) if folder is not None else None


def is_ranked(validation: Mapping[str, float | None]) -> bool:
    """Whether there are metrics and all of them are finite: others are compared with nothing."""
    return bool(validation) and all(value is not None and isfinite(value) for value in validation.values())


def goodness(validation: Mapping[str, float | None]) -> tuple[float, float]:
    """Sort key of checkpoints: accuracy where it was measured, then the smaller loss; metrics that are not finite last.

    Only those that `is_ranked` may be the best.
    """
    if not is_ranked(validation):
        return -inf, -inf
    accuracy, loss = validation.get("val_accuracy", -1.0), validation["val_loss"]
    assert accuracy is not None
    assert loss is not None
    return accuracy, -loss


def load_state(folder: Path) -> CheckpointState:
    """A checkpoint's state, after its files and those of its run have been compared with their digests."""
    state = read_state(folder)
    if state.files is not None:
        state.files.check(folder.parent.parent)
    for name in (MODEL_FILE, OPTIMIZER_FILE):
        path, advice = folder / name, f"remove {folder} to use an older checkpoint"
        if not path.is_file():
            raise StoreDamagedError(f"{path} is missing; put it back from a copy of the run, or {advice}")
        if state.sha256.get(name) != file_sha256(path):
            raise StoreDamagedError(f"{path} differs from its digest; {advice}")
    return state


def read_state(folder: Path) -> CheckpointState:
    """A checkpoint's state, its files not looked at."""
    try:
        record = unseal(folder / STATE_FILE)
        files = record.get("files")
        return CheckpointState(**{**record, "files": RunFiles(**files) if files is not None else None})
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder} is not a checkpoint of this version: {error}; remove it to use an older one"
        ) from error


def nonfinite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold an infinite value or NaN; of a sharded one this rank's part is looked at."""
    floating = {name: local(value.detach()) for name, value in tensors.items() if value.is_floating_point()}
    if not floating:
        return []
    flags = torch.stack([value.isfinite().all().cpu() for value in floating.values()])
    return [name for name, is_finite in zip(floating, flags.tolist(), strict=True) if not is_finite]


def check_finite(step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError for values that no checkpoint may hold; of sharded tensors for those of this rank."""
    for kind, tensors in (("weights", weights), ("optimizer", optimizer)):
        if names := nonfinite_names(tensors):
            raise NonFiniteError(f"the {kind} of step {step} are not finite and are not saved: {_listed(names)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
    """AdamW's state as `NAME/exp_avg` and so on; `names` maps id(parameter) to its name."""
    return {
        f"{names[id(parameter)]}/{entry}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
    }


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, names: Mapping[int, str], step: int) -> None:
    """Load the moments of the checkpoint into `optimizer`, sharded as its parameters are.

    `step`, of the run, is the number of updates where the checkpoint has no number for each parameter.
    """
    if "fused" not in optimizer.defaults:
        _load_8bit(folder, optimizer, names)
        return
    moments = to_model_names(load_file(folder / OPTIMIZER_FILE), _recorded_encoders(folder))
    is_fused = bool(optimizer.defaults["fused"])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            if f"{name}/{MOMENTS[0]}" in moments:  # absent where no gradient has reached it yet
                state = {moment: placed_like(moments[f"{name}/{moment}"], parameter) for moment in MOMENTS}
                updates = moments.get(f"{name}/{STEP}", torch.tensor(float(step)))
                updates = updates.to(parameter.device if is_fused else "cpu")  # where AdamW makes it
                optimizer.state[parameter] = {STEP: updates, **state}


def _load_8bit(folder: Path, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
    """The same of bitsandbytes' AdamW, whose state has more entries, and others for small tensors."""
    moments = to_model_names(load_file(folder / OPTIMIZER_FILE), _recorded_encoders(folder))
    states: dict[str, dict[str, Any]] = defaultdict(dict)
    for path, value in moments.items():
        name, _, entry = path.rpartition("/")
        states[name][entry] = value
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if state := states.get(names[id(parameter)]):
                placed = {entry: value.to(parameter.device) for entry, value in state.items() if entry != STEP}
                optimizer.state[parameter] = {STEP: int(state[STEP]), **placed}


def full_tensor(value: Tensor) -> Tensor:
    """The tensor itself; a sharded one (FSDP's `DTensor`) gathered from all ranks."""
    return cast("Any", value).full_tensor() if hasattr(value, "full_tensor") else value


def local(value: Tensor) -> Tensor:
    """The tensor itself; of a sharded one this rank's part."""
    return cast("Any", value).to_local() if hasattr(value, "to_local") else value


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor on the device of `parameter`, sharded as it is; every rank passes the same value.

    Each takes its shard of its own copy, so nothing is sent.
    """
    value = value.to(parameter.device)
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded = cast("Any", parameter)
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)


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
