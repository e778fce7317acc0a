"""Train: the loop from token source and samples to a run's folder.

The loss is the cross-entropy summed over the supervised tokens of the global batch and divided by their number, so it
depends neither on ranks nor on accumulation; the number is known on every rank without asking, because order and
labels are. Random numbers are seeded per step. A run that is killed and resumed therefore has the losses of one that
was not, to the bit on the CPU. accelerate brings device, precision and data parallelism.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from featurestore.clips import Sample
from mervcache.console import say
from mervcache.errors import UserError
from trainer.config import TrainConfig
from trainer.data.batches import Step
from trainer.data.order import derive_seed
from trainer.data.prefetch import Prefetch
from trainer.data.tokens import TokenSource
from trainer.loop import trackers
from trainer.loop.interrupt import Alarm, terminated
from trainer.loop.optimizer import build_optimizer, current_rates, set_rates
from trainer.loop.plan import Plan, fit_standardisation, make_plan
from trainer.loop.progress import RunProgress
from trainer.loop.ranks import any_rank, deterministic, make_accelerator, prepare
from trainer.loop.validate import Validation
from trainer.model.video_llm import VideoLLM
from trainer.runs import checkpoint
from trainer.runs.folder import starting_point, write_folder
from trainer.runs.metrics import METRICS_FILE
from trainer.runs.shards import plain, whole


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished or stopped run says."""

    run: str
    steps: int  # done
    num_steps: int  # of the whole run
    loss: float  # of the last step
    data_digest: str
    checkpoint: str  # the newest
    best: str = ""  # the best by validation; empty: none was validated


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
    trackers.check_trackers(config)
    accelerator = make_accelerator(config, out)
    folder = starting_point(out, config, resume)
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
    _check_same_data(accelerator, plan)
    validation = Validation(plan, samples, source, accelerator) if config.eval_every else None
    if accelerator.is_main_process:
        write_folder(out, plan.built, plan.record, is_new=folder is None)
    with deterministic(config.deterministic):
        return _Loop(plan, source, accelerator, validation, out).run(folder, stop_at, is_quiet)


def _check_same_data(accelerator: Accelerator, plan: Plan) -> None:
    """Every process opens the store by itself, and a snapshot may be published in between."""
    digests = set(gather_object([plan.data.digest]))
    if len(digests) > 1:
        raise UserError(
            f"the processes of this run opened different data ({', '.join(sorted(digest[:12] for digest in digests))}):"
            " the store has changed meanwhile; start the same command again"
        )


