"""Progress: what a person sees of a run on stderr, and what a program reads of it in metrics.jsonl.

Every step has its line in metrics.jsonl (loss, gradient norm, learning rates, tokens), written every `log_every` steps
together with the speed of these steps. A resumed run drops the lines behind its checkpoint, so the file is one curve.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

METRICS_FILE = "metrics.jsonl"


class RunProgress:
    """A bar on stderr and the metrics file; silent on ranks that are not the first."""

    def __init__(self, run: Path, *, start: int, stop: int, is_first_rank: bool, is_quiet: bool = False) -> None:
        self._file = None
        self._rows: list[dict[str, Any]] = []
        self._began = time.perf_counter()
        self._waited_s = 0.0
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=is_quiet or not is_first_rank,
        )
        self._task = self._bar.add_task("train", total=stop, completed=start, facts="")
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
        self._bar.advance(self._task)

    def flush(self, *, waited_s: float) -> None:
        """Write the rows since the last flush; `waited_s` is all the time the loop has waited for data."""
        if not self._rows:
            return
        rows = [{name: _number(value) for name, value in row.items()} for row in self._rows]
        seconds = time.perf_counter() - self._began
        speed = {
            "samples_per_s": sum(row["samples"] for row in rows) / seconds,
            "tokens_per_s": sum(row["tokens"] for row in rows) / seconds,
            "wait_share": min((waited_s - self._waited_s) / seconds, 1.0),
        }
        if self._file is not None:
            self._file.writelines(json.dumps({**row, **speed}) + "\n" for row in rows)
            self._file.flush()
        last = rows[-1]
        facts = (
            f"loss {last['loss']:.4f}  lr {last['projector_lr']:.1e}  {speed['samples_per_s']:.1f} samples/s"
            f"  {speed['tokens_per_s']:.0f} tokens/s  waits {speed['wait_share']:.0%}"
        )
        self._bar.update(self._task, facts=facts)
        self._rows, self._waited_s, self._began = [], waited_s, time.perf_counter()


def open_metrics(path: Path, start: int) -> Any:
    """The metrics file open for appending, without lines of steps that will be done again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) < start]
        path.write_text("".join(line + "\n" for line in kept))
    return path.open("a")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All steps' metrics of a run."""
    return [json.loads(line) for line in (Path(run) / METRICS_FILE).read_text().splitlines()]


def _step_of(line: str) -> float:
    """The step of a line; a line that a kill cut short belongs to no step that is kept."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
