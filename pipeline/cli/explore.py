"""Commands that look at a store's clips: view, vectors, fiftyone, duplicates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featurestore.locate import Place, names_of
from mervcache.completion import complete_encoders
from mervcache.console import ProgressLine, echo, examples, plural
from mervcache.errors import EXIT_WITH_FAILURES
from mervcache.files import replace_text
from pipeline.cli.options import AS_JSON, ROOT, handle_cli_errors, print_result, takes_store

ENCODERS = click.option(
    "--encoders",
    metavar="LIST",
    shell_complete=complete_encoders,
    show_default="all",
    help="Only these, comma separated, such as dinov2 or dinov2@16x4x4.",
)


@click.command(
    epilog=examples(
        "merv-pipeline view features/demo.zarr", "merv-pipeline view features/demo.zarr --run runs/demo --out site"
    )
)
@handle_cli_errors
@takes_store
@ROOT
@click.option(
    "--run", type=click.Path(file_okay=False, path_type=Path), help="A training run: its answers and fusion weights."
)
@click.option(
    "--projection",
    type=click.Choice(["pca", "umap"]),
    default="pca",
    help="Projection of the map; umap needs the extra `umap`.",
)
@click.option(
    "--max-clips",
    type=click.IntRange(1),
    default=5000,
    help="Maximum number of clips in the page, evenly spaced over the store.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1; 0 selects a free one.")
@click.option("--browser/--no-browser", "opens", default=True, help="Open the page.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write the page into this new folder and exit.",
)
@click.option(
    "--media",
    "with_media",
    is_flag=True,
    help="With --out: copy the media of types that browsers play (.mp4, .webm, .jpg, ...), whatever their codec.",
)
def view(place: Place, out: Path | None, port: int, opens: bool, with_media: bool, **options: Any) -> None:
    """Show the clips of a store in a browser.

    A map by pooled features, a table to search and filter, videos next to what each encoder sees, conversations,
    nearest clips, and with --run answers and fusion weights. The server listens on 127.0.0.1 only and writes nothing.
    """
    import bokeh  # noqa: F401 - first: the extra that brings it also brings everything else that is used here

    from featurestore import FeatureStore
    from pipeline.explorer import Explorer, serve, write_site
    from pipeline.explorer.server import check_new_folder

    if with_media and out is None:
        raise click.UsageError("--media copies media into the folder of --out: add --out DIR")
    if out is not None:
        check_new_folder(out)  # pooling the clips takes seconds and more
    with Explorer(FeatureStore.open(place), plays_media=with_media or out is None, **options) as explorer:
        for folder, number in explorer.missing_media.items():
            under = f" under {folder}" if folder else ""
            echo(f"{plural(number, 'clip')} without media{under}; name the folder with --root")
        if out is not None:
            click.echo(write_site(explorer, out))
            return
        server = serve(explorer, port)
        try:
            click.echo(server.url)
            echo("Ctrl-C ends it.")
            if opens:
                click.launch(server.url)
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            server.server_close()


@click.command(epilog=examples("merv-pipeline vectors features/demo.zarr --encoders dinov2,siglip"))
@handle_cli_errors
@takes_store
@ENCODERS
@click.option("--pooling", type=click.Choice(["mean", "max"]), default="mean", help="Over time, height and width.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    show_default="NAME-vectors.parquet next to the store",
    help="Parquet file to write.",
)
def vectors(place: Place, encoders: str | None, pooling: Any, out: Path | None) -> None:
    """Write one vector per clip and encoder.

    As Parquet for duckdb, LanceDB, FAISS and FiftyOne: a column of fixed-size lists of float32 per encoder, next to
    clip_id, dataset and kind.
    """
    from featurestore import FeatureStore
    from pipeline.vectors import pool_store, vectors_path, write_vectors

    store = FeatureStore.open(place)
    chosen = names_of(encoders) if encoders else list(store.encoders)
    with ProgressLine("pool", unit="clips", total=len(store) * len(chosen)) as progress:
        table = pool_store(store, chosen, pooling=pooling, progress=progress)
    click.echo(write_vectors(table, out or vectors_path(store)))


@click.command(epilog=examples("merv-pipeline fiftyone features/demo.zarr --out fiftyone/demo"))
@handle_cli_errors
@takes_store
@ENCODERS
@ROOT
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder to write.")
def fiftyone(place: Place, encoders: str | None, root: str | None, out: Path) -> None:
    """Write clips and their vectors for FiftyOne.

    OUT/video and OUT/image are datasets of the type FiftyOneDataset: paths of the media, conversations, and the mean
    tokens of each encoder. Nothing is copied. Exit code 3: clips without a media file of their own were left out.
    """
    from featurestore import FeatureStore
    from pipeline.fiftyone import write_fiftyone

    store = FeatureStore.open(place)
    chosen = names_of(encoders) if encoders else list(store.encoders)
    with ProgressLine("pool", unit="clips", total=len(store) * len(chosen)) as progress:
        written = write_fiftyone(store, out, chosen, root=root, progress=progress)
    for folder in written.folders.values():
        click.echo(folder)
    if written.left_out:
        echo(f"{written.left_out} of {len(store)} clips have no media file of their own and are left out")
        click.get_current_context().exit(EXIT_WITH_FAILURES)


@click.command(
    epilog=examples(
        "merv-pipeline duplicates features/demo.zarr --threshold 0.95 --json",
        "merv-pipeline duplicates features/demo.zarr --out exclude.txt",
    )
)
@handle_cli_errors
@takes_store
@ENCODERS
@click.option(
    "--threshold",
    type=click.FloatRange(-1, 1),
    default=0.98,
    help="Smallest cosine similarity of centred mean tokens, for every encoder.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the training clips of leaks, one clip id a line, for merv-train --exclude.",
)
@click.option("--dedup", is_flag=True, help="With --out: also all but one of training clips alike.")
@AS_JSON
def duplicates(
    place: Place, encoders: str | None, threshold: float, out: Path | None, dedup: bool, as_json: bool
) -> None:
    """List near-duplicates, and leaks into training.

    Near-duplicates are similar for every encoder; a leak is a pair of an evaluation clip and a training clip.
    """
    from featurestore import FeatureStore
    from pipeline.cli import render
    from pipeline.cli.next_step import exclude_command
    from pipeline.duplicates import find_duplicates

    if dedup and out is None:
        raise click.UsageError("--dedup is of --out: add --out FILE")
    store = FeatureStore.open(place)
    chosen = names_of(encoders) if encoders else list(store.encoders)
    with ProgressLine("pool", unit="clips", total=len(store) * len(chosen)) as progress:
        found = find_duplicates(store, chosen, threshold=threshold, progress=progress)
    clip_ids = [*found.leaked, *(found.repeated if dedup else ())]
    if out is not None:
        replace_text(out, "".join(f"{clip_id}\n" for clip_id in clip_ids))
    next_command = exclude_command(found, encoders, out if clip_ids else None)
    print_result(found.to_dict(), as_json, lambda: render.duplicates(found, next_command))


EXPLORE_COMMANDS: tuple[click.Command, ...] = (view, vectors, fiftyone, duplicates)
