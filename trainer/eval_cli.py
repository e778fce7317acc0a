"""Command line of trained runs: `merv-eval`. Thin: parse, call one function of the house, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from trainer.command import CONTEXT, heavy_rooms, says_errors


@click.group(context_settings=CONTEXT)
def eval_main() -> None:
    """Measure trained runs."""


@eval_main.command("run")
@click.option("--checkpoint", "checkpoint", type=click.Path(path_type=Path), required=True, help="Folder of a run.")
@click.option("--store", help="Store of the questions' clips.  [default: the one the run was trained on]")
@click.option("--split", default="heldout", help="Split whose questions are asked.")
@click.option(
    "--beside",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Another run that answers the same questions, such as a text-only one; may be repeated.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Ask at most so many questions.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Questions at once, with all their options.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON, answers included.")
@says_errors
def eval_run(checkpoint: Path, store: str | None, beside: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Multiple-choice accuracy by category, beside chance and beside other runs."""
    run = heavy_rooms()
    result = run.evaluate_run(checkpoint, store, beside=beside, **options)
    if as_json:
        click.echo(json.dumps(result))
    else:
        run.print_scores(result)
