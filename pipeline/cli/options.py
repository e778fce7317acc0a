"""Options that commands share, and the `ExtractConfig` that the options of an extraction make.

An option that is not given is None, so that the config file's value or the default of `ExtractConfig` applies.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from featurestore.clips import KINDS
from featurestore.locate import find_store, is_url
from featurestore.storage_dtypes import STORAGE_DTYPES
from mervcache import console
from mervcache.completion import complete_dataset, complete_encoders, complete_store
from mervcache.config import parse_pairs
from mervcache.console import Command, echo, handle_errors, stacked
from mervcache.errors import EXIT_WITH_FAILURES
from pipeline.align import DEFAULT_GRID
from pipeline.config import COMPUTE_DTYPES, DECODER_NAMES, WINDOW, ExtractConfig, read_config
from pipeline.encoders.weights import weights_by_encoder

if TYPE_CHECKING:
    from pipeline.summary import ExtractSummary

STAGES = ("align", "finetune")

STORE_OPTION = click.option(
    "--store",
    "store_option",
    shell_complete=complete_store,
    type=click.Path(),
    show_default="the only one under features/",
    help="The store, as for extract.",
)


class MediaRoot(click.Path):
    """A folder that exists, or a URL below which the media are."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if is_url(value) else super().convert(value, param, ctx)


