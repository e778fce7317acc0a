"""Runs of several processes in a sweep: on this machine and as jobs of a real SLURM, with the same results."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner

from jobs.settings import ClusterSettings
from jobs.slurm import job_options, workers_per_job
from mervcache.errors import ClusterError, UserError
from tests.pipeline.slurm_site import slurm_site  # noqa: F401
from trainer.ablation.cli_sweep import launch_options, resolve_cluster
from trainer.ablation.supervise import RunFailedError, RunJob, supervise
from trainer.main import train_main

pytestmark = pytest.mark.slow

SETTINGS = {
    "llm": "fresh:tiny",
    "projector": {"grid": [2, 2, 2]},
    "max_steps": 3,
    "batch_size": 4,
    "micro_batch_size": 2,
    "precision": "fp32",
}
RANKS = ("--launch", "ddp", "--processes", "2")


@pytest.fixture
def sweep(question_store, tmp_path, monkeypatch):
    """Runs `merv-train sweep` of one encoder with these options; the folder of its run."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SETTINGS))
    shared = ["--from-cache", str(question_store), "--recipe", "demo", "--config", str(tmp_path / "small.yaml")]

    def run(name, *options):
        out = tmp_path / name
        found = CliRunner().invoke(
            train_main,
            ["sweep", *shared, "--subsets", "dinov2", "--no-text-only", "--out", str(out), "--json", *options],
        )
        logs = "\n".join(log.read_text()[-2000:] for log in out.rglob("*.log"))
        assert found.exit_code == 0, f"{found.output}\n{logs}"
        result = json.loads(found.stdout)
        assert [row["status"] for row in result["runs"]] == ["finished"]
        (folder,) = (out / "runs").iterdir()
        assert result["times"]["runs"][folder.name]["train_s"] > 0
        return folder

    return run


def weights(run):
    return max(run.glob("checkpoints/step-*/model.safetensors")).read_bytes()


def test_a_slurm_job_holds_all_processes_of_a_run_and_gives_the_weights_of_this_machine(sweep, slurm_site, tmp_path):  # noqa: F811
    here = sweep("here", "--scheduler", "local", "--workers", "1", *RANKS)
    site = {"gpus": 0, "cpus": 2, "walltime": "00:20:00", "log_directory": str(tmp_path / "logs")}
    cluster = [word for name, value in site.items() for word in ("--cluster", f"{name}={value}")]
    there = sweep("there", "--scheduler", "slurm", "--workers", "1", *cluster, *RANKS)
    assert "--num_processes 2" in next((tmp_path / "there" / "logs").glob("*.log")).read_text()
    assert weights(here) == weights(there)
    assert slurm_site.call("squeue", "--noheader", "--states=pending,running") == ""


def test_a_job_of_several_gpus_has_a_worker_for_each_run():
    four = ClusterSettings(gpus=4, cpus=32)
    assert [workers_per_job(four, ranks) for ranks in (1, 2, 4)] == [4, 2, 1]
    assert workers_per_job(ClusterSettings(gpus=0), 2) == 1
    with pytest.raises(ClusterError, match=r"4 GPUs is not whole runs of 3 processes.*gpus=3"):
        workers_per_job(four, 3)
    options = job_options(four, ranks=2)
    assert (options["processes"], options["job_cpu"]) == (2, 32)
    assert "--nodes=1" in options["job_extra_directives"]
    assert {"export OMP_NUM_THREADS=8", "export MERV_GPUS_PER_WORKER=2"} <= set(options["job_script_prologue"])


def test_the_processes_of_a_run_are_those_of_its_job(monkeypatch):
    def ranks(scheduler, processes=None, *cluster):
        return resolve_cluster(scheduler, None, cluster, "ddp", processes).ranks

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert ranks("slurm", None, "gpus=4") == 4
    assert ranks("slurm", 2, "gpus=4") == 2
    assert ranks("cuda") == 3
    assert ranks("cuda", None, "devices=0,2") == 2
    assert ranks("tcp://host:8786") == 1  # the worker knows
    assert launch_options("fsdp", 4) == ["--launch", "fsdp", "--processes", "4"]
    assert launch_options(None, None) == []
    with pytest.raises(UserError, match="gpus=0 leaves the number of processes open"):
        ranks("slurm", None, "gpus=0")
    with pytest.raises(UserError, match="--processes is of --launch"):
        resolve_cluster("slurm", None, (), None, 2)


def job(tmp_path, script):
    train = (sys.executable, "-c", script, str(tmp_path / "run"))
    return RunJob(
        run=str(tmp_path / "run"), train=train, score=(sys.executable, "-c", ""), views=(), log=str(tmp_path / "log")
    )


def test_only_attempts_without_a_new_checkpoint_count(tmp_path):
    """It crashes five times, after one more checkpoint each: twice without one would have ended it."""
    steps = "import pathlib, sys; f = pathlib.Path(sys.argv[1]) / 'checkpoints'; n = len(list(f.glob('*')))"
    supervise(job(tmp_path, f"{steps}; n < 5 and ((f / f'step-{{n}}').mkdir(parents=True), sys.exit(7))"))
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 5
    with pytest.raises(RunFailedError, match=r"code 7: $"):
        supervise(job(tmp_path, "raise SystemExit(7)"))
    with pytest.raises(RunFailedError, match=r"code 1: Error: no such encoder$"):
        supervise(job(tmp_path, "print('Error: no such encoder\\n' * 2 + 'a launcher says more'); raise SystemExit(1)"))


HOLDER = """
import sys, time
from pathlib import Path
from trainer.runs.lock import STAGES_LOCK, run_lock

with run_lock(Path(sys.argv[1]) / "run", STAGES_LOCK):
    print("held", flush=True)
    time.sleep(3)
    (Path(sys.argv[1]) / "saved").touch()
"""


def test_a_run_with_skipped_steps_has_ended_and_is_scored(tmp_path):
    """merv-train ends with 3 where the loss of a step was not finite: the weights are there."""
    supervise(job(tmp_path, "import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir(); sys.exit(3)"))


def test_a_run_waits_for_a_trainer_that_is_still_saving(tmp_path):
    """As where a node's job ends: the trainer there has the run's lock until its checkpoint is written."""
    holder = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(holder, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        supervise(job(tmp_path, "import pathlib, sys; assert (pathlib.Path(sys.argv[1]).parent / 'saved').exists()"))
