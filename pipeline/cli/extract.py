"""`merv-pipeline`: thin commands. Parse, call one library function, print.

Results go to stdout, as a table for a person or as JSON for a program; progress goes to stderr. Nothing heavy is
imported before a command needs it: `--help` answers at once.

`explain`: parse, call one library function, print.

Commands for people with a cluster. Thin: parse, call one library function, print.

What `status --watch` prints: a table that is redrawn on a terminal, a line per look elsewhere, or JSON lines.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from featurestore.locate import Place, find_store, store_first
from jobs.slurm import TEMPLATES, submit_script
from mervcache.console import CONTEXT, ProgressLine, handle_interrupts
from pipeline.cli.options import (
    AS_JSON,
    CLUSTER_OPTION,
    ROOT,
    STORE_OPTION,
    config_from_options,
    extraction_options,
    given_options,
    handle_cli_errors,
    print_result,
    takes_store,
)
from pipeline.cli.share import SHARE_COMMANDS
from pipeline.cli.store import STORE_COMMANDS, distortion
from pipeline.config import ExtractConfig

if TYPE_CHECKING:
    from pipeline.status import EncoderProgress, Progress


@click.command()
@handle_cli_errors
@click.argument("place", type=click.Path(), required=False, metavar="[STORE]")
@extraction_options
@click.option(
    "--media",
    type=click.Choice(["quick", "full"]),
    default="quick",
    help="quick compares media that were touched since their tokens were made, full reads all.",
)
@click.option("--probe", type=click.IntRange(0), default=0, help="Clips of each kind to really encode, for the time.")
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
    """Say what other settings would recompute. And what that costs, what stays valid, which media changed.

    Options are those of `extract`. What is not given is as in the store's newest run, or with --config as there and by
    default. Nothing is written to the store.
    """
    from pipeline.explain import explain as run_explain
    from pipeline.explain import explained_config

    store = find_store(place or options.pop("store", None))
    config, settings = explained_config(store, config_file, given_options(options))
    if print_config:
        click.echo(config.to_yaml(), nl=False)
        return
    with ProgressLine("media", unit="clips") as progress:
        found = run_explain(store, config, settings=settings, full=media == "full", probe=probe, progress=progress)
    from pipeline.cli.render import explanation

    print_result(found.to_dict(), as_json, lambda: explanation(found))


_TAKEN_OVER = "dataset root encoders weights stage kind limit decoder compute_dtype storage_dtype grid".split()

for parameter in explain.params:  # options of its own: each command has its copy
    if parameter.name in _TAKEN_OVER:
        parameter.show_default = "as in the store's newest run"
    elif parameter.name == "store":
        parameter.help, parameter.show_default = "The store, as for extract.", "the only one under features/"

EXPLAIN_COMMANDS = (explain,)


@click.command("submit-script")
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

    merv-pipeline submit-script --config extract.yaml > job.sbatch

    TEMPLATE one-allocation: scheduler, one worker per GPU and the driver in one job; driver: a small job that submits
    a job per worker itself.
    """
    config = config_from_options(config_file, options)
    request = config.cluster_request
    script = submit_script(template, request.settings, config=config_file, num_workers=request.num_workers)
    click.echo(script, nl=False)


CLUSTER_COMMANDS = (submit,)


def show(looks: Iterable[Progress], *, as_json: bool = False) -> None:
    """Print every look as it comes."""
    for look in looks:
        if as_json:
            print(json.dumps(look.to_dict()), flush=True)
        elif sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")  # home, clear: works over ssh
            _table(look)
        else:
            print(line(look), flush=True)


def line(progress: Progress) -> str:
    """`12:00:05  siglip-0123456789ab 84/120 clips (21/30 blocks), 3.1 clips/s, 12.0 s left; ...`."""
    told = [
        f"{e.encoder} {e.clips}/{e.all_clips} clips ({e.blocks}/{e.all_blocks} blocks), {_rate(e)}, {_left(e)}"
        for e in progress.encoders
    ]
    return f"{time.strftime('%H:%M:%S')}  {'; '.join(told) or 'no encoder has a group yet'}"


