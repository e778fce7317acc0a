"""The command `merv-eval atlas`. Nothing here loads torch before the command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mervcache.completion import complete_store
from mervcache.console import CONTEXT, echo, examples, handle_errors, print_result, table
from mervcache.errors import EXIT_WITH_FAILURES, UserError
from mervcache.text import safe
from trainer.cli import load_torch_modules
from trainer.runs.stage_folders import check_are_runs

if TYPE_CHECKING:
    from trainer.ablation.atlas_page import AtlasResult

RUN = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command("atlas", context_settings=CONTEXT, epilog=examples("merv-eval atlas runs/first --clips 5000"))
@handle_errors(interrupted="Interrupted. Files that were written before are kept.")
@click.argument("run", type=RUN)
@click.option(
    "--store", shell_complete=complete_store, show_default="the one the run was trained on", help="Store of the clips."
)
@click.option("--step", type=click.IntRange(min=0), show_default="the newest", help="Checkpoint to look at.")
@click.option("--best", is_flag=True, help="Look at the best checkpoint by validation.")
@click.option("--compare", metavar="RUN|STEP", help="Another run, or another step of this one, to compare with.")
@click.option("--root", help="Folder of the media, if it has moved.")
@click.option("--clips", type=click.IntRange(min=1), show_default="all", help="A sample of so many clips.")
@click.option(
    "--decode", type=click.IntRange(min=0), default=512, help="Clips whose motion, edges and length are measured."
)
@click.option("--draws", type=click.IntRange(min=100), default=10_000, help="Bootstrap draws of the intervals.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of samples and draws.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), show_default="next to the table", help="Page.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def atlas_command(run: Path, as_json: bool, out: Path | None, **options: Any) -> None:
    """Write what each encoder of RUN contributes to the clips of a store: a table and a page.

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
