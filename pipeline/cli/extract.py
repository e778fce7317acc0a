"""`merv-pipeline`: the command group, and the commands that extract or show what was extracted.

Each command parses, calls one library function and prints: results on stdout, as a table or with --json as JSON,
progress on stderr. Heavy modules are imported inside the commands, because `--help` has to answer at once.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from featurestore.locate import Place, find_store, store_first
from jobs.slurm import TEMPLATES, submit_script
from mervcache.completion import SHELLS, complete_dataset, complete_store, completion_script
from mervcache.console import CONTEXT, ProgressLine, echo, examples, handle_interrupts
from mervcache.program import Program
from pipeline.cli.explore import EXPLORE_COMMANDS
from pipeline.cli.options import (
    AS_JSON,
    CLUSTER_OPTION,
    GPU_COST,
    ROOT,
    STORE_OPTION,
    config_from_options,
    exit_with_failures,
    extraction_options,
    given_options,
    handle_cli_errors,
    print_result,
    takes_store,
)
from pipeline.cli.share import SHARE_COMMANDS
from pipeline.cli.store import STORE_COMMANDS
from pipeline.config import ExtractConfig

PROGRAMS = ("merv-pipeline", "merv-train", "merv-eval")  # of the distribution


@click.group(
    cls=Program,
    context_settings=CONTEXT,
    epilog=examples(
        "merv-pipeline extract --dataset demo --config pipeline/demo.yaml", "merv-pipeline report features/demo.zarr"
    ),
)
@click.version_option(package_name="merv-pipeline")
def main() -> None:
    """Run the frozen encoders of a multi-encoder VideoLLM once, into a feature store that training reads."""


@click.command(
    epilog=examples(
        "merv-pipeline extract --dataset demo --config pipeline/demo.yaml",
        "merv-pipeline extract --dataset folder --root MY_VIDEOS --store features/lab.zarr --scheduler cuda",
    )
)
@handle_cli_errors
@extraction_options
@click.option("--retry-quarantine", is_flag=True, default=None, help="Retry clips that failed before.")
@click.option("--accept-damaged", is_flag=True, default=None, help="Use the decodable frames of damaged files.")
@click.option("--new-identity", is_flag=True, default=None, help="Store changed features alongside the existing ones.")
@click.option("--refresh", is_flag=True, default=None, help="Recompute clips whose media changed.")
@click.option("--no-samples", "samples", flag_value=False, default=None, help="Leave the annotations out of the store.")
@click.option(
    "--max-failed",
    type=click.FloatRange(0, 1),
    show_default=str(ExtractConfig.max_failed),
    help="Stop when more than this share failed, and at least 32 clips; fewer end with exit code 3.",
)
@click.option(
    "--forecast",
    type=click.Path(dir_okay=False),
    help="Output of `plan --json`: recorded in the store's journal alongside what the run took.",
)
@GPU_COST
@click.option("--dashboard", is_flag=True, default=None, help="Start Dask's dashboard; print how to reach it over ssh.")
@click.option(
    "--performance-report",
    type=click.Path(dir_okay=False),
    show_default="with --dashboard: NAME-dask-RUN.html next to the store",
    help="HTML file for Dask's report of the run.",
)
@click.option(
    "--print-config", is_flag=True, help="Print every setting of this command as YAML for --config; do nothing."
)
@AS_JSON
def extract(config_file: str | None, print_config: bool, as_json: bool, **options: Any) -> None:
    """Encode a dataset's clips into a feature store. Run it again to resume, or to add clips and encoders.

    Exit code 0: the store has all that was requested; 3: finished, without the clips that failed, the media that are
    absent or the records that were refused, which the last lines count; 1: stopped by an error.
    """
    with handle_interrupts("stopping: what is committed is kept (once more to stop without waiting)"):
        from pipeline.cli import render
        from pipeline.extract import extract as run_extraction

        config = config_from_options(config_file, options)
        if print_config:
            click.echo(config.to_yaml(), nl=False)
            return
        summary = run_extraction(config)
        print_result(summary.to_dict(), as_json, lambda: render.summary(summary))
        exit_with_failures([summary])


@click.command(
    epilog=examples(
        "merv-pipeline plan --dataset videollava --gpu-cost 2.50",
        "merv-pipeline plan --dataset videollava --json > plan.json",
    )
)
@handle_cli_errors
@extraction_options
@click.option("--probe", type=click.IntRange(0), default=4, help="Clips of each kind to encode for the time estimate.")
@GPU_COST
@AS_JSON
def plan(config_file: str | None, probe: int, as_json: bool, **options: Any) -> None:
    """Estimate the cost of an extraction. Clips, bytes, files and hours, by stage, kind and encoder."""
    from pipeline.cli import render_costs
    from pipeline.forecast import forecast

    result = forecast(config_from_options(config_file, options), probe=probe)
    print_result(result.to_dict(), as_json, lambda: render_costs.forecast(result))


@click.command(epilog=examples("merv-pipeline explain features/lab.zarr --grid 16,4,4"))
@handle_cli_errors
@click.argument("place", type=click.Path(), required=False, metavar="[STORE]", shell_complete=complete_store)
@extraction_options
@click.option(
    "--media",
    type=click.Choice(["quick", "full"]),
    default="quick",
    help="quick hashes media modified since their tokens were made, full hashes all.",
)
@click.option("--probe", type=click.IntRange(0), default=0, help="Clips of each kind to encode for the time estimate.")
@click.option("--print-config", is_flag=True, help="Print the settings that are explained, for extract --config.")
@AS_JSON
def explain(
    place: str | None,
    config_file: str | None,
    media: str,
    probe: int,
    print_config: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what other settings would recompute. And the cost, what stays valid, and which media changed.

    Options are those of `extract`. An option that is not given has the value of the store's newest run, or with
    --config that of the file, else the default. Nothing is written to the store.
    """
    from pipeline.cli import render_costs
    from pipeline.explain import explain as run_explain
    from pipeline.explain import explained_config

    store = find_store(place or options.pop("store", None))
    config, settings = explained_config(store, config_file, given_options(options))
    if print_config:
        click.echo(config.to_yaml(), nl=False)
        return
    with ProgressLine("media", unit="clips") as progress:
        found = run_explain(store, config, settings=settings, full=media == "full", probe=probe, progress=progress)
    print_result(found.to_dict(), as_json, lambda: render_costs.explanation(found))


