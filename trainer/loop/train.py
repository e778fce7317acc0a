"""The training loop: from samples and a token source to a run's folder.

The loss is the cross-entropy summed over the supervised tokens of the global batch, divided by their number, so it
depends neither on ranks nor on gradient accumulation; every rank knows that number without communication, because the
order of the samples is a pure function. Random numbers are seeded per step: a resumed run has bit-identical losses on
the CPU. accelerate provides device, precision and data parallelism.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn import Parameter

from featurestore.clips import Sample
from mervcache.console import ProgressLine
from mervcache.errors import UserError
from trainer.config import OptimizerConfig, TrainConfig
from trainer.data.batches import Prefetch, Step
from trainer.data.order import derive_seed
from trainer.data.tokens import TokenSource
from trainer.loop import distributed
from trainer.loop.distributed import any_rank, deterministic, make_accelerator, prepare
from trainer.loop.plan import Plan, Validation, fit_standardisation, make_plan
from trainer.model.llm import LoadedLLM, is_adapter
from trainer.model.video_llm import VideoLLM
from trainer.runs import checkpoint
from trainer.runs.checkpoint import checkpoint_to_resume, full_tensor, gather_full, write_folder
from trainer.runs.run_record import METRICS_FILE, open_metrics

LR_SETTINGS = {  # module of VideoLLM -> the setting of its learning rate
    "projectors": "projector_lr",
    "fusion": "fusion_lr",
    "llm": "llm_lr",
    "trained_encoders": "encoder_lr",
}
ADAPTER_LR = "lora_lr"  # of the adapters inside the LLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of a finished or stopped run."""

    run: str
    steps: int  # done
    num_steps: int  # of the whole run
    loss: float  # of the last step
    data_digest: str
    checkpoint: str  # the newest
    best: str = ""  # the best by validation; empty: none was validated

    @classmethod
    def of_run(cls, run: Path, **facts: Any) -> TrainResult:
        """The result with the checkpoints that the run's folder holds."""
        newest, best = checkpoint.newest(run), checkpoint.best(run)
        return cls(run=str(run), checkpoint=str(newest or ""), best=str(best or ""), **facts)


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
    accelerator = make_accelerator(config, out)
    folder = checkpoint_to_resume(out, config, resume)
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
        num_ranks=accelerator.num_processes,
    )
    digests = set(gather_object([plan.data.digest]))  # each process opened the store by itself
    if len(digests) > 1:
        raise UserError(
            f"the processes of this run opened different data ({', '.join(sorted(digest[:12] for digest in digests))}):"
            " the store has changed meanwhile; start the same command again"
        )
    validation = Validation(plan, samples, source, accelerator) if config.eval_every else None
    if accelerator.is_main_process:
        write_folder(out, plan.built, plan.record, is_new=folder is None)
    with deterministic(config.deterministic):
        return _Loop(plan, source, accelerator, validation, out).run(folder, stop_at, quiet)


