"""Train: the loop from token source and samples to a run's folder.

The loss is the cross-entropy summed over the supervised tokens of the global batch and divided by their number, so it
depends neither on ranks nor on accumulation; the number is known on every rank without asking, because order and
labels are. Random numbers are seeded per step. A run that is killed and resumed therefore has the losses of one that
was not, to the bit on the CPU. accelerate brings device, precision and data parallelism.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from featurestore.errors import UserError
from featurestore.samples import Sample
from trainer import checkpoint
from trainer.build import LLM_FOLDER
from trainer.config import CONFIG_FILE, TrainConfig, read_config
from trainer.data import Step
from trainer.llm import save_shape
from trainer.optimizer import build_optimizer, set_rates
from trainer.order import derive_seed
from trainer.plan import Plan, fit_standardisation, make_plan
from trainer.prefetch import Prefetch
from trainer.progress import RunProgress
from trainer.tokens import TokenSource
from trainer.video_llm import VideoLLM

# Settings that change neither weights nor losses: a resumed run may have others.
FREE_ON_RESUME = {"log_every", "checkpoint_every", "keep_checkpoints", "prefetch_batches"}


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished or stopped run says."""

    run: str
    steps: int  # done
    num_steps: int  # of the whole run
    loss: float  # of the last step
    data_digest: str
    checkpoint: str


def train(
    config: TrainConfig,
    samples: Sequence[Sample],
    source: TokenSource,
    out: Path,
    *,
    store: str = "",
    resume: bool = False,
    stop_at: int | None = None,
    words: Sequence[str] = (),
    is_quiet: bool = False,
) -> TrainResult:
    """Train to the end, or to step `stop_at`; `resume` goes on from the newest checkpoint in `out`, if there is one."""
    out = Path(out)
    accelerator = _accelerator(config)
    folder = _starting_point(out, config, resume)
    accelerator.wait_for_everyone()  # before the first rank writes what the others look for
    plan = make_plan(
        config,
        samples,
        source,
        store=store,
        run=out if folder else None,
        words=words,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
    )
    if accelerator.is_main_process and folder is None:
        _write_folder(out, plan)
    return _Loop(plan, source, accelerator, out).run(folder, stop_at, is_quiet)


