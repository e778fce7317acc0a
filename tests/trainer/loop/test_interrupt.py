import os
import signal
import threading

import pytest

from trainer.loop.interrupt import CheckpointTimer, stop_signals


def test_a_checkpoint_is_due_after_its_minutes_and_again_after_a_reset():
    now = [100.0]
    timer = CheckpointTimer(2.0, clock=lambda: now[0])
    assert not timer.is_due()
    now[0] = 219.9
    assert not timer.is_due()
    now[0] = 220.0
    assert timer.is_due()
    timer.reset()
    assert not timer.is_due()


def test_without_minutes_none_is_due():
    now = [0.0]
    timer = CheckpointTimer(None, clock=lambda: now[0])
    now[0] = 1e9
    assert not timer.is_due()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_a_hang_up_are_remembered_and_the_handler_put_back(number):
    started_with = signal.signal(number, signal.SIG_DFL)
    try:
        with stop_signals() as is_requested:
            assert not is_requested()
            os.kill(os.getpid(), number)
            assert is_requested()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, started_with)


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as is_requested:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not is_requested()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def hears_ctrl_c():
    """As in a terminal's foreground; a suite that runs in the background was started deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_the_background_stays_ignored(hears_ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_signals() as is_requested:
        signal.raise_signal(signal.SIGINT)
        assert not is_requested()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_ctrl_c_is_remembered_once_and_the_second_one_stops_at_once(hears_ctrl_c, capsys):
    before = signal.getsignal(signal.SIGINT)
    with stop_signals() as is_requested:
        signal.raise_signal(signal.SIGINT)
        assert is_requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "stopping after this step, which is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_signals_are_left_alone():
    found = []

    def ask():
        with stop_signals() as is_requested:
            found.append((is_requested(), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [(False, before)]
