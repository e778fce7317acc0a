"""The probe on a cluster: on several workers at a time, and what their spread says of the whole.

Comes in: a client, and a few clips of each kind per worker. Goes out: one `Probe`, its records marked with the worker
that they are from, and how far the mean may be off. Workers of one cluster may differ (another GPU, a shared
node), so what lies between workers counts as well as what lies between clips.
"""

from __future__ import annotations

import math
import statistics
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from featurestore.clips import Clip
from jobs.run import Listener, Task, run_tasks
from pipeline.config import ExtractConfig
from pipeline.worker.reports import Probe, ProbeRecord

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
    listener: Listener = Listener(),
) -> Probe:
    """Probe the chosen clips, dealt out to `workers` workers of the cluster."""
    from pipeline.costs.probe import probe_clips  # imports torch

    parts = [{kind: clips[n::workers] for kind, clips in chosen.items()} for n in range(workers)]
    tasks = [
        Task(
            key=f"probe-{n}-{uuid.uuid4().hex}",
            arguments=(config.engine_settings, root, part, config.batch),
        )
        for n, part in enumerate(parts)
        if n == 0 or any(part.values())
    ]
    probes = []
    wait_s = config.cluster_request.worker_wait_s
    for outcome in run_tasks(client, probe_clips, tasks, attempts=1, worker_wait_s=wait_s, listener=listener):
        if outcome.error is not None:
            raise outcome.error
        probes.append(outcome.result)
    return _together(probes)


def _together(probes: Sequence[Probe]) -> Probe:
    """One probe of several; every clip's record says which worker it is from."""
    clips: dict[str, list[ProbeRecord]] = {}
    for worker, probe in enumerate(probes):
        for kind, records in probe.clips.items():
            clips.setdefault(kind, []).extend(replace(record, worker=worker) for record in records)
    startup_s = max(probe.startup_s for probe in probes)
    return replace(probes[0], clips=clips, startup_s=startup_s, workers=len(probes))


def standard_error(records: Sequence[ProbeRecord]) -> float:
    """Standard error of the mean seconds per clip: between clips, or between workers' means where it is larger.

    >>> round(standard_error([ProbeRecord(decode_s=0.1, wall_s=s, encoders={}) for s in (1.0, 3.0)]), 6)
    1.0
    """
    by_worker: dict[int, list[float]] = {}
    for record in records:
        by_worker.setdefault(record.worker, []).append(record.wall_s)
    means = [statistics.fmean(seconds) for seconds in by_worker.values()]
    return max(_error_of_mean([record.wall_s for record in records]), _error_of_mean(means))


def _error_of_mean(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
