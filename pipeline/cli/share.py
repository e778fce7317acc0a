"""Commands that copy stores and make new ones from them: push, pull, subset, union, export, import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from featurestore.clips import KINDS
from featurestore.locate import find_store, names_of
from mervcache.completion import complete_dataset, complete_encoders, complete_store
from mervcache.console import ProgressLine, examples, stacked
from pipeline.cli.options import AS_JSON, handle_cli_errors, print_result

if TYPE_CHECKING:
    from featurestore.transfer.export import ExportCells
    from featurestore.transfer.merge import StoreCells
    from featurestore.transfer.selection import Selection

URLS = """URLs: s3://BUCKET/FOLDER, gs://, az:// and file:// to read and write; hf://datasets/USER/REPO[@BRANCH][/FOLDER]
to read and push to, in commits, the snapshot in the last; hf://buckets/USER/BUCKET[/FOLDER] to read and push to, by one
push at a time; https:// to read. Endpoint, region and credentials come from the environment: AWS_ENDPOINT_URL,
AWS_REGION, AWS_ACCESS_KEY_ID, ..., GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_..., HF_TOKEN (or `hf auth login`).
az:// is tested against Azurite, gs:// against a server that answers as its documentation says; hf:// is tested against
a server of our own that speaks its protocol, with the real hf_xet and its local content store, not against the Hub
itself; none was tried against the service itself. No repository and no bucket is made by itself, and the history of a
repository keeps what a tombstone removes until it is squashed.
"""
ENCODERS = click.option(
    "--encoders",
    metavar="LIST",
    shell_complete=complete_encoders,
    show_default="all",
    help="Only these, comma separated, such as dinov2 or dinov2@16x4x4.",
)
DATASETS = click.option(
    "--datasets",
    "--dataset",
    "datasets",
    metavar="LIST",
    shell_complete=complete_dataset,
    show_default="all",
    help="Only clips of these, comma separated.",
)
CLIPS = click.option(
    "--clips", type=click.Path(exists=True, dir_okay=False), show_default="all", help="File of clip ids, one per line."
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
    AS_JSON,
)
cell_options = stacked(DATASETS, SPLIT, ENCODERS, CLIPS, KIND, AS_JSON)
MB = 1e6


@click.command(
    epilog=examples(
        "merv-pipeline push features/lab.zarr s3://BUCKET/lab.zarr",
        "merv-pipeline push features/lab.zarr hf://datasets/USER/NAME --license cc-by-4.0",
    )
    + f"\n\n{URLS}"
)
@handle_cli_errors
@click.argument("store", shell_complete=complete_store)
@click.argument("url")
@transfer_options
@click.option(
    "--journal/--no-journal",
    "with_journal",
    default=False,
    help="Send the journals of runs too; they contain host names, paths and options.",
)
@click.option(
    "--license", show_default="as before, else unknown", help="Licence of the data, for the card: cc-by-4.0, other, ..."
)
def push(
    store: str, url: str, encoders: str | None, datasets: str | None, clips: str | None, as_json: bool, **options: Any
) -> None:
    """Send a store to a bucket, a folder or the Hub, with a card.

    Run it again to resume, or to send what is new. Clips and datasets are sent as the whole blocks that contain them;
    the result gives the overhead. To send exactly those clips, make a `subset` first.
    """
    from featurestore.transfer.sync import push as run_push
    from pipeline.cli import render

    selection = _select(encoders=encoders, datasets=datasets, clips=clips)
    with ProgressLine("push", unit="MB", scale=MB) as progress:
        done = run_push(find_store(store), url, selection=selection, **options, progress=progress)
    print_result(vars(done), as_json, lambda: render.transferred(done))


@click.command(
    epilog=examples(
        "merv-pipeline pull s3://BUCKET/lab.zarr features/lab.zarr --encoders dinov2,siglip",
        "merv-pipeline pull hf://datasets/USER/NAME features/msvd.zarr --dataset msvd",
    )
    + f"\n\n{URLS}"
)
@handle_cli_errors
@click.argument("url")
@click.argument("store", shell_complete=complete_store)
@transfer_options
@click.option("--journal/--no-journal", "with_journal", default=True, help="Fetch the journals of runs too.")
def pull(
    url: str, store: str, encoders: str | None, datasets: str | None, clips: str | None, as_json: bool, **options: Any
) -> None:
    """Fetch a store, or some encoders or datasets of it. Run it again to resume, or to fetch what is new.

    Of clips and datasets, the whole blocks that contain them are fetched, and the store goes on listing the others
    without tokens. `merv-pipeline subset URL STORE --dataset NAME` makes a store of exactly those clips.
    """
    from featurestore.transfer.sync import transfer
    from pipeline.cli import render

    selection = _select(encoders=encoders, datasets=datasets, clips=clips)
    with ProgressLine("pull", unit="MB", scale=MB) as progress:
        done = transfer(url, store, selection=selection, **options, progress=progress)
    print_result(vars(done), as_json, lambda: render.transferred(done))


def _select(
    *, encoders: str | None, datasets: str | None, clips: str | None, kind: str | None = None, split: str | None = None
) -> Selection:
    """Options as a `Selection`."""
    from featurestore.transfer.selection import Selection, read_clip_list

    return Selection(
        encoders=tuple(names_of(encoders)) if encoders else None,
        datasets=tuple(names_of(datasets)) if datasets else None,
        clips=read_clip_list(clips) if clips else None,
        kind=kind,
        split=split,
    )


@click.command(
    epilog=examples("merv-pipeline subset features/lab.zarr features/small.zarr --encoders dinov2 --split train")
)
@handle_cli_errors
@click.argument("store", shell_complete=complete_store)
@click.argument("out")
@cell_options
def subset(store: str, out: str, as_json: bool, **options: Any) -> None:
    """Make a new store from a part of one. Nothing is recomputed; every row is verified."""
    _combine(_stored_cells([store]), out, as_json, _select(**options))


@click.command(epilog=examples("merv-pipeline union features/mine.zarr features/theirs.zarr features/ours.zarr"))
@handle_cli_errors
@click.argument("stores", nargs=-1, required=True, shell_complete=complete_store, metavar="STORE... OUT")
@cell_options
def union(stores: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Make a new store OUT from several. If two have tokens of the same clip and encoder, the first store wins."""
    if len(stores) < 3:
        raise click.UsageError("give two stores or more, and the new one: union STORE STORE OUT")
    _combine(_stored_cells(stores[:-1]), stores[-1], as_json, _select(**options))


