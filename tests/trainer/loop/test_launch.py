import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from torch.distributed.launcher.api import LaunchConfig

from featurestore import StoreWriter
from mervcache.errors import UserError
from trainer.cli import train_main
from trainer.loop.launch import LAUNCH_FILES, Machines, launch_command, launch_environment, num_processes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {
    "llm": "fresh:tiny",
    "projector": {"grid": [2, 2, 2]},
    "max_steps": 4,
    "batch_size": 4,
    "micro_batch_size": 1,
    "eval_every": 2,
    "log_every": 1,
}


@pytest.fixture
def here(tmp_path, question_store, make_sample):
    """A working folder with a store, a third of its samples text only, and a `trainer` folder of its own."""
    writer = StoreWriter.open_or_create(question_store, block_rows={"video": 4, "image": 4})
    writer.add_samples("toy-text", [make_sample(index, clip_id=None) for index in range(30, 39)])
    writer.publish_snapshot()
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer/__init__.py").write_text("raise RuntimeError('not this one')\n")
    return tmp_path


def merv_train(folder, *arguments):
    """The installed command, as typed in that folder."""
    program = Path(sys.executable).with_name("merv-train")
    command = [str(program), "--from-cache", "--recipe", "demo", "--config", "settings.yaml", *arguments]
    threads = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **threads}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_launched_processes_have_the_losses_of_one_and_one_of_them_prints(here):
    merv_train(here, "--out", "alone")
    done = merv_train(here, "--out", "together", "--json", "--launch", "ddp", "--processes", "2")
    assert json.loads(done.stdout)["steps"] == 4
    assert "running " in done.stderr
    alone, together = rows(here / "alone"), rows(here / "together")
    assert [row["step"] for row in together] == list(range(4))
    for name in ("loss", "grad_norm", "tokens"):
        assert [row[name] for row in together] == pytest.approx([row[name] for row in alone], rel=1e-4), name
    for name in ("val_loss", "val_accuracy"):
        assert together[-1][name] == pytest.approx(alone[-1][name], rel=1e-4), name


def test_every_line_of_two_launched_processes_and_their_launcher_is_json(here):
    done = merv_train(here, "--out", "logged", "--log-json", "--launch", "ddp", "--processes", "2")
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"time", "level", "event"} <= line.keys() for line in lines)
    progress = [line for line in lines if line["event"] == "progress" and line["label"] == "train"][-1]
    assert (progress["done"], progress["total"], progress["metrics"]["step"]) == (4, 4, 3)
    assert progress["metrics"]["loss"] > 0


def test_two_machines_of_one_process_have_the_losses_of_one(here, free_port):
    """Both are this machine: each runs the command with its number, and the first one's address."""
    merv_train(here, "--out", "alone")
    program = str(Path(sys.executable).with_name("merv-train"))
    command = [program, "--from-cache", "--recipe", "demo", "--config", "settings.yaml", "--out", "two"]
    command += ["--launch", "ddp", "--processes", "1", "--machines", "2", "--main-machine", f"127.0.0.1:{free_port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    machines = [
        subprocess.Popen(
            [*command, "--machine-rank", str(rank)], cwd=here, env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [machine.communicate(timeout=240)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert [row["loss"] for row in rows(here / "two")] == pytest.approx(
        [row["loss"] for row in rows(here / "alone")], rel=1e-4
    )


@pytest.mark.parametrize(
    ("machines", "reason"),
    [
        ({"count": 2}, "needs --main-machine HOST:PORT"),
        ({"count": 2, "main": "node1"}, "needs --main-machine HOST:PORT"),
        ({"count": 2, "main": "node1:0"}, "needs --main-machine HOST:PORT"),
        ({"count": 2, "rank": 2, "main": "node1:4000"}, "counts from 0"),
    ],
)
def test_machines_that_could_not_meet_are_refused(machines, reason):
    with pytest.raises(UserError, match=reason):
        Machines(**machines)


def test_every_machine_starts_its_part_of_all_processes():
    machines = Machines(count=4, rank=3, main="node1:4000")
    command = launch_command("fsdp", 8, [], machines=machines)
    given = dict(zip(command[4:14:2], command[5:15:2], strict=False))
    assert given["--num_processes"] == "32"
    assert (given["--num_machines"], given["--machine_rank"]) == ("4", "3")
    assert command[command.index("--main_process_ip") + 1] == "node1"
    assert command[command.index("--main_process_port") + 1] == "4000"


def test_the_command_names_files_and_modules_so_that_it_works_anywhere():
    command = launch_command("fsdp", 8, ["--from-cache", "x", "--launch", "fsdp"])
    assert command[:4] == [sys.executable, "-P", "-m", "trainer.loop.launch"]
    assert command[command.index("--config_file") + 1] == str(ROOT / "trainer/loop/launch_fsdp.yaml")
    assert command[command.index("--num_processes") + 1] == "8"
    assert command[-8:] == [sys.executable, "-P", "-m", "trainer.cli", "--from-cache", "x", "--launch", "fsdp"]


def test_launch_files_belong_to_the_package():
    import tomllib

    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    for path in LAUNCH_FILES.values():
        assert path.is_file()
        assert path.parent == ROOT / "trainer/loop"
        assert any(path.match(pattern) for pattern in patterns)


def test_there_is_one_process_per_gpu_by_default():
    assert num_processes("ddp", None, 4) == num_processes("fsdp", None, 4) == 4
    assert num_processes("fsdp", 2, 4) == num_processes("ddp", 2, 0) == 2
    with pytest.raises(UserError, match="--processes is 8 and 4 GPUs are visible"):
        num_processes("ddp", 8, 4)
    with pytest.raises(UserError, match="--processes how many CPU processes"):
        num_processes("ddp", None, 0)
    with pytest.raises(UserError, match="none is visible; on CPUs use --launch ddp"):
        num_processes("fsdp", 2, 0)


def test_without_a_gpu_accelerate_is_set_to_the_cpu():
    there = launch_environment({"A": "1"}, 2)
    assert there["A"] == "1"
    assert "ACCELERATE_USE_CPU" not in there
    assert launch_environment({"A": "1"}, 0) == {**there, "ACCELERATE_USE_CPU": "true"}


def test_torchs_launcher_leaves_the_ranks_ten_minutes_to_save_by_default(monkeypatch):
    def timeout(environment):
        for name, value in launch_environment(environment, 0).items():
            monkeypatch.setenv(name, value)
        return LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout

    assert timeout({}) == 600
    assert timeout({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "50"}) == 50


def test_settings_are_checked_once_before_anything_is_launched(here, monkeypatch):
    monkeypatch.chdir(here)
    (here / "settings.yaml").write_text("fusion: {nmae: first}\n")
    arguments = ["--from-cache", "--recipe", "demo", "--config", "settings.yaml", "--launch", "ddp"]
    result = CliRunner().invoke(train_main, arguments)
    assert result.exit_code == 1
    assert "unknown setting 'fusion.nmae'" in result.stderr
    assert "running" not in result.stderr
