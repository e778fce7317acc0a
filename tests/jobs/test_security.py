"""Who can reach the clusters that we start: real connection attempts, and the sockets that listen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jobs.clusters import ClusterRequest, connect
from jobs.security import write_credentials
from jobs.settings import dask_environment
from mervcache.errors import ClusterError

pytestmark = pytest.mark.slow

OUTSIDER = """
import sys
from distributed import Client, Security
address, target, certificate = sys.argv[1:]
security = Security.temporary() if certificate == "own" else None
def write(dask_scheduler):
    open(target, "w").write("code of an outsider")
with Client(address, security=security, timeout="5 s") as client:
    client.run_on_scheduler(write)
"""


RESULT = """
import sys
from jobs.clusters import ClusterRequest, connect
with connect(ClusterRequest(scheduler=sys.argv[1], device="cpu")) as client:
    print(client.submit(abs, -3).result())
"""


def attempt(address: str, folder: Path, certificate: str) -> tuple[bool, str]:
    """Whether an outsider, another user where we are root, runs code in the scheduler's process; and its error."""
    target = folder / "written-by-an-outsider"
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    command = [*as_nobody, sys.executable, "-c", OUTSIDER, address, str(target), certificate]
    done = subprocess.run(command, cwd="/", env=os.environ | {"HOME": "/tmp"}, capture_output=True, text=True)
    return target.exists(), done.stderr


def listening() -> set[tuple[int, str, int]]:
    """(process, address, port) of the sockets on which this process and its children listen."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return {
        (process.pid, connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.mark.slow
@pytest.mark.parametrize("certificate", ["none", "own"])
@pytest.mark.parametrize("protocol", ["tls", "tcp"])
def test_an_outsider_without_the_certificate_runs_no_code(tmp_path, certificate, protocol):
    with connect(ClusterRequest(num_workers=2, device="cpu")) as client:
        address = client.scheduler.address
        for reached in (address, *client.scheduler_info()["workers"]):
            ran, error = attempt(f"{protocol}://{reached.partition('://')[2]}", tmp_path, certificate)
            assert not ran
            assert "Error" in error  # it ended because it was refused
        assert client.submit(abs, -3).result() == 3  # and the cluster still works


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("dashboard", [False, True])
def test_everything_that_listens_does_so_on_the_loopback_interface(num_workers, dashboard):
    before = listening()
    with connect(ClusterRequest(num_workers=num_workers, device="cpu", dashboard=dashboard)):
        sockets = listening() - before
    assert len(sockets) >= 2  # the HTTP servers of the scheduler and of the workers
    assert {address for _, address, _ in sockets} == {"127.0.0.1"}


@pytest.mark.slow
def test_a_scheduler_of_ones_own_is_reached_with_the_printed_credentials_alone(tmp_path, monkeypatch):
    """`python -m jobs.security`, `dask scheduler` and `dask worker` as jobs/README.md shows them."""
    environment = os.environ | dask_environment(write_credentials(tmp_path / "tls"))
    scheduler_file, programs = tmp_path / "scheduler.json", []
    try:
        for words in (("scheduler", "--protocol", "tls", "--port", "0"), ("worker", "--nthreads", "1")):
            command = [Path(sys.executable).with_name("dask"), *words, "--scheduler-file", scheduler_file]
            programs.append(subprocess.Popen(list(map(str, command)), env=environment, cwd=tmp_path))
        deadline = time.monotonic() + 120
        while not scheduler_file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        request = ClusterRequest(scheduler=str(scheduler_file), device="cpu")
        with pytest.raises(ClusterError, match=r"speaks TLS and this shell has no certificate"):
            connect(request).__enter__()
        assert not attempt(json.loads(scheduler_file.read_text())["address"], tmp_path, "own")[0]
        used = Path(sys.executable), "-c", RESULT, scheduler_file
        done = subprocess.run(list(map(str, used)), env=environment, capture_output=True, text=True)
        assert done.stdout == "3\n", done.stderr
    finally:
        for program in programs:
            program.terminate()
            program.wait()


def test_credentials_are_readable_by_their_owner_alone(tmp_path):
    folder = tmp_path / "tls"
    folder.mkdir(mode=0o755)
    settings = write_credentials(folder)
    write_credentials(folder)  # a requeued job
    (path,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    assert str(path) in settings.values()
