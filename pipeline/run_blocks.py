"""Blocks on the cluster: handed out, watched, counted.

Comes in: tasks, a store and a summary to fill. Goes out: nothing but the summary's counts; blocks are committed by the
workers, and what a worker reports while it computes moves the progress line alone. A block that workers died of is
computed once more under suspicion, alone.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from featurestore.errors import RunStoppedError
from featurestore.writer import StoreWriter
from jobs.clusters import check_cluster
from jobs.progress import Counts, RunProgress
from jobs.run import Outcome, Task, run_tasks
from pipeline.config import ExtractConfig
from pipeline.crash_marks import forget_all
from pipeline.plan import PlannedBlock
from pipeline.prediction import from_first_blocks
from pipeline.summary import DECODING, ExtractSummary
from pipeline.worker_reports import BlockCounts

if TYPE_CHECKING:
    from distributed import Client

BESIDE = ("total", DECODING)  # seconds that are no stage of the worker's own
SNAPSHOT_INTERVAL_S = 180.0
MIN_FAILED = 32  # clips; below this a share of failures says nothing


def run_blocks(
    client: Client,
    store: StoreWriter,
    tasks: Iterator[Task],
    blocks: list[PlannedBlock],
    summary: ExtractSummary,
    config: ExtractConfig,
    *,
    quiet: bool,
) -> None:
    """Hand out the tasks of the planned blocks and count what comes back; readers see the store grow meanwhile."""
    from pipeline.suspect import compute_block, extract_suspect

    total = sum(block.num_clips for block in blocks)
    last_snapshot = time.monotonic()
    worker_wait_s = config.cluster_request.worker_wait_s
    with (
        RunProgress("extract", total=total, unit="clips", quiet=quiet) as progress,
        closing(
            run_tasks(
                client,
                compute_block,
                tasks,
                is_final=lambda error: isinstance(error, RunStoppedError),
                after_deaths=extract_suspect,
                on_report=lambda task, attempt, told: progress.report(task.key, attempt, _counts(BlockCounts(**told))),
                worker_wait_s=worker_wait_s,
                on_wait=lambda seconds: progress.wait(_waiting(seconds, worker_wait_s)),
                check_new=lambda addresses: check_cluster(client, config.cluster_request, addresses),
            )
        ) as outcomes,
    ):
        for outcome in outcomes:
            _count(outcome, summary, progress)
            _predict(summary, total, progress.elapsed_s)
            if summary.failed >= MIN_FAILED and summary.failed > config.max_failed * summary.clips:
                raise RunStoppedError(
                    f"{summary.failed} of {summary.clips} clips failed, more than --max-failed {config.max_failed:g}: "
                    f"{_worst(summary.reasons)}; mend the cause, or raise --max-failed, and run again"
                )
            if time.monotonic() - last_snapshot > SNAPSHOT_INTERVAL_S:
                store.publish_snapshot()
                last_snapshot = time.monotonic()
    forget_all(str(config.store_path))


def _waiting(seconds: float, limit_s: float) -> str:
    """What the progress line says where the cluster has no worker."""
    return f"no worker for {seconds:.0f} s, stops after {limit_s:.0f} s" if seconds else ""


def _count(outcome: Outcome, summary: ExtractSummary, progress: RunProgress) -> None:
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
    return ", ".join(f"{count} x {reason}" for reason, count in Counter(reasons).most_common(3))