ROOT = click.option(
    "--root",
    type=MediaRoot(exists=True, file_okay=False),
    show_default="as at extraction",
    help="Folder of the media, or the URL of tar shards.",
)
WEIGHTS = click.option(
    "--weights", metavar="SPEC", multiple=True, show_default="as at extraction", help="As for extract. Repeatable."
)
DEVICE = click.option("--device", show_default="cuda if available, else cpu", help="cpu, cuda, cuda:1, ...")
GPU_COST = click.option(
    "--gpu-cost",
    type=click.FloatRange(min=0),
    metavar="PRICE",
    show_default="no cost is shown",
    help="Price of a GPU-hour in any currency, such as 2.50; on CPUs of a worker-hour.",
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
DATASET_OPTION = click.option(
    "--option",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    help="An option of the dataset; `merv-pipeline datasets NAME` lists them. Repeatable.",
)
CLUSTER_OPTION = click.option(
    "--cluster",
    metavar="KEY=VALUE",
    multiple=True,
    help="A setting of cuda or slurm, such as partition=gpu or walltime=8:00:00; see jobs/README.md. Repeatable.",
)
extraction_options = stacked(  # what would be extracted, from where, with what, and where it runs
    click.option(
        "--dataset", shell_complete=complete_dataset, help="Dataset by name; `merv-pipeline datasets` lists them."
    ),
    click.option(
        "--root",
        type=click.Path(file_okay=False),
        show_default="the dataset's own, e.g. data/videollava",
        help="Folder of media and annotations.",
    ),
    click.option(
        "--store",
        type=click.Path(),
        shell_complete=complete_store,
        show_default="features/DATASET.zarr",
        help="Feature store to write.",
    ),
    click.option(
        "--reuse",
        metavar="STORE",
        shell_complete=complete_store,
        help="Copy tokens of the same media from another store; folder or URL.",
    ),
    click.option(
        "--encoders",
        metavar="LIST",
        shell_complete=complete_encoders,
        show_default=",".join(ExtractConfig.encoders),
        help="Encoders, comma separated.",
    ),
    click.option(
        "--weights",
        metavar="SPEC",
        multiple=True,
        show_default="hub",
        help="hub, a folder, or random:SEED; NAME=SPEC sets one encoder. Repeatable.",
    ),
    click.option(
        "--config",
        "config_file",
        type=click.Path(dir_okay=False),
        help="YAML file of settings; options on the command line override it.",
    ),
    DATASET_OPTION,
    click.option("--stage", type=click.Choice(STAGES), show_default="all", help="Records of this training stage only."),
    click.option("--kind", type=click.Choice(KINDS), show_default="both", help="Clips of this kind only."),
    click.option("--limit", type=click.IntRange(1), show_default="all", help="Only the first clips of the listing."),
    click.option(
        "--fps",
        type=click.FloatRange(0, min_open=True),
        show_default="each video is one clip, whatever its length",
        help="Split videos into windows of frames at this rate: docs/long-videos.md.",
    ),
    click.option(
        "--window", type=click.IntRange(1), show_default=f"{WINDOW} with --fps", help="Frames of a window of --fps."
    ),
    click.option(
        "--decoder",
        type=click.Choice(DECODER_NAMES),
        show_default=ExtractConfig.decoder,
        help="frames/1 is frame-exact; the others reproduce published work.",
    ),
    click.option(
        "--compute-dtype",
        type=click.Choice(COMPUTE_DTYPES),
        show_default=ExtractConfig.compute_dtype,
        help="Arithmetic of the encoders.",
    ),
    click.option(
        "--storage-dtype",
        type=click.Choice(tuple(STORAGE_DTYPES)),
        show_default=ExtractConfig.storage_dtype,
        help="Data type of the stored tokens.",
    ),
    click.option(
        "--grid",
        metavar="T,H,W",
        show_default=",".join(map(str, DEFAULT_GRID)),
        help="Stored tokens per clip, or raw: each encoder's own grid. 16x16,8x8,raw stores several from one forward.",
    ),
    click.option(
        "--layer",
        "layers",
        metavar="NAME=N",
        multiple=True,
        show_default="each encoder's own",
        help="Block whose output is stored: 12, -1 (the last), -1+norm; several with commas. Repeatable.",
    ),
    click.option(
        "--upsample",
        is_flag=True,
        default=None,
        help="Allow --grid to exceed the rows and columns of an encoder's own grid.",
    ),
    click.option(
        "--prefix-tokens",
        is_flag=True,
        default=None,
        help="Store class and register tokens too, of the encoders that have them.",
    ),
    click.option(
        "--scheduler",
        metavar="NAME|ADDRESS",
        show_default=ExtractConfig.scheduler,
        help="local, cuda (this machine's GPUs), slurm, tcp://HOST:PORT, or a scheduler file.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1),
        show_default="1; with cuda one per GPU; with slurm one per GPU of a job",
        help="Worker processes.",
    ),
    CLUSTER_OPTION,
    DEVICE,
)


def takes_store(command: Command) -> Command:
    """Decorator: passes the store that the argument or --store names, else the only one under features/."""

    @click.argument("store", type=click.Path(), required=False, shell_complete=complete_store)
    @STORE_OPTION
    @functools.wraps(command)
    def wrapped(store: str | None, store_option: str | None, **options: Any) -> Any:
        return command(find_store(store or store_option), **options)

    return wrapped


def config_from_options(config_file: str | None, options: dict[str, Any]) -> ExtractConfig:
    """The settings of options, over those of a config file."""
    return read_config(config_file, given_options(options))


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as settings of `ExtractConfig`."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "weights" in given:
        given["weights"] = weights_by_encoder(given["weights"])
    if "options" in given:
        given["options"] = parse_pairs("--option", given["options"])
    if "cluster" in given:
        given["cluster"] = parse_pairs("--cluster", given["cluster"])
    parts = [part.strip() for part in str(given.get("grid", "raw")).split(",")]
    if not all(re.fullmatch(r"raw|\d+(x\d+){0,2}", part) for part in parts):
        example = "16,8,8, raw, or several such as 16x16,8x8,raw"
        raise click.BadParameter(f"--grid is T,H,W such as {example}; got {given['grid']!r}")
    if "layers" in given:
        given["layers"] = weights_by_encoder(given["layers"])  # NAME=N,N or N,N for all, as weights are given
    return given


def exit_with_failures(summaries: Sequence[ExtractSummary]) -> None:
    """Print what is missing as the last line and exit with its code; return if nothing is."""
    if failures := [summary.failures for summary in summaries if summary.failures]:
        line = f"finished with failures (exit code {EXIT_WITH_FAILURES}): {'; '.join(failures)}"
        echo(line, event="finished", level=logging.WARNING, exit_code=EXIT_WITH_FAILURES)
        click.get_current_context().exit(EXIT_WITH_FAILURES)


handle_cli_errors = handle_errors(
    interrupted="Interrupted. What was committed is kept; run the same command again to go on.",
)
print_result = partial(console.print_result, indent=2)
