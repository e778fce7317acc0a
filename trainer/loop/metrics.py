"""Metrics of a training run: its progress line and the rows of metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mervcache.console import ProgressLine, plural
from trainer.loop.device import Device, TrainingFlops
from trainer.runs.run_record import open_metrics
from trainer.runs.stage_folders import METRICS_FILE


class MetricsWriter:
    """Progress on stderr and the rows of metrics.jsonl; silent on ranks that are not the first.

    Rows are written at each `flush`, with the speed of the steps since the last one: samples_per_s, tokens_per_s (real
    positions of text and visual tokens), data_wait (seconds that the loop stood still for data) and its share
    wait_share; on a GPU also peak_memory (bytes of the first rank so far) and mfu, see `device.py`.
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
        device: torch.device | None = None,
        flops: TrainingFlops | None = None,
        num_ranks: int = 1,
    ) -> None:
        self._log = log
        self._device = Device(device, num_ranks)
        self._flops = flops or TrainingFlops()
        self._validation, self._num_skipped = "", 0  # text of the last one
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

    def flush(self, *, waited_s: float, is_synced: bool = False) -> list[dict[str, Any]]:
        """Write and return the rows since the last flush; `waited_s` is all the time the loop has waited for data.

        `is_synced`: they survive a power cut, like the checkpoint that is written next.
        """
        if not self._rows:
            return []
        rows = [{name: finite_or_none(value) for name, value in row.items()} for row in self._rows]
        seconds = time.perf_counter() - self._started
        tokens, answers = (sum(row.get(name, 0) for row in rows) for name in ("tokens", "supervised_tokens"))
        speed = {
            "samples_per_s": sum(row["samples"] for row in rows) / seconds,
            "tokens_per_s": tokens / seconds,
            "wait_share": min((waited_s - self._waited_s) / seconds, 1.0),
            "data_wait": waited_s - self._waited_s,
            **self._device.figures(self._flops.of_steps(tokens, answers) / seconds),
        }
        rows = [{**row, **speed} for row in rows]
        if self._file is not None:
            self._file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            self._file.flush()
            if is_synced:
                os.fsync(self._file.fileno())
        if self._log is not None:
            for row in rows:
                self._log({name: value for name, value in row.items() if value is not None})
        self._show(rows)
        self._rows, self._waited_s, self._started = [], waited_s, time.perf_counter()
        return rows

    def _show(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._num_skipped += row.get("skipped", 0)
            if "val_loss" in row:
                self._validation = f"  held out: loss {_shown(row['val_loss'], 4)}"
            if "val_accuracy" in row:
                accuracy, chance = _shown(row["val_accuracy"], 2), _shown(row["val_chance"], 2)
                self._validation += f", accuracy {accuracy} by likelihood (chance {chance})"
        last = rows[-1]
        rate = max((value for name, value in last.items() if name.endswith("_lr")), default=0.0)
        skipped = f"  {plural(self._num_skipped, 'step')} skipped" if self._num_skipped else ""
        self._line.set_postfix(
            f"loss {_shown(last['loss'], 4)}{skipped}  lr {rate:.1e}  {last['samples_per_s']:.1f} samples/s"
            f"  {last['tokens_per_s']:.0f} tokens/s  waits {last['wait_share']:.0%}{self._validation}",
            metrics=last,
        )


def finite_or_none(value: Any) -> Any:
    """A number from wherever it is; None for one that is not finite, which JSON cannot hold."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
