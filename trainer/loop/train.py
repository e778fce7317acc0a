"""The training loop: from samples and a token source to a run's folder.

The loss is the cross-entropy summed over the supervised tokens of the global batch, divided by their number, so it
depends neither on ranks nor on gradient accumulation; every rank knows that number without communication, because the
order of the samples is a pure function. Random numbers are seeded per step: a resumed run has bit-identical losses on
the CPU. accelerate provides device, precision and data parallelism.

A step whose loss or gradient is not finite changes neither weights nor moments and is counted. It is a step all the
same: its samples are not repeated, and the learning rate, a function of the step's number, goes on.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from featurestore.clips import Sample
from featurestore.locate import check_room
from mervcache.errors import MervCacheError, NonFiniteError, UserError
from mervcache.reprs import brief
from trainer.config import TrainConfig
from trainer.data.batches import Step
from trainer.data.prefetch import Prefetch
from trainer.data.tokens import TokenSource
from trainer.loop import distributed
from trainer.loop.accumulate import Gradients, read_limit
from trainer.loop.device import TrainingFlops
from trainer.loop.distributed import any_rank, deterministic, make_accelerator, on_first_rank, prepare, raise_together
from trainer.loop.interrupt import CheckpointTimer, stop_signals
from trainer.loop.metrics import MetricsWriter, finite_or_none
from trainer.loop.nonfinite import SkippedSteps, Trace
from trainer.loop.optimizer import build_optimizer, current_rates, set_rates
from trainer.loop.plan import Plan, Validation, fit_standardisation, make_plan
from trainer.loop.sizes import as_begun, size_warnings
from trainer.model.llm import LoadedLLM
from trainer.model.video_llm import VideoLLM
from trainer.runs import checkpoint
from trainer.runs.checkpoint import CheckpointState, checkpoint_to_resume, full_tensor, write_folder
from trainer.runs.disk import disk_faults, remove_leftovers
from trainer.runs.integrity import RunFiles
from trainer.runs.lock import run_lock
from trainer.runs.run_record import read_metrics
from trainer.runs.saver import BackgroundSaver, staged
from trainer.runs.stage_folders import METRICS_FILE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of a finished or stopped run."""

    run: str
    steps: int  # done
    num_steps: int  # of the whole run
    loss: float | None  # of the last step; None: it was not finite
    data_digest: str
    num_questions: int  # that `merv-eval run` asks
    checkpoint: str  # the newest
    best: str = ""  # the best by validation; empty: none was validated
    skipped: int = 0  # steps whose loss or gradient was not finite, so that they changed nothing
    unranked: int = 0  # validations with a number that was not finite

    def __repr__(self) -> str:
        loss = "not finite" if self.loss is None else f"{self.loss:.4g}"
        return brief(self, f"{self.run}: {self.steps} of {self.num_steps} steps, loss {loss}, {self.skipped} skipped")

    @property
    def is_complete(self) -> bool:
        """Whether no step and no validation was lost."""
        return not self.skipped and not self.unranked

    @classmethod
    def of_run(cls, run: Path, *, steps: int, **facts: Any) -> TrainResult:
        """The result with what the run's folder holds: checkpoints and metrics."""
        newest, best = checkpoint.newest(run), checkpoint.best(run)
        rows = read_metrics(run)
        is_last = bool(rows) and rows[-1]["step"] == steps - 1
        return cls(
            run=str(run),
            steps=steps,
            loss=finite_or_none(rows[-1].get("loss")) if is_last else None,
            checkpoint=str(newest or ""),
            best=str(best or ""),
            skipped=checkpoint.read_state(newest).skipped if newest else 0,
            unranked=sum(not checkpoint.is_ranked(metrics) for row in rows if (metrics := _validated(row))),
            **facts,
        )