_INHERITED = "dataset root encoders weights stage kind limit fps window decoder".split()
_INHERITED += "compute_dtype storage_dtype grid upsample".split()
for parameter in explain.params:  # each command has its own copy of shared options
    if not isinstance(parameter, click.Option):
        continue
    if parameter.name in _INHERITED:
        parameter.show_default = "as in the store's newest run"
    elif parameter.name == "store":
        parameter.help, parameter.show_default = "The store, as for extract.", "the only one under features/"


@click.command(
    epilog=examples("merv-pipeline status features/lab.zarr", "merv-pipeline status features/lab.zarr --watch 30")
)
@handle_cli_errors
@takes_store
@click.option(
    "--watch",
    "every_s",
    type=click.FloatRange(0.1),
    is_flag=False,
    flag_value=5.0,
    metavar="[SECONDS]",
    show_default="5, once without --watch",
    help="Refresh until every planned block is committed; give it after the store.",
)
@AS_JSON
def status(place: Place, every_s: float | None, as_json: bool) -> None:
    """Show what is committed, pending and quarantined. Per encoder."""
    from pipeline.cli import render
    from pipeline.quarantine import quarantined
    from pipeline.status import store_status, watch

    if every_s is None:
        result = store_status(place)
        print_result(result, as_json, lambda: render.status(result, quarantined(place)))
        return
    for progress in watch(place, every_s):
        if not as_json and sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")  # home, clear: works over ssh
            render.watch_table(progress)
        else:
            print(json.dumps(progress.to_dict()) if as_json else render.watch_line(progress), flush=True)


