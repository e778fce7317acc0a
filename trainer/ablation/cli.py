"""Commands of `merv-eval` about ablations. Nothing here loads torch before a command runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from featurestore.locate import names_of
from mervcache.completion import complete_encoders, complete_store
from mervcache.console import (
    CONTEXT,
    echo,
    examples,
    format_bytes,
    format_duration,
    handle_errors,
    print_result,
    stacked,
)
from mervcache.errors import EXIT_WITH_FAILURES, UserError
from mervcache.text import safe
from trainer.ablation.sweep import SUBSET_RULES, SWEEP_FILE, expand_subsets
from trainer.cli import load_torch_modules
from trainer.config import Protocol
from trainer.runs.stage_folders import check_are_runs, last_stage

if TYPE_CHECKING:
    from trainer.ablation.atlas_page import AtlasResult
    from trainer.ablation.costs import RunCosts

handle_cli_errors = handle_errors(interrupted="Interrupted. Nothing was written.")
SUFFIXES = {".md": "markdown", ".csv": "csv", ".tex": "latex", ".json": "json"}
SHOWN_MISSING = 5
FORMAT = click.option(
    "--format", "format_", type=click.Choice(["text", *SUFFIXES.values()]), default="text", help="Form of the tables."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
RUN = click.Path(exists=True, file_okay=False, path_type=Path)


RANKS = click.option(
    "--ranks", is_flag=True, help="Also effective ranks, from a sample of clips: minutes a run at full size."
)
TEXT_TOKENS = click.option(
    "--text-tokens",
    type=click.IntRange(min=1),
    show_default="mean of a training sample",
    help="Text tokens of the sample whose FLOPs are counted.",
)


@click.command(
    "table",
    context_settings=CONTEXT,
    epilog=examples("merv-eval table runs/sweep", "merv-eval table runs/sweep --out table.tex"),
)
@handle_cli_errors
@click.argument("sweep", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_",
    type=click.Choice(list(SUFFIXES.values())),
    show_default="that of --out, else markdown",
    help="How the table is written.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write instead of stdout.")
@click.option(
    "--questions", is_flag=True, help="One row per question with its score in every run, instead of the table."
)
@click.option("--draws", type=click.IntRange(min=100), default=10_000, help="Bootstrap draws of the intervals.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the draws.")
@click.option("--costs/--no-costs", default=True, help="Tokens, parameters, FLOPs, step time and bytes of every run.")
@RANKS
@TEXT_TOKENS
@click.option(
    "--store",
    shell_complete=complete_store,
    show_default="where the sweep read it",
    help="Place of the sweep's store, if it has moved.",
)
def table_command(
    sweep: Path,
    format_: str | None,
    out: Path | None,
    questions: bool,
    draws: int,
    seed: int,
    store: str | None,
    costs: bool,
    ranks: bool,
    text_tokens: int | None,
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
    if ranks and not costs:
        raise UserError("--ranks are among the costs: leave out --no-costs")
    results, measured = read_results(sweep, store=store), None
    if costs and not questions:
        load_torch_modules()
        from trainer.ablation.costs_table import folders_of, measure_costs

        places = {"store": store, "text_tokens": text_tokens}
        measured = measure_costs(results, folders_of(results), with_ranks=ranks, **places)
    document = make_table(results, costs=measured, draws=draws, seed=seed)
    text = FORMATS[format_ or "markdown"][questions](document)
    if out is None:
        click.echo(text, nl=False)
    else:
        replace_text(out, text)
        echo(f"wrote {out}")
    end_if_incomplete(document.missing, "table")


def end_if_incomplete(missing: Sequence[str], what: str) -> None:
    """Print the runs that a table or page lacks, and exit with 3, if there are any."""
    if not missing:
        return
    *lines, following = missing
    more = len(lines) - SHOWN_MISSING
    for line in lines[:SHOWN_MISSING]:
        echo(line)
    if more > 0:
        echo(f"and {more} more, which the {what} lists")
    echo(f"The {what} is incomplete. {following}")
    sys.exit(EXIT_WITH_FAILURES)


@click.command(
    "report", context_settings=CONTEXT, epilog=examples("merv-eval report runs/sweep", "merv-eval report runs/first")
)
@handle_cli_errors
@click.argument("path", metavar="SWEEP|RUN", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    show_default="NAME-report.html next to the folder",
    help="File to write.",
)
@click.option("--split", show_default="heldout", help="With a run: split whose scores are shown.")
@click.option(
    "--protocol",
    type=click.Choice(get_args(Protocol)),
    show_default="that of its scores",
    help="With a run: protocol of the scores.",
)
@click.option("--draws", type=click.IntRange(min=100), default=10_000, help="Bootstrap draws of the intervals.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the draws.")
@RANKS
@TEXT_TOKENS
@click.option(
    "--with",
    "tables",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Show these tables too, which merv-eval probe --out FILE.json or another command has written; repeatable.",
)
@click.option(
    "--store",
    shell_complete=complete_store,
    show_default="where it was read",
    help="Place of the store, if it has moved.",
)
def report_command(path: Path, **options: Any) -> None:
    """One self-contained HTML page about a sweep or a run: scores, lattice of subsets, learning curves, costs, tables.

    Exit code 3: runs of a sweep are missing; the page lists them.
    """
    if not (path / SWEEP_FILE).is_file():
        check_are_runs(path)
    load_torch_modules()
    from trainer.ablation.report import write_report

    written = write_report(path, **options)
    echo(f"wrote {written.path}")
    end_if_incomplete(written.missing, "page")


QUESTIONS = stacked(  # one checkpoint, and the questions that it answers in several conditions
    click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="Folder of a run."),
    click.option(
        "--store",
        shell_complete=complete_store,
        show_default="the one the run was trained on",
        help="Store of the questions' clips.",
    ),
    click.option("--split", default="heldout", help="Split whose questions are scored."),
    click.option(
        "--protocol",
        type=click.Choice(get_args(Protocol)),
        show_default="as in merv-eval run",
        help="Protocol of the scores.",
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Score at most this many questions."),
    click.option("--json", "as_json", is_flag=True, help="Print the answers as JSON."),
)


@click.command("mask", context_settings=CONTEXT, epilog=examples("merv-eval mask --checkpoint runs/first"))
@handle_cli_errors
@QUESTIONS
@click.option("--subsets", default="all", metavar="|".join([*SUBSET_RULES, "LIST"]), help="Subsets, as for sweep.")
def mask_command(checkpoint: Path, subsets: str, as_json: bool, **options: Any) -> None:
    """Score one checkpoint with some of its encoders masked.

    One-shot for a run that was trained with `mask_encoders`, else post-hoc: such a run has never seen a subset before.
    """
    check_are_runs(checkpoint)
    load_torch_modules()
    from trainer.evaluate import EvaluationRequest, evaluate_masked
    from trainer.runs.run_record import RunRecord

    encoders = RunRecord.read(last_stage(checkpoint)).encoder_order
    chosen = [(), *expand_subsets(names_of(subsets), encoders)]
    result = evaluate_masked(checkpoint, EvaluationRequest(**options), chosen)
    print_result(result, as_json, lambda: print_views(f"encoders shown, {result['method']}", result, "subsets"))


@click.command("grids", context_settings=CONTEXT, epilog=examples("merv-eval grids --checkpoint runs/nested"))
@handle_cli_errors
@QUESTIONS
@click.option("--grids", metavar="LIST", show_default="all of the run", help="Tokens per frame, comma separated.")
def grids_command(checkpoint: Path, grids: str | None, as_json: bool, **options: Any) -> None:
    """Score one checkpoint that was trained with `projector.nested_grids` at each of them."""
    chosen = names_of(grids) if grids else ()
    if odd := [name for name in chosen if not name.isdecimal()]:
        raise UserError(f"--grids are tokens per frame, such as 64,16, got {odd[0]!r}")
    check_are_runs(checkpoint)
    load_torch_modules()
    from trainer.evaluate import EvaluationRequest, evaluate_grids

    result = evaluate_grids(checkpoint, EvaluationRequest(**options), [int(name) for name in chosen])
    print_result(result, as_json, lambda: print_views("tokens per frame, one-shot", result, "grids"))


def print_views(heading: str, result: Mapping[str, Any], key: str) -> None:
    """Print a row per condition that the same checkpoint was scored in."""
    from mervcache.console import table  # rich

    credits = {name: [answer["credit"] for answer in found] for name, found in result[key].items()}
    rows = [(name or "none", f"{sum(c) / len(c):.3f}", f"{len(c):,}") for name, c in credits.items()]
    columns = (heading, f"accuracy by {result['protocol']}", "questions")
    table(columns, rows, right=columns[1:])


@click.command("flops", context_settings=CONTEXT, epilog=examples("merv-eval flops --format csv"))
@handle_cli_errors
@click.option(
    "--text-tokens", type=click.IntRange(min=0), default=880, help="Text tokens in addition to the visual ones."
)
@FORMAT
@JSON
def flops_command(text_tokens: int, format_: str, as_json: bool) -> None:
    """Count parameters and FLOPs for the fusion and projector tables of arXiv 2501.01426 at published sizes.

    Nothing is trained or loaded: parameters and multiply-adds follow from shapes alone.
    """
    load_torch_modules()
    from trainer.ablation.published_costs import published_tables
    from trainer.ablation.render import print_document

    print_document(published_tables(text_tokens), "json" if as_json else format_)


@click.command(
    "rank",
    context_settings=CONTEXT,
    epilog=examples("merv-eval rank runs/first", "merv-eval rank --store features/lab.zarr"),
)
@handle_cli_errors
@click.argument("run", required=False, type=RUN)
@click.option(
    "--store",
    shell_complete=complete_store,
    show_default="the one the run was trained on",
    help="Store of the tokens; alone: no run.",
)
@click.option(
    "--encoders",
    metavar="LIST",
    shell_complete=complete_encoders,
    help="With a store alone: encoders, comma separated; all by default.",
)
@click.option("--clips", type=click.IntRange(min=1), default=64, help="Clips in the sample.")
@click.option("--seed", type=int, default=0, help="Chooses the sample.")
@click.option("--best", is_flag=True, help="With a run: the best checkpoint by validation instead of the newest.")
@FORMAT
@JSON
def rank_command(
    run: Path | None, store: str | None, encoders: str | None, format_: str, as_json: bool, **options: Any
) -> None:
    """Effective rank of the input and output of each projector of RUN, or of a store's tokens."""
    if run is None and store is None:
        raise UserError("give a run, or a store with --store")
    if run is not None:
        check_are_runs(run)
    if run is not None and encoders is not None:
        raise UserError("--encoders chooses among a store's encoders; a run has its own: leave one of both out")
    if run is None and options["best"]:
        raise UserError("--best chooses a checkpoint: give a run too, or leave it out")
    load_torch_modules()
    from trainer.ablation.rank import rank_document, ranks_of_run, ranks_of_store
    from trainer.ablation.render import print_document

    if run is not None:
        report = ranks_of_run(run, store, **options)
    else:
        options.pop("best")
        report = ranks_of_store(str(store), names_of(encoders) if encoders else (), **options)
    if as_json or format_ == "json":
        print_result(report.to_dict(), True, lambda: None)
    else:
        print_document(rank_document(report), format_)


