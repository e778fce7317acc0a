"""Train: the loop from token source and samples to a run's folder.

The loss is the cross-entropy summed over the supervised tokens of the global batch and divided by their number, so it
depends neither on ranks nor on accumulation; the number is known on every rank without asking, because order and
labels are. Random numbers are seeded per step. A run that is killed and resumed therefore has the losses of one that
was not, to the bit on the CPU. accelerate brings device, precision and data parallelism.

Optimizer: AdamW with a group per part and decay, and the learning rate as a function of the step.

Interrupt: when a run leaves its loop or writes a checkpoint before its time: told to end, or by the clock.

Progress: what a person sees of a run on stderr, and what a program reads of it in `trainer/runs/run_record.py`.

A step's row is written every `log_every` steps and before every checkpoint, together with the speed of the steps since
the last write.
"""

from __future__ import annotations

import contextlib
import json
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
from mervcache.console import ProgressLine, echo
from mervcache.errors import UserError
from trainer.config import OptimizerConfig, TrainConfig
from trainer.data.batches import Prefetch, Step
from trainer.data.order import derive_seed
from trainer.data.tokens import TokenSource
from trainer.loop import distributed
from trainer.loop.distributed import any_rank, deterministic, make_accelerator, prepare
from trainer.loop.plan import Plan, Validation, fit_standardisation, make_plan
from trainer.model.llm import is_adapter
from trainer.model.video_llm import VideoLLM
from trainer.runs import checkpoint
from trainer.runs.checkpoint import plain, resolve_start, whole, write_folder
from trainer.runs.run_record import METRICS_FILE, open_metrics

PARTS = {  # module of VideoLLM -> its setting
    "projectors": "projector_lr",
    "fusion": "fusion_lr",
    "llm": "llm_lr",
    "trained_encoders": "encoder_lr",
}
ADAPTERS = "lora_lr"  # of the adapters inside the LLM


