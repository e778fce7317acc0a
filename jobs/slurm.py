"""Clusters and job scripts of a SLURM site.

`slurm` submits every worker as a job (dask-jobqueue). The number of jobs is fixed: scaling by load would stop workers
that load weights and start ones without work. Jobs end with their walltime, so workers retire before it (Dask moves
their tasks) and a thread submits new jobs until the run is done. All jobs are cancelled at the end.

`submit_script` fills in a shipped template, which also runs as it is (`sbatch jobs/templates/NAME.sbatch`).
"""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jobs.event_loop import event_loop
from jobs.pin import GPUS_VARIABLE
from jobs.security import private_folder, security_in
from jobs.settings import (
    ClusterRequest,
    ClusterSettings,
    check_directive_value,
    parse_walltime,
    worker_environment,
)
from mervcache.errors import ClusterError, unknown_name

if TYPE_CHECKING:
    from dask_jobqueue.slurm import SLURMCluster
    from distributed import Client

TEMPLATES = {
    "one-allocation": "scheduler, one worker per GPU and the driver in one job",
    "driver": "the driver alone, which submits a job per worker itself (--scheduler slurm)",
}
TEMPLATE_FOLDER = Path(__file__).with_name("templates")
MARGIN_S = 240  # retire before the walltime; longer gains nothing: Dask gives the block to another worker at once
CHECK_S = 5.0  # between looks at the queue while no worker has joined
POLL_S = 30.0  # between looks at jobs that ended
MAX_FAILED_JOBS = 5  # per requested job, that ended in a row without a worker
TAIL_LINES = 15  # of a job's log, in an error

log = logging.getLogger(__name__)


@contextmanager
def slurm(request: ClusterRequest) -> Iterator[Client]:
    """Submit jobs for `num_workers` workers and continue with the first; others join as the queue lets them.

    A job has a worker per GPU; where tasks start several processes, one for as many GPUs, on one node.
    """
    try:
        from dask_jobqueue.slurm import SLURMCluster  # optional
    except ImportError as error:
        raise ClusterError("--scheduler slurm needs dask-jobqueue: pip install 'merv-pipeline[slurm]'") from error
    from distributed import Client

    settings = request.settings
    per_job = workers_per_job(settings, request.ranks)
    num_jobs, logs = math.ceil((request.num_workers or per_job) / per_job), Path(settings.log_directory).absolute()
    with (
        private_folder(logs) as credentials,  # the jobs see the folder of their logs
        event_loop() as loop,
        SLURMCluster(
            **job_options(settings, ranks=request.ranks, dashboard=request.dashboard),
            security=security_in(credentials),
            loop=loop,
        ) as started,
        Client(started) as client,
    ):
        cluster = cast("SLURMCluster", started)  # in a coroutine it would be another value
        _check_submits(cluster.job_script())
        replacer = _JobReplacer(cluster, num_jobs, logs)
        cluster.scale(jobs=num_jobs)
        log.info("slurm: submitted %d x %d (jobs x workers), waiting for the first; logs: %s", num_jobs, per_job, logs)
        _wait_for_first(client, replacer, logs)
        with replacer:
            yield client


def _check_submits(script: str) -> None:
    """Raise SLURM's message for a job that it would refuse: jobqueue submits in the background, without an error."""
    try:
        answer = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ClusterError("--scheduler slurm: there is no sbatch here; run the command on a login node") from error
    if answer.returncode:
        raise ClusterError(
            f"SLURM refuses the job of a worker: {answer.stderr.strip()}; change the cluster settings "
            "(partition, account, walltime, gpus, cpus, memory, directives) or ask whether SLURM is up"
        )


