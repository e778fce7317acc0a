"""Scripts to submit: what a site's settings make of the shipped templates."""

import re
import subprocess
import sys

import pytest

from jobs.settings import ClusterSettings, worker_environment
from jobs.slurm import TEMPLATES, job_options, submit_script, training_script
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
    assert script.count("CONFIG=${CONFIG:-'my extract.yaml'}") == 1
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


HOSTILE = [
    "two words.yaml",
    "it's.yaml",
    'say "x".yaml',
    "$(touch made).yaml",
    "`touch made`.yaml",
    "$HOME.yaml",
    "a}; touch made; #.yaml",
    "~/a.yaml",
    "back\\slash.yaml",
    "two\nlines.yaml",
    "*.yaml",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("config", HOSTILE)
def test_a_value_reaches_the_program_as_it_is_and_runs_nothing(template, config, tmp_path, monkeypatch):
    """The whole script runs in bash; its programs are stand-ins in a folder of a hostile name too."""
    folder = tmp_path / 'it\'s a $(touch made) `touch made` "folder"'
    folder.mkdir()
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    (folder / "merv-pipeline").write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > {tmp_path}/words\n')
    (folder / "dask").write_text('#!/bin/bash\n[ "$1" = scheduler ] && echo {} > "$3"\nexec sleep 20\n')
    (tmp_path / "srun").write_text("#!/bin/bash\nexec sleep 20\n")
    (folder / "python").write_text("#!/bin/bash\n")
    for program in (folder / "merv-pipeline", folder / "dask", folder / "python", tmp_path / "srun"):
        program.chmod(0o755)
    script = submit_script(template, ClusterSettings(gpus=0), config=config, num_workers=1)
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "HOME": str(tmp_path)}
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=job | path, check=True, timeout=60)
    words = (tmp_path / "words").read_text().split("\0")
    assert words[words.index("--config") + 1] == config
    assert not list(tmp_path.rglob("made"))


@pytest.mark.parametrize("setting", ["partition", "account", "memory"])
@pytest.mark.parametrize(
    "value", ["gpu\n#SBATCH --nodes=99", "gpu --nodes=99", 'gpu"', "gpu#1", "a\\b", "a\rb", "$(id)"]
)
def test_a_value_that_would_end_its_sbatch_option_is_refused(setting, value):
    with pytest.raises(ClusterError, match=f"cluster: {setting} is {re.escape(repr(value))}"):
        ClusterSettings(**{setting: value})


def test_a_directive_is_one_line():
    quoted = ClusterSettings(directives=('--comment="two words"',))
    assert '--comment="two words"' in options(submit_script("one-allocation", quoted, config="e"))
    with pytest.raises(ClusterError, match="is one printable line"):
        ClusterSettings(directives=("--constraint=a100\nrm -r x",))


def test_the_worker_command_of_a_submitted_job_holds_every_value_as_one_word(tmp_path, monkeypatch):
    """The script that dask-jobqueue makes of the settings, run in bash."""
    from dask_jobqueue.slurm import SLURMJob

    values = {"local_directory": "it's $(touch made)", "interface": "ib 0`touch made`"}
    python = tmp_path / "my $(touch made) python"
    python.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > {tmp_path}/words\n')
    python.chmod(0o755)
    settings = ClusterSettings(gpus=0, log_directory=str(tmp_path / "logs"), python=str(python), **values)
    made_for_jobs = {k: v for k, v in job_options(settings).items() if k not in ("scheduler_options", "silence_logs")}
    script = SLURMJob(scheduler="tcp://127.0.0.1:1", name="w", **made_for_jobs).job_script()
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True, timeout=60)
    words = (tmp_path / "words").read_text().split("\0")
    assert {words[words.index(f"--{name.replace('_', '-')}") + 1]: name for name in values} == {
        value: name for name, value in values.items()
    }
    assert not list(tmp_path.rglob("made"))


def test_a_folder_that_an_sbatch_line_cannot_name_is_refused_before_a_job_is_submitted(tmp_path, monkeypatch):
    (tmp_path / "my project").mkdir()
    monkeypatch.chdir(tmp_path / "my project")
    with pytest.raises(ClusterError, match=r"log_directory is .*my project"):
        job_options(ClusterSettings())


@pytest.mark.parametrize("value", HOSTILE)
def test_a_training_script_hands_every_argument_to_each_node_as_it_is(value, tmp_path, monkeypatch):
    """The whole script runs in bash; srun and scontrol are stand-ins that start one task on each of two nodes."""
    programs = {
        "merv-train": f'#!/bin/bash\nprintf "%s\\0" "$@" > {tmp_path}/words-$SLURM_NODEID\n',
        "scontrol": "#!/bin/bash\nprintf 'node1\\nnode2\\n'\n",
        "srun": '#!/bin/bash\nfor n in 0 1; do SLURM_NNODES=2 SLURM_NODEID=$n "${@:3}" || exit; done\n',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    script = training_script(["--from-cache", value, "--out", "runs/merv", "--launch", "fsdp"])
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "20007"}
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=job | path, check=True, timeout=60)
    for rank in range(2):
        words = (tmp_path / f"words-{rank}").read_text().split("\0")[:-1]
        given = ["--resume", "auto", "--from-cache", value, "--out", "runs/merv", "--launch", "fsdp"]
        assert words == [*given, "--machines", "2", "--machine-rank", str(rank), "--main-machine", "node1:20007"]


def test_a_training_script_asks_for_one_launcher_on_each_node():
    assert {"--ntasks-per-node=1", "--signal=B:TERM@300", "--requeue"} <= set(options(training_script([])))
