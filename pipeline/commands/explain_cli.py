"""`explain`: parse, call one library function, print."""

from __future__ import annotations

from typing import Any

import click

from featurestore.locate import find_store
from mervcache.console import say
from pipeline.commands.options import AS_JSON, extraction_options, given_options
from pipeline.commands.show import progress, says_errors, show_result


@click.command()
@says_errors
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
    from pipeline.upkeep.explain import explain as run_explain
    from pipeline.upkeep.explain import explained_config

    store = find_store(place or options.pop("store", None))
    config, settings = explained_config(store, config_file, given_options(options))
    if print_config:
        click.echo(config.to_yaml(), nl=False)
        return
    with progress("media", "clips") as shown:
        found = run_explain(
            store, config, settings=settings, full=media == "full", probe=probe, progress=shown, say=say
        )
    from pipeline.commands.explain_tables import explanation

    show_result(found.to_dict(), as_json, lambda: explanation(found))


_TAKEN_OVER = "dataset root encoders weights stage kind limit decoder compute_dtype storage_dtype grid".split()

for parameter in explain.params:  # options of its own: each command has its copy
    if parameter.name in _TAKEN_OVER:
        parameter.show_default = "as in the store's newest run"
    elif parameter.name == "store":
        parameter.help, parameter.show_default = "The store, as for extract.", "the only one under features/"

EXPLAIN_COMMANDS = (explain,)
