"""Formats to compare: how each one stores synthetic clips, and a loader that yields collated batches of them.

Run by peers.py, one process per case, with the interpreter of the format: this project's, or the peers'.

    python benchmarks/peer_formats.py write FORMAT PLACE CODEC CLIPS
    python benchmarks/peer_formats.py read FORMAT PLACE CODEC CLIPS WORKERS PASSES

A batch is float16 [16, 16, 8, 8, 1024], the clips of an epoch in random order, as far as the format shuffles. Every
reader checks a digest of each clip: its format's own, else a crc32c stored with the clip. `read` prints the seconds of
each pass as JSON; before the first one the files are dropped from the page cache (`posix_fadvise`, DONTNEED).
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from peer_clips import (
    BATCH,
    SHAPE,
    RangedFile,
    bucket_of,
    check,
    clip_tokens,
    crc,
    drop_pages,
    get_many,
    is_remote,
    shuffled,
)

CLIPS_PER_FILE = 64  # of formats with files of many clips, like the store's blocks

# --- this project's store ---------------------------------------------------------------------------------------------


def write_merv(place: str, codec: str, num_clips: int) -> None:
    from synthetic import synthetic_identity

    from featurestore.clips import Clip
    from featurestore.writer import StoreWriter

    identity = synthetic_identity("synthetic", SHAPE[:3], SHAPE[3])
    writer = StoreWriter.open_or_create(place)
    rows = writer.add_clips([Clip(dataset="bench", path=f"{n:06d}.mp4", kind="video") for n in range(num_clips)])
    group = writer.ensure_group(
        "video", identity, batch_shape=1, weights_label="random:0", codec="none" if codec == "none" else "blosc"
    )
    for block in group.missing_blocks():
        task = group.begin(block)
        for row in (row for row, _ in rows if row in task.rows):
            task.add(row, {"tokens": clip_tokens(row)}, media_sha256=None, decoder=None)
        task.commit()
    writer.publish_snapshot()


def read_merv(place: str, codec: str, num_clips: int, workers: int) -> Callable[[], Iterator[torch.Tensor]]:
    """The training loader: batches collated in its prefetching thread."""
    from featurestore import FeatureStore
    from trainer.data.collate import collate
    from trainer.data.order import permutation
    from trainer.data.prefetch import Prefetch
    from trainer.data.prompts import Rendered
    from trainer.data.tokens import StoreTokens

    source = StoreTokens(FeatureStore.open(place, cache=False), ["synthetic"])
    text = Rendered(input_ids=[1] * 32, labels=[1] * 32, visual_at=1)
    epochs = iter(range(1 << 30))

    def epoch() -> Iterator[torch.Tensor]:
        order = permutation(num_clips, "bench", next(epochs))

        def make(step: int) -> torch.Tensor:
            ids = [f"bench/{n:06d}.mp4" for n in order[step * BATCH : (step + 1) * BATCH]]
            batch = collate([text] * BATCH, range(BATCH), source.fetch(ids), num_visual_tokens=64)
            return batch.tokens["synthetic"]

        with Prefetch(make, 0, num_clips // BATCH, depth=2) as batches:
            yield from batches

    return epoch


# --- readers of the same store ----------------------------------------------------------------------------------------


def array_of(place: str) -> tuple[str, str]:
    """(place, path) of the tokens' array in a store."""
    if not is_remote(place):
        return place, str(next(Path(place).glob("video/*/tokens")).relative_to(place))
    import obstore

    groups = obstore.list_with_delimiter(bucket_of(place), "video")["common_prefixes"]
    return place, f"{groups[0].strip('/')}/tokens"


def open_zarr(place: str) -> Any:
    import zarr

    place, path = array_of(place)
    if not is_remote(place):
        return zarr.open_array(Path(place) / path, mode="r")
    return zarr.open_array(zarr.storage.ObjectStore(bucket_of(place), read_only=True), path=path, mode="r")


def read_zarr(place: str, codec: str, num_clips: int, workers: int) -> Callable[[], Iterator[torch.Tensor]]:
    def read(array: Any, numbers: list[int]) -> np.ndarray:
        return np.stack([array[number] for number in numbers])

    loader = shuffled(place, num_clips, workers, open_zarr, read)
    return lambda: iter(loader)


