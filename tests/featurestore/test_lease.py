"""The lease keeps a second driver off and expires soon after its holder is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from featurestore.lease import StoreLease
from mervcache.errors import UserError


def test_a_second_driver_is_told_who_works_and_may_start_when_the_first_is_done(tmp_path):
    with (
        StoreLease(tmp_path, "run-1") as first,
        pytest.raises(UserError, match=f"run-1 on .*, process {os.getpid()}"),
        StoreLease(tmp_path, "run-2"),
    ):
        pass
    assert first.holder() is None
    with StoreLease(tmp_path, "run-2") as second:
        assert second.holder()["run"] == "run-2"


def test_a_lease_whose_holder_stopped_touching_it_is_taken_over(tmp_path):
    lease = tmp_path / "tmp" / "driver.lease"
    lease.parent.mkdir()
    lease.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "run": "killed", "since": 0}))
    with pytest.raises(UserError, match="killed"), StoreLease(tmp_path, "next"):
        pass
    os.utime(lease, (time.time() - 300,) * 2)
    with StoreLease(tmp_path, "next") as lease:
        assert lease.holder()["run"] == "next"


def test_the_holder_keeps_its_lease_fresh(tmp_path):
    file = tmp_path / "tmp" / "driver.lease"
    with StoreLease(tmp_path, "run", stale_after_s=0.2):
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.stat().st_mtime > 1


def test_a_lease_that_somebody_else_took_is_left_to_them(tmp_path):
    lease = StoreLease(tmp_path, "old")
    with lease:
        (tmp_path / "tmp" / "driver.lease").write_text('{"host": "other", "pid": 1, "run": "new"}')
    assert lease.holder()["run"] == "new"
    (tmp_path / "tmp" / "driver.lease").write_text("not json")
    assert lease.holder() is None


def test_a_lease_whose_process_on_this_host_is_gone_is_taken_over_at_once(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", f"import os; from featurestore.lease import StoreLease as L; "
         f"L({str(tmp_path)!r}, 'killed').__enter__(); os.kill(os.getpid(), 9)"],
        check=False,
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL
    with StoreLease(tmp_path, "next") as lease:
        assert lease.holder()["run"] == "next"


def put_lease(store: Path, content: str) -> Path:
    """A lease as a driver puts it, touched just now."""
    file = store / "tmp" / "driver.lease"
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    return file


ELSEWHERE = json.dumps({"host": "node7", "pid": 1, "run": "requeued", "since": 0})


def test_the_fresh_lease_of_a_killed_run_on_another_host_is_waited_for(tmp_path, caplog):
    caplog.set_level("INFO", "featurestore")
    file = put_lease(tmp_path, ELSEWHERE)
    began, last = time.time(), file.stat().st_mtime
    with StoreLease(tmp_path, "next", stale_after_s=2) as lease:
        assert lease.holder()["run"] == "next"
        assert time.time() >= last + 2 - 0.1  # file systems round times
    assert time.time() - began < 60
    (message,) = [record.getMessage() for record in caplog.records if record.name == "featurestore.lease"]
    assert message.startswith("the store's lease is that of requeued on node7, process 1, last seen ")


def test_the_lease_of_another_host_that_is_touched_again_is_respected(tmp_path):
    file, is_over = put_lease(tmp_path, ELSEWHERE), threading.Event()

    def touch() -> None:
        while not is_over.wait(0.1):
            os.utime(file)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(UserError, match="requeued on node7"), StoreLease(tmp_path, "next", stale_after_s=5):
            pass
    finally:
        is_over.set()
        thread.join()


@pytest.mark.parametrize("content", ["", "\0" * 80, '{"host": "node7", "p', "[]"])
def test_a_lease_that_a_power_cut_left_without_its_content_is_nobodys(tmp_path, content):
    put_lease(tmp_path, content)
    with StoreLease(tmp_path, "next") as lease:  # at once: the default would be two minutes
        assert lease.holder()["run"] == "next"