def _table(progress: Progress) -> None:
    from pipeline.cli import render

    columns = ("encoder", "clips", "of", "blocks", "of", "rate", "left")
    rows = [(e.encoder, e.clips, e.all_clips, e.blocks, e.all_blocks, _rate(e), _left(e)) for e in progress.encoders]
    left = progress.seconds_left
    render.console().print(time.strftime("%H:%M:%S  rates are of the last 5 min (Ctrl-C leaves; the run goes on)"))
    render.table(columns, rows, right=columns[1:])
    if progress.is_done:
        render.console().print("every block given out is committed")
    elif left is not None:
        render.console().print(f"about {render.duration(left)} left")


def _rate(encoder: EncoderProgress) -> str:
    if encoder.is_done:
        return "-"
    return "not moving" if encoder.clips_per_s is None else f"{encoder.clips_per_s:.2f} clips/s"


def _left(encoder: EncoderProgress) -> str:
    from pipeline.cli import render

    if encoder.is_done:
        return "done"
    return "time left unknown" if encoder.seconds_left is None else f"{render.duration(encoder.seconds_left)} left"


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="merv-pipeline")
def main() -> None:
    """Run the frozen encoders of a multi-encoder VideoLLM once, into a feature store that training reads."""


@main.command()
@handle_cli_errors
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
    with handle_interrupts("stopping: what is committed is kept (once more to stop without waiting)"):
        from pipeline.cli import render
        from pipeline.extract import extract as run_extraction

        config = config_from_options(config_file, options)
        if print_config:
            click.echo(config.to_yaml(), nl=False)
            return
        summary = run_extraction(config)
        print_result(summary.to_dict(), as_json, lambda: render.summary(summary))


@main.command()
@handle_cli_errors
@extraction_options
@click.option("--probe", type=click.IntRange(0), default=4, help="Clips of each kind to really encode.")
@AS_JSON
def plan(config_file: str | None, probe: int, as_json: bool, **options: Any) -> None:
    """Say what an extraction would cost. Clips, bytes, files and hours, by stage, kind and encoder."""
    from pipeline.cli import render
    from pipeline.forecast import forecast

    result = forecast(config_from_options(config_file, options), probe=probe)
    print_result(result.to_dict(), as_json, lambda: render.forecast(result))


@main.command()
@handle_cli_errors
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
        from pipeline.status import watch

        show(watch(place, every_s), as_json=as_json)
        return
    from pipeline.cli import render
    from pipeline.quarantine import quarantined
    from pipeline.status import store_status

    result = store_status(place)
    print_result(result, as_json, lambda: render.status(result, quarantined(place)))


@main.command()
@handle_cli_errors
@click.argument("words", nargs=-1, required=True, metavar="[STORE] CLIP|ENCODER")
@STORE_OPTION
@AS_JSON
def inspect(words: tuple[str, ...], store_option: str | None, as_json: bool) -> None:
    """Show what the store holds of a clip or an encoder.

    Name a clip by its id, or by an end of it that no other clip has ("v1.mp4").
    """
    from pipeline.cli import render
    from pipeline.status import inspect_store

    place, names = store_first(words, store_option)
    if len(names) != 1:
        raise click.UsageError(f"one clip or encoder at a time, got {len(names)}: {', '.join(names)}")
    result = inspect_store(place, names[0])
    print_result(result, as_json, lambda: render.details(result))


@main.command()
@handle_cli_errors
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
@handle_cli_errors
@AS_JSON
def encoders(as_json: bool) -> None:
    """List the encoders. The four of MERV, the others that come along, and plug-ins."""
    from pipeline.cli import render
    from pipeline.encoders import ENCODERS

    rows = [render.encoder_row(spec) for spec in ENCODERS.values()]
    print_result(rows, as_json, lambda: render.encoders(rows))


@main.command()
@handle_cli_errors
@click.argument("name", required=False)
@AS_JSON
def datasets(name: str | None, as_json: bool) -> None:
    """List the datasets, or tell about one by NAME. Its layout, and its options."""
    from pipeline.cli import render
    from pipeline.datasets import DATASETS, dataset_spec

    if name:
        told = render.dataset_details(dataset_spec(name))
        print_result(told, as_json, lambda: render.details(told))
    else:
        rows = [render.dataset_row(spec) for spec in DATASETS.values()]
        print_result(rows, as_json, lambda: render.rows_of(rows))


for command in (*STORE_COMMANDS, *EXPLAIN_COMMANDS, *SHARE_COMMANDS, *CLUSTER_COMMANDS, distortion):
    main.add_command(command)
