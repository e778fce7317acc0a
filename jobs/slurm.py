"""The cluster of a SLURM site: every worker lives in a job that the driver submits (dask-jobqueue).

The number of jobs is fixed: scaling by load stops workers that are loading weights and starts ones that find no work.
Jobs end with their walltime, so workers retire before it (their tasks go to others) and a keeper submits new jobs in
their place until the run is done. All jobs are cancelled when the driver leaves.

Scripts to submit: a shipped template with a site's settings written into its head.

The templates run as they are (`sbatch jobs/templates/NAME.sbatch`, options of the command line win over their head);
this room only fills in what a person would edit.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.settings import ClusterRequest, ClusterSettings, parse_walltime, worker_environment
from mervcache.errors import ClusterError, unknown_name

if TYPE_CHECKING:
    from dask_jobqueue import SLURMCluster
    from distributed import Client, SchedulerPlugin

INSTALL = "pip install 'merv-pipeline[slurm]'"
MARGIN_S = 240  # before the walltime; longer would gain nothing: Dask gives the block in hand to another worker at once
CHECK_S = 5.0  # between looks at the queue while no worker has come
POLL_S = 30.0  # between looks at jobs that ended
MAX_FAILED_JOBS = 5  # jobs, for each that is wanted, that ended one after the other before their worker came
TAIL_LINES = 15  # of a job's log, in an error


@contextmanager
def slurm(request: ClusterRequest, say: Callable[[str], None]) -> Iterator[Client]:
    """Submit `num_workers` / `gpus` jobs, go on when the first worker is there; later ones join as the queue lets."""
    try:
        from dask_jobqueue import SLURMCluster  # optional
    except ImportError as error:
        raise ClusterError(f"--scheduler slurm needs dask-jobqueue: {INSTALL}") from error
    from distributed import Client

    settings = request.settings
    per_job = max(1, settings.gpus)
    num_jobs = math.ceil((request.num_workers or per_job) / per_job)
    with SLURMCluster(**job_options(settings, dashboard=request.dashboard)) as cluster, Client(cluster) as client:
        _check_submits(cluster.job_script())
        keeper = _JobReplacer(cluster, num_jobs, _logs(settings), say)
        cluster.scale(jobs=num_jobs)
        say(f"slurm: submitted {num_jobs} x {per_job} (jobs x workers), waiting for the first; logs: {_logs(settings)}")
        _wait_for_first(client, keeper, settings)
        with keeper:
            yield client


def _check_submits(script: str) -> None:
    """Raise what SLURM says of a job that it would refuse: jobqueue submits in the background and would not tell."""
    try:
        answer = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ClusterError("--scheduler slurm: there is no sbatch here; run the command on a login node") from error
    if answer.returncode:
        raise ClusterError(
            f"SLURM refuses the job that a worker would live in: {answer.stderr.strip()}; mend the cluster settings "
            "(partition, account, walltime, gpus, cpus, memory, directives) or ask whether SLURM is up"
        )


def job_options(settings: ClusterSettings, *, dashboard: bool = False) -> dict[str, Any]:
    """The settings in dask-jobqueue's words; what is None there is read from its own configuration files."""
    workers = max(1, settings.gpus)
    directives = [f"--gres=gpu:{settings.gpus}"] if settings.gpus else []
    directives += ["--exclusive"] if settings.exclusive else []
    return {
        "queue": settings.partition,
        "account": settings.account,
        "walltime": settings.walltime,
        "cores": workers,  # Dask's threads: one task at a time and worker
        "processes": workers,
        "job_cpu": settings.cpus,
        "memory": settings.memory or "1GB",  # a word that jobqueue wants; workers have no limit of their own
        "job_mem": settings.memory,
        "job_directives_skip": [] if settings.memory else ["--mem="],
        "job_extra_directives": [*directives, *settings.directives],
        "job_script_prologue": [*prologue(settings), *settings.prologue],
        "worker_extra_args": ["--memory-limit", "0", "--preload", "jobs.pin", *lifetime(settings.walltime)],
        "python": settings.python or sys.executable,
        "interface": settings.interface,
        "local_directory": settings.local_directory,
        "log_directory": str(_logs(settings)),
        "job_name": "merv-worker",
        "scheduler_options": {"dashboard_address": ":0", "dashboard": dashboard},
        "silence_logs": "critical",
    }


