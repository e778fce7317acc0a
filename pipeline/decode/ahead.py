"""Decoding ahead: clips in order, a bounded number of them in the making."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

from mervcache.errors import MediaError
from pipeline.decode.job import Decoded, DecodeJob
from pipeline.decode.pool import DecodePool


def decode_ahead(
    jobs: Iterable[tuple[int, DecodeJob]], pool: DecodePool, lookahead: int
) -> Iterator[tuple[int, Decoded | MediaError]]:
    """(row, frames or why there are none) in the order of the jobs, `lookahead` of them ahead of the one asked for."""
    ahead: deque[tuple[int, Future]] = deque()
    try:
        for row, job in jobs:
            ahead.append((row, pool.submit(job)))
            if len(ahead) > lookahead:
                yield _result(*ahead.popleft())
        while ahead:
            yield _result(*ahead.popleft())
    finally:
        for _, future in ahead:
            future.cancel()


def _result(row: int, future: Future) -> tuple[int, Decoded | MediaError]:
    try:
        return row, future.result()
    except MediaError as reason:
        return row, reason
