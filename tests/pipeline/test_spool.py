import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mervcache.errors import MediaError, RunStoppedError
from pipeline.spool import Spool


def writes(data: bytes):
    return lambda file: file.write(data)


def copies(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "bytes"}


def forbidden(_):
    raise AssertionError("a copy that is there was fetched again")


def test_a_copy_is_fetched_once_and_the_least_recently_used_go_first(tmp_path):
    spool = Spool(tmp_path, 100)
    for name in ("a", "b", "c"):
        with spool.hold(name, 30, writes(name.encode() * 30)) as path:
            assert path.read_bytes() == name.encode() * 30
    with spool.hold("a", 30, forbidden) as path:
        assert path.read_bytes() == b"a" * 30
    with spool.hold("d", 30, writes(b"d" * 30)):
        assert copies(tmp_path) == {"a": 30, "c": 30, "d": 30}


def test_a_copy_larger_than_the_bound_is_an_error_that_names_the_option(tmp_path):
    with (
        pytest.raises(RunStoppedError, match=r"101 bytes does not fit .* 100 bytes .* spool_gb"),
        Spool(tmp_path, 100).hold("a", 101, forbidden),
    ):
        pass


def test_copies_in_use_stay_and_a_process_that_finds_no_room_waits(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.spool.REPORT_S", 0.0)
    spool, waited, order = Spool(tmp_path, 100), threading.Event(), []

    def late():
        with spool.hold("b", 60, writes(b"b" * 60), waited.set):
            order.append("b is held")

    with spool.hold("a", 60, writes(b"a" * 60)) as path:
        thread = threading.Thread(target=late)
        thread.start()
        assert waited.wait(30)
        assert path.read_bytes() == b"a" * 60
        order.append("a is left")
    thread.join()
    assert order == ["a is left", "b is held"]
    assert copies(tmp_path) == {"b": 60}


def test_a_fetch_that_fails_leaves_nothing_and_takes_no_room(tmp_path):
    spool = Spool(tmp_path, 100)

    def fails(file):
        file.write(b"half")
        raise MediaError("no such member")

    for _ in range(5):
        with pytest.raises(MediaError), spool.hold("a", 80, fails):
            pass
    assert copies(tmp_path) == {}
    with spool.hold("a", 80, writes(b"a" * 80)):
        assert copies(tmp_path) == {"a": 80}


PROGRAM = """
import os, sys, time
from contextlib import suppress
from pathlib import Path
from pipeline.spool import Spool

spool = Spool(Path(sys.argv[1]), 1000)
def stop(file):
    file.write(b"x" * 100)
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
if sys.argv[2] == "die":
    with spool.hold("whole", 300, lambda file: file.write(b"w" * 300)):
        with spool.hold("half", 500, stop):
            pass
for n in range(40):
    with spool.hold(f"{sys.argv[2]}{n % 7}", 200, lambda file: file.write(b"x" * 200)) as path:
        assert path.read_bytes() == b"x" * 200
        total = 0
        for name in os.listdir(sys.argv[1]):
            with suppress(FileNotFoundError):  # evicted since
                total += os.stat(f"{sys.argv[1]}/{name}").st_size if name != "bytes" else 0
        assert total <= 1000, total
"""


def test_a_kill_leaves_no_lock_and_its_partial_copy_is_removed_by_the_next_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path), "die"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert sorted(copies(tmp_path).values()) == [300, 500]
    spool = Spool(tmp_path, 1000)
    assert copies(tmp_path) == {"whole": 300}
    with spool.hold("next", 700, writes(b"n" * 700)):
        assert copies(tmp_path) == {"whole": 300, "next": 700}


def test_processes_that_share_a_spool_stay_within_one_bound(tmp_path):
    """Each asserts the bound after each of its 40 copies, while the others write and evict."""
    started = [subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path), name]) for name in ("a", "b", "a")]
    assert [process.wait(60) for process in started] == [0, 0, 0]


def test_removed_copies_are_gone_and_their_room_is_free(tmp_path):
    spool = Spool(tmp_path, 100)
    for name in ("a", "b"):
        with spool.hold(name, 50, writes(name.encode() * 50)):
            pass
    assert [spool.remove("a"), spool.remove("never there")] == [1, 0]
    with spool.hold("c", 50, writes(b"c" * 50)):
        assert copies(tmp_path) == {"b": 50, "c": 50}
    assert os.listdir(tmp_path)
