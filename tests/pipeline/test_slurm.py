"""Extraction through a real SLURM: jobs that the driver submits, and the shipped script of one allocation."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import pytest
import yaml

from featurestore import verify_store
from jobs import slurm
from jobs.clusters import ClusterError, ClusterRequest, ClusterSettings, connect

TEMPLATES = Path(slurm.__file__).with_name("templates")


def _fixture_module(name: str):
    """By its file: test folders are not packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


slurm_site = _fixture_module("slurm_site").slurm_site


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


def until_gone(site, job: str, within_s: float = 240.0) -> None:
    """`sbatch --wait` looks every ten seconds and more."""
    deadline = time.monotonic() + within_s
    while site.call("squeue", "--noheader", f"--jobs={job}", check=False):
        assert time.monotonic() < deadline, f"job {job} still runs after {within_s} s"
        time.sleep(0.3)


def settings(folder: Path, **changes) -> ClusterSettings:
    given = {"walltime": "00:20:00", "cpus": 1, "gpus": 0, "log_directory": str(folder / "logs")}
    return ClusterSettings(**given | changes)


def test_jobs_that_the_driver_submits_write_the_bytes_of_a_local_run(lab, slurm_site, elsewhere, expected):
    said = []
    from pipeline.extract import extract

    cluster = {"cpus": 1, "gpus": 1, "walltime": "00:20:00", "log_directory": str(lab.folder / "logs")}
    config = lab.config(encoders=["languagebind"], scheduler="slurm", cluster=cluster)
    summary = extract(config, quiet=True, say=said.append)
    assert (summary.clips, summary.failed) == (14, 0)
    assert any(line.startswith("slurm: submitted 1 x 1") for line in said), said
    assert lab.hashes(lab.store) == expected
    assert slurm_site.call("squeue", "--noheader", "--states=pending,running") == ""


def test_the_script_of_one_allocation_extracts_the_same_bytes(lab, slurm_site, elsewhere, expected, monkeypatch):
    config = lab.folder / "extract.yaml"
    config.write_text(yaml.safe_dump(lab.settings(encoders=["languagebind"])))
    monkeypatch.setenv("CONFIG", str(config))
    monkeypatch.setenv("BIN", str(Path(sys.executable).parent))
    options = [
        "--ntasks-per-node=2",
        "--cpus-per-task=1",
        "--gres=gpu:2",
        "--time=20",
        f"--output={lab.folder}/job.log",
    ]
    script = TEMPLATES / "one-allocation.sbatch"
    job = slurm_site.call(
        "sbatch", "--parsable", f"--chdir={elsewhere}", f"--output={lab.folder}/job.log", *options, str(script)
    ).strip()
    until_gone(slurm_site, job)
    log = (lab.folder / "job.log").read_text()
    assert "ExitCode=0:0" in slurm_site.call("scontrol", "show", "job", job), log
    assert lab.hashes(lab.store) == expected, log
    assert verify_store(lab.store, "full") == []
    assert not list(slurm_site.folder.glob("merv-scheduler-*"))  # where it was submitted


def test_jobs_that_end_without_a_worker_are_told_with_what_they_said(slurm_site, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "CHECK_S", 1.0)
    wrong = settings(tmp_path, prologue=("echo no such module >&2; exit 3",))
    request = ClusterRequest(scheduler="slurm", num_workers=2, device="cpu", settings=wrong)
    with pytest.raises(ClusterError, match=r"all 2 SLURM jobs ended before a worker.*\n  no such module\nmend the"):
        connect(request).__enter__()


def test_a_job_that_is_lost_is_replaced_and_the_work_goes_on(slurm_site, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "KEEP_S", 1.0)
    request = ClusterRequest(scheduler="slurm", num_workers=1, device="cpu", settings=settings(tmp_path))
    said = []
    with connect(request, say=said.append) as client:
        job = slurm_site.call("squeue", "--noheader", "--format=%i").split()
        future = client.submit(time.sleep, 0.1)
        future.result()
        slurm_site.call("scancel", *job)
        assert client.submit(abs, -3).result(timeout=90) == 3
    assert any("has ended and the run has not" in line for line in said)
