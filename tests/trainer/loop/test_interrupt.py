import os
import signal
import threading

import pytest

from trainer.loop.train import Alarm, terminated


def test_an_alarm_rings_after_its_minutes_and_is_set_again():
    now = [100.0]
    alarm = Alarm(2.0, clock=lambda: now[0])
    assert not alarm.rings()
    now[0] = 219.9
    assert not alarm.rings()
    now[0] = 220.0
    assert alarm.rings()
    alarm.set()
    assert not alarm.rings()


def test_no_minutes_never_ring():
    now = [0.0]
    alarm = Alarm(None, clock=lambda: now[0])
    now[0] = 1e9
    assert not alarm.rings()


def test_sigterm_is_remembered_and_the_handler_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with terminated() as is_terminated:
        assert not is_terminated()
        os.kill(os.getpid(), signal.SIGTERM)
        assert is_terminated()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def hears_ctrl_c():
    """As in a terminal's foreground; a suite that runs in the background was started deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_the_background_stays_ignored(hears_ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with terminated() as is_terminated:
        signal.raise_signal(signal.SIGINT)
        assert not is_terminated()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_ctrl_c_is_remembered_once_and_the_second_one_stops_at_once(hears_ctrl_c, capsys):
    before = signal.getsignal(signal.SIGINT)
    with terminated() as is_terminated:
        signal.raise_signal(signal.SIGINT)
        assert is_terminated()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "stopping after this step, which is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_signals_are_left_alone():
    found = []

    def ask():
        with terminated() as is_terminated:
            found.append((is_terminated(), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [(False, before)]