def lifetime(walltime: str) -> list[str]:
    """Workers retire four minutes before their job ends, half of it for short jobs, not all in one moment."""
    seconds = parse_walltime(walltime)
    margin = min(MARGIN_S, seconds // 2)
    return ["--lifetime", f"{seconds - margin}s", "--lifetime-stagger", f"{margin * 2 // 5}s"]


def prologue(settings: ClusterSettings) -> list[str]:
    """Shell lines that every job starts with."""
    threads = max(1, settings.cpus // max(1, settings.gpus))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = worker_environment() | dict.fromkeys(names, str(threads))
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]


def _logs(settings: ClusterSettings) -> Path:
    return Path(settings.log_directory).absolute()


def _wait_for_first(client: Client, keeper: _JobReplacer, settings: ClusterSettings) -> None:
    """A queue may take hours, so there is no limit; but jobs that all ended without a worker will bring none."""
    while True:
        try:
            return client.wait_for_workers(1, timeout=CHECK_S)
        except TimeoutError as error:
            if not (keeper.job_ids and keeper.live_jobs() == set()):
                continue
            if client.scheduler_info(n_workers=-1)["workers"]:
                return None
            raise ClusterError(
                f"all {len(keeper.job_ids)} SLURM jobs ended before a worker reached the driver; "
                f"the last lines in {_logs(settings)}:\n{_tail(_logs(settings), keeper.job_ids)}\n"
                "mend the cluster settings (prologue, partition, interface), and run again"
            ) from error


def _tail(folder: Path, job_ids: set[str]) -> str:
    """The last lines that a job said."""
    logs = [path for job in job_ids for path in folder.glob(f"*-{job}.*") if path.stat().st_size]
    newest = max(logs, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return "  (no job wrote any)"
    return "\n".join(f"  {line}" for line in newest.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def _note_names(names: set[str]) -> SchedulerPlugin:
    """Keeps the name of every worker that comes."""
    from distributed import SchedulerPlugin

    class NoteNames(SchedulerPlugin):
        def add_worker(self, scheduler: Any, worker: str) -> None:
            names.add(str(scheduler.workers[worker].name))

    return NoteNames()


class _JobReplacer(threading.Thread):
    """Keeps the number of jobs: those that ended, by walltime or by accident, are submitted anew."""

    def __init__(self, cluster: SLURMCluster, num_jobs: int, logs: Path, say: Callable[[str], None]) -> None:
        super().__init__(name="slurm-keeper", daemon=True)
        self._logs = logs
        self._cluster, self._num_jobs, self._say = cluster, num_jobs, say
        self._fruitless = 0  # jobs that ended one after the other before their worker came
        self._seen: set[str] = set()  # names of workers: that of their job, and a number behind it
        cluster.scheduler.add_plugin(_note_names(self._seen))
        self._is_over = threading.Event()

    @property
    def job_ids(self) -> set[str]:
        return {str(job.job_id) for job in list(self._cluster.workers.values()) if job.job_id}

    def live_jobs(self) -> set[str] | None:
        """Our jobs that wait or run; None where the queue does not answer."""
        command = ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(sorted(self.job_ids))}"]
        answer = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        if answer.returncode == 0:
            return set(answer.stdout.split()) & self.job_ids
        return set() if "Invalid job id" in answer.stderr else None  # SLURM forgets jobs that ended long ago

    def run(self) -> None:
        while not self._is_over.wait(POLL_S):
            # Looked up before the queue is: a job that is being submitted meanwhile is in no answer, and has not ended.
            submitted = {name: job for name, job in list(self._cluster.workers.items()) if job.job_id}
            live = self.live_jobs() if submitted else set()
            if live is None:
                continue
            for name, job in submitted.items():
                if str(job.job_id) not in live and self._cluster.workers.get(name) is job:
                    self._replace(name, str(job.job_id))
            if self._fruitless < MAX_FAILED_JOBS * self._num_jobs:
                self._cluster.scale(jobs=self._num_jobs)  # submits what its list lacks; no more than the number

    def _replace(self, name: str, job_id: str) -> None:
        """Take a job that ended off the list, so that another one is submitted; not for ever, where all end at once."""
        del self._cluster.workers[name]
        its_workers = {worker for worker in set(self._seen) if worker == str(name) or worker.startswith(f"{name}-")}
        self._seen -= its_workers  # the next job has the same name
        self._fruitless = 0 if its_workers else self._fruitless + 1
        if self._fruitless < MAX_FAILED_JOBS * self._num_jobs:
            self._say(f"slurm: job {job_id} has ended and the run has not: another one is submitted")
        elif self._fruitless == MAX_FAILED_JOBS * self._num_jobs:
            tail = _tail(self._logs, {job_id})
            self._say(
                f"slurm: {self._fruitless} jobs ended before their workers came, no more are submitted; the last lines "
                f"in {self._logs}:\n{tail}"
            )

    def __enter__(self) -> _JobReplacer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join()


TEMPLATES = {
    "one-allocation": "scheduler, one worker per GPU and the driver in one job",
    "driver": "the driver alone, which submits a job per worker itself (--scheduler slurm)",
}


def submit_script(name: str, settings: ClusterSettings, *, config: str, num_workers: int = 0) -> str:
    """The template `name` for `num_workers` workers (0: those of one node) with `config` as its settings' file."""
    if name not in TEMPLATES:
        raise ClusterError(unknown_name("template", name, TEMPLATES))
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