def workers_per_job(settings: ClusterSettings, ranks: int = 1) -> int:
    """Workers of a job whose tasks start so many processes each; `ClusterError` where its GPUs do not go round."""
    if settings.gpus % ranks and settings.gpus:
        raise ClusterError(
            f"a job of {settings.gpus} GPUs is not whole runs of {ranks} processes with a GPU each: give"
            f" --cluster gpus={ranks}"
        )
    return max(1, settings.gpus // ranks)


def job_options(settings: ClusterSettings, *, ranks: int = 1, dashboard: bool = False) -> dict[str, Any]:
    """Arguments of `SLURMCluster`; where one is None, dask-jobqueue reads its own configuration files.

    It writes them into the job script as they are, so values in shell lines are quoted here.
    """
    workers = workers_per_job(settings, ranks)
    logs = str(Path(settings.log_directory).absolute())
    check_directive_value("log_directory", logs)
    directives = [f"--gres=gpu:{settings.gpus}"] if settings.gpus else []
    directives += ["--exclusive"] if settings.exclusive else []
    directives += ["--nodes=1"] if ranks > 1 else []
    return {
        "queue": settings.partition,
        "account": settings.account,
        "walltime": settings.walltime,
        "cores": workers,  # Dask's threads: one task at a time and worker
        "processes": workers,
        "job_cpu": settings.cpus,
        "memory": settings.memory or "1GB",  # required by jobqueue; workers have no limit of their own
        "job_mem": settings.memory,
        "job_directives_skip": [] if settings.memory else ["--mem="],
        "job_extra_directives": [*directives, *settings.directives],
        "job_script_prologue": [*prologue(settings, ranks), *settings.prologue],
        "worker_extra_args": [
            *("--memory-limit", "0", "--preload", "jobs.pin"),
            *("--dashboard-address", shlex.quote(settings.dashboard_address)),
            *lifetime(settings.walltime),
        ],
        "python": shlex.quote(settings.python or sys.executable),
        "interface": settings.interface and shlex.quote(settings.interface),
        "local_directory": settings.local_directory and shlex.quote(settings.local_directory),
        "log_directory": logs,
        "job_name": "merv-worker",
        "scheduler_options": {"dashboard_address": settings.dashboard_address, "dashboard": dashboard},
        "silence_logs": "critical",
    }


def lifetime(walltime: str) -> list[str]:
    """Options of `dask worker`: retire four minutes before the job ends, short jobs at half time, not all at once."""
    seconds = parse_walltime(walltime)
    margin = min(MARGIN_S, seconds // 2)
    return ["--lifetime", f"{seconds - margin}s", "--lifetime-stagger", f"{margin * 2 // 5}s"]


def prologue(settings: ClusterSettings, ranks: int = 1) -> list[str]:
    """The first shell lines of every job."""
    threads = max(1, settings.cpus // (workers_per_job(settings, ranks) * ranks))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = worker_environment() | dict.fromkeys(names, str(threads))
    environment |= {GPUS_VARIABLE: str(ranks)} if ranks > 1 else {}
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]


def _wait_for_first(client: Client, replacer: _JobReplacer, logs: Path) -> None:
    """Wait for a worker, for as long as the queue takes; raise `ClusterError` where all jobs ended without one."""
    while True:
        try:
            return client.wait_for_workers(1, timeout=CHECK_S)
        except TimeoutError as error:
            if not (replacer.job_ids and replacer.live_jobs() == set()):
                continue
            if client.scheduler_info(n_workers=-1)["workers"]:
                return None
            raise ClusterError(
                f"all {len(replacer.job_ids)} SLURM jobs ended before a worker reached the driver; "
                f"the last lines in {logs}:\n{_tail(logs, replacer.job_ids)}\n"
                "change the cluster settings (prologue, partition, interface), and run again"
            ) from error


def _tail(folder: Path, job_ids: set[str]) -> str:
    """The last lines of the newest log of these jobs."""
    logs = [path for job in job_ids for path in folder.glob(f"*-{job}.*") if path.stat().st_size]
    newest = max(logs, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return "  (no job wrote any)"
    return "\n".join(f"  {line}" for line in newest.read_text(errors="replace").splitlines()[-TAIL_LINES:])


class _JobReplacer(threading.Thread):
    """Keeps the number of jobs constant: submits a new job for each that ended, by walltime or by accident."""

    def __init__(self, cluster: SLURMCluster, num_jobs: int, logs: Path) -> None:
        super().__init__(name="slurm-jobs", daemon=True)
        self._cluster, self._num_jobs, self._logs = cluster, num_jobs, logs
        self._failed = 0  # jobs in a row that ended before their worker joined
        self._seen: set[str] = set()  # names of workers: the name of their job and a number
        self._is_over = threading.Event()
        from distributed import SchedulerPlugin

        seen = self._seen

        class NoteNames(SchedulerPlugin):
            def add_worker(self, scheduler: Any, worker: str) -> None:
                seen.add(str(scheduler.workers[worker].name))

        assert cluster.scheduler is not None  # the cluster has been started
        cluster.scheduler.add_plugin(NoteNames())

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
            # Listed before the queue is read: a job that is being submitted is in no answer and has not ended.
            submitted = {name: job for name, job in list(self._cluster.workers.items()) if job.job_id}
            live = self.live_jobs() if submitted else set()
            if live is None:
                continue
            for name, job in submitted.items():
                if str(job.job_id) not in live and self._cluster.workers.get(name) is job:
                    self._remove(name, str(job.job_id))
            if self._failed < MAX_FAILED_JOBS * self._num_jobs:
                self._cluster.scale(jobs=self._num_jobs)  # submits the missing ones

    def _remove(self, name: str, job_id: str) -> None:
        """Remove a job that ended, so that `scale` submits another; not forever where all end at once."""
        del self._cluster.workers[name]
        its_workers = {worker for worker in set(self._seen) if worker == str(name) or worker.startswith(f"{name}-")}
        self._seen -= its_workers  # the next job has the same name
        self._failed = 0 if its_workers else self._failed + 1
        if self._failed < MAX_FAILED_JOBS * self._num_jobs:
            log.info("slurm: job %s has ended before the run; submitting another one", job_id)
        elif self._failed == MAX_FAILED_JOBS * self._num_jobs:
            log.warning(
                "slurm: %d jobs ended before their workers joined, no more are submitted; the last lines in %s:\n%s",
                self._failed,
                self._logs,
                _tail(self._logs, {job_id}),
            )

    def __enter__(self) -> _JobReplacer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join()


def submit_script(name: str, settings: ClusterSettings, *, config: str, num_workers: int = 0) -> str:
    """The template `name` for `num_workers` workers (0: those of one node), with `config` as the file of settings.

    Every value is one word of the script, whatever characters it holds; `settings.prologue` is shell and is not quoted.
    """
    if name not in TEMPLATES:
        raise ClusterError(unknown_name("template", name, TEMPLATES))
    text = (TEMPLATE_FOLDER / f"{name}.sbatch").read_text()
    wanted = num_workers or max(1, settings.gpus)
    given = {"partition": settings.partition, "account": settings.account}
    options = [f"--{option}={value}" for option, value in given.items() if value]
    options += _allocation(settings, wanted) if name == "one-allocation" else []
    replaced = {option.lstrip("-").partition("=")[0] for option in options} | ({"gres"} if not settings.gpus else set())
    variables = {"CONFIG": config, "WORKERS": str(wanted), "BIN": str(Path(sys.executable).parent)}
    lines: list[str] = []
    for line in text.splitlines():
        directive, variable = re.match(r"#SBATCH --([a-z-]+)", line), line.partition("=")[0]
        if directive and directive[1] == "job-name":
            lines += [line, *(f"#SBATCH {option}" for option in options)]
        elif directive and directive[1] in replaced:
            continue
        elif line.startswith("# -- prologue") and settings.prologue:
            lines += settings.prologue
        elif variable in variables and line.startswith(f"{variable}=${{{variable}:-"):
            lines.append(f"{variable}=${{{variable}:-{shlex.quote(variables[variable])}}}")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def training_script(arguments: Sequence[str]) -> str:
    """The template of a training on several nodes; each of the arguments of `merv-train` is one word of the script."""
    folder = shlex.quote(str(Path(sys.executable).parent))
    values = {"ARGUMENTS": f"({shlex.join(arguments)})", "BIN": f"${{BIN:-{folder}}}"}
    lines = []
    for line in (TEMPLATE_FOLDER / "train.sbatch").read_text().splitlines():
        name = line.partition("=")[0]
        lines.append(f"{name}={values[name]}" if name in values else line)
    return "\n".join(lines) + "\n"


def _allocation(settings: ClusterSettings, num_workers: int) -> list[str]:
    """Options of the one job: `num_workers` spread over nodes of `gpus` each."""
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
