"""Nothing that Dask's event loop has begun is abandoned when a cluster is closed."""

from __future__ import annotations

import asyncio
import datetime
import subprocess
import sys

import pytest

from jobs.event_loop import event_loop

pytestmark = pytest.mark.slow

PROGRAM = """
import gc, sys
from jobs.clusters import ClusterRequest, connect
if __name__ == "__main__":
    for _ in range(2):
        with connect(ClusterRequest(num_workers=int(sys.argv[1]), device="cpu")) as client:
            print(client.submit(abs, -3).result())
    gc.collect()
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_a_process_that_has_used_clusters_leaves_nothing_on_standard_error(tmp_path, num_workers):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-X", "dev", "-W", "ignore", str(tmp_path / "program.py"), num_workers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n3\n"), done.stderr
    assert "never retrieved" not in done.stderr
    assert "Traceback" not in done.stderr


def test_timers_and_tasks_that_are_pending_at_the_end_come_to_theirs():
    """A stream of Dask waits in a coroutine that nothing refers to, for an event or 5 ms."""
    from tornado import gen, locks

    ended = []

    @gen.coroutine
    def wait_as_a_stream_does():
        try:
            yield locks.Event().wait(datetime.timedelta(milliseconds=5))
        except gen.TimeoutError:
            ended.append("timer")

    async def task() -> None:
        await asyncio.sleep(0.2)
        ended.append("task")

    with event_loop() as loop:
        loop.add_callback(wait_as_a_stream_does)
        loop.add_callback(task)
    assert ended == ["timer", "task"]