def read_zarrs(place: str, codec: str, num_clips: int, workers: int) -> Callable[[], Iterator[torch.Tensor]]:
    def open_with_zarrs(place: str) -> Any:
        import zarr
        import zarrs  # noqa: F401  registers its pipeline

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 1})
        return open_zarr(place)

    def read(array: Any, numbers: list[int]) -> np.ndarray:
        return np.stack([array[number] for number in numbers])

    loader = shuffled(place, num_clips, workers, open_with_zarrs, read)
    return lambda: iter(loader)


def read_tensorstore(place: str, codec: str, num_clips: int, workers: int) -> Callable[[], Iterator[torch.Tensor]]:
    import tensorstore

    root, path = array_of(place)

    def open_array(place: str) -> Any:
        kvstore: dict[str, Any] = {"driver": "file", "path": f"{root}/{path}"}
        if is_remote(root):
            parts = urlsplit(root)
            kvstore = {
                "driver": "s3",
                "bucket": parts.netloc,
                "path": f"{parts.path}/{path}/".lstrip("/"),
                "endpoint": os.environ["AWS_ENDPOINT_URL"],
                "aws_region": os.environ["AWS_REGION"],
            }
        return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()

    def read(array: Any, numbers: list[int]) -> np.ndarray:
        return array.oindex[numbers].read().result()

    if not workers or is_remote(root):  # has threads of its own, which do not survive a fork
        workers = 0
    loader = shuffled(place, num_clips, workers, open_array, read)
    return lambda: iter(loader)


# --- one file per clip ------------------------------------------------------------------------------------------------


def write_safetensors(place: str, codec: str, num_clips: int) -> None:
    from safetensors.numpy import save_file

    Path(place).mkdir(parents=True)
    for number in range(num_clips):
        tokens = clip_tokens(number)
        save_file({"tokens": tokens, "crc": np.array([crc(tokens)])}, f"{place}/{number:06d}.safetensors")


def read_safetensors(place: str, codec: str, num_clips: int, workers: int) -> Callable[[], Iterator[torch.Tensor]]:
    from safetensors.torch import load, load_file

    def read(place: str, numbers: list[int]) -> Iterator[torch.Tensor]:
        names = [f"{number:06d}.safetensors" for number in numbers]
        found = map(load, get_many(place, names)) if is_remote(place) else (load_file(f"{place}/{n}") for n in names)
        for tensors in found:
            check(tensors["tokens"].numpy(), tensors["crc"])
            yield tensors["tokens"]

    loader = shuffled(place, num_clips, workers, str, read)
    return lambda: iter(loader)


def write_pt(place: str, codec: str, num_clips: int) -> None:
    Path(place).mkdir(parents=True)
    for number in range(num_clips):
        tokens = clip_tokens(number)
        torch.save({"tokens": torch.from_numpy(tokens), "crc": crc(tokens)}, f"{place}/{number:06d}.pt")


def read_pt(place: str, codec: str, num_clips: int, workers: int) -> Callable[[], Iterator[torch.Tensor]]:
    def read(place: str, numbers: list[int]) -> Iterator[torch.Tensor]:
        names = [f"{number:06d}.pt" for number in numbers]
        files = map(io.BytesIO, get_many(place, names)) if is_remote(place) else (f"{place}/{name}" for name in names)
        for file in files:
            held = torch.load(file, weights_only=True)
            check(held["tokens"].numpy(), held["crc"])
            yield held["tokens"]

    loader = shuffled(place, num_clips, workers, str, read)
    return lambda: iter(loader)


# --- files of many clips ----------------------------------------------------------------------------------------------


def write_hdf5(place: str, codec: str, num_clips: int) -> None:
    import h5py

    Path(place).mkdir(parents=True)
    options = {} if codec == "none" else {"compression": "gzip", "shuffle": True}  # its default level, 4
    with h5py.File(f"{place}/clips.h5", "w") as file:
        tokens = file.create_dataset(
            "tokens", (num_clips, *SHAPE), "f2", chunks=(1, *SHAPE), fletcher32=True, **options
        )
        for number in range(num_clips):
            tokens[number] = clip_tokens(number)


