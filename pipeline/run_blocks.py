"""Blocks on the cluster: handed out, watched, counted.

Comes in: tasks, a store and a summary to fill. Goes out: the summary's counts. Workers commit the blocks themselves;
what they report while they compute only moves the progress line. A block that workers died of is computed once more,
alone and under suspicion.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from featurestore.writer import StoreWriter
from jobs.clusters import check_cluster
from jobs.run import Listener, Outcome, Task, run_tasks
from jobs.settings import ClusterRequest
from mervcache.console import Counts, RunProgress
from mervcache.errors import RunStoppedError
from pipeline.config import ExtractConfig
from pipeline.costs.prediction import from_first_blocks
from pipeline.summary import DECODING, ExtractSummary
from pipeline.worker.crash_marks import forget_all
from pipeline.worker.reports import BlockCounts

if TYPE_CHECKING:
    from distributed import Client

BESIDE = ("total", DECODING)  # not counted as a worker's stages: the total, and decoding, which runs beside
SNAPSHOT_INTERVAL_S = 180.0
MIN_FAILED = 32  # clips; below this a share of failures says nothing


def run_blocks(
    client: Client,
    store: StoreWriter,
    tasks: Iterator[Task],
    summary: ExtractSummary,
    config: ExtractConfig,
    *,
    total: int,  # clips in all the tasks
    quiet: bool,
) -> None:
    """Hand out the tasks and count what comes back; readers see the store grow meanwhile."""
    published = time.monotonic()
    with (
        RunProgress("extract", total=total, unit="clips", quiet=quiet) as progress,
        closing(_outcomes(client, tasks, progress, config.cluster_request)) as outcomes,
    ):
        for outcome in outcomes:
            _count(outcome, summary, progress)
            _predict(summary, total, progress.elapsed_s)
            _check_failures(summary, config.max_failed)
            if time.monotonic() - published > SNAPSHOT_INTERVAL_S:
                store.publish_snapshot()
                published = time.monotonic()
    forget_all(str(config.store_path))


def _outcomes(
    client: Client, tasks: Iterator[Task], progress: RunProgress, request: ClusterRequest
) -> Iterator[Outcome]:
    """Outcomes as blocks end; what happens meanwhile moves the progress line."""
    from pipeline.worker.suspect import compute_block, extract_suspect

    return run_tasks(
        client,
        compute_block,
        tasks,
        is_final=lambda error: isinstance(error, RunStoppedError),
        after_deaths=extract_suspect,
        worker_wait_s=request.worker_wait_s,
        listener=Listener(
            report=lambda task, attempt, told: progress.report(task.key, attempt, _counts(BlockCounts(**told))),
            waiting=lambda seconds: progress.wait(_waiting(seconds, request.worker_wait_s)),
            workers_came=lambda addresses: check_cluster(client, request, addresses),
        ),
    )


def _waiting(seconds: float, limit_s: float) -> str:
    """What the progress line says where the cluster has no worker."""
    return f"no worker for {seconds:.0f} s, stops after {limit_s:.0f} s" if seconds else ""


def _count(outcome: Outcome, summary: ExtractSummary, progress: RunProgress) -> None:
    """Count a block that is done; raise for one that could not be computed."""
    if outcome.error is not None:
        if isinstance(outcome.error, RunStoppedError):
            raise outcome.error
        raise RunStoppedError(
            f"block {outcome.task.key} failed twice: {type(outcome.error).__name__}: {outcome.error}"
            f"{_where(outcome.error)}; "
            "everything committed so far is kept, run the same command again after mending the cause"
        ) from outcome.error
    summary.add(outcome.result)
    progress.finish(outcome.task.key, _counts(outcome.result))


def _check_failures(summary: ExtractSummary, max_failed: float) -> None:
    """Stop the run where more than its share of clips failed: then it is not the clips."""
    if summary.failed >= MIN_FAILED and summary.failed > max_failed * summary.clips:
        raise RunStoppedError(
            f"{summary.failed} of {summary.clips} clips failed, more than --max-failed {max_failed:g}: "
            f"{_worst(summary.reasons)}; mend the cause, or raise --max-failed, and run again"
        )


def _predict(summary: ExtractSummary, total: int, seconds: float) -> None:
    """Where nobody planned, a run's own first blocks tell what the whole will cost."""
    if summary.predicted is None:
        early = from_first_blocks(done=summary.clips, total=total, seconds=seconds, num_bytes=summary.bytes)
        summary.predicted = early and early.to_dict()


def _counts(block: BlockCounts) -> Counts:
    """A block's counts, so far or at its end, as the progress line shows them."""
    return Counts(
        done=block.clips,
        failed=block.failed,
        amounts={"frames": block.frames, "MB": block.bytes / 1e6},
        seconds={name.removeprefix("encode:"): s for name, s in block.seconds.items() if name not in BESIDE},
        notes={"batches halved": block.halvings},
    )


def _where(error: BaseException) -> str:
    """File and line that raised: what a bug report needs."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _worst(reasons: dict[str, int]) -> str:
    """The three most frequent reasons."""
    return ", ".join(f"{count} x {reason}" for reason, count in Counter(reasons).most_common(3))