class _Loop:
    """One process's part of a run."""

    def __init__(
        self, plan: Plan, source: TokenSource, accelerator: Accelerator, validation: Validation | None, out: Path
    ) -> None:
        self.plan, self.source, self.accelerator, self.out = plan, source, accelerator, out
        self.config, self.validation = plan.config, validation
        self.model: VideoLLM = plan.built.model
        self.optimizer = build_optimizer(self.model, self.config.optimizer)
        self.names: dict[int, str] = {}  # id(parameter) -> name, once the model is on device and ranks
        self.timer = CheckpointTimer(self.config.checkpoint_minutes)
        self.best: tuple[float, float] | None = None  # goodness of the best validation so far

    def run(self, folder: Path | None, stop_at: int | None, quiet: bool) -> TrainResult:
        """Start, or go on from the checkpoint `folder`, and step to the end, to `stop_at`, or until a stop signal."""
        config, accelerator, num_steps = self.config, self.accelerator, self.plan.batches.num_steps
        start = self._restore_model(folder)
        model, optimizer = prepare(accelerator, self.model, self.optimizer)
        self.names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        if folder is not None:
            checkpoint.load_optimizer(folder, self.optimizer, self.names, start)
            self.best = checkpoint.best_goodness(self.out)
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
        )
        done, loss = start, torch.tensor(float("nan"))
        with steps, metrics, stop_signals() as is_stop_requested:
            for number, step in enumerate(steps, start=start):
                row = self._step(model, optimizer, number, step)
                done, loss = number + 1, row["loss"]
                is_time = accelerator.is_main_process and self.timer.is_due()  # by the first rank's clock
                is_stopped, is_time = any_rank(accelerator, is_stop_requested(), is_time)
                validated: dict[str, float] = {}
                if self.validation and not is_stopped and (done % config.eval_every == 0 or done == num_steps):
                    with metrics.paused():
                        validated = self.validation()
                metrics.advance(row | validated)
                is_last = done == stop or is_stopped
                # A new best validation is always kept.
                saves = is_last or is_time or done % config.checkpoint_every == 0 or self._is_best(validated)
                if saves or done % config.log_every == 0:
                    # A killed run resumes from its checkpoint: the rows of the steps before it must be on disk by then.
                    metrics.flush(waited_s=steps.waited_s, is_synced=saves)
                if saves:
                    self._save(done, validated)
                if is_last:
                    break
        distributed.stop_trackers(accelerator)
        return TrainResult.of_run(
            self.out, steps=done, num_steps=num_steps, loss=float(loss), data_digest=self.plan.data.digest
        )

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

    def _log_start(self, start: int) -> None:
        begins = f"resumes after step {start}" if start else "starts"
        if not start and (self.out / METRICS_FILE).exists():
            begins = "had no checkpoint yet and starts again"
        config, tokens = self.config, self.plan.record.store or "media that are decoded and encoded now"
        logger.info(
            f"{self.out} {begins}: {self.plan.batches.num_steps} steps of {config.batch_size} samples, {config.llm},"
            f" tokens of {tokens}; a checkpoint every {config.checkpoint_every} steps"
        )

    def _read(self, number: int) -> Step:
        """A step's batches; for a GPU in pinned memory, so that copies overlap with compute."""
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
                # Data parallelism averages gradients over ranks; here they are parts of a sum.
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        return {
            "step": number,
            "loss": accelerator.reduce(total, "sum"),
            "grad_norm": full_tensor(norm.detach()),
            **current_rates(self.optimizer),
            "samples": config.batch_size,
            "tokens": step.num_tokens,
            "supervised_tokens": step.num_supervised,
        }

    def _is_best(self, validated: Mapping[str, float]) -> bool:
        return bool(validated) and (self.best is None or checkpoint.goodness(validated) > self.best)

    def _save(self, done: int, validated: Mapping[str, float]) -> None:
        """A checkpoint of full tensors: every rank contributes its shards, the first one writes."""
        is_writer = self.accelerator.is_main_process
        weights = checkpoint.model_weights(self.model, with_llm=self.plan.built.saves_llm)
        moments = checkpoint.optimizer_tensors(self.optimizer, self.names)
        weights, moments = gather_full(weights, keep=is_writer), gather_full(moments, keep=is_writer)
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
        self.timer.reset()
        self.accelerator.wait_for_everyone()


