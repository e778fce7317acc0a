"""`merv-pipeline`: thin commands. Parse, call one library function, print.

Results go to stdout, as a table for a person or as JSON for a program; progress goes to stderr. Nothing heavy is
imported before a command needs it: `--help` answers at once.
"""

from __future__ import annotations

from typing import Any

import click

from featurestore.locate import Place, store_first
from mervcache.console import CONTEXT, say
from pipeline.commands.cluster_cli import CLUSTER_COMMANDS
from pipeline.commands.distortion_cli import distortion
from pipeline.commands.explain_cli import EXPLAIN_COMMANDS
from pipeline.commands.options import AS_JSON, ROOT, STORE_OPTION, config_from_options, extraction_options, takes_store
from pipeline.commands.share_cli import SHARE_COMMANDS
from pipeline.commands.show import says_errors, show_result, told_interrupts
from pipeline.commands.store_cli import STORE_COMMANDS
from pipeline.config import ExtractConfig


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="merv-pipeline")
def main() -> None:
    """Run the frozen encoders of a multi-encoder VideoLLM once, into a feature store that training reads."""


@main.command()
@says_errors
@extraction_options
@click.option("--retry-quarantine", is_flag=True, default=None, help="Try the clips again that failed before.")
@click.option("--accept-damaged", is_flag=True, default=None, help="Take what can be decoded of damaged files.")
@click.option("--new-identity", is_flag=True, default=None, help="Keep changed features beside the stored ones.")
@click.option("--refresh", is_flag=True, default=None, help="Compute clips again whose media changed since.")
@click.option("--no-samples", "samples", flag_value=False, default=None, help="Leave the annotations out of the store.")
@click.option(
    "--max-failed",
    type=click.FloatRange(0, 1),
    show_default=str(ExtractConfig.max_failed),
    help="Stop when more than this share failed.",
)
@click.option(
    "--forecast",
    type=click.Path(dir_okay=False),
    help="What `plan --json` printed: the store's journal then holds it beside what the run took.",
)
@click.option("--dashboard", is_flag=True, default=None, help="Start Dask's dashboard; tell how to reach it over ssh.")
@click.option(
    "--performance-report",
    type=click.Path(dir_okay=False),
    show_default="with --dashboard: NAME-dask-RUN.html beside the store",
    help="HTML file for Dask's report of the run.",
)
@click.option(
    "--print-config", is_flag=True, help="Print every setting of this command as YAML for --config; do nothing."
)
@AS_JSON
def extract(config_file: str | None, print_config: bool, as_json: bool, **options: Any) -> None:
    """Encode a dataset's clips into a feature store. Run it again to go on, or to add clips and encoders."""
    with told_interrupts():
        from pipeline.commands import tables
        from pipeline.extract import extract as run_extraction

        config = config_from_options(config_file, options)
        if print_config:
            click.echo(config.to_yaml(), nl=False)
            return
        summary = run_extraction(config, say=say)
        show_result(summary.to_dict(), as_json, lambda: tables.summary(summary))


@main.command()
@says_errors
@extraction_options
@click.option("--probe", type=click.IntRange(0), default=4, help="Clips of each kind to really encode.")
@AS_JSON
def plan(config_file: str | None, probe: int, as_json: bool, **options: Any) -> None:
    """Say what an extraction would cost. Clips, bytes, files and hours, by stage, kind and encoder."""
    from pipeline.commands import tables
    from pipeline.costs.forecast import forecast

    result = forecast(config_from_options(config_file, options), probe=probe, say=say)
    show_result(result.to_dict(), as_json, lambda: tables.forecast(result))


@main.command()
@says_errors
@takes_store
@click.option(
    "--watch",
    "every_s",
    type=click.FloatRange(0.1),
    is_flag=False,
    flag_value=5.0,
    metavar="[SECONDS]",
    show_default="without it, once; with it, every 5",
    help="Look again and again, until all is committed; give it behind the store.",
)
@AS_JSON
def status(place: Place, every_s: float | None, as_json: bool) -> None:
    """Say what is committed, to do and quarantined. Per encoder."""
    if every_s is not None:
        from pipeline.commands.watch_show import show
        from pipeline.watch import watch

        show(watch(place, every_s), as_json=as_json)
        return
    from pipeline.commands import tables
    from pipeline.status import store_status
    from pipeline.upkeep.quarantine import quarantined

    result = store_status(place)
    show_result(result, as_json, lambda: tables.status(result, quarantined(place)))


@main.command()
@says_errors
@click.argument("words", nargs=-1, required=True, metavar="[STORE] CLIP|ENCODER")
@STORE_OPTION
@AS_JSON
def inspect(words: tuple[str, ...], store_option: str | None, as_json: bool) -> None:
    """Show what the store holds of a clip or an encoder.

    Name a clip by its id, or by an end of it that no other clip has ("v1.mp4").
    """
    from pipeline.commands import tables
    from pipeline.status import inspect_store

    place, names = store_first(words, store_option)
    if len(names) != 1:
        raise click.UsageError(f"one clip or encoder at a time, got {len(names)}: {', '.join(names)}")
    result = inspect_store(place, names[0])
    show_result(result, as_json, lambda: tables.details(result))


@main.command()
@says_errors
@takes_store
@click.option(
    "--out",
    type=click.Path(dir_okay=False),
    show_default="NAME-report.html beside the store",
    help="HTML file to write.",
)
@ROOT
@click.option("--clips", "num_clips", type=click.IntRange(1, 64), default=8, help="Clips to picture.")
def report(place: Place, **options: Any) -> None:
    """Write one HTML page about a store. What each encoder sees in some clips, sizes, rates and failures."""
    from pipeline.report import write_report

    click.echo(write_report(place, **options))


@main.command()
@says_errors
@AS_JSON
def encoders(as_json: bool) -> None:
    """List the encoders. The four of MERV, the others that come along, and plug-ins."""
    from pipeline.commands import tables
    from pipeline.encoders import ENCODERS

    rows = [tables.encoder_row(spec) for spec in ENCODERS.values()]
    show_result(rows, as_json, lambda: tables.encoders(rows))


@main.command()
@says_errors
@click.argument("name", required=False)
@AS_JSON
def datasets(name: str | None, as_json: bool) -> None:
    """List the datasets, or tell about one by NAME. Its layout, and its options."""
    from pipeline.commands import tables
    from pipeline.datasets import DATASETS, dataset_spec

    if name:
        told = tables.dataset_details(dataset_spec(name))
        show_result(told, as_json, lambda: tables.details(told))
    else:
        rows = [tables.dataset_row(spec) for spec in DATASETS.values()]
        show_result(rows, as_json, lambda: tables.rows_of(rows))


for command in (*STORE_COMMANDS, *EXPLAIN_COMMANDS, *SHARE_COMMANDS, *CLUSTER_COMMANDS, distortion):
    main.add_command(command)
