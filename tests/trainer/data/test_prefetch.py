import threading

import pytest

from trainer.data.prefetch import Prefetch


def test_steps_come_in_order():
    with Prefetch(lambda step: step * step, 2, 6, depth=2) as steps:
        assert list(steps) == [4, 9, 16, 25]


def test_an_error_while_reading_reaches_the_loop_at_its_step():
    def make(step):
        if step == 2:
            raise OSError("share is gone")
        return step

    seen = []
    with pytest.raises(OSError, match="share is gone"), Prefetch(make, 0, 5, depth=4) as steps:
        seen.extend(steps)
    assert seen == [0, 1]
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


def test_leaving_early_ends_the_thread():
    with Prefetch(lambda step: step, 0, 10**9, depth=1) as steps:
        assert next(iter(steps)) == 0
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


def test_no_more_than_the_depth_is_read_ahead():
    made = []
    reached = threading.Semaphore(0)

    def make(step):
        made.append(step)
        reached.release()
        return step

    with Prefetch(make, 0, 100, depth=3) as steps:
        for _ in range(4):  # three in the queue, one in hand
            reached.acquire()
        assert not reached.acquire(timeout=0.3)
        assert made == [0, 1, 2, 3]
        assert next(iter(steps)) == 0
