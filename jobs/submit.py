"""Scripts to submit: a shipped template with a site's settings written into its head.

The templates run as they are (`sbatch jobs/templates/NAME.sbatch`, options of the command line win over their head);
this room only fills in what a person would edit.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from jobs.request import ClusterError, ClusterSettings

TEMPLATES = {
    "one-allocation": "scheduler, one worker per GPU and the driver in one job",
    "driver": "the driver alone, which submits a job per worker itself (--scheduler slurm)",
}


def submit_script(name: str, settings: ClusterSettings, *, config: str, num_workers: int = 0) -> str:
    """The template `name` for `num_workers` workers (0: those of one node) with `config` as its settings' file."""
    if name not in TEMPLATES:
        raise ClusterError(f"unknown template {name!r}; known: {', '.join(TEMPLATES)}")
    text = Path(__file__).with_name("templates").joinpath(f"{name}.sbatch").read_text()
    wanted = num_workers or max(1, settings.gpus)
    options = _whose(settings) + (_sizes(settings, wanted) if name == "one-allocation" else [])
    names = {option.lstrip("-").partition("=")[0] for option in options} | ({"gres"} if settings.gpus == 0 else set())
    lines = [line for line in text.splitlines() if not _is_option(line, names)]
    first = next(number for number, line in enumerate(lines) if _is_option(line, {"job-name"}))
    lines[first + 1 : first + 1] = [f"#SBATCH {option}" for option in options]
    values = {"CONFIG": config, "WORKERS": str(wanted), "BIN": str(Path(sys.executable).parent)}
    return "\n".join(_filled(lines, values, settings.prologue)) + "\n"


def _whose(settings: ClusterSettings) -> list[str]:
    given = {"partition": settings.partition, "account": settings.account}
    return [f"--{name}={value}" for name, value in given.items() if value]


def _sizes(settings: ClusterSettings, num_workers: int) -> list[str]:
    """What the one job asks for: `num_workers` spread over nodes of `gpus` each."""
    per_node = max(1, settings.gpus)
    if num_workers > per_node and num_workers % per_node:
        less = num_workers // per_node * per_node
        raise ClusterError(
            f"{num_workers} workers do not fill whole nodes of {per_node} GPUs: give --workers {less} or "
            f"{less + per_node}"
        )
    options = [f"--nodes={math.ceil(num_workers / per_node)}", f"--ntasks-per-node={min(num_workers, per_node)}"]
    options += [f"--gres=gpu:{min(num_workers, per_node)}"] if settings.gpus else []
    options += [f"--cpus-per-task={max(1, settings.cpus // per_node)}", f"--time={settings.walltime}"]
    options += [f"--mem={settings.memory}"] if settings.memory else []
    return [*options, *(["--exclusive"] if settings.exclusive else []), *settings.directives]


def _is_option(line: str, names: set[str]) -> bool:
    found = re.match(r"#SBATCH --([a-z-]+)", line)
    return found is not None and found[1] in names


def _filled(lines: list[str], values: dict[str, str], prologue: tuple[str, ...]) -> Iterator[str]:
    """Defaults of the script's variables, and the site's own lines in their place."""
    for line in lines:
        name = line.partition("=")[0]
        if line.startswith("# -- prologue") and prologue:
            yield from prologue
        elif name in values and line.startswith(f"{name}=${{{name}:-"):
            yield f"{name}=${{{name}:-{values[name]}}}"
        else:
            yield line
