"""Commands of `merv-eval` about costs: `flops`, `rank` and `costs`. Nothing here loads torch before a command runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mervcache.console import CONTEXT, console, echo, format_bytes, format_duration, handle_errors, print_result, table
from mervcache.errors import UserError
from trainer.ablation.rendering import FORMATS, Column, Format, Table, print_tables
from trainer.runs.stage_folders import check_are_runs

if TYPE_CHECKING:
    from trainer.ablation.costs import RunCosts
    from trainer.ablation.rank import RankReport

handle_cli_errors = handle_errors(interrupted="Interrupted. Nothing was written.")
FORMAT = click.option("--format", type=click.Choice(FORMATS), default="text", help="Form of the tables.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
RUN = click.Path(exists=True, file_okay=False, path_type=Path)


def _before_torch() -> None:
    """Threads that wait should not spin: other processes share the cores. Read once, when torch is loaded."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@click.command("flops", context_settings=CONTEXT)
@handle_cli_errors
@click.option("--text-tokens", type=click.IntRange(min=0), default=880, help="Tokens of text besides the visual ones.")
@FORMAT
@JSON
def flops_command(text_tokens: int, format: Format, as_json: bool) -> None:
    """Count the fusion and the projector table of arXiv 2501.01426 at published sizes, next to its figures.

    Nothing is trained or loaded: parameters and multiply-adds follow from shapes alone.
    """
    _before_torch()
    from trainer.ablation.published_costs import fusion_table, projector_table

    print_tables([fusion_table(text_tokens), projector_table()], "json" if as_json else format)


@click.command("rank", context_settings=CONTEXT)
@handle_cli_errors
@click.argument("run", required=False, type=RUN)
@click.option("--store", show_default="the one the run was trained on", help="Store of the tokens; alone: no run.")
@click.option("--encoders", metavar="LIST", help="Of a store alone: encoders, comma separated; all by default.")
@click.option("--clips", type=click.IntRange(min=1), default=64, help="Clips in the sample.")
@click.option("--seed", type=int, default=0, help="Chooses the sample.")
@click.option("--best", is_flag=True, help="Of a run, the best checkpoint by validation instead of the newest.")
@FORMAT
@JSON
def rank_command(
    run: Path | None, store: str | None, encoders: str | None, format: Format, as_json: bool, **options: Any
) -> None:
    """Effective rank of what enters and of what leaves each projector of RUN, or of a store's tokens alone."""
    if run is None and store is None:
        raise UserError("give a run, or a store with --store")
    if run is not None:
        check_are_runs(run)
    if run is not None and encoders is not None:
        raise UserError("--encoders chooses among a store's encoders; a run has its own: leave one of both out")
    if run is None and options["best"]:
        raise UserError("--best chooses a checkpoint: give a run too, or leave it out")
    _before_torch()
    from featurestore.locate import names_of
    from trainer.ablation.rank import ranks_of_run, ranks_of_store

    if run is not None:
        report = ranks_of_run(run, store, **options)
    else:
        options.pop("best")
        report = ranks_of_store(str(store), names_of(encoders) if encoders else (), **options)
    if as_json or format == "json":
        print_result(report.to_dict(), True, lambda: None)
    else:
        print_tables([rank_table(report)], format)


def rank_table(report: RankReport) -> Table:
    """The report as a table."""
    columns = [
        Column(key="encoder", heading="encoder", is_number=False),
        *(
            Column(key=f"{key}_{side}", heading=f"{heading} {side}", text=text)
            for side in ("entering", "leaving")
            for key, heading, text in (
                ("rank", "effective rank", "{:.1f}".format),
                ("width", "channels", "{:,}".format),
                ("tokens", "tokens", "{:,}".format),
            )
        ),
    ]
    rows = []
    for row in report.rows:
        values: dict[str, Any] = {"encoder": row.encoder}
        for side, found in (("entering", row.enters), ("leaving", row.leaves)):
            for key in ("rank", "width", "tokens"):
                values[f"{key}_{side}"] = None if found is None else getattr(found, key)
        rows.append(values)
    if not report.run:
        columns, rows = columns[:4], [{column.key: row[column.key] for column in columns[:4]} for row in rows]
    subject = f"run {report.run} at step {report.step}" if report.run else "the encoders"
    notes = [
        f"{report.formula}.",
        f"N = {report.clips} clips ({report.stills} of them stills) drawn with seed {report.seed} from"
        f" {report.available} that have tokens of every encoder, of {report.store} at {report.snapshot}; a still's time"
        " steps repeat, as a projector reads them.",
    ]
    if report.without:
        notes.append(f"{report.without} other clips of the store lack tokens of an encoder and were not drawn from.")
    return Table(name="rank", title=f"Effective rank: {subject}", columns=columns, rows=rows, notes=notes)


@click.command("costs", context_settings=CONTEXT)
@handle_cli_errors
@click.argument("run", type=RUN)
@click.option("--store", show_default="the one the run was trained on", help="Store whose extraction is counted.")
@click.option("--runs", type=click.IntRange(min=1), default=1, help="Runs like this one that read the store.")
@click.option("--live", type=RUN, help="The same run end to end: its steps give the cost of live encoding.")
@click.option("--overlapped", is_flag=True, help="End to end, encoding runs on devices of its own during the steps.")
@JSON
def costs_command(run: Path, store: str | None, as_json: bool, **options: Any) -> None:
    """Measured step time, bytes read, and after how many runs x epochs the store has paid for itself."""
    check_are_runs(run, *([options["live"]] if options["live"] else []))
    _before_torch()
    from trainer.ablation.costs import run_costs

    costs = run_costs(run, store, **options)
    print_result(costs.to_dict(), as_json, lambda: print_costs(costs))


def print_costs(costs: RunCosts) -> None:
    """Print what was measured, and what follows."""
    step, reading, extraction = costs.step, costs.reading, costs.extraction
    warmup = f", without the first {step.warmup}" if step.warmup else ""
    rows = [
        ("step", f"{format_duration(step.seconds)} (mean of {step.steps:,} steps{warmup})"),
        ("waits for tokens", f"{step.wait_share:.0%}"),
        ("clips per step", f"{reading.clips:,.1f}, distinct {reading.distinct_clips:,.1f}"),
        (
            "read per step",
            f"{format_bytes(reading.array_bytes)} of arrays, {format_bytes(reading.stored_bytes)} stored",
        ),
        (
            "extraction",
            f"{format_duration(extraction.seconds)} for {extraction.clips:,} clips,"
            f" {extraction.seconds_per_clip:.3g} s a clip, {extraction.runs:,} runs by the journal",
        ),
        ("live encoding", f"{costs.live_s_per_clip:.3g} s a clip, by {costs.live_source}"),
    ]
    table(("", "measured"), rows)
    console().print(costs.break_even.describe())
    for note in extraction.notes:
        echo(note)


COMMANDS = (flops_command, rank_command, costs_command)