def build_optimizer(model: VideoLLM, config: OptimizerConfig) -> torch.optim.AdamW:
    """Groups by part; tensors with fewer than two axes never decay. Rates are set by `set_rates` before each step."""
    members: dict[tuple[str, bool], list[Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[rate_setting(name), parameter.ndim > 1 and not name.endswith(".bias")].append(parameter)
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


def rate_setting(name: str) -> str:
    """The setting that holds the learning rate of the parameter of that name."""
    part = name.partition(".")[0]
    return ADAPTERS if part == "llm" and is_adapter(name) else PARTS[part]


def set_rates(optimizer: torch.optim.Optimizer, step: int, num_steps: int, config: OptimizerConfig) -> None:
    """Every group's rate for step 0, 1, ..."""
    factor = rate_factor(step, num_steps, int(config.warmup_ratio * num_steps))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def current_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Setting -> the rate now, of what is trained."""
    return {group["rate"]: group["lr"] for group in optimizer.param_groups}


def rate_factor(step: int, num_steps: int, num_warmup: int) -> float:
    """Share of the peak rate: linear up over `num_warmup` steps, then half a cosine to zero.

    As `get_cosine_schedule_with_warmup` of transformers, but warming up from the first step, which has rate 0 there.
    """
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + cos(pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


@contextlib.contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """A question that turns true once SIGTERM or Ctrl-C has come: the step is finished, a checkpoint written, we stop.

    A second Ctrl-C stops at once.
    """
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told.is_set  # signals reach the main thread only
        return

    def stop(number: int, frame: object) -> None:
        told.set()
        if number == signal.SIGINT:
            print("\nstopping after this step, which is saved (once more to stop at once)", file=sys.stderr, flush=True)
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    # A shell starts what it puts in the background deaf to Ctrl-C, which is then meant for somebody else.
    is_deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    heard = (signal.SIGTERM,) if is_deaf else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield told.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Alarm:
    """Rings when `minutes` have passed since it was set; never, without minutes."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._minutes, self._clock = minutes, clock
        self.set()

    def set(self) -> None:
        """Start anew."""
        self._began = self._clock()

    def rings(self) -> bool:
        """Whether the time is over."""
        return self._minutes is not None and self._clock() - self._began >= 60 * self._minutes


class MetricsWriter:
    """A bar on stderr and the metrics file; silent on ranks that are not the first."""

    def __init__(
        self,
        run: Path,
        *,
        start: int,
        stop: int,
        is_first_rank: bool,
        quiet: bool = False,
        log: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """`log` is told every row that is written: the door to other trackers."""
        self._file, self._log = None, log
        self._seen = ""  # of the last validation
        self._rows: list[dict[str, Any]] = []
        self._began = time.perf_counter()
        self._waited_s = 0.0
        self._line = ProgressLine("train", total=stop, first=start, unit="steps", quiet=quiet or not is_first_rank)
        if is_first_rank:
            self._file = open_metrics(run / METRICS_FILE, start)

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
        """Time inside counts as no step's."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def flush(self, *, waited_s: float, is_synced: bool = False) -> None:
        """Write the rows since the last flush; `waited_s` is all the time the loop has waited for data.

        `is_synced`: they outlive a power cut, as the checkpoint does that is written next.
        """
        if not self._rows:
            return
        rows = [{name: _number(value) for name, value in row.items()} for row in self._rows]
        seconds = time.perf_counter() - self._began
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
        self._seen = next((_validation(row) for row in reversed(rows) if "val_loss" in row), self._seen)
        self._line.set_postfix(_facts(rows[-1]) + self._seen)
        self._rows, self._waited_s, self._began = [], waited_s, time.perf_counter()


def _facts(row: Mapping[str, Any]) -> str:
    rate = max((value for name, value in row.items() if name.endswith("_lr")), default=0.0)
    return (
        f"loss {row['loss']:.4f}  lr {rate:.1e}  {row['samples_per_s']:.1f} samples/s"
        f"  {row['tokens_per_s']:.0f} tokens/s  waits {row['wait_share']:.0%}"
    )


def _validation(row: Mapping[str, Any]) -> str:
    accuracy = f", accuracy {row['val_accuracy']:.2f} (chance {row['val_chance']:.2f})" if "val_accuracy" in row else ""
    return f"  held out: loss {row['val_loss']:.4f}{accuracy}"


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


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
    quiet: bool = False,
) -> TrainResult:
    """Train to the end, or to step `stop_at`; `resume` goes on from the newest checkpoint in `out`, if there is one."""
    out = Path(out)
    distributed.check_trackers(config)
    accelerator = make_accelerator(config, out)
    folder = resolve_start(out, config, resume)
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
        return _Loop(plan, source, accelerator, validation, out).run(folder, stop_at, quiet)


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

    def run(self, folder: Path | None, stop_at: int | None, quiet: bool) -> TrainResult:
        """Start, or go on from the checkpoint `folder`, and step to the end, to `stop_at`, or until told to stop."""
        start = self._restore_model(folder)
        model, optimizer = self._prepare(folder, start)
        distributed.start_trackers(self.accelerator, self.config, self.out, start)
        num_steps = self.plan.batches.num_steps
        stop = min(num_steps, stop_at if stop_at is not None else num_steps)
        steps = Prefetch(self._read, start, stop, depth=self.config.prefetch_batches)
        self._say_start(start, quiet)
        shown = self._progress(start, quiet)
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
        distributed.stop_trackers(self.accelerator)
        return self._result(done, float(loss))

    def _prepare(self, folder: Path | None, start: int) -> tuple[torch.nn.Module, Any]:
        """Model and optimizer on device and ranks, with the moments of a checkpoint."""
        prepared = prepare(self.accelerator, self.model, self.optimizer)
        self.names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        if folder is not None:
            checkpoint.load_optimizer(folder, self.optimizer, self.names, start)
            self.best = checkpoint.best_goodness(self.out)
        return prepared

    def _progress(self, start: int, quiet: bool) -> MetricsWriter:
        """Bar, metrics file and trackers; opening it drops the lines of steps that will be done again."""
        return MetricsWriter(
            self.out,
            start=start,
            stop=self.plan.batches.num_steps,
            is_first_rank=self.accelerator.is_main_process,
            quiet=quiet,
            log=lambda row: distributed.log(self.accelerator, row),
        )

    def _keep(
        self, done: int, validated: Mapping[str, float], shown: MetricsWriter, *, waited_s: float, is_due: bool
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

    def _validate(self, done: int, shown: MetricsWriter) -> dict[str, float]:
        """Held-out metrics where they are due: every so many steps, and when all is done."""
        if self.validation is None or (done % self.config.eval_every and done != self.plan.batches.num_steps):
            return {}
        with shown.paused():
            return self.validation()

    def _is_best(self, validated: Mapping[str, float]) -> bool:
        return bool(validated) and (self.best is None or checkpoint.goodness(validated) > self.best)

    def _say_start(self, start: int, quiet: bool) -> None:
        """What a log should begin with; a run that was stopped before its first checkpoint begins anew, and says so."""
        if quiet or not self.accelerator.is_main_process:
            return
        begins = f"goes on behind step {start}" if start else "starts"
        if not start and (self.out / METRICS_FILE).exists():
            begins = "had no checkpoint yet and starts again"
        config, tokens = self.config, self.plan.record.store or "media that are decoded and encoded now"
        told = (
            f"{self.out} {begins}: {self.plan.batches.num_steps} steps of {config.batch_size} samples, {config.llm},"
            f" tokens of {tokens}; a checkpoint every {config.checkpoint_every} steps"
        )
        echo(told)

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
