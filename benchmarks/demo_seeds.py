"""The demo's scores over several seeds: mean and range by category, beside chance and beside text-only runs.

    make demo
    python benchmarks/demo_seeds.py --seeds 7,8,9

The store is the demo's; only the training differs: weights and the order of samples follow the seed. About three
minutes a seed on two cores. A run that is done is not done again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mervcache.config import overlay
from trainer.config import TrainConfig
from trainer.recipes import get_recipe

Scores = Mapping[str, Mapping[str, Any]]  # category -> its line of an evaluation


@click.command(context_settings={"show_default": True})
@click.option("--store", default="features/demo.zarr", type=click.Path(exists=True), help="Store of the demo's clips.")
@click.option("--seeds", default="7,8,9", help="Seeds of the runs.")
@click.option("--recipe", default="demo", help="Settings of the runs.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps of each run.  [default: the recipe's]")
@click.option("--grid", help="T,H,W of the visual tokens.  [default: the recipe's]")
@click.option("--out", default="runs/demo-seeds", type=click.Path(path_type=Path), help="Folder of the runs.")
def main(store: str, seeds: str, recipe: str, steps: int | None, grid: str | None, out: Path) -> None:
    """Train and score every seed, then print one markdown table."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    changes: dict[str, Any] = {"max_steps": steps} if steps else {}
    if grid:
        changes["projector"] = {"grid": [int(side) for side in grid.split(",")]}
    config = overlay(get_recipe(recipe), changes)
    measured = [scores_of(replace(config, seed=int(seed)), store, out) for seed in seeds.split(",")]
    text = table([seen for seen, _ in measured], [read for _, read in measured], seeds)
    (out / "table.md").write_text(text)
    click.echo(text)


def scores_of(config: TrainConfig, store: str, out: Path) -> tuple[Scores, Scores]:
    """Train with and without visual tokens; the scores of both on the held-out questions."""
    from trainer.evaluate import EvaluationRequest, evaluate_run
    from trainer.loop.train import train
    from trainer.sources import open_store

    seen, read = out / f"{config.seed}", out / f"{config.seed}-text-only"
    for each, folder in ((config, seen), (replace(config, mode="text-only"), read)):
        samples, source = open_store(store, each)
        train(each, samples, source, folder, store=store, resume=True)
    result = evaluate_run(seen, EvaluationRequest(store=store), [read])
    return by_category(result["scores"]), by_category(result["beside"][str(read)])


def by_category(rows: Sequence[Mapping[str, Any]]) -> Scores:
    return {row["category"]: row for row in rows}


def table(seen: Sequence[Scores], read: Sequence[Scores], seeds: str) -> str:
    """Markdown: a line per category, the one over all questions first."""

    def spread(runs: Sequence[Scores], category: str) -> str:
        values = [run[category]["accuracy"] for run in runs]
        return f"{sum(values) / len(values):.2f} ({min(values):.2f}-{max(values):.2f})"

    lines = [
        f"| questions about | number | seeds {seeds}: mean (range) | text only | chance |",
        "|---|---|---|---|---|",
    ]
    for category, row in seen[0].items():
        cells = [category, str(row["questions"]), spread(seen, category), spread(read, category)]
        lines.append("| " + " | ".join([*cells, f"{row['chance']:.2f}"]) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
