"""Gradients of a step over its micro-batches, and the smaller ones of a run whose device ran out of memory.

RUN/micro_batch.json    the limit that the run has come to, written the moment memory runs out: a killed or resumed
                        run goes on with it. Remove the file to use the config's again
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from mervcache.errors import RunStoppedError, UserError
from mervcache.files import replace_text
from trainer.config import TrainConfig
from trainer.data.batches import Step
from trainer.data.order import derive_seed
from trainer.data.partition import Limit
from trainer.loop.plan import Plan

LIMIT_FILE = "micro_batch.json"

logger = logging.getLogger(__name__)


def accumulate(accelerator: Accelerator, model: nn.Module, step: Step) -> Tensor:
    """This rank's part of the step's loss, with its gradients in the parameters."""
    total = torch.zeros((), device=accelerator.device)
    for index, (batch, divisor) in enumerate(zip(step.micro_batches, step.divisors, strict=True)):
        # FSDP sums every time: without it each rank would keep whole fp32 gradients between micro-batches.
        is_summed = accelerator.is_fsdp2 or index == len(step.micro_batches) - 1
        with contextlib.nullcontext() if is_summed else accelerator.no_sync(model):
            with accelerator.autocast():  # FSDP's own precision is that of weights alone
                loss = model(batch.to(accelerator.device)) / divisor
            # Data parallelism averages gradients over ranks; here they are parts of a sum.
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    return total


class Gradients:
    """Computes the gradients of steps; where memory runs out, in smaller micro-batches.

    One rank tries the step again. Of several, the others are in the middle of theirs: under DDP this one gives zeros
    to the sum that they wait for, `has_failed` is set, and all can end with a checkpoint; under FSDP, where ranks wait
    for each other in every layer, it can only end, and the last checkpoint is what there is.
    """

    def __init__(self, plan: Plan, accelerator: Accelerator, run: Path | None, read: Callable[[int], Step]) -> None:
        """`run` keeps the limit; None keeps none. `read` makes a step by the limit in force."""
        self.plan, self.accelerator, self.run, self.read = plan, accelerator, run, read
        self.has_failed = False  # of several ranks: memory ran out on this one, and after the step's decision on any

    def __call__(self, model: nn.Module, optimizer: Any, number: int, step: Step) -> tuple[Tensor, Step]:
        """This rank's part of the loss, with its gradients in the parameters, and the step as it was computed."""
        config, accelerator, batches = self.plan.config, self.accelerator, self.plan.batches
        while True:
            torch.manual_seed(derive_seed("step", config.seed, number, accelerator.process_index))
            try:
                return accumulate(accelerator, model, step), step
            except RuntimeError as error:
                if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                    raise
                reason = str(error).strip().partition("\n")[0]
            # Out of the except clause, whose error held the tensors of the forward pass.
            optimizer.zero_grad()
            clear_device_cache(garbage_collection=True)
            logger.warning(f"step {number}, rank {accelerator.process_index}, with {step.limit}: {reason}")
            limit = self._smaller(number, step)
            if limit is not None:
                batches.limit = limit
            if limit is not None and self.run is not None:
                replace_text(self.run / LIMIT_FILE, json.dumps(asdict(limit)) + "\n")
            if accelerator.num_processes > 1 and not accelerator.is_fsdp2:
                self.has_failed = True
                return self._join(model, number, step), step
            if limit is None or accelerator.is_fsdp2:
                raise self.end(number, step)
            logger.warning(f"step {number} is done again with {limit}, and so are all others")
            step = self.read(number)

    def _join(self, model: nn.Module, number: int, step: Step) -> Tensor:
        """Give zeros to the gradients that the other ranks sum up, so that they come to the decision about the step."""
        # DDP broadcasts buffers at the first forward of a step, which this rank has begun already.
        cast("Any", model).require_forward_param_sync = False
        filler = replace(step, micro_batches=[self.plan.batches.filler(number)], divisors=(1,))
        try:
            return accumulate(self.accelerator, model, filler)
        except RuntimeError as error:  # gradients of the step were being summed already
            raise self.end(number, step) from error

    def end(self, number: int, step: Step) -> RunStoppedError:
        """The end of a run whose step does not fit, with what to do."""
        config, begin = self.plan.config, f"memory ran out in step {number} with {step.limit}"
        if (limit := self._smaller(number, step)) is not None:
            return RunStoppedError(
                f"{begin} on one of {self.accelerator.num_processes} processes; go on from the last checkpoint with"
                f" --resume auto, which uses {limit} from now on"
            )
        options = [] if config.activation_checkpointing else ["activation_checkpointing: true"]
        if config.loss != "per_token":
            options.append("a new run with a smaller micro_batch_size, which this loss depends on")
        if not self.accelerator.is_fsdp2:
            options.append("--launch fsdp on several GPUs")
        options.append("a new run with a smaller max_text_tokens or fewer visual tokens")
        return RunStoppedError(
            f"{begin}, and nothing smaller is the same training. The last checkpoint is kept; choose"
            f" {'; '.join(options)}"
        )

    def _smaller(self, number: int, step: Step) -> Limit | None:
        """Half the limit of a step; None where that is impossible or another training."""
        batches = self.plan.batches
        longest = max(batches.length(index, number) for index in batches.order.batch(number))
        return step.limit.halved(longest) if self.plan.config.loss == "per_token" else None


def read_limit(run: Path, config: TrainConfig) -> Limit | None:
    """The limit that the run has come to; None: the config's, which may be smaller by now."""
    path, wanted = run / LIMIT_FILE, Limit.of(config)
    if not path.is_file():
        return None
    try:
        found = Limit(**json.loads(path.read_text()))
        is_smaller = found.is_smaller_than(wanted)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to use the config's {wanted}") from error
    if not is_smaller:
        return None
    logger.info(f"memory ran out before, so {found} is used instead of {wanted}; remove {path} to use that again")
    return found
