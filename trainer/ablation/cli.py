"""The command `merv-eval table`: what a sweep says, as Markdown, CSV, LaTeX or JSON. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click

from featurestore.locate import names_of
from mervcache.console import CONTEXT, echo, handle_errors, print_result
from mervcache.errors import EXIT_WITH_FAILURES, UserError
from trainer.ablation.sweep import SUBSET_RULES, expand_subsets
from trainer.cli import load_torch_modules
from trainer.config import Protocol
from trainer.runs.stage_folders import check_are_runs, last_stage

SUFFIXES = {".md": "markdown", ".csv": "csv", ".tex": "latex", ".json": "json"}
SHOWN_MISSING = 5


@click.command("table", context_settings=CONTEXT)
@handle_errors(interrupted="Interrupted. Nothing was written.")
@click.argument("sweep", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_",
    type=click.Choice(list(SUFFIXES.values())),
    show_default="that of --out, else markdown",
    help="How the table is written.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write instead of stdout.")
@click.option("--questions", is_flag=True, help="Instead: a row per question, with what it was worth to every run.")
@click.option("--draws", type=click.IntRange(min=100), default=10_000, help="Bootstrap draws of the intervals.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of these draws.")
@click.option("--store", show_default="where the sweep read it", help="Place of the sweep's store, if it has moved.")
def table_command(
    sweep: Path, format_: str | None, out: Path | None, questions: bool, draws: int, seed: int, store: str | None
) -> None:
    """Encoder importance, settings and agreement of methods, from the scores of SWEEP.

    Retrained, post-hoc masked and one-shot runs are in blocks of their own. Exits with 3 if runs are missing.
    """
    from mervcache.files import replace_text
    from trainer.ablation.render import FORMATS
    from trainer.ablation.results import read_results
    from trainer.ablation.table import make_table

    if format_ is None and out is not None:
        format_ = SUFFIXES.get(out.suffix)
        if format_ is None:
            raise UserError(f"--out {out} ends in none of {', '.join(SUFFIXES)}; give --format too")
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}; make it first")
    document = make_table(read_results(sweep, store=store), draws=draws, seed=seed)
    text = FORMATS[format_ or "markdown"][questions](document)
    if out is None:
        click.echo(text, nl=False)
    else:
        replace_text(out, text)
        echo(f"wrote {out}")
    if document.missing:
        *lines, following = document.missing
        more = len(lines) - SHOWN_MISSING
        for line in lines[:SHOWN_MISSING]:
            echo(line)
        if more > 0:
            echo(f"and {more} more, which the table lists")
        echo(f"The table is incomplete. {following}")
        sys.exit(EXIT_WITH_FAILURES)


@click.command("mask", context_settings=CONTEXT)
@handle_errors(interrupted="Interrupted. Nothing was written.")
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="Folder of a run.")
@click.option("--store", show_default="the one the run was trained on", help="Store of the questions' clips.")
@click.option("--subsets", default="all", metavar="|".join([*SUBSET_RULES, "LIST"]), help="Subsets, as for sweep.")
@click.option("--split", default="heldout", help="Split whose questions are asked.")
@click.option(
    "--protocol", type=click.Choice(get_args(Protocol)), show_default="as in merv-eval run", help="Of scores."
)
@click.option("--limit", type=click.IntRange(min=1), help="Ask at most so many questions.")
@click.option("--json", "as_json", is_flag=True, help="Print the answers as JSON.")
def mask_command(checkpoint: Path, subsets: str, as_json: bool, **options: Any) -> None:
    """Score one checkpoint with only some of its encoders shown.

    One-shot for a run that was trained with `mask_encoders`, else post-hoc: such a run has never seen a subset before.
    """
    check_are_runs(checkpoint)
    load_torch_modules()
    from trainer.evaluate import EvaluationRequest, evaluate_masked
    from trainer.runs.run_record import RunRecord

    encoders = RunRecord.read(last_stage(checkpoint)).encoder_order
    chosen = [(), *expand_subsets(names_of(subsets), encoders)]
    result = evaluate_masked(checkpoint, EvaluationRequest(**options), chosen)
    print_result(result, as_json, lambda: print_masked(result))


def print_masked(result: Mapping[str, Any]) -> None:
    """Print a row per subset."""
    from mervcache.console import table  # rich

    credits = {name: [answer["credit"] for answer in found] for name, found in result["subsets"].items()}
    rows = [(name or "none", f"{sum(c) / len(c):.3f}", f"{len(c):,}") for name, c in credits.items()]
    table((f"encoders shown, {result['method']}", f"accuracy by {result['protocol']}", "questions"), rows)
