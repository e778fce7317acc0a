"""The bar of long loops: a live one on a terminal, lines in a log, nothing where quiet was asked."""

import io

import pytest

from mervcache.console import Bar


@pytest.fixture
def clock(stepped_clock):
    return stepped_clock("mervcache.console")


def test_a_log_has_a_line_now_and_then_with_what_is_left_and_one_at_the_end(clock):
    log = io.StringIO()
    with Bar("train", total=120, start=100, stream=log) as shown:
        for step in range(20):
            clock.now += 3
            shown.tell(f"loss {step}")
            shown.advance()
    assert log.getvalue().splitlines() == [
        "train: 104/120, loss 3, 0:00:12, ETA 0:00:48",
        "train: 108/120, loss 7, 0:00:24, ETA 0:00:36",
        "train: 112/120, loss 11, 0:00:36, ETA 0:00:24",
        "train: 116/120, loss 15, 0:00:48, ETA 0:00:12",
        "train: 120/120, loss 19, 0:01:00",
    ]


def test_items_are_counted_as_they_come_and_none_is_lost(clock):
    log = io.StringIO()
    with Bar("questions", total=3, stream=log) as shown:
        assert list(shown.over("abc")) == ["a", "b", "c"]
    assert log.getvalue() == "questions: 3/3, 0:00:00\n"


def test_a_loop_that_did_nothing_leaves_no_line():
    log = io.StringIO()
    with Bar("train", total=9, start=9, stream=log):
        pass
    assert log.getvalue() == ""


def test_quiet_writes_nothing_anywhere(terminal):
    for stream in (io.StringIO(), terminal):
        with Bar("train", total=2, quiet=True, stream=stream) as shown:
            shown.advance(2)
        assert stream.getvalue() == ""


def test_on_a_terminal_a_live_bar_tells_the_same(terminal):
    with Bar("train", total=2, stream=terminal) as shown:
        shown.advance(2)
        shown.tell("loss 0.5")
    assert "2/2" in terminal.getvalue()
    assert "loss 0.5" in terminal.getvalue()
