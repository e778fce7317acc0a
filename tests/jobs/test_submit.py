"""Scripts to submit: what a site's settings make of the shipped templates."""

import subprocess

import pytest

from jobs.settings import ClusterSettings, worker_environment
from jobs.slurm import TEMPLATES, submit_script
from mervcache.errors import ClusterError

SITE = ClusterSettings(
    gpus=4,
    cpus=32,
    walltime="8:00:00",
    partition="gpu",
    account="lab7",
    memory="200GB",
    exclusive=True,
    prologue=("module load cuda", "echo 'a $weird line'"),
    directives=("--constraint=a100",),
)


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("settings", [SITE, ClusterSettings(gpus=0, cpus=2)], ids=["site", "no gpu"])
def test_every_script_is_bash_and_holds_its_settings_once(name, settings):
    script = submit_script(name, settings, config="my extract.yaml", num_workers=8)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    names = [option.partition("=")[0] for option in options(script)]
    assert len(set(names)) == len(names)
    assert script.count("CONFIG=${CONFIG:-my extract.yaml}") == 1
    assert script.startswith("#!/bin/bash\n")


def test_one_allocation_has_nodes_for_all_workers_and_a_task_per_gpu():
    script = submit_script("one-allocation", SITE, config="e.yaml", num_workers=8)
    wanted = {"--nodes=2", "--ntasks-per-node=4", "--gres=gpu:4", "--cpus-per-task=8", "--time=8:00:00", "--mem=200GB"}
    assert wanted | {"--partition=gpu", "--account=lab7", "--exclusive", "--constraint=a100"} <= set(options(script))
    lines = script.splitlines()
    assert lines.index("module load cuda") + 1 == lines.index("echo 'a $weird line'")
    assert lines.index("module load cuda") < next(n for n, line in enumerate(lines) if '/dask" scheduler' in line)


def test_fewer_workers_than_a_node_has_gpus_ask_for_no_more_than_they_use():
    script = submit_script("one-allocation", SITE, config="e.yaml", num_workers=2)
    assert {"--nodes=1", "--ntasks-per-node=2", "--gres=gpu:2"} <= set(options(script))


def test_without_gpus_none_is_asked_for():
    script = submit_script("one-allocation", ClusterSettings(gpus=0), config="e")
    assert not any("gres" in option for option in options(script))


def test_the_driver_is_a_small_job_that_knows_how_many_workers_to_submit():
    script = submit_script("driver", SITE, config="e.yaml", num_workers=8)
    assert "WORKERS=${WORKERS:-8}" in script
    assert not any(option.startswith(("--gres", "--mem", "--nodes")) for option in options(script))


def test_what_the_script_says_to_dask_is_what_every_cluster_is_told():
    script = submit_script("one-allocation", SITE, config="e.yaml")
    told = worker_environment()
    exported = [line.split("#")[0].removeprefix("export ").strip() for line in script.splitlines()]
    dask = {name: value.strip('"') for name, _, value in (line.partition("=") for line in exported) if "DASK_" in name}
    assert dask.items() <= told.items()
    assert {"DASK_DISTRIBUTED__WORKER__DAEMON", "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"} <= set(dask)


def test_an_unknown_template_lists_the_known_ones():
    with pytest.raises(ClusterError, match="unknown template 'two'; known: one-allocation, driver"):
        submit_script("two", SITE, config="e.yaml")


def test_workers_that_do_not_fill_their_nodes_are_not_rounded_in_silence():
    with pytest.raises(ClusterError, match="6 workers do not fill whole nodes of 4 GPUs: give --workers 4 or 8"):
        submit_script("one-allocation", ClusterSettings(gpus=4), config="e.yaml", num_workers=6)