class _Loop:
    """One process's part of a run."""

    def __init__(self, plan: Plan, source: TokenSource, accelerator: Accelerator, out: Path) -> None:
        self.plan, self.source, self.accelerator, self.out = plan, source, accelerator, out
        self.config = plan.config
        self.model: VideoLLM = plan.built.model
        self.optimizer = build_optimizer(self.model, self.config.optimizer)
        self.names = {id(parameter): name for name, parameter in self.model.named_parameters()}

    def run(self, folder: Path | None, stop_at: int | None, is_quiet: bool) -> TrainResult:
        start = self._restore(folder)
        prepared, optimizer = self.accelerator.prepare(self.model, self.optimizer)
        num_steps = self.plan.batches.num_steps
        stop = min(num_steps, stop_at if stop_at is not None else num_steps)
        steps = Prefetch(self.plan.batches.step, start, stop, depth=self.config.prefetch_batches)
        shown = RunProgress(
            self.out,
            start=start,
            stop=num_steps,
            is_first_rank=self.accelerator.is_main_process,
            is_quiet=is_quiet,
        )
        done, last = start, torch.tensor(float("nan"))
        with steps, shown, _terminated() as is_terminated:
            for number, step in enumerate(steps, start=start):
                row = self._step(prepared, optimizer, number, step)
                shown.advance(row)
                done, last = number + 1, row["loss"]
                is_last = done == stop or self._agree(is_terminated())
                if is_last or done % self.config.log_every == 0:
                    shown.flush(waited_s=steps.waited_s)
                if is_last or done % self.config.checkpoint_every == 0:
                    self._save(done)
                if is_last:
                    break
        return TrainResult(
            run=str(self.out),
            steps=done,
            num_steps=num_steps,
            loss=float(last),
            data_digest=self.plan.data.digest,
            checkpoint=str(checkpoint.newest(self.out) or ""),
        )

    def _step(self, model: torch.nn.Module, optimizer: Any, number: int, step: Step) -> dict[str, Any]:
        """Forward and backward over the micro-batches, one update; a row of metrics."""
        config, accelerator = self.config, self.accelerator
        torch.manual_seed(derive_seed("step", config.seed, number, accelerator.process_index))
        set_rates(self.optimizer, number, self.plan.batches.num_steps, config.optimizer)
        model.train()
        total = torch.zeros((), device=accelerator.device)
        for index, (batch, divisor) in enumerate(zip(step.micro_batches, step.divisors, strict=True)):
            is_last = index == len(step.micro_batches) - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                loss = model(batch.to(accelerator.device)) / divisor
                # Data parallelism averages gradients over ranks; ours are parts of a sum.
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        factor = max(group["lr"] / group["peak"] if group["peak"] else 0.0 for group in self.optimizer.param_groups)
        samples = config.batch_size
        return {
            "step": number,
            "loss": accelerator.reduce(total, "sum"),
            "grad_norm": norm.detach(),
            "projector_lr": config.optimizer.projector_lr * factor,
            "fusion_lr": config.optimizer.fusion_lr * factor,
            "llm_lr": config.optimizer.llm_lr * factor if config.train_llm != "none" else 0.0,
            "samples": samples,
            "tokens": step.num_tokens,
            "supervised_tokens": step.num_supervised,
        }

    def _restore(self, folder: Path | None) -> int:
        """Weights and moments of a checkpoint, or fresh ones with measured constants; the first step to do."""
        if folder is None:
            fit_standardisation(self.plan, self.source)
            return 0
        state = checkpoint.load_state(folder)
        if state.data_digest != self.plan.data.digest:
            raise UserError(
                f"{folder} was trained on data {state.data_digest}, this is data {self.plan.data.digest}:"
                " samples or tokens have changed; start a new run with another --out"
            )
        checkpoint.load_model(folder, self.model, with_llm=self.plan.built.saves_llm)
        checkpoint.load_optimizer(folder, self.optimizer, self.names, state.step)
        return state.step

    def _save(self, done: int) -> None:
        if self.accelerator.is_main_process:
            checkpoint.save(
                self.out,
                step=done,
                weights=checkpoint.model_weights(self.model, with_llm=self.plan.built.saves_llm),
                optimizer=checkpoint.optimizer_tensors(self.optimizer, self.names),
                data_digest=self.plan.data.digest,
                identities={encoder: shape.identity for encoder, shape in self.plan.record.shapes.items()},
                keep=self.config.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _agree(self, wants_to_stop: bool) -> bool:
        """Whether any rank was told to end: they must all stop at the same step."""
        if self.accelerator.num_processes == 1:
            return wants_to_stop
        flag = torch.tensor(float(wants_to_stop), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)


def _accelerator(config: TrainConfig) -> Accelerator:
    return Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")


def _starting_point(out: Path, config: TrainConfig, resume: bool) -> Path | None:
    """The checkpoint to go on from; an existing run is neither overwritten nor continued with other settings."""
    if not (out / CONFIG_FILE).exists():
        return None
    if not resume:
        raise UserError(f"{out} holds a run already; go on with --resume auto, or choose another --out")
    before = read_config(out)
    names = [f.name for f in fields(config) if f.name not in FREE_ON_RESUME | {"allow_fresh_frozen"}]
    if odd := [name for name in names if getattr(before, name) != getattr(config, name)]:
        values = "; ".join(f"{name} was {getattr(before, name)!r}, is {getattr(config, name)!r}" for name in odd)
        raise UserError(
            f"{out} was started with other settings ({values}); resume with the same, or choose another --out"
        )
    return checkpoint.newest(out)


def _write_folder(out: Path, plan: Plan) -> None:
    """Settings, record and tokenizer, before the first step."""
    out.mkdir(parents=True, exist_ok=True)
    save_shape(plan.built.llm, out / LLM_FOLDER)
    plan.record.write(out)
    (out / CONFIG_FILE).write_text(plan.config.to_yaml())


@contextlib.contextmanager
def _terminated() -> Iterator[Callable[[], bool]]:
    """A question that turns true once SIGTERM has come: the step is finished and a checkpoint written, then we stop."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told.is_set  # signals reach the main thread only
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
