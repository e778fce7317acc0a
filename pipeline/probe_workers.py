"""The probe on a cluster: on several workers at a time, and what their spread says of the whole.

Comes in: a client, and a few clips of each kind per worker. Goes out: one probe's answer, its records marked with the
worker that they are from, and how far the mean may be off. Workers of one cluster may differ (another GPU, a shared
node), so what lies between workers counts as well as what lies between clips.
"""

from __future__ import annotations

import math
import statistics
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featurestore.clips import Clip
from jobs.reports import Report
from jobs.run import Task, run_tasks
from pipeline.config import ExtractConfig

if TYPE_CHECKING:
    from distributed import Client

MAX_WORKERS = 8  # probed: the error of a mean shrinks with the root of their number
INTERVAL = "two standard errors of the mean to each side, between clips or between workers, whichever is wider"


def probe_workers(
    client: Client,
    config: ExtractConfig,
    root: str,
    chosen: Mapping[str, Sequence[Clip]],
    *,
    workers: int,
    on_report: Callable[[Task, str, Report], None] | None = None,
) -> dict[str, Any]:
    """What `probe_clips` says, with the chosen clips dealt out to `workers` workers of the cluster."""
    from pipeline.probe import probe_clips  # imports torch

    parts = [{kind: clips[n::workers] for kind, clips in chosen.items()} for n in range(workers)]
    tasks = [
        Task(
            key=f"probe-{n}-{uuid.uuid4().hex}",
            arguments=(config.engine_settings, root, part, config.batch),
        )
        for n, part in enumerate(parts)
        if n == 0 or any(part.values())
    ]
    answers = []
    wait_s = config.cluster_request.worker_wait_s
    for outcome in run_tasks(client, probe_clips, tasks, attempts=1, worker_wait_s=wait_s, on_report=on_report):
        if outcome.error is not None:
            raise outcome.error
        answers.append(outcome.result)
    return _together(answers)


def _together(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One answer of several; every clip's record says whose it is."""
    clips: dict[str, list[dict[str, Any]]] = {}
    for worker, answer in enumerate(answers):
        for kind, records in answer["clips"].items():
            clips.setdefault(kind, []).extend({**record, "worker": worker} for record in records)
    startup_s = max(answer.get("startup_s", 0.0) for answer in answers)
    return {**answers[0], "clips": clips, "startup_s": startup_s, "workers": len(answers)}


def standard_error(records: Sequence[Mapping[str, Any]]) -> float:
    """Of the mean seconds per clip: between clips, or between workers' means where these differ more.

    >>> round(standard_error([{"wall_s": s, "worker": 0} for s in (1.0, 3.0)]), 6)
    1.0
    """
    by_worker: dict[int, list[float]] = {}
    for record in records:
        by_worker.setdefault(record.get("worker", 0), []).append(record["wall_s"])
    means = [statistics.fmean(seconds) for seconds in by_worker.values()]
    return max(_error_of_mean([record["wall_s"] for record in records]), _error_of_mean(means))


def _error_of_mean(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