def _validated(row: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in row.items() if name.startswith("val_")}


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
    llm: LoadedLLM | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train to the end, or to step `stop_at`; `resume` goes on from the newest checkpoint in `out`, if there is one.

    `words` are texts whose words a fresh LLM knows besides those of the samples, `llm` the config's LLM where it is
    loaded already and not trained. SIGTERM and Ctrl-C finish the step,
    write a checkpoint and return. Raises UserError before the first step for settings or data that do not fit the run.
    """
    out = Path(out)
    distributed.check_trackers(config)
    check_room(out, "run", "--out")
    accelerator = make_accelerator(config, out)
    with contextlib.ExitStack() as held:
        on_first_rank(accelerator, lambda: held.enter_context(run_lock(out)))
        config = as_begun(config, out) if resume else config
        folder = checkpoint_to_resume(out, config, resume)
        state = checkpoint.load_state(folder) if folder else None
        accelerator.wait_for_everyone()  # before the first rank writes what the others look for
        plan = make_plan(
            config,
            samples,
            source,
            store=store,
            run=out if folder else None,
            words=words,
            llm=llm,
            rank=accelerator.process_index,
            device=distributed.device_of(accelerator, config),
            limit=read_limit(out, config),
            # FSDP takes its shards from the host's memory.
            llm_device=None if accelerator.is_fsdp2 else accelerator.device,
        )
        held.callback(plan.rendered.flush)
        digests = set(gather_object([plan.data.digest]))  # each process opened the store by itself
        if len(digests) > 1:
            raise UserError(
                "the processes of this run opened different data"
                f" ({', '.join(sorted(digest[:12] for digest in digests))}): the store has changed meanwhile; start the"
                " same command again"
            )
        if state is not None and state.data_digest != plan.data.digest:
            raise UserError(
                f"{folder} was trained on data {state.data_digest}, this is data {plan.data.digest}:"
                " samples or tokens have changed; start a new run with another --out"
            )
        validation = Validation(plan, samples, source, accelerator) if config.eval_every else None

        def prepare_folder() -> RunFiles:
            remove_leftovers(out)
            if folder is not None:
                checkpoint.set_aside_after(folder)
            return write_folder(out, plan.built, plan.record, state)

        files = on_first_rank(accelerator, prepare_folder)
        with deterministic(config.deterministic), disk_faults(out, "metrics"):
            return _Loop(plan, source, accelerator, validation, out, files).run(folder, state, stop_at, quiet)


def time_steps(plan: Plan, source: TokenSource, numbers: Iterable[int]) -> list[tuple[float, float]]:
    """Seconds of reading and of computing of some steps of a plan; nothing is written, the weights do change.

    A run reads ahead, so its steps take the longer of both.
    """
    accelerator = make_accelerator(replace(plan.config, trackers=()), Path())
    loop = _Loop(plan, source, accelerator, None, Path(), None)
    model, optimizer = prepare(accelerator, loop.model, loop.optimizer)
    found = []
    for number in numbers:
        began = time.perf_counter()
        step = loop._read(number)
        read = time.perf_counter()
        float(loop._step(model, optimizer, number, step)["loss"])  # waits for the device
        found.append((read - began, time.perf_counter() - read))
    return found


class _Loop:
    """One process's part of a run."""

    def __init__(
        self,
        plan: Plan,
        source: TokenSource,
        accelerator: Accelerator,
        validation: Validation | None,
        out: Path,
        files: RunFiles | None,
    ) -> None:
        self.plan, self.source, self.accelerator, self.out = plan, source, accelerator, out
        self.config, self.validation, self.files = plan.config, validation, files
        self.model: VideoLLM = plan.built.model
        # 8-bit AdamW has no flag on the device by which it skips an update.
        self.is_deferred = self.config.optimizer.name == "adamw" and distributed.decides_on_device(accelerator)
        is_fused = self.is_deferred or accelerator.device.type == "cuda"
        self.optimizer = build_optimizer(
            self.model, self.config.optimizer, fused=is_fused, is_sharded=accelerator.is_fsdp2
        )
        self.names: dict[int, str] = {}  # id(parameter) -> name, once the model is on device and ranks
        self.gradients = Gradients(plan, accelerator, None if out == Path() else out, self._read)
        self.timer = CheckpointTimer(self.config.checkpoint_minutes)
        self.saver = BackgroundSaver()
        self.group: Any = None  # of the ranks' threads that write sharded checkpoints
        self.best: tuple[float, float] | None = None  # goodness of the best validation so far
        self.skips = SkippedSteps(self.config.max_skipped_in_row)
        self.trace: Trace | None = None  # of a step that is the last chance
        self.is_stop_requested: Callable[[], bool] = lambda: False
        self.is_stopped = self.is_time = False  # as all ranks have decided in the last step

    def run(self, folder: Path | None, state: CheckpointState | None, stop_at: int | None, quiet: bool) -> TrainResult:
        """Start, or go on from the checkpoint `folder`, and step to the end, to `stop_at`, or until a stop signal."""
        config, accelerator, num_steps = self.config, self.accelerator, self.plan.batches.num_steps
        start = self._restore_model(folder, state, quiet=quiet or not accelerator.is_main_process)
        model, optimizer = prepare(accelerator, self.model, self.optimizer)
        self.names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self._check_weights()
        if folder is not None and state is not None:
            checkpoint.load_optimizer(folder, self.optimizer, self.names, start - state.skipped)
            self.best, self.skips.total = checkpoint.best_goodness(self.out), state.skipped
        self.group = distributed.side_group() if accelerator.is_fsdp2 else None
        distributed.start_trackers(accelerator, config, self.out, start)
        stop = min(num_steps, stop_at if stop_at is not None else num_steps)
        steps = Prefetch(self._read, start, stop, depth=config.prefetch_batches)
        if accelerator.is_main_process and not quiet:
            self._log_start(start)
        metrics = MetricsWriter(
            self.out,
            start=start,
            stop=num_steps,
            is_first_rank=accelerator.is_main_process,
            quiet=quiet,
            log=lambda row: distributed.log(accelerator, row),
            device=accelerator.device,
            flops=TrainingFlops.of(self.model),
            num_ranks=accelerator.num_processes,
        )
        done, saved = start, start
        with self.saver, steps, metrics, stop_signals() as self.is_stop_requested:
            for number, step in enumerate(steps, start=start):
                if step.limit != self.plan.batches.limit:  # made before memory ran out
                    step = self._read(number)
                row = self._step(model, optimizer, number, step)
                if self.gradients.has_failed:
                    metrics.flush(waited_s=steps.waited_s, is_synced=True)
                    if saved < number:
                        self._save(number, {})
                    distributed.stop_trackers(accelerator)
                    raise self.gradients.end(number, step)
                done = number + 1
                validated: dict[str, float] = {}
                is_due = done == num_steps or (config.eval_every is not None and done % config.eval_every == 0)
                if self.validation and not self.is_stopped and is_due:
                    with metrics.paused():
                        validated = self.validation()
                metrics.advance(row | validated)
                is_over = self.trace is not None and bool(row["skipped"])
                is_last = done == stop or self.is_stopped or is_over
                # A new best validation is always kept.
                saves = is_last or self.is_time or done % config.checkpoint_every == 0 or self._is_best(validated)
                if saves or done % config.log_every == 0:
                    # A killed run resumes from its checkpoint: the rows of the steps before it must be on disk by then.
                    rows = metrics.flush(waited_s=steps.waited_s, is_synced=saves)
                    for written in rows if self.is_deferred else ():
                        self.skips.count(bool(written["skipped"]))
                if is_over:
                    self._stop(done, saved)
                if saves:
                    self._save(done, validated)
                    saved = done
                if is_last:
                    break
            self._finish_save()
        distributed.stop_trackers(accelerator)
        return TrainResult.of_run(
            self.out,
            steps=done,
            num_steps=num_steps,
            data_digest=self.plan.data.digest,
            num_questions=self.plan.record.num_questions,
        )

    def _restore_model(self, folder: Path | None, state: CheckpointState | None, *, quiet: bool) -> int:
        """Weights of a checkpoint, or fresh ones with measured constants; the first step to do."""
        if folder is None or state is None:
            fit_standardisation(self.plan, self.source, quiet=quiet)
            return 0
        checkpoint.load_model(folder, self.model, with_llm=self.plan.built.saves_llm)
        return state.step

    def _check_weights(self) -> None:
        """Refuse weights and measured constants that no checkpoint may hold, before the first step."""
        names = checkpoint.nonfinite_names(checkpoint.model_weights(self.model, with_llm=self.plan.built.saves_llm))
        failure = None
        if names:
            failure = NonFiniteError(
                f"{', '.join(names[:3])} {'holds' if len(names) == 1 else 'hold'} infinite values or NaN before the"
                " first step: they come from the LLM, from init, or, as measured constants, from the tokens"
            )
        raise_together(self.accelerator, failure)

    def _stop(self, done: int, saved: int) -> None:
        """End a run whose steps change nothing any more; what was trained before them is saved."""
        place, first = self.trace.place() if self.trace else "", done - self.skips.in_a_row
        if saved < first:
            self.skips.total -= self.skips.in_a_row
            self._save(first, {})
        self._finish_save()
        distributed.stop_trackers(self.accelerator)
        raise NonFiniteError(
            f"steps {first} to {done - 1} of {self.out}, {self.skips.in_a_row} in a row, changed nothing: their loss or"
            f" gradient was not finite. In step {done - 1} the first value that is not finite is {place}. What was"
            " trained before is saved. Look at the samples and lower the learning rates in a new run;"
            " max_skipped_in_row in a config file allows more, and --resume auto goes on"
        )

    def _log_start(self, start: int) -> None:
        begins = f"resumes after step {start}" if start else "starts"
        if not start and (self.out / METRICS_FILE).exists():
            begins = "had no checkpoint yet and starts again"
        config, tokens = self.config, self.plan.record.store or "media that are decoded and encoded now"
        logger.info(
            f"{self.out} {begins}: {self.plan.batches.num_steps} steps of {config.batch_size} samples, {config.llm},"
            f" tokens of {tokens}; a checkpoint every {config.checkpoint_every} steps"
        )
        for line in size_warnings(config, self.plan.batches.order.num_per_epoch, self.plan.batches.num_steps):
            logger.warning(line)

    def _read(self, number: int) -> Step:
        """A step's batches; for a GPU in pinned memory, so that copies overlap with compute."""
        step = self.plan.batches.step(number)
        if self.accelerator.device.type != "cuda":
            return step
        return replace(step, micro_batches=[batch.pinned() for batch in step.micro_batches])

    def _step(self, model: torch.nn.Module, optimizer: Any, number: int, step: Step) -> dict[str, Any]:
        """Forward and backward over the micro-batches, one update; a row of metrics."""
        config, accelerator = self.config, self.accelerator
        set_rates(self.optimizer, number, self.plan.batches.num_steps, config.optimizer)
        model.train()
        self.trace = Trace(self.model) if self.skips.is_traced else None
        with self.trace or contextlib.nullcontext():
            total, step = self.gradients(model, optimizer, number, step)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm or float("inf"))
        norm = full_tensor(cast("Tensor", norm).detach())
        total = cast("Tensor", accelerator.reduce(total, "sum"))
        is_skipped = self._update(optimizer, total, norm)
        optimizer.zero_grad()
        return {
            "step": number,
            "loss": total,
            "grad_norm": norm,
            "skipped": is_skipped,
            **current_rates(self.optimizer),
            "samples": config.batch_size,
            "tokens": step.num_tokens,
            "padding_share": step.padding_share,
            "supervised_tokens": step.num_supervised,
            **({} if step.tokens_per_frame is None else {"tokens_per_frame": step.tokens_per_frame}),
        }

    def _update(self, optimizer: Any, loss: Tensor, norm: Tensor) -> int | Tensor:
        """One update, unless the loss or the gradient's norm is not finite; 1 if it was skipped.

        Both are sums over all ranks, so every rank decides the same. Several ranks read the decision together with
        their stop signals; on one GPU AdamW itself takes it on the device, so that no step waits for it.
        """
        is_odd = ~(loss.isfinite() & norm.isfinite())
        # The first rank's clock says when it is time for a checkpoint.
        flags = self.is_stop_requested(), self.accelerator.is_main_process and self.timer.is_due()
        if self.is_deferred:
            cast("Any", self.optimizer).found_inf = is_odd.float()  # as GradScaler sets it
        if self.is_deferred and self.trace is None:
            optimizer.step()
            self.is_stopped, self.is_time = any_rank(self.accelerator, *flags)
            return is_odd.int()
        flags = (*flags, self.gradients.has_failed)
        is_skipped, self.is_stopped, self.is_time, self.gradients.has_failed = any_rank(
            self.accelerator, is_odd, *flags
        )
        if self.gradients.has_failed:
            return 1
        if not is_skipped:
            optimizer.step()
        elif self.trace is not None:
            self.trace.look_at_parameters()
        if self.is_deferred:  # the total is counted when metrics are read
            self.skips.in_a_row = self.skips.in_a_row + 1 if is_skipped else 0
        else:
            self.skips.count(is_skipped)
        return int(is_skipped)

    def _is_best(self, validated: Mapping[str, float]) -> bool:
        return checkpoint.is_ranked(validated) and (self.best is None or checkpoint.goodness(validated) > self.best)

    def _save(self, done: int, validated: Mapping[str, float]) -> None:
        """Copy what a checkpoint holds and have it written: under FSDP by every rank its shards, else by the first."""
        self._finish_save()
        is_writer = self.accelerator.is_main_process
        weights = checkpoint.model_weights(self.model, with_llm=self.plan.built.saves_llm)
        moments = checkpoint.optimizer_tensors(self.optimizer, self.names)
        if self.group is not None:
            self._raise_together(lambda: checkpoint.check_finite(done, weights, moments))
        if is_writer or self.group is not None:
            self.saver.start(
                partial(
                    checkpoint.save,
                    self.out,
                    step=done,
                    weights=staged(weights),
                    optimizer=staged(moments),
                    data_digest=self.plan.data.digest,
                    identities={encoder: shape.identity for encoder, shape in self.plan.record.shapes.items()},
                    keep=self.config.keep_checkpoints,
                    validation=validated,
                    skipped=self.skips.total,
                    files=self.files,
                    group=self.group,
                    is_writer=is_writer,
                )
            )
        if self._is_best(validated):
            self.best = checkpoint.goodness(validated)
        self.timer.reset()

    def _finish_save(self) -> None:
        """Wait until the checkpoint that is being written has its name; where it failed, every rank does."""
        self._raise_together(self.saver.wait)

    def _raise_together(self, action: Callable[[], None]) -> None:
        failure = None
        try:
            action()
        except MervCacheError as error:
            failure = error
        raise_together(self.accelerator, failure)
