"""Commands that move stores and make new ones of them. Thin: parse, call one library function, print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from featurestore.clips import KINDS
from featurestore.locate import find_store, names_of
from mervcache.console import ProgressLine, stacked
from pipeline.cli.options import AS_JSON, handle_cli_errors, print_result

URLS = """URLs: s3://BUCKET/FOLDER, gs://, az:// and file:// to read and write; hf://datasets/USER/REPO[@BRANCH][/FOLDER]
to read and push to, in commits, the snapshot in the last; https:// to read. Endpoint, region and credentials come from
the environment: AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ..., GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_..., HF_TOKEN (or `hf auth login`). az:// is tested against Azurite, gs:// against a server that answers
as its documentation says; hf:// is tested against a server of our own that speaks its protocol, not against the Hub
itself (nor is Xet); none was tried against the service itself. No repository is made by itself, and the history of one
keeps what a tombstone removes until it is squashed.
"""
ENCODERS = click.option("--encoders", metavar="LIST", show_default="all", help="Only these, comma separated.")
DATASETS = click.option("--datasets", metavar="LIST", show_default="all", help="Only clips of these, comma separated.")
CLIPS = click.option(
    "--clips", type=click.Path(exists=True, dir_okay=False), show_default="all", help="File of clip ids, one a line."
)
KIND = click.option("--kind", type=click.Choice(KINDS), show_default="both", help="Clips of this kind only.")
SPLIT = click.option(
    "--split", metavar="NAME", show_default="all", help="Conversations of this split, and their clips: train, heldout."
)
transfer_options = stacked(
    ENCODERS,
    DATASETS,
    CLIPS,
    click.option("--workers", type=click.IntRange(1, 64), default=4, help="Blocks in flight, each about 100 MB."),
    click.option("--check", is_flag=True, help="Read everything back at the destination and compare digests."),
    click.option(
        "--journal/--no-journal", "with_journal", default=True, help="Send the journals too: they name hosts and paths."
    ),
    AS_JSON,
)
cell_options = stacked(DATASETS, SPLIT, ENCODERS, CLIPS, KIND, AS_JSON)
MB = 1e6


@click.command(epilog=URLS)
@handle_cli_errors
@click.argument("store")
@click.argument("url")
@transfer_options
@click.option(
    "--license", show_default="as before, else unknown", help="Of the data, for the card: cc-by-4.0, other, ..."
)
def push(store: str, url: str, as_json: bool, **options: Any) -> None:
    """Send a store to a bucket, a folder or the Hub, with a card.

    Run again to go on, or to send what is new. Clips and datasets are sent as the whole blocks that hold them; the
    answer tells what that costs. To cut instead, make a `subset` first.
    """
    from featurestore.transfer.sync import push as run_push

    options = _selected(options)
    with ProgressLine("push", unit="MB", scale=MB) as progress:
        done = run_push(find_store(store), url, **options, progress=progress)
    _show_transferred(done, as_json)


@click.command(epilog=URLS)
@handle_cli_errors
@click.argument("url")
@click.argument("store")
@transfer_options
def pull(url: str, store: str, as_json: bool, **options: Any) -> None:
    """Fetch a store, or some encoders of it. Run again to go on, or to fetch what is new."""
    from featurestore.transfer.sync import transfer

    options = _selected(options)
    with ProgressLine("pull", unit="MB", scale=MB) as progress:
        done = transfer(url, store, **options, progress=progress)
    _show_transferred(done, as_json)


def _selected(options: dict[str, Any]) -> dict[str, Any]:
    """Options with a `Selection` in place of the words that make it."""
    words = {name: options.pop(name) for name in ("encoders", "datasets", "clips")}
    return {**options, "selection": selection(**words)}


def selection(encoders: str | None, datasets: str | None, clips: str | None, **others: str | None) -> Any:
    """Options as typed -> a `Selection`; `others` are its kind and split."""
    from featurestore.transfer.selection import Selection, read_clip_list

    return Selection(
        encoders=_names(encoders),
        datasets=_names(datasets),
        clips=read_clip_list(clips) if clips else None,
        **others,
    )


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(names_of(text)) if text else None


def _show_transferred(done: Any, as_json: bool) -> None:
    from pipeline.cli.render import transferred

    print_result(vars(done), as_json, lambda: transferred(done))


@click.command()
@handle_cli_errors
@click.argument("store")
@click.argument("out")
@cell_options
def subset(store: str, out: str, as_json: bool, **names: Any) -> None:
    """Make a new store of a part of one. Nothing is computed, every row is checked."""
    _combine([store], out, as_json, names)


@click.command()
@handle_cli_errors
@click.argument("stores", nargs=-1, required=True, metavar="STORE... OUT")
@cell_options
def union(stores: tuple[str, ...], as_json: bool, **names: Any) -> None:
    """Make a new store OUT of several. Where two hold a clip of one encoder, the first one's tokens are taken."""
    if len(stores) < 3:
        raise click.UsageError("give two stores or more, and the new one: union STORE STORE OUT")
    _combine(stores[:-1], stores[-1], as_json, names)


@click.command("export")
@handle_cli_errors
@click.argument("store")
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--format", type=click.Choice(("webdataset", "safetensors")), default="webdataset", help="Kind of files.")
@cell_options
def export_store(store: str, out: str, format: str, as_json: bool, **names: Any) -> None:
    """Write a store as plain files. Tars of .npy, one per block, or safetensors, one per clip; with SHA256SUMS."""
    from featurestore.transfer.export import export
    from featurestore.transfer.merge import StoreCells
    from pipeline.cli import render

    with ProgressLine("export", unit="cells") as progress:
        source = StoreCells(find_store(store))
        done = export(source, out, format=format, selection=selection(**names), progress=progress)
    print_result(vars(done), as_json, lambda: render.details(vars(done)))


@click.command("import")
@handle_cli_errors
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.argument("out")
@AS_JSON
def import_store(folder: str, out: str, as_json: bool) -> None:
    """Make a store of an exported folder. Checked as a stranger's: paths, sizes, digests."""
    from featurestore.transfer.export import ExportCells

    _lay([ExportCells(folder)], out, as_json, None)


def _combine(stores: Sequence[str], out: str, as_json: bool, names: dict[str, Any]) -> None:
    from featurestore.transfer.merge import StoreCells

    _lay([StoreCells(find_store(store)) for store in stores], out, as_json, selection(**names))


def _lay(sources: Sequence[Any], out: str, as_json: bool, chosen: Any) -> None:
    from featurestore.transfer.merge import combine
    from pipeline.cli.render import combined

    with ProgressLine("copy", unit="cells") as progress:
        done = combine(sources, find_store(out), selection=chosen, progress=progress)
    print_result(vars(done), as_json, lambda: combined(done))


SHARE_COMMANDS = (push, pull, subset, union, export_store, import_store)