class _Loop:
    """One process's part of a run."""

    def __init__(
        self, plan: Plan, source: TokenSource, accelerator: Accelerator, validation: Validation | None, out: Path
    ) -> None:
        self.plan, self.source, self.accelerator, self.out = plan, source, accelerator, out
        self.config, self.validation = plan.config, validation
        self.model: VideoLLM = plan.built.model
        self.optimizer = build_optimizer(self.model, self.config.optimizer)
        self.names: dict[int, str] = {}  # of the model's parameters, once they are on device and ranks
        self.alarm = Alarm(self.config.checkpoint_minutes)
        self.best: tuple[float, float] | None = None  # goodness of the best validation so far

    def run(self, folder: Path | None, stop_at: int | None, is_quiet: bool) -> TrainResult:
        """Start, or go on from the checkpoint `folder`, and step to the end, to `stop_at`, or until told to stop."""
        start = self._restore_model(folder)
        model, optimizer = self._prepare(folder, start)
        trackers.start_trackers(self.accelerator, self.config, self.out, start)
        num_steps = self.plan.batches.num_steps
        stop = min(num_steps, stop_at if stop_at is not None else num_steps)
        steps = Prefetch(self._read, start, stop, depth=self.config.prefetch_batches)
        self._say_start(start, is_quiet)
        shown = self._progress(start, is_quiet)
        done, loss = start, torch.tensor(float("nan"))
        with steps, shown, terminated() as is_terminated:
            for number, step in enumerate(steps, start=start):
                row = self._step(model, optimizer, number, step)
                done, loss = number + 1, row["loss"]
                is_told, is_time = any_rank(self.accelerator, is_terminated(), self._is_time())
                is_last = done == stop or is_told
                validated = {} if is_told else self._validate(done, shown)
                shown.advance(row | validated)
                self._keep(done, validated, shown, waited_s=steps.waited_s, is_due=is_last or is_time)
                if is_last:
                    break
        trackers.stop_trackers(self.accelerator)
        return self._result(done, float(loss))

    def _prepare(self, folder: Path | None, start: int) -> tuple[torch.nn.Module, Any]:
        """Model and optimizer on device and ranks, with the moments of a checkpoint."""
        prepared = prepare(self.accelerator, self.model, self.optimizer)
        self.names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        if folder is not None:
            checkpoint.load_optimizer(folder, self.optimizer, self.names, start)
            self.best = checkpoint.best_goodness(self.out)
        return prepared

    def _progress(self, start: int, is_quiet: bool) -> RunProgress:
        """Bar, metrics file and trackers; opening it drops the lines of steps that will be done again."""
        return RunProgress(
            self.out,
            start=start,
            stop=self.plan.batches.num_steps,
            is_first_rank=self.accelerator.is_main_process,
            is_quiet=is_quiet,
            log=lambda row: trackers.log(self.accelerator, row),
        )

    def _keep(
        self, done: int, validated: Mapping[str, float], shown: RunProgress, *, waited_s: float, is_due: bool
    ) -> None:
        """Write the rows and a checkpoint, each where it is due; a new best validation is always kept."""
        saves = is_due or done % self.config.checkpoint_every == 0 or self._is_best(validated)
        if saves or done % self.config.log_every == 0:
            # A run that is killed goes on behind its checkpoint: the steps before must be on disk by then.
            shown.flush(waited_s=waited_s, is_synced=saves)
        if saves:
            self._save(done, validated)

    def _result(self, done: int, loss: float) -> TrainResult:
        return TrainResult(
            run=str(self.out),
            steps=done,
            num_steps=self.plan.batches.num_steps,
            loss=loss,
            data_digest=self.plan.data.digest,
            checkpoint=str(checkpoint.newest(self.out) or ""),
            best=str(checkpoint.best(self.out) or ""),
        )

    def _read(self, number: int) -> Step:
        """A step's batches; where a GPU computes, in memory that it can copy from meanwhile."""
        step = self.plan.batches.step(number)
        if self.accelerator.device.type != "cuda":
            return step
        return replace(step, micro_batches=[batch.pinned() for batch in step.micro_batches])

    def _step(self, model: torch.nn.Module, optimizer: Any, number: int, step: Step) -> dict[str, Any]:
        """Forward and backward over the micro-batches, one update; a row of metrics."""
        config, accelerator = self.config, self.accelerator
        torch.manual_seed(derive_seed("step", config.seed, number, accelerator.process_index))
        set_rates(self.optimizer, number, self.plan.batches.num_steps, config.optimizer)
        model.train()
        total = torch.zeros((), device=accelerator.device)
        for index, (batch, divisor) in enumerate(zip(step.micro_batches, step.divisors, strict=True)):
            # FSDP sums every time: without it each rank would keep whole fp32 gradients between micro-batches.
            is_summed = accelerator.is_fsdp2 or index == len(step.micro_batches) - 1
            with contextlib.nullcontext() if is_summed else accelerator.no_sync(model):
                with accelerator.autocast():  # FSDP's own precision is that of weights alone
                    loss = model(batch.to(accelerator.device)) / divisor
                # Data parallelism averages gradients over ranks; ours are parts of a sum.
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        return {
            "step": number,
            "loss": accelerator.reduce(total, "sum"),
            "grad_norm": plain(norm.detach()),
            **current_rates(self.optimizer),
            "samples": config.batch_size,
            "tokens": step.num_tokens,
            "supervised_tokens": step.num_supervised,
        }

    def _validate(self, done: int, shown: RunProgress) -> dict[str, float]:
        """Held-out metrics where they are due: every so many steps, and when all is done."""
        if self.validation is None or (done % self.config.eval_every and done != self.plan.batches.num_steps):
            return {}
        with shown.paused():
            return self.validation()

    def _is_best(self, validated: Mapping[str, float]) -> bool:
        return bool(validated) and (self.best is None or checkpoint.goodness(validated) > self.best)

    def _say_start(self, start: int, is_quiet: bool) -> None:
        """What a log should begin with; a run that was stopped before its first checkpoint begins anew, and says so."""
        if is_quiet or not self.accelerator.is_main_process:
            return
        begins = f"goes on behind step {start}" if start else "starts"
        if not start and (self.out / METRICS_FILE).exists():
            begins = "had no checkpoint yet and starts again"
        config, tokens = self.config, self.plan.record.store or "media that are decoded and encoded now"
        told = (
            f"{self.out} {begins}: {self.plan.batches.num_steps} steps of {config.batch_size} samples, {config.llm},"
            f" tokens of {tokens}; a checkpoint every {config.checkpoint_every} steps"
        )
        say(told)

    def _is_time(self) -> bool:
        """Whether a checkpoint is due by the first rank's clock."""
        return self.accelerator.is_main_process and self.alarm.rings()

    def _restore_model(self, folder: Path | None) -> int:
        """Weights of a checkpoint, or fresh ones with measured constants; the first step to do."""
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
        return state.step

    def _save(self, done: int, validated: Mapping[str, float]) -> None:
        """A checkpoint of whole tensors: every rank brings its shards, the first one writes."""
        is_writer = self.accelerator.is_main_process
        weights = checkpoint.model_weights(self.model, with_llm=self.plan.built.saves_llm)
        moments = checkpoint.optimizer_tensors(self.optimizer, self.names)
        weights, moments = whole(weights, keep=is_writer), whole(moments, keep=is_writer)
        if is_writer:
            checkpoint.save(
                self.out,
                step=done,
                weights=weights,
                optimizer=moments,
                data_digest=self.plan.data.digest,
                identities={encoder: shape.identity for encoder, shape in self.plan.record.shapes.items()},
                keep=self.config.keep_checkpoints,
                validation=validated,
            )
        if self._is_best(validated):
            self.best = checkpoint.goodness(validated)
        self.alarm.set()
        self.accelerator.wait_for_everyone()