@click.command(
    epilog=examples("merv-pipeline inspect features/lab.zarr dinov2", "merv-pipeline inspect features/lab.zarr v1.mp4")
)
@handle_cli_errors
@click.argument("names", nargs=-1, required=True, shell_complete=complete_store, metavar="[STORE] CLIP|ENCODER")
@STORE_OPTION
@AS_JSON
def inspect(names: tuple[str, ...], store_option: str | None, as_json: bool) -> None:
    """Show what the store holds of a clip or an encoder.

    Give a clip id or a unique ending of one ("v1.mp4").
    """
    from pipeline.cli import render
    from pipeline.status import inspect_store

    place, chosen = store_first(names, store_option)
    if len(chosen) != 1:
        raise click.UsageError(f"one clip or encoder at a time, got {len(chosen)}: {', '.join(chosen)}")
    result = inspect_store(place, chosen[0])
    print_result(result, as_json, lambda: render.details(result))


@click.command(epilog=examples("merv-pipeline report features/lab.zarr --out report.html"))
@handle_cli_errors
@takes_store
@click.option(
    "--out",
    type=click.Path(dir_okay=False),
    show_default="NAME-report.html next to the store",
    help="HTML file to write.",
)
@ROOT
@click.option(
    "--clips", "num_clips", type=click.IntRange(1, 64), default=8, help="Number of clips shown with token maps."
)
def report(place: Place, **options: Any) -> None:
    """Write one HTML page about a store. Token maps of some clips, sizes, rates and failures."""
    from pipeline.report import write_report

    click.echo(write_report(place, **options))


@click.command(epilog=examples("merv-pipeline encoders"))
@handle_cli_errors
@AS_JSON
def encoders(as_json: bool) -> None:
    """List the encoders. The four of MERV, further published ones, and plug-ins."""
    from pipeline.cli import render
    from pipeline.encoders import ENCODERS

    rows = [render.encoder_row(spec) for spec in ENCODERS.usable(echo)]
    print_result(rows, as_json, lambda: render.encoders(rows))


@click.command(epilog=examples("merv-pipeline datasets", "merv-pipeline datasets videollava"))
@handle_cli_errors
@click.argument("name", required=False, shell_complete=complete_dataset)
@AS_JSON
def datasets(name: str | None, as_json: bool) -> None:
    """List the datasets, or show one by NAME. Its layout and its options."""
    from pipeline.cli import render
    from pipeline.datasets import DATASETS, dataset_spec

    if name:
        details = render.dataset_details(dataset_spec(name))
        lines = details["what to get"].split("\n")
        print_result(details, as_json, lambda: render.details(details | {"what to get": lines}))
    else:
        rows = [render.dataset_row(spec) for spec in DATASETS.usable(echo)]
        print_result(rows, as_json, lambda: render.rows_of(rows))


@click.command(
    "submit-script", epilog=examples("merv-pipeline submit-script --config extract.yaml --workers 8 > job.sbatch")
)
@handle_cli_errors
@click.argument("template", type=click.Choice(list(TEMPLATES)), default=next(iter(TEMPLATES)))
@click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False),
    required=True,
    help="Settings of the extraction, with the site's under `cluster:`.",
)
@click.option("--workers", type=click.IntRange(1), show_default="those of one node", help="One per GPU.")
@CLUSTER_OPTION
def submit(template: str, config_file: str, **options: Any) -> None:
    """Print a SLURM script that runs an extraction.

    TEMPLATE one-allocation: scheduler, one worker per GPU and the driver in one job; driver: a small job that submits
    a job per worker itself.
    """
    request = config_from_options(config_file, options).cluster_request
    script = submit_script(template, request.settings, config=config_file, num_workers=request.num_workers)
    click.echo(script, nl=False)


@click.command(epilog=examples('eval "$(merv-pipeline completion bash)"', "merv-pipeline completion fish | source"))
@handle_cli_errors
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script for a SHELL. For merv-pipeline, merv-train and merv-eval."""
    click.echo(completion_script(main, PROGRAMS, shell))


for command in (extract, plan, explain, status, inspect, report, encoders, datasets, submit, completion):
    main.add_command(command)
for command in (*STORE_COMMANDS, *SHARE_COMMANDS, *EXPLORE_COMMANDS):
    main.add_command(command)
