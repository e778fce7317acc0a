"""Options of `merv-train` that start several processes, on one machine or on several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import click

from jobs.slurm import training_script
from mervcache.console import stacked
from mervcache.errors import UserError
from trainer.loop.launch import Launch, Machines, relaunch

PRINT_SBATCH = "--print-sbatch"
launch_options = stacked(
    click.option(
        "--launch",
        type=click.Choice(get_args(Launch)),
        help="Train on several processes through accelerate: ddp, or fsdp for models too large for one GPU. After a"
        " SIGTERM they have 10 minutes to write a checkpoint.",
    ),
    click.option(
        "--processes",
        type=click.IntRange(min=1),
        show_default="one per GPU",
        help="Processes that --launch starts on each machine.",
    ),
    click.option("--machines", type=click.IntRange(min=1), default=1, help="Machines that run this command."),
    click.option("--machine-rank", type=click.IntRange(min=0), default=0, help="Index of this machine, from 0."),
    click.option("--main-machine", metavar="HOST:PORT", help="Address of the first of --machines."),
    click.option(
        PRINT_SBATCH, is_flag=True, help="Print a SLURM script that runs this command on whole nodes; do nothing."
    ),
)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a command."""

    launch: Launch
    count: int | None  # on each machine; None: one per GPU
    machines: Machines

    @property
    def total(self) -> int | None:
        """On all machines; None: one per GPU."""
        return None if self.count is None else self.count * self.machines.count

    def start(self, arguments: Sequence[str]) -> None:
        """Replace this process by the launcher of `merv-train` with these arguments."""
        relaunch(self.launch, self.count, arguments, machines=self.machines)


def pop_processes(options: dict[str, Any]) -> Processes | None:
    """Remove the options of `launch_options` and return what they start; None for this process alone."""
    launch, count = options.pop("launch"), options.pop("processes")
    number, rank, main = (options.pop(name) for name in ("machines", "machine_rank", "main_machine"))
    machines = Machines(count=number, rank=rank, main=main or "")
    if launch is None and machines.count > 1:
        raise UserError(f"--machines {machines.count} is for several processes: give --launch ddp or fsdp too")
    return None if launch is None else Processes(launch=launch, count=count, machines=machines)


def sbatch_script(launch: Launch | None, arguments: Sequence[str]) -> str:
    """The job that runs `merv-train` with these arguments on every node."""
    if launch is None:
        raise UserError(f"{PRINT_SBATCH} is for several processes: give --launch ddp or fsdp too")
    return training_script([word for word in arguments if word != PRINT_SBATCH])
