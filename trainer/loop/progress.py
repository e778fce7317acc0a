"""Progress: what a person sees of a run on stderr, and what a program reads of it in `trainer/runs/metrics.py`.

A step's row is written every `log_every` steps and before every checkpoint, together with the speed of the steps since
the last write.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.bar import Bar
from trainer.runs.metrics import METRICS_FILE, open_metrics


class RunProgress:
    """A bar on stderr and the metrics file; silent on ranks that are not the first."""

    def __init__(
        self,
        run: Path,
        *,
        start: int,
        stop: int,
        is_first_rank: bool,
        is_quiet: bool = False,
        log: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """`log` is told every row that is written: the door to other trackers."""
        self._file, self._log = None, log
        self._seen = ""  # of the last validation
        self._rows: list[dict[str, Any]] = []
        self._began = time.perf_counter()
        self._waited_s = 0.0
        self._bar = Bar("train", total=stop, start=start, is_quiet=is_quiet or not is_first_rank)
        if is_first_rank:
            self._file = open_metrics(run / METRICS_FILE, start)

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        if self._file is not None:
            self._file.close()

    def advance(self, row: dict[str, Any]) -> None:
        """One step done; tensors in `row` are read at the next `flush`, so that no step waits for the device."""
        self._rows.append(row)
        self._bar.advance()

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
        self._bar.tell(_facts(rows[-1]) + self._seen)
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