def read_hdf5(place: str, codec: str, num_clips: int, workers: int) -> Callable[[], Iterator[torch.Tensor]]:
    import h5py

    def open_file(place: str) -> Any:
        if not is_remote(place):
            return h5py.File(f"{place}/clips.h5", "r")["tokens"]
        return h5py.File(RangedFile(place, "clips.h5"), "r")["tokens"]

    def read(tokens: Any, numbers: list[int]) -> np.ndarray:
        batch = np.empty((len(numbers), *SHAPE), np.float16)
        for slot, number in enumerate(numbers):
            tokens.read_direct(batch, np.s_[number], np.s_[slot])
        return batch

    loader = shuffled(place, num_clips, workers, open_file, read)
    return lambda: iter(loader)


def write_webdataset(place: str, codec: str, num_clips: int) -> None:
    import webdataset

    Path(place).mkdir(parents=True)
    with webdataset.ShardWriter(f"{place}/%06d.tar", maxcount=CLIPS_PER_FILE, verbose=0) as writer:
        for number in range(num_clips):
            tokens = clip_tokens(number)
            writer.write({"__key__": f"{number:06d}", "npy": tokens, "crc.id": str(crc(tokens))})


def read_webdataset(place: str, codec: str, num_clips: int, workers: int) -> Callable[[], Iterator[torch.Tensor]]:
    import webdataset

    num_files = -(-num_clips // CLIPS_PER_FILE)
    urls = [f"{place}/{number:06d}.tar" for number in range(num_files)]
    if is_remote(place):
        urls = [f"pipe:curl -s '{signed(url)}'" for url in urls]

    def checked(sample: dict) -> torch.Tensor:
        return torch.from_numpy(check(sample["npy"], int(sample["crc.id"])))

    data = webdataset.WebDataset(urls, shardshuffle=num_files, nodesplitter=None, empty_check=False)
    data = data.shuffle(CLIPS_PER_FILE).decode().map(checked).batched(BATCH, collation_fn=torch.stack, partial=True)
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return lambda: iter(loader)


def signed(url: str) -> str:
    """An address that needs no credentials, of an s3:// URL."""
    import boto3

    parts = urlsplit(url)
    names = {"Bucket": parts.netloc, "Key": parts.path.lstrip("/")}
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name=os.environ["AWS_REGION"])
    return client.generate_presigned_url("get_object", Params=names)


def write_litdata(place: str, codec: str, num_clips: int) -> None:
    from litdata.streaming.writer import BinaryWriter

    Path(place).mkdir(parents=True)
    writer = BinaryWriter(place, chunk_size=CLIPS_PER_FILE, compression=None if codec == "none" else "zstd")
    for number in range(num_clips):
        tokens = clip_tokens(number)
        writer.add_item(number, {"tokens": torch.from_numpy(tokens), "crc": crc(tokens)})
    writer.done()
    writer.merge()


def read_litdata(place: str, codec: str, num_clips: int, workers: int) -> Callable[[], Iterator[torch.Tensor]]:
    from litdata import StreamingDataLoader, StreamingDataset

    def collated(samples: list[dict]) -> torch.Tensor:
        return torch.stack([torch.as_tensor(check(s["tokens"].numpy(), s["crc"])) for s in samples])

    options = {}
    if is_remote(place):
        options["storage_options"] = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
        options["cache_dir"] = os.environ["PEER_CACHE"]
    data = StreamingDataset(place, shuffle=True, **options)
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=collated)
    return lambda: iter(loader)


def write_mosaicml(place: str, codec: str, num_clips: int) -> None:
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:float16:{','.join(map(str, SHAPE))}", "crc": "int"}
    options = {"compression": None if codec == "none" else "zstd", "size_limit": CLIPS_PER_FILE << 21}
    with MDSWriter(out=place, columns=columns, **options) as writer:
        for number in range(num_clips):
            tokens = clip_tokens(number)
            writer.write({"tokens": tokens, "crc": crc(tokens)})


