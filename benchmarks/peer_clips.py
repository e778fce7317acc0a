"""What peer_formats.py's formats share: the synthetic clips and their checksums, places, and torch's loader."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch

SHAPE = (16, 8, 8, 1024)  # T, H, W, D
BATCH = 16  # clips
S3_REQUESTS = 16  # in flight at once


def clip_tokens(number: int) -> np.ndarray:
    """float16 tokens, smooth in time and of uneven channel scale, the same for every format."""
    random = np.random.default_rng(number)
    gain = np.random.default_rng(0).lognormal(size=SHAPE[-1])
    drift = 0.3 * random.normal(size=SHAPE).cumsum(axis=0)
    return ((random.normal(size=(1, 1, 1, SHAPE[-1])) + drift) * gain).astype(np.float16)


def crc(tokens: np.ndarray) -> int:
    return google_crc32c.value(tokens.reshape(-1).view(np.uint8))


def check(tokens: np.ndarray, expected: int) -> np.ndarray:
    if crc(np.ascontiguousarray(tokens)) != int(expected):
        raise ValueError("a clip does not match its checksum")
    return tokens


def drop_pages(place: str) -> None:
    """Take every file of a folder out of the page cache; no process may have it mapped."""
    for path in (path for path in Path(place).rglob("*") if path.is_file()):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def is_remote(place: str) -> bool:
    return "://" in place


def bucket_of(place: str) -> Any:
    """An obstore store of an s3:// place; endpoint and credentials come from the environment."""
    from obstore.store import from_url

    return from_url(place, client_options={"allow_http": True})


def get_many(place: str, names: list[str]) -> list[bytes]:
    """Whole objects, `S3_REQUESTS` of them at once."""
    from concurrent.futures import ThreadPoolExecutor

    import obstore

    store = bucket_of(place)
    with ThreadPoolExecutor(S3_REQUESTS) as pool:
        return [bytes(data) for data in pool.map(lambda name: obstore.get(store, name).bytes(), names)]


class RangedFile(io.RawIOBase):
    """An object as a file of ranged reads, for libraries that want bytes."""

    def __init__(self, place: str, name: str) -> None:
        import obstore

        self._reader = obstore.open_reader(bucket_of(place), name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._reader.seek(offset, whence)

    def tell(self) -> int:
        return self._reader.tell()

    def readinto(self, buffer: memoryview) -> int:
        data = bytes(self._reader.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)


class ClipFiles(torch.utils.data.Dataset):
    """Items by number, with one open handle per process; `__getitems__` reads a loader's whole batch."""

    def __init__(self, place: str, num_clips: int, open_place: Callable, read: Callable) -> None:
        self._place, self._num_clips, self._open, self._read = place, num_clips, open_place, read
        self._handle: tuple[int, Any] = (0, None)

    def __len__(self) -> int:
        return self._num_clips

    def __getitems__(self, numbers: list[int]) -> torch.Tensor:
        if self._handle[0] != os.getpid():  # a worker opens its own
            self._handle = (os.getpid(), self._open(self._place))
        read = self._read(self._handle[1], numbers)
        return torch.from_numpy(read) if isinstance(read, np.ndarray) else torch.stack(list(read))


def shuffled(place: str, num_clips: int, workers: int, open_place: Callable, read: Callable) -> Iterator[torch.Tensor]:
    """torch's own loader over a format that has random access."""
    return torch.utils.data.DataLoader(
        ClipFiles(place, num_clips, open_place, read),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        collate_fn=lambda batch: batch,
        persistent_workers=workers > 0,
    )
