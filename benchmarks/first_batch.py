"""Time to first batch: a training run's opening, planning and first batch, from a thousand clips to a million.

    python benchmarks/first_batch.py --page docs/performance.md

Each size is a store whose receipts are all there, with shards of the clips of the first batch alone, and one sample per
clip. Each measurement is a fresh process without a cache: on this machine's disk, and from an S3 server here, whose
every answer waits `--latency-ms`. Requests are those before the first row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from peers import HERE, KEYS, put_newest, replace_part, s3_server
from scale import IDENTITY, TOKENS, put_receipt

from featurestore.clips import Clip, Sample, Turn
from featurestore.layout import shard_place
from featurestore.writer import StoreWriter
from trainer.config import OptimizerConfig, TrainConfig

BATCH = 16
BLOCK_ROWS = 64
RATES = OptimizerConfig(projector_lr=1e-4, fusion_lr=1e-4, llm_lr=1e-4)
CONFIG = TrainConfig(llm="fresh:tiny", train_llm="full", optimizer=RATES, batch_size=BATCH, max_steps=1)


@click.command(context_settings={"show_default": True})
@click.option("--clips", "sizes", multiple=True, type=int, default=(1000, 10_000, 100_000, 1_000_000))
@click.option("--latency-ms", default=20.0, help="What each answer of the S3 server waits.")
@click.option("--page", type=click.Path(path_type=Path), help="Page whose table is replaced.")
@click.option("--one", hidden=True)
def main(sizes: tuple[int, ...], latency_ms: float, page: Path | None, one: str | None) -> None:
    """Print seconds to the first batch for each size and place."""
    if one:
        click.echo(json.dumps(first_batch(one)))
        return
    os.fsync = lambda descriptor: None  # the disk of the store in the making is not what is measured
    lines = [
        "| clips | place | open s | plan s | batch s | all s | CPU s | requests before the first row |",
        "|---" * 8 + "|",
    ]
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="first-") as name, s3_server(Path(name), latency_ms / 1000) as endpoint:
            place = Path(name) / "bucket/first.zarr"
            make_store(place, size)
            lines.append(line(size, "disk", measured(str(place), os.environ)))
            put_newest(place)
            environ = {**os.environ, **KEYS, "AWS_ENDPOINT_URL": endpoint}
            lines.append(line(size, f"S3 + {latency_ms:g} ms", measured("s3://bucket/first.zarr", environ)))
            click.echo("\n".join(lines[-2:]), err=True)
    click.echo("\n".join(lines))
    if page:
        replace_part(page, "first batch", "\n".join(lines))


def line(size: int, place: str, found: dict) -> str:
    seconds = [found[name] for name in ("open_s", "plan_s", "batch_s")]
    cells = [f"{size:,}", place, *(f"{s:.2f}" for s in [*seconds, sum(seconds), found["processor_s"]])]
    return f"| {' | '.join(cells)} | {found['requests'] if place != 'disk' else '-'} |"


def measured(place: str, environ: dict[str, str]) -> dict:
    command = [sys.executable, __file__, "--one", place]
    environment = {**environ, "PYTHONPATH": str(HERE.parent), "MERV_CACHE_BYTES": "1"}
    with tempfile.TemporaryDirectory() as cache:
        environment["MERV_CACHE_DIR"] = cache
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def first_batch(place: str) -> dict:
    """Seconds of each part; imports and the model are not among them."""
    from trainer.data.batches import order_digest, select, streams
    from trainer.data.collate import collate, distinct_clips
    from trainer.data.order import Order
    from trainer.data.prompts import Rendered
    from trainer.sources import open_store

    requests = count_requests()
    began, cpu = time.perf_counter(), time.process_time()
    samples, source = open_store(place, CONFIG)
    opened = time.perf_counter()
    data = select(samples, source, CONFIG)
    digest = order_digest(data.samples)
    order = Order(streams(data.samples, CONFIG), batch_size=BATCH, seed=CONFIG.seed, digest=digest)
    order.batch(0)
    planned = time.perf_counter()
    before = len(requests)
    # The shards that are there hold the first clips, in place of those that the order would take.
    clips, rows = distinct_clips([sample.clip_id for sample in data.samples[:BATCH]])
    text = Rendered(input_ids=[1] * 32, labels=[1] * 32, visual_at=1)
    collate([text] * BATCH, rows, source.fetch(clips), num_visual_tokens=1)
    ended = time.perf_counter()
    metadata = [key for key in requests[before:] if not shard_place(key)]
    return {
        "open_s": opened - began,
        "plan_s": planned - opened,
        "batch_s": ended - planned,
        "processor_s": time.process_time() - cpu,
        "requests": before + len(metadata),
    }


def count_requests() -> list[str]:
    """Keys of the requests to a bucket from here on, a listing as `list PREFIX`."""
    import obstore

    sent: list[str] = []

    def counted(name: str) -> None:
        call = getattr(obstore, name)

        def counting(store, key=None, *arguments, **options):  # as obstore's own
            sent.append(f"list {key}" if name.startswith("list") else str(key))
            return call(store, key, *arguments, **options)

        setattr(obstore, name, counting)

    for name in ("get", "head", "get_range", "list", "list_with_delimiter"):
        counted(name)
    return sent


def make_store(place: Path, num_clips: int) -> None:
    """A store with shards of its first block only."""
    writer = StoreWriter.open_or_create(place, block_rows={"video": BLOCK_ROWS})
    group = writer.ensure_group("video", IDENTITY, batch_shape=1, weights_label="random:0")
    clips = [Clip(dataset="first", path=f"{n // 1000:04}/{n:07}.mp4", kind="video") for n in range(num_clips)]
    writer.add_clips(clips)
    turns = (Turn(role="human", text="<video>\nWhat happens?"), Turn(role="gpt", text="A person opens a door."))
    writer.add_samples(
        "bench",
        (
            Sample(sample_id=f"{n:07}", clip_id=clip.clip_id, turns=turns, stage="finetune", source="bench")
            for n, clip in enumerate(clips)
        ),
    )
    writer.grow_groups()
    for block in range(-(-num_clips // BLOCK_ROWS)):
        rows = range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, num_clips))
        if block:
            put_receipt(writer, "", block, rows.start, rows.stop)
            continue
        task = group.begin(block, rows)
        for row in rows:
            task.add(row, {"tokens": np.array(TOKENS)}, media_sha256="0" * 64, decoder="frames/1")
        task.commit()
    writer.publish_snapshot()


if __name__ == "__main__":
    main()
