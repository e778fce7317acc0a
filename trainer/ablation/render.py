"""What the ablation commands print for a person; programs get the same facts with --json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.ablation.execute import PinnedSweep, RunOutcome


def print_runs(sweep: PinnedSweep) -> None:
    """Print the runs of a dry run, and what pins them."""
    from mervcache.console import console, table  # rich

    rows = []
    for run in sweep.runs:
        grid = "stored" if run.tokens_per_frame is None else run.tokens_per_frame
        axes = (run.fusion, run.projector, grid) if run.encoders else ("-", "-", "-")
        note = "" if run.is_trained else "frozen LLM: scored as it is"
        rows.append(("+".join(run.encoders) or "text only", *axes, f"{run.rate:g}", run.seed, note))
    columns = ("encoders", "fusion", "projector", "tokens/frame", "rate", "seed", "")
    table(columns, rows, right=("tokens/frame", "rate", "seed"))
    console().print(
        f"{len(sweep.runs):,} runs of {len(sweep.samples):,} samples, scored on {len(sweep.questions):,} questions:"
        f" clips with tokens of {', '.join(sweep.encoders)} in snapshot {sweep.pins['snapshot']}",
        markup=False,
    )


def print_outcomes(out: Path, outcomes: Sequence[RunOutcome]) -> None:
    """Print a row per run, then what to do next."""
    from mervcache.console import console, table  # rich

    rows = [
        (
            outcome.name,
            outcome.status,
            "-" if outcome.accuracy is None else f"{outcome.accuracy:.3f}",
            "-" if outcome.questions is None else f"{outcome.questions:,}",
            outcome.error,
        )
        for outcome in outcomes
    ]
    has_errors = any(outcome.error for outcome in outcomes)
    columns = ("run", "status", "accuracy", "questions", *(["error"] if has_errors else []))
    table(columns, [row[: len(columns)] for row in rows], right=("accuracy", "questions"))
    finished = sum(outcome.status == "finished" for outcome in outcomes)
    if finished == len(outcomes):
        console().print(f"all {finished} runs are scored; next: merv-eval table {out}", markup=False)
    else:
        console().print(
            f"{finished} of {len(outcomes)} runs are scored; the same command again goes on with the others",
            markup=False,
        )