@click.command("export", epilog=examples("merv-pipeline export features/lab.zarr exported --format safetensors"))
@handle_cli_errors
@click.argument("store", shell_complete=complete_store)
@click.argument("out", type=click.Path(file_okay=False))
@click.option(
    "--format", type=click.Choice(("webdataset", "safetensors")), default="webdataset", help="Format of the files."
)
@cell_options
def export_store(store: str, out: str, format: str, as_json: bool, **options: Any) -> None:
    """Write a store as plain files. Tars of .npy, one per block, or safetensors, one per clip; with SHA256SUMS."""
    from featurestore.transfer.export import export
    from pipeline.cli import render

    with ProgressLine("export", unit="pairs") as progress:
        (source,) = _stored_cells([store])
        done = export(source, out, format=format, selection=_select(**options), progress=progress)
    print_result(vars(done), as_json, lambda: render.details(vars(done)))


@click.command("import", epilog=examples("merv-pipeline import exported features/copy.zarr"))
@handle_cli_errors
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.argument("out")
@AS_JSON
def import_store(folder: str, out: str, as_json: bool) -> None:
    """Make a store from an exported folder. It is untrusted: paths, sizes and digests are checked."""
    from featurestore.transfer.export import ExportCells

    _combine([ExportCells(folder)], out, as_json)


def _stored_cells(stores: Sequence[str]) -> list[StoreCells]:
    from featurestore.transfer.merge import StoreCells

    return [StoreCells(find_store(store)) for store in stores]


def _combine(
    sources: Sequence[StoreCells | ExportCells], out: str, as_json: bool, selection: Selection | None = None
) -> None:
    from featurestore.transfer.merge import combine
    from pipeline.cli import render

    with ProgressLine("copy", unit="pairs") as progress:
        done = combine(sources, find_store(out), selection=selection, progress=progress)
    print_result(vars(done), as_json, lambda: render.combined(done))


SHARE_COMMANDS: tuple[click.Command, ...] = (push, pull, subset, union, export_store, import_store)
