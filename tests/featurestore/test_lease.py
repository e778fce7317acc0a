"""The lease keeps a second driver off and expires soon after its holder is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

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