def build_optimizer(model: VideoLLM, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with a group per part and decay; tensors with fewer than two axes never decay.

    `set_rates` sets the learning rates before each step. Raises UserError where nothing is trained.
    """
    members: dict[tuple[str, bool], list[Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.partition(".")[0]
            setting = ADAPTER_LR if part == "llm" and is_adapter(name) else LR_SETTINGS[part]
            members[setting, parameter.ndim > 1 and not name.endswith(".bias")].append(parameter)
    groups = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "rate": setting,
            "peak": getattr(config, setting),
            "lr": 0.0,
        }
        for (setting, decays), parameters in members.items()
    ]
    if not groups:
        raise UserError("nothing is trained: the fusion and the projectors have no parameters and the LLM is frozen")
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)


def set_rates(optimizer: torch.optim.Optimizer, step: int, num_steps: int, config: OptimizerConfig) -> None:
    """Set every group's learning rate for step 0, 1, ..."""
    factor = rate_factor(step, num_steps, int(config.warmup_ratio * num_steps))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def current_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Setting -> current learning rate, of what is trained."""
    return {group["rate"]: group["lr"] for group in optimizer.param_groups}


def rate_factor(step: int, num_steps: int, num_warmup: int) -> float:
    """Share of the peak rate: linear up over `num_warmup` steps, then half a cosine to zero.

    As `get_cosine_schedule_with_warmup` of transformers, but warming up from the first step, which has rate 0 there.
    """
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + cos(pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True once SIGTERM or Ctrl-C was received; a second Ctrl-C stops at once."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received.is_set  # signals reach the main thread only
        return

    def stop(number: int, frame: object) -> None:
        received.set()
        if number == signal.SIGINT:
            print("\nstopping after this step, which is saved (once more to stop at once)", file=sys.stderr, flush=True)
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    # A shell starts background processes with SIGINT ignored: Ctrl-C is then meant for another process.
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    numbers = (signal.SIGTERM,) if is_ignored else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield received.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class CheckpointTimer:
    """Due when `minutes` have passed since the last reset; never, without minutes."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._minutes, self._clock = minutes, clock
        self.reset()

    def reset(self) -> None:
        self._started = self._clock()

    def is_due(self) -> bool:
        return self._minutes is not None and self._clock() - self._started >= 60 * self._minutes


class MetricsWriter:
    """Progress on stderr and the rows of metrics.jsonl; silent on ranks that are not the first.

    Rows are written at each `flush`, with the speed of the steps since the last one.
    """

    def __init__(
        self,
        run: Path,
        *,
        start: int,
        stop: int,
        is_first_rank: bool,
        quiet: bool = False,
        log: Callable[[Mapping[str, Any]], None] | None = None,  # called with every row that is written
    ) -> None:
        self._log = log
        self._validation = ""  # text of the last one
        self._rows: list[dict[str, Any]] = []
        self._started, self._waited_s = time.perf_counter(), 0.0
        self._line = ProgressLine("train", total=stop, first=start, unit="steps", quiet=quiet or not is_first_rank)
        # Opening the file drops the lines of steps that will be done again.
        self._file = open_metrics(run / METRICS_FILE, start) if is_first_rank else None

    def __enter__(self) -> MetricsWriter:
        self._line.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._line.__exit__(*exception)
        if self._file is not None:
            self._file.close()

    def advance(self, row: dict[str, Any]) -> None:
        """One step done; tensors in `row` are read at the next `flush`, so that no step waits for the device."""
        self._rows.append(row)
        self._line.advance()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not counted as training time."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def flush(self, *, waited_s: float, is_synced: bool = False) -> None:
        """Write the rows since the last flush; `waited_s` is all the time the loop has waited for data.

        `is_synced`: they survive a power cut, like the checkpoint that is written next.
        """
        if not self._rows:
            return
        rows = [
            {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}
            for row in self._rows
        ]
        seconds = time.perf_counter() - self._started
        speed = {
            "samples_per_s": sum(row["samples"] for row in rows) / seconds,
            "tokens_per_s": sum(row["tokens"] for row in rows) / seconds,
            "wait_share": min((waited_s - self._waited_s) / seconds, 1.0),
        }
        rows = [{**row, **speed} for row in rows]
        if self._file is not None:
            self._file.writelines(json.dumps(row) + "\n" for row in rows)
            self._file.flush()
            if is_synced:
                os.fsync(self._file.fileno())
        for row in rows if self._log is not None else ():
            self._log(row)
        self._show(rows)
        self._rows, self._waited_s, self._started = [], waited_s, time.perf_counter()

    def _show(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            if "val_loss" in row:
                self._validation = f"  held out: loss {row['val_loss']:.4f}"
            if "val_accuracy" in row:
                self._validation += f", accuracy {row['val_accuracy']:.2f} (chance {row['val_chance']:.2f})"
        last = rows[-1]
        rate = max((value for name, value in last.items() if name.endswith("_lr")), default=0.0)
        self._line.set_postfix(
            f"loss {last['loss']:.4f}  lr {rate:.1e}  {last['samples_per_s']:.1f} samples/s"
            f"  {last['tokens_per_s']:.0f} tokens/s  waits {last['wait_share']:.0%}{self._validation}"
        )
