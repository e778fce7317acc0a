"""Extraction through a real SLURM: jobs that the driver submits, and the shipped script of one allocation."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from featurestore import verify_store
from jobs import slurm
from jobs.clusters import ClusterError, ClusterRequest, ClusterSettings, connect
from pipeline.encoders.registry import ENCODERS, EncoderTable
from tests.stress import fault_lab

pytestmark = pytest.mark.slow

TEMPLATES = Path(slurm.__file__).with_name("templates")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A folder with rooms of the project's names, from which jobs are submitted: none of it may be imported."""
    for name in ("featurestore", "jobs", "pipeline", "trainer"):
        (tmp_path / "here" / name).mkdir(parents=True)
        (tmp_path / "here" / name / "__init__.py").write_text("raise ImportError('not the installed one')")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def expected(lab, local_hashes) -> dict:
    """Hashes of a local run's store with the encoder that loads fastest; made once."""
    if not local_hashes:
        lab.extract(encoders=["languagebind"], store=lab.folder / "local.zarr")
        local_hashes |= lab.hashes(lab.folder / "local.zarr")
    return local_hashes


@pytest.fixture(scope="module")
def local_hashes() -> dict:
    return {}


def until_gone(site, job: str, within_s: float = 600.0) -> None:
    """`sbatch --wait` looks every ten seconds and more."""
    deadline = time.monotonic() + within_s
    while site.call("squeue", "--noheader", f"--jobs={job}", check=False):
        assert time.monotonic() < deadline, f"job {job} still runs after {within_s} s"
        time.sleep(0.3)


def settings(folder: Path, **changes) -> ClusterSettings:
    given = {"walltime": "00:20:00", "cpus": 1, "gpus": 0, "log_directory": str(folder / "logs")}
    return ClusterSettings(**given | changes)


class Tiny:
    """Media of the fault benchmarks and their encoder of one convolution, which waits at a gate."""

    def __init__(self, folder: Path, lab: ModuleType) -> None:
        self.folder, self.lab, self.store = folder, lab, folder / "features" / "store.zarr"
        lab.draw_media(folder / "media")

    def settings(self, **changes) -> dict:
        return self.lab.tiny_settings(self.folder / "media", changes.pop("store", self.store), **changes)

    def expected(self) -> dict:
        """Hashes of a local run's store."""
        self.extract(store=self.folder / "features" / "local.zarr")
        return self.lab.hashes(self.folder / "features" / "local.zarr")

    def extract(self, **changes):
        from pipeline.config import read_config
        from pipeline.extract import extract

        return extract(read_config(None, self.settings(**changes)), quiet=True)

    def commits(self) -> dict:
        """Receipt -> what changes when it is written anew."""
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in self.lab.receipts(self.store)}


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Tiny:
    """The plug-in is known here, and to jobs by their environment."""
    lab = fault_lab
    lab.install(tmp_path / "plugins")
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "plugins"), prepend=os.pathsep)
    monkeypatch.setattr(ENCODERS, "_plug_ins", EncoderTable({})._plug_ins)
    return Tiny(tmp_path, lab)


def test_jobs_that_the_driver_submits_write_the_bytes_of_a_local_run(lab, slurm_site, elsewhere, expected, caplog):
    caplog.set_level(logging.INFO)
    from pipeline.extract import extract

    cluster = {"cpus": 1, "gpus": 1, "walltime": "00:20:00", "log_directory": str(lab.folder / "logs")}
    config = lab.config(encoders=["languagebind"], scheduler="slurm", cluster=cluster)
    summary = extract(config, quiet=True)
    assert (summary.clips, summary.failed) == (14, 0)
    assert any(line.startswith("slurm: submitted 1 x 1") for line in caplog.messages), caplog.messages
    assert lab.hashes(lab.store) == expected
    assert slurm_site.call("squeue", "--noheader", "--states=pending,running") == ""


def test_the_credentials_of_submitted_jobs_are_in_a_private_folder_and_refuse_others(slurm_site, tmp_path):
    from tests.jobs.test_security import attempt

    request = ClusterRequest(scheduler="slurm", num_workers=1, device="cpu", settings=settings(tmp_path))
    with connect(request) as client:
        (folder,) = (tmp_path / "logs").glob(".tls-*")
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
        for address in (client.scheduler.address, *client.scheduler_info()["workers"]):
            for certificate in ("none", "own"):
                assert not attempt(address, tmp_path, certificate)[0]
        assert client.submit(abs, -3).result(timeout=300) == 3
    assert not folder.exists()


def test_one_allocation_over_two_nodes_extracts_the_same_bytes(lab, slurm_site, elsewhere, expected, monkeypatch):
    job = submit(slurm_site, lab.folder, lab.settings(encoders=["languagebind"]), monkeypatch, f"--chdir={elsewhere}")
    until_gone(slurm_site, job)
    log = (lab.folder / "job.log").read_text()
    assert "ExitCode=0:0" in slurm_site.call("scontrol", "show", "job", job), log
    assert lab.hashes(lab.store) == expected, log
    assert verify_store(lab.store, "full") == []
    assert all(f"name: {node}-0" in log for node in ("node1", "node2")), log  # a worker on each
    assert not list(slurm_site.folder.glob("merv-scheduler-*"))  # where it was submitted
    assert not list(slurm_site.folder.glob(".merv-tls-*"))
    assert "tls://" in log  # nobody without the job's certificate reaches its scheduler
    assert "tcp://" not in log


