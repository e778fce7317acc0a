"""Settings of clusters: what is accepted, what is refused, and in which words."""

import dask
import pytest
import yaml

from jobs.settings import DASK_SETTINGS, ClusterSettings, parse_walltime, worker_environment
from jobs.slurm import job_options, lifetime
from mervcache.errors import ClusterError


def test_a_small_yaml_gives_every_setting_its_type():
    text = "{partition: gpu, gpus: 4, walltime: 12:00:00, devices: [0, 2], prologue: module load cuda, memory: }"
    settings = ClusterSettings.from_mapping(yaml.safe_load(text))
    assert (settings.partition, settings.gpus, settings.walltime) == ("gpu", 4, "12:00:00")
    assert (settings.devices, settings.prologue, settings.memory) == ("0,2", ("module load cuda",), None)


REFUSED = [
    ({"wall_time": "1:00:00"}, "unknown setting 'cluster.wall_time', the nearest known one is 'cluster.walltime'"),
    ({"gpus": "four"}, "gpus must be a whole number, got 'four'"),
    ({"gpus": True}, "gpus must be a whole number, got True"),
    ({"gpus": -1}, "gpus must be at least 0 and cpus at least 1, got -1 and 8"),
    ({"exclusive": "yes please"}, "exclusive must be true or false, got 'yes please'"),
    ({"directives": [3]}, r"directives\[0\] must be text, got 3"),
    ({"walltime": "12h"}, r"walltime must be \[D-\]HH:MM:SS, such as 12:00:00, got '12h'"),
    ({"walltime": "0:00:00"}, "walltime must be"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_wrong_setting_is_named_with_what_was_given(given, message):
    with pytest.raises(ClusterError, match=message):
        ClusterSettings.from_mapping(given)


@pytest.mark.parametrize(("walltime", "seconds"), [("00:20:00", 1200), ("100:00:01", 360_001), ("2-00:00:00", 172_800)])
def test_a_walltime_is_so_many_seconds(walltime, seconds):
    assert parse_walltime(walltime) == seconds


def test_workers_retire_four_minutes_before_their_job_or_at_half_of_a_short_one():
    assert lifetime("12:00:00") == ["--lifetime", "42960s", "--lifetime-stagger", "96s"]
    assert lifetime("00:10:00") == ["--lifetime", "360s", "--lifetime-stagger", "96s"]


def test_the_environment_of_a_workers_job_says_to_dask_what_the_driver_was_told():
    told = dask.config.collect_env(worker_environment())
    for name, value in DASK_SETTINGS.items():
        assert dask.config.get(name, config=told) == value


def test_a_job_is_asked_for_in_the_words_of_the_settings(tmp_path):
    from dask_jobqueue.slurm import SLURMJob

    settings = ClusterSettings(
        partition="gpu",
        account="lab7",
        gpus=2,
        cpus=16,
        memory="64GB",
        exclusive=True,
        walltime="8:00:00",
        directives=("--constraint=a100",),
        prologue=("module load cuda",),
        python="/opt/env/bin/python",
        log_directory=str(tmp_path / "logs"),
    )
    options = job_options(settings)
    for name in ("scheduler_options", "silence_logs"):
        del options[name]
    script = SLURMJob("tcp://driver:8786", name="w", **options).job_script()
    directives = {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {"-p gpu", "-A lab7", "-n 1", "--cpus-per-task=16", "--mem=64GB", "-t 8:00:00"} <= directives
    assert {"--gres=gpu:2", "--exclusive", "--constraint=a100"} <= directives
    lines = script.splitlines()
    assert lines.index("module load cuda") < len(lines) - 1
    assert "export OMP_NUM_THREADS=8" in lines
    (command,) = [line for line in lines if line.startswith("/opt/env/bin/python -m distributed.cli.dask_worker")]
    for words in ("--nthreads 1", "--nworkers 2", "--memory-limit 0", "--lifetime 28560s", "--preload jobs.pin"):
        assert words in command


def test_without_a_word_on_memory_the_partition_decides(tmp_path):
    from dask_jobqueue.slurm import SLURMJob

    options = job_options(ClusterSettings(log_directory=str(tmp_path)))
    for name in ("scheduler_options", "silence_logs"):
        del options[name]
    assert "--mem" not in SLURMJob("tcp://driver:8786", name="w", **options).job_header
