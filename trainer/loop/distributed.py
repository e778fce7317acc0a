"""One process or many: device, precision and data parallelism by accelerate, its trackers, and decisions of all ranks.

Under DDP every rank holds the whole model; under FSDP (version 2) a shard of every tensor.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

from mervcache.errors import MervCacheError, RunStoppedError, UserError
from mervcache.reprs import shown
from trainer.config import TrainConfig
from trainer.loop.memory import Device, device_memory
from trainer.model.llm import decoder_layers
from trainer.model.video_llm import VideoLLM

Result = TypeVar("Result")

TRACKERS_FOLDER, PROJECT = "trackers", "merv-train"  # RUN/trackers/merv-train/: event files of TensorBoard


def make_accelerator(config: TrainConfig, run: Path) -> Accelerator:
    """This process among its ranks, by the environment that a launcher set."""
    precision = "bf16" if config.precision == "bf16" else "no"
    # accelerate remembers the first precision of a process; a later run or stage may have another.
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        if AcceleratorState._shared_state.get("distributed_type") == DistributedType.FSDP:
            raise UserError("under FSDP one command has one precision: train stages of unlike precision one by one")
        AcceleratorState._reset_state()
    atexit.register(leave_group)
    return Accelerator(
        mixed_precision=precision,
        fsdp_plugin=fsdp_plugin(config),
        log_with=list(config.trackers) or None,
        project_dir=str(run / TRACKERS_FOLDER),
    )


def leave_group() -> None:
    """End this process's part in a group of ranks, before the interpreter ends.

    gloo's threads hold tensors for a moment after a collective has returned; one that frees a tensor while Python shuts
    down aborts the process (seen with torch 2.13: exit by SIGABRT after everything was done).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fsdp_plugin(config: TrainConfig) -> Any:
    """How FSDP shards the model; None if it was not launched with FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin()  # reads the launch file's settings
    if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
        raise UserError(
            "FSDP must be version 2 with cpu_ram_efficient_loading off, as `merv-train --launch fsdp` sets it: frozen"
            " and trained weights are in one unit, and constants are loaded with the weights"
        )
    if config.precision == "bf16":
        # accelerate would also sum gradients and return the loss in bfloat16.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return plugin


def prepare(accelerator: Accelerator, model: VideoLLM, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
    """The model as it is called in training, and its optimizer; weights are still read from `model` itself."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare(model, optimizer)
    from torch.distributed.fsdp import register_fsdp_forward_method

    layers = sorted({type(layer).__name__ for layer in decoder_layers(model.llm)})
    plugin: Any = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = layers  # one unit per layer, the rest is the root
    prepared, optimizer = accelerator.prepare(model, optimizer)
    register_fsdp_forward_method(model, "sample_losses")  # validation calls it: weights are gathered for it too
    return prepared, optimizer


def device_of(accelerator: Accelerator, config: TrainConfig) -> Device:
    """What each process has: memory as configured, else of the smallest GPU among them."""
    memory = device_memory(config, accelerator.device)
    memories = [found for found in gather_object([memory]) if found is not None]
    return Device(
        memory=min(memories, default=None),
        num_processes=accelerator.num_processes,
        is_sharded=accelerator.is_fsdp2,
    )


def any_rank(accelerator: Accelerator, *flags: bool | Tensor) -> list[bool]:
    """For every flag whether some rank has set it, so that all ranks take the same step."""
    if accelerator.num_processes == 1:
        return [bool(flag) for flag in flags]
    counts = torch.stack([torch.as_tensor(flag, device=accelerator.device).float() for flag in flags])
    return [count > 0 for count in cast("Tensor", accelerator.reduce(counts, "sum")).tolist()]


def on_first_rank(accelerator: Accelerator, action: Callable[[], Result]) -> Result | None:
    """The result of `action`, which the first rank takes alone; None on others. Where it fails, every rank does."""
    result, failure = None, None
    if accelerator.is_main_process:
        try:
            result = action()
        except MervCacheError as error:
            failure = error
    raise_together(accelerator, failure)
    return result


def raise_together(accelerator: Accelerator, failure: MervCacheError | None) -> None:
    """Raise on every rank where one has failed, so that none waits for it."""
    if any_rank(accelerator, failure is not None)[0]:
        raise failure or RunStoppedError("another process of this run failed; its message gives the reason")


def side_group() -> Any:
    """A process group on CPUs for threads alongside the training; every rank calls it at the same time."""
    return torch.distributed.new_group(backend="gloo")


def decides_on_device(accelerator: Accelerator) -> bool:
    """Whether AdamW skips a step by a flag on the device: on one GPU, where nothing else makes a step wait."""
    is_alone = accelerator.num_processes == 1 and not accelerator.is_fsdp2
    return is_alone and accelerator.device.type == "cuda"


@contextlib.contextmanager
def deterministic(is_wanted: bool) -> Iterator[None]:
    """Deterministic algorithms where torch has a choice; slower on a GPU."""
    if not is_wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; cuBLAS is not stable without
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def check_trackers(config: TrainConfig) -> None:
    """Raise UserError for a tracker that is not installed: accelerate leaves it out with a warning."""
    for name in config.trackers:
        if find_spec(name) is None:
            extra = "trackio" if name == "trackio" else "track"
            raise UserError(f"tracker {name} is not installed: pip install 'merv-pipeline[{extra}]', or leave it out")


def start_trackers(accelerator: Accelerator, config: TrainConfig, run: Path, start: int) -> None:
    """Log from step `start` on; TensorBoard drops what the run has logged after it."""
    accelerator.init_trackers(
        PROJECT,
        config=flat(dataclasses.asdict(config)),
        init_kwargs={
            "tensorboard": {"purge_step": start},
            "wandb": {"name": run.name, "dir": str(run)},
            "trackio": {"name": run.name, "resume": "allow", "embed": False},
        },
    )


def flat(settings: Mapping[str, Any], where: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings under dotted names, as trackers take them."""
    flattened: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flattened |= flat(value, f"{where}{name}.")
        else:
            flattened[f"{where}{name}"] = value if isinstance(value, bool | int | float | str) else shown(value)
    return flattened


def log(accelerator: Accelerator, row: Mapping[str, Any]) -> None:
    """One step's metrics."""
    accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def stop_trackers(accelerator: Accelerator) -> None:
    """Flush and close; `Accelerator.end_training` would end the process group too."""
    for tracker in accelerator.trackers:
        tracker.finish()
