"""The event loop of a cluster and its client, which ends after everything in it has ended.

Dask stops its loop as soon as the client and the cluster are closed. What is still pending then, such as the timer of a
stream that has just sent its last message, is abandoned: Python reports it when the process exits, as "Future exception
was never retrieved".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tornado.ioloop import IOLoop

PENDING_TIMEOUT_S = 2.0  # for tasks that are still running when all has been closed
LAST_TIMERS_S = 0.02  # Dask's streams wait for at most 5 ms
OWN_TASKS = 2  # of the loop: its main one, and `_finish`


@contextmanager
def event_loop() -> Iterator[IOLoop]:
    """A loop in a thread of its own, for `loop=` of clusters and clients that are closed within the block."""
    from distributed.utils import LoopRunner, sync

    runner = LoopRunner()
    runner.start()
    loop = runner.loop
    assert loop is not None
    try:
        yield loop
    finally:
        sync(loop, _finish)
        runner.stop()


async def _finish() -> None:
    deadline = time.monotonic() + PENDING_TIMEOUT_S
    while len(asyncio.all_tasks()) > OWN_TASKS and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    await asyncio.sleep(LAST_TIMERS_S)
