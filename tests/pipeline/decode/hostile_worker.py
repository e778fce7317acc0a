"""A decode process with decoders that misbehave; the pool's tests start it in place of the real one."""

import os
import signal
import sys
import time
from pathlib import Path

from mervcache.errors import RunStoppedError
from pipeline.decode import worker
from pipeline.decode.decoders import DECODERS
from pipeline.media import Source


def spin(source, collector, *, accept_damaged):
    while True:
        time.sleep(60)


def ignore_signals_and_spin(source, collector, *, accept_damaged):
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    spin(source, collector, accept_damaged=accept_damaged)


def burn(source, collector, *, accept_damaged):
    while True:
        pass


def stop_itself(source, collector, *, accept_damaged):
    signal.raise_signal(signal.SIGSTOP)


def crash(source, collector, *, accept_damaged):
    signal.raise_signal(signal.SIGSEGV)


def exit_quietly(source, collector, *, accept_damaged):
    os._exit(3)


def crash_once(source, collector, *, accept_damaged):
    """Dies the first time, works the second: a machine's mood, not the clip's."""
    mark = Path(source.root) / "has-crashed"
    if not mark.exists():
        mark.touch()
        crash(source, collector, accept_damaged=accept_damaged)
    return DECODERS["frames/1"](source, collector, accept_damaged=accept_damaged)


def talk(source, collector, *, accept_damaged):
    """Prints and reads where the messages run."""
    print("frame" * 5000, flush=True)
    os.write(1, b"\0\0\0\1" * 1000)
    sys.stdin.read()
    return DECODERS["frames/1"](source, collector, accept_damaged=accept_damaged)


def start_a_program(source, collector, *, accept_damaged):
    """Leaves a child of its own behind and hangs: a decoder program that does not end."""
    child = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "600")
    (Path(source.root) / "program").write_text(str(child))
    spin(source, collector, accept_damaged=accept_damaged)


def eat_memory(source, collector, *, accept_damaged):
    return bytearray(1 << 40)


def write_pid_and_spin(source, collector, *, accept_damaged):
    (Path(source.root) / "pid").write_text(str(os.getpid()))
    spin(source, collector, accept_damaged=accept_damaged)


def bug(source, collector, *, accept_damaged):
    return {}["a key that is not there"]


def be_killed(source, collector, *, accept_damaged):
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def lose_the_share(source, collector, *, accept_damaged):
    raise RunStoppedError("the share is gone")


for decoder in (
    *(spin, ignore_signals_and_spin, burn, stop_itself, crash, exit_quietly, crash_once, talk, start_a_program),
    *(eat_memory, write_pid_and_spin, bug, be_killed, lose_the_share),
):
    DECODERS[decoder.__name__] = decoder

plain_sha256 = Source.sha256


def hang_on_the_share(source):
    """Bytes that do not come, for files so named: what a share that has gone away does to a reader."""
    return time.sleep(600) if "hangs" in source.path else plain_sha256(source)


Source.sha256 = hang_on_the_share

if __name__ == "__main__":
    worker.main()
