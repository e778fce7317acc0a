"""Options of `merv-train` that say how much of the data a run reads, and in which steps."""

import click

from mervcache.console import stacked

BY_SAMPLES = "by the number of samples"
size_options = stacked(
    click.option("--snapshot", metavar="ID|TAG", help="Read the store as it was at this snapshot."),
    click.option("--fraction", type=click.FloatRange(0, 1, min_open=True), help="Train on this share of the samples."),
    click.option("--limit", type=click.IntRange(min=1), help="Train on at most this many samples."),
    click.option(
        "--exclude",
        type=click.Path(dir_okay=False),
        help="Do not train on the clips listed in this file, one clip id a line.",
    ),
    click.option("--batch-size", type=click.IntRange(min=1), show_default=BY_SAMPLES, help="Samples of a step."),
    click.option(
        "--epochs", type=click.FloatRange(0, min_open=True), show_default=BY_SAMPLES, help="Passes over the samples."
    ),
    click.option("--max-steps", type=click.IntRange(min=1), help="Train so many steps, whatever the epochs."),
)