@click.command("costs", context_settings=CONTEXT, epilog=examples("merv-eval costs runs/first"))
@handle_cli_errors
@click.argument("run", type=RUN)
@click.option(
    "--store",
    shell_complete=complete_store,
    show_default="the one the run was trained on",
    help="Store whose extraction is counted.",
)
@click.option("--runs", type=click.IntRange(min=1), default=1, help="Runs like this one that read the store.")
@click.option("--live", type=RUN, help="The same run end to end: its steps give the cost of live encoding.")
@click.option("--overlapped", is_flag=True, help="End to end, encoding runs on devices of its own during the steps.")
@JSON
def costs_command(run: Path, store: str | None, as_json: bool, **options: Any) -> None:
    """Measured step time, bytes read, and break-even of the store in runs x epochs."""
    check_are_runs(run, *([options["live"]] if options["live"] else []))
    load_torch_modules()
    from trainer.ablation.costs import run_costs

    costs = run_costs(run, store, **options)
    print_result(costs.to_dict(), as_json, lambda: print_costs(costs))


def print_costs(costs: RunCosts) -> None:
    """Print what was measured, and what follows."""
    from mervcache.console import console, table  # rich

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


@click.command("atlas", context_settings=CONTEXT, epilog=examples("merv-eval atlas runs/first --clips 5000"))
@handle_errors(interrupted="Interrupted. Files that were written before are kept.")
@click.argument("run", type=RUN)
@click.option(
    "--store", shell_complete=complete_store, show_default="the one the run was trained on", help="Store of the clips."
)
@click.option("--step", type=click.IntRange(min=0), show_default="the newest", help="Step of the checkpoint.")
@click.option("--best", is_flag=True, help="Use the best checkpoint by validation.")
@click.option("--compare", metavar="RUN|STEP", help="Another run, or another step of this one, to compare with.")
@click.option("--root", help="Folder of the media, if it has moved.")
@click.option("--clips", type=click.IntRange(min=1), show_default="all", help="Number of clips in the sample.")
@click.option(
    "--decode", type=click.IntRange(min=0), default=512, help="Clips whose motion, edges and length are measured."
)
@click.option("--draws", type=click.IntRange(min=100), default=10_000, help="Bootstrap draws of the intervals.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of samples and draws.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), show_default="next to the table", help="Page.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def atlas_command(run: Path, as_json: bool, out: Path | None, **options: Any) -> None:
    """Write a table and a page of each encoder's contribution to the clips of a store.

    The table is RUN/atlas/NAME.parquet. No LLM is loaded. Exits with 3 if clips could not be decoded.
    """
    check_are_runs(run)
    if options["step"] is not None and options["best"]:
        raise UserError("--step and --best choose a checkpoint each; leave one of both out")
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}; make it first")
    load_torch_modules()
    from trainer.ablation.atlas_run import AtlasRequest, make_atlas

    made = make_atlas(run, AtlasRequest(**options), page=out, quiet=as_json)
    print_result(made.to_dict(), as_json, lambda: print_atlas(made.result, made.table, made.page))
    if made.result.properties.failed:
        sys.exit(EXIT_WITH_FAILURES)


def print_atlas(result: AtlasResult, table_path: Path, page: Path) -> None:
    """Print a row per encoder, the findings, what is missing, and the files."""
    from mervcache.console import table  # rich
    from trainer.ablation.atlas_page import findings, notices

    atlas = result.atlas
    weights = [] if atlas.weight_CE is None else [f"{mean:.3f}" for mean in atlas.weight_CE.mean(axis=0)]
    rows = [
        (
            encoder,
            weights[place] if weights else "none",
            f"{atlas.norm_CE[:, place].mean():.3g}",
            f"{atlas.share_CE[:, place].mean():.0%}",
        )
        for place, encoder in enumerate(atlas.encoders)
    ]
    columns = ("encoder", "weight", "norm", "share of the norms")
    table(columns, rows, right=columns[1:])
    for line in findings(result.correlations):
        click.echo(safe(line))
    if result.correlations and not findings(result.correlations):
        click.echo("no correlation with a property of clips has an interval away from 0")
    for line in notices(result):
        echo(line)
    echo(f"wrote {table_path} and {page}")


COMMANDS = (
    table_command,
    report_command,
    mask_command,
    grids_command,
    flops_command,
    rank_command,
    costs_command,
    atlas_command,
)
