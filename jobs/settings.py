"""Settings of clusters: of the user's config file, and those of Dask that every cluster gets.

One flat set of settings serves all clusters, so that a config file may be used with several; each reads its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mervcache.config import from_settings
from mervcache.errors import ClusterError

DASK_SETTINGS = {
    "distributed.scheduler.allowed-failures": 2,  # worker deaths before a task is given up
    "distributed.scheduler.worker-ttl": "30 minutes",  # a long native call must not look like a dead worker
    "distributed.scheduler.work-stealing": False,  # a window of two tasks leaves nothing to steal
    "distributed.worker.memory.target": False,  # results are small; spilling would hide a leak
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.worker.daemon": False,  # workers start decode processes
    "distributed.worker.profile.interval": "100 ms",  # Dask's own 10 ms: a sample of every stack, under the GIL
    "distributed.admin.tick.limit": "30 s",  # loading weights blocks the event loop; no warning each time
}
WORKER_WAIT_S = {"slurm": 86_400.0, "": 600.0}  # scheduler, or "" for any other -> seconds without any worker
AUTO_WORKERS = 0  # the cluster's default: one, or one per GPU


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """The section `cluster:` of a config file; sizes are per job, which runs one worker per GPU."""

    devices: str | None = None  # cuda: GPUs as in CUDA_VISIBLE_DEVICES, "0,2"; None: all that are visible
    local_directory: str | None = None  # cuda, slurm: a fast local folder for the files of Dask's workers
    dashboard_host: str = "127.0.0.1"  # all: address of dashboards and /metrics, readable without a password
    worker_wait: str | None = None  # all: [D-]HH:MM:SS without any worker, then stop; None: 10 min, slurm: a day
    walltime: str = "12:00:00"  # slurm: [D-]HH:MM:SS
    partition: str | None = None  # slurm
    account: str | None = None  # slurm
    gpus: int = 1  # slurm: GPUs of a job, 0 for none; a job runs one worker per GPU
    cpus: int = 8  # slurm: cores of a job, for all its GPUs; `plan` prints how many a GPU wants
    memory: str | None = None  # slurm: "64GB"; None: the partition's default
    exclusive: bool = False  # slurm: whole nodes
    directives: tuple[str, ...] = ()  # slurm: further #SBATCH options, such as "--constraint=a100"
    prologue: tuple[str, ...] = ()  # slurm: shell lines before the workers start, such as "module load cuda"
    python: str | None = None  # slurm: None: the driver's
    interface: str | None = None  # slurm: network interface through which workers reach the driver: "ib0"
    log_directory: str = "slurm-logs"  # slurm: standard output and error of the jobs

    def __post_init__(self) -> None:
        parse_walltime(self.walltime)
        if self.worker_wait is not None:
            parse_walltime(self.worker_wait, "worker_wait")
        if self.gpus < 0 or self.cpus < 1:
            raise ClusterError(f"cluster: gpus must be at least 0 and cpus at least 1, got {self.gpus} and {self.cpus}")
        for name in ("partition", "account", "memory"):
            check_directive_value(name, getattr(self, name) or "")
        for line in self.directives:
            if not line.isprintable():
                raise ClusterError(f"cluster: directives has {line!r}; an #SBATCH option is one printable line")

    @property
    def dashboard_address(self) -> str:
        """Any free port, because two runs on one machine must not compete for 8787."""
        return f"{self.dashboard_host}:0"

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> ClusterSettings:
        """Settings as YAML or a command line gives them; ClusterError for a wrong name or type in `given`."""
        settings = {name: _spelled_out(name, value) for name, value in given.items()}
        return from_settings(cls, settings, where="cluster.", error=ClusterError, see="jobs/settings.py lists all")


@dataclass(frozen=True, kw_only=True)
class ClusterRequest:
    """The cluster that a run asks for."""

    scheduler: str = "local"  # name in CLUSTERS, tcp://HOST:PORT, or the path of a scheduler file
    num_workers: int = AUTO_WORKERS
    ranks: int = 1  # processes that a task starts: its worker has as many GPUs, where there are GPUs at all
    device: str = "auto"  # what the tasks compute on: cpu, auto, cuda, cuda:1
    dashboard: bool = False  # starting it costs about a second and needs bokeh
    settings: ClusterSettings = field(default_factory=ClusterSettings)

    @property
    def worker_wait_s(self) -> float:
        """How long a run continues without any worker; a queue of jobs may be long."""
        if self.settings.worker_wait is not None:
            return parse_walltime(self.settings.worker_wait, "worker_wait")
        return WORKER_WAIT_S.get(self.scheduler, WORKER_WAIT_S[""])


def check_directive_value(name: str, value: str) -> None:
    """ClusterError for a value that an #SBATCH line cannot hold: it has no shell quoting, and blanks end an option."""
    if found := re.search(r"""[\s"'\\#$`;&|<>(){}*?!~]""", value):
        raise ClusterError(
            f"cluster: {name} is {value!r}, and an #SBATCH line cannot hold {found[0]!r} in a value; use a {name}"
            " without it"
        )


def parse_walltime(walltime: str, name: str = "walltime") -> int:
    """Seconds of `[D-]HH:MM:SS`.

    >>> parse_walltime("1-02:00:30")
    93630
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", walltime)
    seconds = 0
    if found:
        days, hours, minutes, rest = (int(part or 0) for part in found.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if not seconds:
        raise ClusterError(f"cluster: {name} must be [D-]HH:MM:SS, such as 12:00:00, got {walltime!r}")
    return seconds


def worker_environment() -> dict[str, str]:
    """`DASK_SETTINGS` as environment variables, for workers that a job script starts."""
    # A folder `pipeline` where the job was submitted must not hide the package.
    return dask_environment(DASK_SETTINGS) | {"PYTHONSAFEPATH": "1"}


def dask_environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings of Dask as environment variables.

    >>> dask_environment({"distributed.scheduler.worker-ttl": "30 minutes"})
    {'DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL': '30 minutes'}
    """
    return {f"DASK_{name.replace('.', '__').replace('-', '_').upper()}": str(v) for name, v in settings.items()}


def _spelled_out(name: Any, value: Any) -> Any:
    """Short spellings as the values of the fields: a list of devices, a single line of a list."""
    if name in ("walltime", "worker_wait") and type(value) is int:  # YAML reads 12:00:00 as seconds, in base 60
        return f"{value // 3600:02}:{value // 60 % 60:02}:{value % 60:02}"
    if name == "devices" and isinstance(value, list | int) and not isinstance(value, bool):
        return ",".join(map(str, value if isinstance(value, list) else [value]))
    return [value] if name in ("directives", "prologue") and isinstance(value, str) else value
