"""Commands for people with a cluster. Thin: parse, call one library function, print."""

from __future__ import annotations

from typing import Any

import click

from jobs.slurm import TEMPLATES, submit_script
from pipeline.commands.options import CLUSTER_OPTION, config_from_options
from pipeline.commands.show import says_errors


@click.command("submit-script")
@says_errors
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
