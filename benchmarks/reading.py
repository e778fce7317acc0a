"""Reading compared with its limit: shuffled whole-clip reads from a store, and the same bytes without it.

    python benchmarks/reading.py            # 0.3 GB in a temporary folder, one thread, warm page cache

Tokens are synthetic: float16 [16, 8, 8, 1024], smooth in time, of uneven channel scale. What is read is checked
against its crc32c everywhere, except in the first row of each half; so the second row is the limit at equal checks.
Processor time counts, since other work on the machine changes it least; tensorstore's threads are in it. Readers take
turns batch by batch, each at a batch of its own, and the median over all batches counts: the speed of memory drifts by
half within seconds where other machines share it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import google_crc32c
import numpy as np
from numcodecs import blosc
from synthetic import synthetic_identity

from featurestore.clips import Clip
from featurestore.shards import Shard
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter

GRID, WIDTH = (16, 8, 8), 1024
BATCH = 16  # clips per read
IDENTITY = synthetic_identity("synthetic", GRID, WIDTH)


@click.command(context_settings={"show_default": True})
@click.option("--clips", default=128, help="Clips in the store.")
@click.option("--repeats", default=9, help="Passes over all clips, after one that does not count.")
def main(clips: int, repeats: int) -> None:
    """Print MB/s of delivered float16 tokens, and the ratio to the limit."""
    for codec in ("none", "blosc"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bench.zarr"
            make_store(path, clips, codec)
            report(codec, compare(path, codec, repeats))


def make_store(path: Path, num_clips: int, codec: str) -> None:
    writer = StoreWriter.open_or_create(path)
    rows = writer.add_clips([Clip(dataset="bench", path=f"{i}.mp4", kind="video") for i in range(num_clips)])
    group = writer.ensure_group("video", IDENTITY, batch_shape=1, weights_label="random:0", codec=codec)
    rng = np.random.default_rng(0)
    gain = rng.lognormal(size=WIDTH)
    for block in group.missing_blocks():
        block_writer = group.begin(block)
        for row in (row for row, _ in rows if row in block_writer.rows):
            smooth = rng.normal(size=(1, 1, 1, WIDTH)) + 0.3 * rng.normal(size=(*GRID, WIDTH)).cumsum(axis=0)
            tokens = (smooth * gain).astype(np.float32)
            block_writer.add(row, {"tokens": tokens}, media_sha256=None, decoder=None)
        block_writer.commit()
    writer.publish_snapshot()


def compare(path: Path, codec: str, repeats: int, only: Sequence[str] = ()) -> dict[str, float]:
    """Processor seconds per clip by reader, the median over the batches of all passes."""
    store = FeatureStore.open(path)
    ids = store.clips["clip_id"].to_pylist()
    np.random.default_rng(1).shuffle(ids)
    out = np.empty((BATCH, *GRID, WIDTH), np.float16)
    chunks = encoded_chunks(store, path, ids)
    readers = {
        "bare, unchecked": lambda batch: bare(chunks, batch, out, codec, check=False),
        "bare, checked": lambda batch: bare(chunks, batch, out, codec, check=True),
        "FeatureStore.read(out=)": lambda batch: store.read(batch, encoder="synthetic", out=out),
        "FeatureStore.read": lambda batch: store.read(batch, encoder="synthetic"),
        "training loader": loader_of(store),
        "zarr-python, array[i]": zarr_reader(path, store, out),
        "tensorstore": tensorstore_reader(path, store),
    }
    readers = {name: reader for name, reader in readers.items() if not only or name in only}
    batches = [ids[start : start + BATCH] for start in range(0, len(ids) - BATCH + 1, BATCH)]
    taken: dict[str, list[float]] = {name: [] for name in readers}
    for step in range((1 + repeats) * len(batches)):
        for turn, (name, reader) in enumerate(readers.items()):
            taken[name].append(seconds(reader, batches[(step + turn) % len(batches)]))
    return {name: statistics.median(values[len(batches) :]) / BATCH for name, values in taken.items()}


def report(codec: str, taken: dict[str, float]) -> None:
    megabytes = 2 * GRID[0] * GRID[1] * GRID[2] * WIDTH / 1e6
    click.echo(f"codec {codec}: {'reader':<26}{'MB/s':>8}{'of bare, checked':>18}")
    for name, seconds_of_clip in taken.items():
        ratio = taken["bare, checked"] / seconds_of_clip
        click.echo(f"{'':<{len(codec) + 8}}{name:<26}{megabytes / seconds_of_clip:>8.0f}{ratio:>18.2f}")


def seconds(reader: Callable, batch: list[str]) -> float:
    """Processor seconds of one batch."""
    started = time.process_time()
    reader(batch)
    return time.process_time() - started


def loader_of(store: FeatureStore) -> Callable:
    """What a step does to read: tokens as tensors, collated with a text of 32 tokens."""
    from trainer.data.collate import collate
    from trainer.data.prompts import Rendered
    from trainer.data.tokens import StoreTokens

    source = StoreTokens(store, ["synthetic"])
    text = Rendered(input_ids=[1] * 32, labels=[1] * 32, visual_at=1)
    return lambda batch: collate([text] * len(batch), range(len(batch)), source.fetch(batch), num_visual_tokens=64)


def encoded_chunks(store: FeatureStore, path: Path, ids: list[str]) -> dict[str, tuple[int, int, int]]:
    """Clip id -> (open file, offset, length) of its chunk: where a reader with no store around it would look."""
    writer = StoreWriter.open(path)
    group = writer.open_group("video", IDENTITY.group_name)
    spec, places, files = group.specs["tokens"], {}, {}
    for clip_id, row in zip(ids, store.rows(ids, encoder="synthetic"), strict=True):
        block, inside = divmod(int(row), group.block_rows)
        if block not in files:
            key = f"video/{IDENTITY.group_name}/tokens/c/{block}/0/0/0/0"
            files[block] = (os.open(path / key, os.O_RDONLY), Shard(spec, writer.objects.open(key)))
        file, shard = files[block]
        offset, length = (int(n) for n in shard._index[inside])
        places[clip_id] = (file, offset, length)
    return places


_scratch = np.empty(4 << 20, np.uint8)


def bare(places: dict, batch: list[str], out: np.ndarray, codec: str, *, check: bool) -> None:
    """One pread per clip and, for blosc, one decompression."""
    for slot, clip_id in enumerate(batch):
        file, offset, length = places[clip_id]
        raw = codec == "none"
        target = out[slot].reshape(-1).view(np.uint8) if raw else _scratch[: length - 4]
        os.preadv(file, [memoryview(target)], offset)
        if check:
            google_crc32c.value(target)
        if not raw:
            blosc.decompress(target, out[slot])


def zarr_reader(path: Path, store: FeatureStore, out: np.ndarray) -> Callable:
    import zarr

    array = zarr.open_array(path / "video" / IDENTITY.group_name / "tokens", mode="r")

    def read(batch: list[str]) -> None:
        for slot, row in enumerate(store.rows(batch, encoder="synthetic")):
            out[slot] = array[int(row)]

    return read


def tensorstore_reader(path: Path, store: FeatureStore) -> Callable:
    import tensorstore

    folder = str(path / "video" / IDENTITY.group_name / "tokens")
    array = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": folder}}).result()

    def read(batch: list[str]) -> None:
        array.oindex[store.rows(batch, encoder="synthetic").tolist()].read().result()

    return read


if __name__ == "__main__":
    main()
