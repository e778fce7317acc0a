"""Blocks in flight: how many, how large, of which engine, and when a task is alone."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest

from pipeline.worker.admission import BlocksInFlight


def entered(context) -> threading.Event:
    """Enter the context on a thread of its own, and leave at once; set when it was inside."""
    inside = threading.Event()

    def enter() -> None:
        with context:
            inside.set()

    threading.Thread(target=enter, daemon=True).start()
    return inside


def test_blocks_of_one_engine_share_a_worker_up_to_the_number_and_the_bytes():
    blocks = BlocksInFlight(max_blocks=3, max_bytes=100)
    with ExitStack() as first:
        first.enter_context(blocks.admit("a", 60))
        with blocks.admit("a", 40):
            assert not entered(blocks.admit("a", 1)).wait(0.05)
        with blocks.admit("a", 10), blocks.admit("a", 10):
            waiting = entered(blocks.admit("a", 10))
            assert not waiting.wait(0.05)
        assert waiting.wait(10)


def test_a_block_larger_than_the_budget_is_admitted_by_itself():
    blocks = BlocksInFlight(max_bytes=100)
    with blocks.admit("a", 500):
        waiting = entered(blocks.admit("a", 1))
        assert not waiting.wait(0.05)
    assert waiting.wait(10)


def test_blocks_of_another_engine_wait_until_the_worker_has_drained():
    blocks = BlocksInFlight()
    with blocks.admit("a", 1):
        other = entered(blocks.admit("b", 1))
        assert not other.wait(0.05)
    assert other.wait(10)


def test_a_task_alone_waits_for_the_blocks_in_flight_and_admits_none():
    blocks = BlocksInFlight()
    with blocks.admit("a", 1):
        alone = entered(blocks.alone())
        assert not alone.wait(0.05)
    assert alone.wait(10)
    with blocks.alone():
        block, another = entered(blocks.admit("a", 1)), entered(blocks.alone())
        assert not block.wait(0.05)
        assert not another.wait(0.05)
    assert block.wait(10)
    assert another.wait(10)


def test_who_came_first_is_admitted_first():
    """A suspect is not overtaken by the blocks behind it, which would fit."""
    blocks, order = BlocksInFlight(), []

    def enter(name: str, context) -> None:
        with context:
            order.append(name)

    with blocks.admit("a", 1):
        suspect = threading.Thread(target=enter, args=("suspect", blocks.alone()))
        suspect.start()
        while not blocks.has_waiting:
            time.sleep(0.001)
        block = threading.Thread(target=enter, args=("block", blocks.admit("a", 1)))
        block.start()
        block.join(0.05)
        assert order == []
    suspect.join()
    block.join()
    assert order == ["suspect", "block"]


def test_an_error_inside_leaves_the_worker_to_others():
    blocks = BlocksInFlight(max_blocks=1)
    with pytest.raises(ValueError, match="broken"), blocks.admit("a", 1):
        raise ValueError("broken")
    assert entered(blocks.admit("b", 1)).wait(10)
