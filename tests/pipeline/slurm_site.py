"""A real SLURM site of two nodes in a scratch folder: munged, slurmctld and two slurmd with their own ports.

Both nodes are this machine: Debian's slurmd may run several times, each under a node's name. Each claims two GPUs that
SLURM only counts: jobs may ask for them and are given CUDA_VISIBLE_DEVICES, but the files behind are empty. Everything
is stopped at the end, jobs included.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

NODES = ("node1", "node2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser={user}
SlurmdUser={user}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=2
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0,requeue_delay=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=4 Gres=gpu:2 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=4 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""


class SlurmSite:
    """Daemons of one site, and its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        host, (controller_port, port1, port2) = socket.gethostname().split(".")[0], free_ports(3)
        for name in ("state", "munge", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
            (self.folder / name).chmod(0o755)
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o600)
        user = "root" if os.geteuid() == 0 else os.environ["USER"]
        values = {"host": host, "user": user, "controller_port": controller_port}
        values |= {"port1": port1, "port2": port2}
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, **values))
        for name in ("gpu0", "gpu1"):
            (self.folder / name).touch()
        (self.folder / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={self.folder}/gpu[0-1]\n")
        munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.call("munged", *[f"--{option}={self.folder}/munge/{name}" for option, name in munge.items()])
        self.call("slurmctld")
        for node in NODES:
            self.call("slurmd", "-N", node)
        self.until_idle()

    def until_idle(self) -> None:
        deadline = time.monotonic() + 120
        while (state := self.call("sinfo", "--noheader", "--format=%D %t", check=False)).split() != ["2", "idle"]:
            assert time.monotonic() < deadline, f"no two nodes after 120 s: {state}\n{self.logs()}"
            time.sleep(0.2)

    def stop(self) -> None:
        with suppress(subprocess.SubprocessError):
            self.call("scancel", "--user=root" if os.geteuid() == 0 else f"--user={os.environ['USER']}", check=False)
            deadline = time.monotonic() + 15
            while self.call("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for name in (*(f"slurmd-{node}.pid" for node in NODES), "slurmctld.pid", "munge/pid"):
            with suppress(FileNotFoundError, ProcessLookupError, ValueError):
                stop_process(int((self.folder / name).read_text()))

    def call(self, *command: str, check: bool = True) -> str:
        answer = subprocess.run(
            command,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
        )
        assert not check or answer.returncode == 0, f"{' '.join(command)}: {answer.stderr}\n{self.logs()}"
        return answer.stdout

    def logs(self) -> str:
        texts = [path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(texts)


def free_ports(number: int) -> list[int]:
    """Below the ports that the system gives to outgoing connections, so that none is taken meanwhile."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() % 5000, 32_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("0.0.0.0", port))
            found.append(port)
        if len(found) == number:
            return found
    raise AssertionError("no free port")


def stop_process(pid: int, within_s: float = 10.0) -> None:
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if not Path(f"/proc/{pid}").exists() or "(zombie)" in Path(f"/proc/{pid}/status").read_text():
            return
    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def slurm_site() -> Iterator[SlurmSite]:
    """A site for the tests of one file; SLURM_CONF names it meanwhile."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"a real SLURM is needed (Debian: slurm-wlm, munge); not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("the daemons of a SLURM site of our own want root")
    folder = Path(tempfile.mkdtemp(prefix="slurm-site-"))
    folder.chmod(0o755)
    site = SlurmSite(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", site.environment["SLURM_CONF"])
        try:
            site.start()
            yield site
        finally:
            site.stop()
            shutil.rmtree(folder, ignore_errors=True)