def submit(site, folder: Path, settings: dict, monkeypatch, *options: str) -> str:
    """The shipped script on two nodes of one worker each; returns the job's number."""
    (folder / "extract.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("CONFIG", str(folder / "extract.yaml"))
    monkeypatch.setenv("BIN", str(Path(sys.executable).parent))
    sizes = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=gpu:1", "--time=20"]
    script = str(TEMPLATES / "one-allocation.sbatch")
    return site.call("sbatch", "--parsable", f"--output={folder}/job.log", *sizes, *options, script).strip()


def test_a_job_that_is_requeued_half_way_goes_on_where_it_was(tiny, slurm_site, monkeypatch):
    expected, gate = tiny.expected(), tiny.lab.Gate(tiny.store)
    for name, value in gate.environment.items():
        monkeypatch.setenv(name, value)
    job = submit(slurm_site, tiny.folder, tiny.settings(), monkeypatch)
    gate.wait()  # a worker has committed one block and stands in the middle of the next
    slurm_site.call("scontrol", "requeue", job)
    deadline = time.monotonic() + 300
    while slurm_site.call("squeue", "--noheader", "--format=%t", f"--jobs={job}").strip() in ("R", "CG"):
        assert time.monotonic() < deadline, "the requeued job does not end"
        time.sleep(0.1)
    before = tiny.commits()
    assert 0 < len(before) < tiny.lab.BLOCKS
    gate.open()
    slurm_site.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM waits two minutes by itself
    until_gone(slurm_site, job)
    log = (tiny.folder / "job.log").read_text()
    told = slurm_site.call("scontrol", "show", "job", job)
    assert "ExitCode=0:0" in told, log
    assert "Restarts=1" in told
    assert tiny.lab.hashes(tiny.store) == expected, log
    assert before.items() <= tiny.commits().items()


def test_a_worker_that_retires_before_its_walltime_leaves_its_block_to_the_next_job(
    tiny, slurm_site, monkeypatch, caplog
):
    """The first job's worker lives for eight seconds, of which it spends the last ones in the middle of a block."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(slurm, "POLL_S", 0.5)
    monkeypatch.setattr(slurm, "lifetime", lambda walltime: ["--lifetime", "$LIFETIME"])
    expected, gate = tiny.expected(), tiny.lab.Gate(tiny.store)
    first = tiny.folder / "first"
    lives = f"if mkdir {first}; then export LIFETIME=8s; else export LIFETIME=20m; fi"
    for name, value in gate.environment.items():
        monkeypatch.setenv(name, value)
    logs = tiny.folder / "logs"

    def open_when_it_retires() -> None:
        while not any("worker-lifetime-reached" in log.read_text() for log in logs.glob("*.err")):
            time.sleep(0.1)
        gate.open()

    helper = threading.Thread(target=open_when_it_retires, daemon=True)
    helper.start()
    cluster = {"cpus": 1, "gpus": 0, "walltime": "00:20:00", "log_directory": str(logs), "prologue": [lives]}
    summary = tiny.extract(scheduler="slurm", cluster=cluster)
    assert summary.failed == 0
    assert len(list(logs.glob("*.err"))) >= 2, caplog.messages  # one job after the other
    assert tiny.lab.hashes(tiny.store) == expected
    assert verify_store(tiny.store, "full") == []


def test_a_job_that_slurm_refuses_is_told_before_anybody_waits_for_it(slurm_site, tmp_path):
    request = ClusterRequest(scheduler="slurm", device="cpu", settings=settings(tmp_path, partition="nowhere"))
    with pytest.raises(ClusterError, match=r"(?s)SLURM refuses the job .*invalid partition specified: nowhere.*change"):
        connect(request).__enter__()


def test_jobs_that_end_without_a_worker_are_told_with_what_they_said(slurm_site, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "CHECK_S", 1.0)
    wrong = settings(tmp_path, prologue=("echo no such module >&2; exit 3",))
    request = ClusterRequest(scheduler="slurm", num_workers=2, device="cpu", settings=wrong)
    with pytest.raises(ClusterError, match=r"all 2 SLURM jobs ended before a worker.*\n  no such module\nchange the"):
        connect(request).__enter__()


def test_a_job_that_is_lost_is_replaced_but_not_for_ever_by_jobs_that_end_at_once(
    slurm_site, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "jobs.slurm")
    monkeypatch.setattr(slurm, "POLL_S", 0.5)
    monkeypatch.setattr(slurm, "MAX_FAILED_JOBS", 2)
    first, second = tmp_path / "first", tmp_path / "second"
    only_twice = f"mkdir {first} || mkdir {second} || {{ echo the module is gone >&2; exit 3; }}"
    wishes = settings(tmp_path, prologue=(only_twice,))
    with connect(ClusterRequest(scheduler="slurm", num_workers=1, device="cpu", settings=wishes)) as client:
        slurm_site.call("scancel", *slurm_site.call("squeue", "--noheader", "--format=%i").split())
        assert client.submit(abs, -3).result(timeout=300) == 3  # by the second job
        slurm_site.call("scancel", *slurm_site.call("squeue", "--noheader", "--format=%i").split())
        deadline = time.monotonic() + 120
        while "no more are submitted" not in (messages := caplog.messages)[-1]:
            assert time.monotonic() < deadline, messages
            time.sleep(0.2)
    assert sum("submitting another one" in line for line in messages) == 3  # two that were lost, one that failed
    assert "2 jobs ended before their workers joined" in messages[-1]
    assert messages[-1].splitlines()[-1] == "  the module is gone", messages[-1]