def read_mosaicml(place: str, codec: str, num_clips: int, workers: int) -> Callable[[], Iterator[torch.Tensor]]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    os.environ["S3_ENDPOINT_URL"] = os.environ.get("AWS_ENDPOINT_URL", "")

    def collated(samples: list[dict]) -> torch.Tensor:
        return torch.stack([torch.from_numpy(check(s["tokens"], s["crc"])) for s in samples])

    where = {"remote": place, "local": os.environ["PEER_CACHE"]} if is_remote(place) else {"local": place}
    data = StreamingDataset(**where, shuffle=True, batch_size=BATCH)
    loader = torch.utils.data.DataLoader(
        data, batch_size=BATCH, num_workers=workers, collate_fn=collated, persistent_workers=workers > 0
    )
    return lambda: iter(loader)


def write_lance(place: str, codec: str, num_clips: int) -> None:
    import lance
    import pyarrow as pa

    size = int(np.prod(SHAPE))
    schema = pa.schema([("tokens", pa.list_(pa.float16(), size)), ("crc", pa.int64())])

    def batches() -> Iterator[pa.RecordBatch]:
        for first in range(0, num_clips, BATCH):
            clips = [clip_tokens(number) for number in range(first, min(first + BATCH, num_clips))]
            tokens = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate([c.reshape(-1) for c in clips])), size)
            yield pa.record_batch([tokens, pa.array([crc(c) for c in clips])], schema=schema)

    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), place)


def read_lance(place: str, codec: str, num_clips: int, workers: int) -> Callable[[], Iterator[torch.Tensor]]:
    import lance

    def open_dataset(place: str) -> Any:
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        options = {"aws_endpoint": endpoint, "allow_http": "true"} if is_remote(place) else None
        return lance.dataset(place, storage_options=options)

    def read(dataset: Any, numbers: list[int]) -> np.ndarray:
        table = dataset.take(numbers)
        tokens = table["tokens"].combine_chunks().flatten().to_numpy().reshape(len(numbers), *SHAPE)
        for clip, expected in zip(tokens, table["crc"].to_pylist(), strict=True):
            check(clip, expected)
        return np.array(tokens)  # Arrow's memory may not be written to

    loader = shuffled(place, num_clips, 0, open_dataset, read)  # has threads of its own, which do not survive a fork
    return lambda: iter(loader)


Read = Callable[[str, str, int, int], Callable[[], Iterator[torch.Tensor]]]
Write = Callable[[str, str, int], None]
# Name -> writer (None: reads the store of "merv"), reader.
FORMATS: dict[str, tuple[Write | None, Read]] = {
    "merv": (write_merv, read_merv),
    "safetensors": (write_safetensors, read_safetensors),
    "pt": (write_pt, read_pt),
    "hdf5": (write_hdf5, read_hdf5),
    "webdataset": (write_webdataset, read_webdataset),
    "litdata": (write_litdata, read_litdata),
    "mosaicml": (write_mosaicml, read_mosaicml),
    "lance": (write_lance, read_lance),
    "zarr-python": (None, read_zarr),
    "tensorstore": (None, read_tensorstore),
    "zarrs": (None, read_zarrs),
}
WITHOUT_CODEC = ("safetensors", "pt", "webdataset", "lance")  # as they come, they store float16 uncompressed


def measure(name: str, place: str, codec: str, num_clips: int, workers: int, passes: int) -> dict[str, Any]:
    """Seconds of wall and processor time of each pass, the first one without the place's pages in memory."""
    torch.set_num_threads(1)
    epoch = FORMATS[name][1](place, codec, num_clips, workers)
    if not is_remote(place):
        drop_pages(place)
    wall, processor = [], []
    for _ in range(passes):
        began, cpu, count = time.perf_counter(), time.process_time(), 0
        for batch in epoch():
            if batch.dtype != torch.float16 or tuple(batch.shape[1:]) != SHAPE:
                raise ValueError(f"a batch of {name} is {tuple(batch.shape)} {batch.dtype}")
            count += len(batch)
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - cpu)
        if count != num_clips:
            raise ValueError(f"{name} gave {count} of {num_clips} clips")
    return {"wall_s": wall, "processor_s": processor}


def main() -> None:
    action, name, place, codec, num_clips, *numbers = sys.argv[1:]
    if action == "write":
        write = FORMATS[name][0]
        assert write is not None
        write(place, codec, int(num_clips))
        return
    print(json.dumps(measure(name, place, codec, int(num_clips), *map(int, numbers))))


if __name__ == "__main__":
    main()
