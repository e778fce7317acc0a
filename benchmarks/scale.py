"""What everything but the encoders costs, from a thousand clips to a million.

    python benchmarks/scale.py [--clips 1000 --clips 10000 ...] [--workers 64]

A store is made for clips that have no media; rows are given out and blocks planned; as many tasks as there are blocks,
which return at once, go through a real Dask scheduler beside the driver to 64 workers in another process; tokens of
width 1 are committed block by block (without fsync: the disk is not what is measured; beyond 100,000 clips receipts
alone). Printed per size: seconds to give out rows and to plan, processor milliseconds per block of the driver with its
scheduler and of the workers, seconds of a snapshot, of the scan for a resume and of opening, what all that makes per
clip without the workers, bytes that a store's metadata takes, and the driver's peak memory. Each size runs in a process
of its own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import many_workers
import numpy as np
from synthetic import synthetic_identity

from featurestore import FeatureStore
from featurestore.clips import Clip
from featurestore.layout import receipt_key
from featurestore.records import Receipt, RowOutcome
from featurestore.writer import StoreWriter
from pipeline.plan import StoreView, plan_blocks

IDENTITY = synthetic_identity(
    "still", (1, 1, 1), 1, architecture={"hidden_size": 1}, frame_rule="linspace-32/1", decode="frames/1"
)
WHOLE_UP_TO = 100_000  # clips; beyond, receipts are written without their shards
TOKENS = np.zeros((1, 1, 1, 1), np.float32)


def commit_block(store: str, block: int, first: int, stop: int) -> dict:
    """What a worker does besides decoding and encoding: open the store, write a shard and its receipt."""
    group = StoreWriter.open(store).open_group("video", IDENTITY.group_name)
    writer = group.begin(block, range(first, stop))
    for row in range(first, stop):
        writer.add(row, {"tokens": TOKENS}, media_sha256="0" * 64, decoder="frames/1")
    writer.commit()
    return {"clips": stop - first}


def put_receipt(store: StoreWriter, _: str, block: int, first: int, stop: int) -> None:
    """The receipt alone: what planning, snapshots and opening read."""
    ok = RowOutcome(state="ok", digest="0" * 32, media_sha256="0" * 64, decoder="frames/1")
    rows = tuple(ok if row < stop else RowOutcome(state="empty") for row in range(first, first + 64))
    shards = {"tokens": {"sha256": "0" * 64, "bytes": 1000}}
    receipt = Receipt(kind="video", group=IDENTITY.group_name, block=block, rows=rows, shards=shards)
    store.objects.put_exclusive(receipt_key("video", IDENTITY.group_name, block), receipt.to_bytes())


def measure(num_clips: int, workers: int, folder: Path) -> dict[str, float]:
    """Seconds and bytes of one size."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - began

    place = folder / "scale.zarr"
    clips = [Clip(dataset="scale", path=f"{n // 1000:04}/{n:07}.mp4", kind="video") for n in range(num_clips)]
    ids = {clip.clip_id for clip in clips}
    with timed("rows"):
        store = StoreWriter.open_or_create(place)
        store.ensure_group("video", IDENTITY, batch_shape=1, weights_label="random:0")
        store.add_clips(clips)
        store.grow_groups()
    del clips
    with timed("plan"):
        blocks = plan_blocks(StoreView(store), {"still": IDENTITY}, clip_ids=ids)
    tasks = [(str(place), b.block, min(b.wanted["still"]), max(b.wanted["still"]) + 1) for b in blocks]
    del blocks
    seconds |= {f"dask {side}": cost for side, cost in many_workers.cost(tasks, workers).items()}
    with timed("commit"):
        for task in tasks:
            commit_block(*task) if num_clips <= WHOLE_UP_TO else put_receipt(store, *task)
    with timed("snapshot"):
        store.publish_snapshot()
    with timed("resume"):
        left = plan_blocks(StoreView(StoreWriter.open(place)), {"still": IDENTITY}, clip_ids=ids)
    assert not left
    with timed("open"):
        opened = FeatureStore.open(place)
        assert len(opened) == num_clips
    metadata = sum(f.stat().st_size for top in ("clips", "snapshots", "receipts") for f in (place / top).rglob("*.*"))
    return {
        "clips": num_clips,
        "blocks": len(tasks),
        **seconds,
        "metadata": metadata,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def line(row: dict[str, float]) -> str:
    per_clip_us = 1e6 * sum(row[name] for name in ("rows", "plan", "dask driver", "snapshot")) / row["clips"]
    return (
        f"{row['clips']:>9,} {row['blocks']:>7,} {row['rows']:7.2f} {row['plan']:7.2f} "
        f"{1000 * row['dask driver'] / row['blocks']:13.2f} {1000 * row['dask workers'] / row['blocks']:14.2f} "
        f"{1000 * row['commit'] / row['blocks']:13.2f} "
        f"{row['snapshot']:8.2f} {row['resume']:9.2f} {row['open']:7.2f} {per_clip_us:11.0f} "
        f"{row['metadata'] / row['clips']:9.0f} {row['peak'] / 1e6:8.0f}"
    )


NAMES = (
    "clips",
    "blocks",
    "rows[s]",
    "plan[s]",
    "driver[ms/bl]",
    "workers[ms/bl]",
    "commit[ms/bl]",
    "snap.[s]",
    "resume[s]",
    "open[s]",
)
WIDTHS = (9, 7, 7, 7, 13, 14, 13, 8, 9, 7, 11, 9, 8)
HEAD = " ".join(map(str.rjust, (*NAMES, "us per clip", "meta[B/c]", "peak[MB]"), WIDTHS))


@click.command()
@click.option(
    "--clips", "sizes", multiple=True, type=int, default=(1000, 10_000, 100_000, 1_000_000), show_default=True
)
@click.option("--workers", default=64, show_default=True, help="Dask workers, all in one process.")
@click.option("--one", type=int, hidden=True)
def main(sizes: tuple[int, ...], workers: int, one: int | None) -> None:
    """Measure what everything but the encoders costs."""
    if one:
        os.fsync = lambda descriptor: None
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            click.echo(json.dumps(measure(one, workers, Path(folder))))
        return
    click.echo(HEAD)
    for size in sizes:
        command = [sys.executable, __file__, "--one", str(size), "--workers", str(workers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        click.echo(line(row))


if __name__ == "__main__":
    main()
