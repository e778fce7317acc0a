"""`--launch`: the same command on several processes, one per GPU, through `accelerate launch`.

`merv-train --launch ddp --processes 8 ...` replaces itself by accelerate's launcher, which starts `merv-train ...` that
many times; it works from any folder, also from one that has a `trainer/` of its own. On several machines the same
command runs on each, with its number and the address of the first: `--print-sbatch` writes a job that does so.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mervcache.console import echo
from mervcache.errors import EXIT_WITH_FAILURES, UserError
from mervcache.logs import restore_stderr, start_json_if_given

Launch = Literal["ddp", "fsdp"]
LAUNCH_FILES: dict[Launch, Path] = {
    "ddp": Path(__file__).with_name("launch_ddp.yaml"),
    "fsdp": Path(__file__).with_name("launch_fsdp.yaml"),
}
# How long torch's launcher waits after a SIGTERM before it kills its processes; the default of 30 s is too short for
# the checkpoint of a large LLM.
SHUTDOWN_VARIABLE, SHUTDOWN_S = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 600
EXIT_FILE_VARIABLE = "MERV_TRAIN_EXIT_FILE"  # names the file for the first rank's exit code
# -P: Python does not look for modules in the folder it is started from.
THIS_COMMAND = (sys.executable, "-P", "-m", "trainer.cli")


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines of one training, each of which starts as many processes."""

    count: int = 1
    rank: int = 0  # of this one
    main: str = ""  # HOST:PORT on the first, where processes meet

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise UserError(f"--machine-rank counts from 0 to --machines - 1, got {self.rank} of {self.count}")
        host, _, port = self.main.rpartition(":")
        if (self.count > 1 or self.main) and not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise UserError(
                f"--machines {self.count} needs --main-machine HOST:PORT, an address of the first machine that all of"
                f" them reach and a free port there; got {self.main!r}"
            )

    def options(self, processes: int) -> list[str]:
        """Those of accelerate's launcher, for so many processes on each machine."""
        if not self.main:
            # Port 0: a free one, so that several runs fit on one machine.
            return ["--num_processes", str(processes), "--main_process_port", "0"]
        host, _, port = self.main.rpartition(":")
        total = ["--num_processes", str(processes * self.count), "--num_machines", str(self.count)]
        return [*total, "--machine_rank", str(self.rank), "--main_process_ip", host, "--main_process_port", port]


ONE_MACHINE = Machines()


def is_launched() -> bool:
    """Whether this process is one of several already."""
    return "LOCAL_RANK" in os.environ


def is_first_rank() -> bool:
    """Whether this process prints and writes what all ranks share."""
    return int(os.environ.get("RANK", 0)) == 0


def relaunch(
    launch: Launch,
    processes: int | None,
    arguments: Sequence[str],
    *,
    program: Sequence[str] = THIS_COMMAND,
    machines: Machines = ONE_MACHINE,
) -> None:
    """Replace this process by the launcher; `arguments` are those of `program`, this command."""
    import torch  # seconds, but the processes will need longer

    num_gpus = torch.cuda.device_count()
    command = launch_command(launch, num_processes(launch, processes, num_gpus), arguments, program, machines)
    echo(f"running {shlex.join(command)}")
    restore_stderr()  # the launcher makes its own pipe
    os.execve(command[0], command, launch_environment(os.environ, num_gpus))


def num_processes(launch: Launch, requested: int | None, num_gpus: int) -> int:
    """Processes to start: as many as requested, else one per GPU; UserError where there are too few GPUs."""
    if num_gpus == 0 and launch == "fsdp":
        raise UserError("--launch fsdp spreads a model over GPUs, and none is visible; on CPUs use --launch ddp")
    if num_gpus == 0 and requested is None:
        raise UserError(f"no GPU is visible: set with --processes how many CPU processes --launch {launch} starts")
    if num_gpus and requested is not None and requested > num_gpus:
        raise UserError(
            f"--processes is {requested} and {num_gpus} GPUs are visible: each process needs one of its own"
        )
    return requested or num_gpus


def end_with_failures() -> None:
    """Exit as a run that finished and lost something.

    Under our launcher the first rank leaves the exit code in a file: torch's launcher takes any other code than 0 for
    a crash, ends the other ranks and exits with 1.
    """
    if (file := os.environ.get(EXIT_FILE_VARIABLE)) is None:
        sys.exit(EXIT_WITH_FAILURES)
    if is_first_rank():
        Path(file).write_text(str(EXIT_WITH_FAILURES))


def run_launcher() -> None:
    """Run accelerate's launcher in this process and exit with the code that the first rank has left, else 0."""
    from accelerate.commands.launch import main

    start_json_if_given(sys.argv)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "exit_code"
        os.environ[EXIT_FILE_VARIABLE] = str(file)
        main()
        code = int(file.read_text()) if file.is_file() else 0
    sys.exit(code)


def launch_command(
    launch: Launch,
    processes: int,
    arguments: Sequence[str],
    program: Sequence[str] = THIS_COMMAND,
    machines: Machines = ONE_MACHINE,
) -> list[str]:
    """The launcher's command line; the processes read `--launch` too, and see by `is_launched` what they are."""
    launcher = [sys.executable, "-P", "-m", "trainer.loop.launch"]
    options = ["--config_file", str(LAUNCH_FILES[launch]), *machines.options(processes)]
    return [*launcher, *options, "--no_python", *program, *arguments]


def launch_environment(environment: Mapping[str, str], num_gpus: int) -> dict[str, str]:
    """Variables of the launcher. Without a GPU accelerate must be set to CPU, or each rank would train its own run."""
    ranks = {} if num_gpus else {"ACCELERATE_USE_CPU": "true"}
    return {SHUTDOWN_VARIABLE: str(SHUTDOWN_S), **environment, **ranks}


if __name__ == "__main__":
    run_launcher()
