"""One block: decode ahead, encode, write behind, commit. The task that Dask runs.

Comes in: a `BlockTask` of paths and rows. Goes out: receipts in the store, and a small dict of counts and seconds. The
three stages overlap: decode processes work on the next clips while the device encodes this batch and a thread
compresses the last one. Batches are cut by row, not by what happened to decode: a broken neighbour is a zeroed slot,
and a clip's bits never depend on who sat beside it.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from featurestore.blocks import BlockWriter
from featurestore.clips import Clip
from featurestore.errors import MediaError, RunStoppedError
from featurestore.receipts import Receipt
from featurestore.writer import StoreWriter
from jobs import metrics
from pipeline.config import EngineSettings
from pipeline.decode.job import Decoded, DecodeJob
from pipeline.engine import Engine, encode_batch, engine_for
from pipeline.media import MISSING_REASON
from pipeline.reuse import ReuseTask, copy_cells
from pipeline.summary import DECODING

WRITES_IN_FLIGHT = 2  # batches compressed behind the encoder; bounds the memory


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """Everything a worker needs to compute one block of one kind."""

    store: str
    root: str  # folder of the media
    kind: str
    block: int
    rows: tuple[tuple[int, Clip], ...]  # the block's planned rows, in order
    wanted: Mapping[str, frozenset[int]]  # encoder -> rows to compute; the block's other rows are skipped
    groups: Mapping[str, str]  # encoder -> group name, ENCODER-IDENTITY12
    batch: int  # clips per forward
    accept_damaged: bool
    engine: EngineSettings
    reuse: ReuseTask | None = None  # cells of another store that may be copied


def extract_block(task: BlockTask) -> dict:
    """Compute and commit one block; returns counts, seconds per stage and reasons of failure."""
    started = time.monotonic()
    engine = engine_for(task.engine)
    _check_identities(engine, task)
    work = _BlockWork(task, engine)
    try:
        for batch in _batches(task.rows, task.batch):
            work.encode(batch)
        done = work.finish(time.monotonic() - started)
    finally:
        work.close()
    _count(done)
    return done


def _count(done: Mapping) -> None:
    """Tell whoever watches this worker."""
    metrics.count("blocks", "Blocks committed")
    metrics.count("clips", "Clips computed or failed", done["clips"])
    metrics.count("clips_failed", "Clips quarantined", done["failed"])
    metrics.count("stored_bytes", "Bytes of the committed shards", done["bytes"])
    for stage, seconds in done["seconds"].items():
        metrics.count("stage_seconds", "Seconds of blocks, by stage", seconds, stage=stage)


class _BlockWork:
    """The state of one block in the making."""

    def __init__(self, task: BlockTask, engine: Engine) -> None:
        self.task, self.engine = task, engine
        self.seconds: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        store = StoreWriter.open(task.store)
        rows = [row for row, _ in task.rows]
        self.writers: dict[str, BlockWriter] = {
            name: store.open_group(task.kind, task.groups[name]).begin(task.block, rows) for name in task.wanted
        }
        self._behind = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._writes: deque[Future] = deque()
        self._clips = dict(task.rows)
        self._copy_from_other_store()
        self._needed = frozenset().union(*self._wanted.values())
        self._decoding = _decode_ahead(task, engine, self._needed)

    def encode(self, rows: Sequence[int]) -> None:
        """Encode one batch of rows with every encoder that wants any of them."""
        decoded = {row: result for row in rows if row in self._needed and (result := self._decoded(row)) is not None}
        for name, wanted in self._wanted.items():
            run, writer = self.engine.encoders[name], self.writers[name]
            frames = {row: decoded[row].frames[run.view] for row in rows if row in wanted and row in decoded}
            for row in rows:
                if row in self._clips and row not in self.task.wanted[name]:
                    writer.skip(row)
            if not frames:
                continue
            began = time.monotonic()
            slots = [*rows, *[None] * (self.task.batch - len(rows))]
            arrays, halvings = encode_batch(run, frames, slots)
            self.seconds[f"encode:{name}"] += time.monotonic() - began
            self.counts["batch halvings"] += halvings
            kept = {row: (slot, decoded[row]) for slot, row in enumerate(slots) if row in frames}
            self._write_behind(writer, arrays, kept)

    def finish(self, seconds: float) -> dict:
        """Commit every encoder's shard and say what was done."""
        self._drain(0)
        self._refuse_vanished_media()
        began = time.monotonic()
        receipts = {name: writer.commit() for name, writer in self.writers.items()}
        self.seconds["commit"] += time.monotonic() - began
        reasons = _failures(receipts, self.task.wanted)
        return {
            "kind": self.task.kind,
            "block": self.task.block,
            "clips": len(frozenset().union(*self.task.wanted.values())),
            "reused": self.counts["reused"],
            "failed": len(reasons),
            "frames": self.counts["frames"],
            "bytes": sum(receipt.stored_bytes for receipt in receipts.values()),
            "halvings": self.counts["batch halvings"],
            "reasons": dict(Counter(reasons.values())),
            "seconds": {**self.seconds, "total": seconds},
        }

    def close(self) -> None:
        self._behind.shutdown(wait=True, cancel_futures=True)
        self._decoding.close()

    def _copy_from_other_store(self) -> None:
        """What another store holds of the same media is left out of what is to be computed."""
        self._wanted = dict(self.task.wanted)
        if self.task.reuse is None:
            return
        began, task = time.monotonic(), self.task
        copied = copy_cells(task.reuse, task.root, self._clips, task.kind, self.writers, task.groups)
        for name, rows in copied.items():
            self._wanted[name] = self._wanted[name] - rows
            self.counts["reused"] += len(rows)
        self.seconds["copy from another store"] += time.monotonic() - began

    def _decoded(self, row: int) -> Decoded | None:
        """The clip's frames, or None after its failure is noted with every encoder that wanted it."""
        began = time.monotonic()
        got, result = next(self._decoding)
        self.seconds["decode wait"] += time.monotonic() - began
        assert got == row, f"decoded rows come in order, got {got} for {row}"
        if isinstance(result, Decoded):
            self.counts["frames"] += max(len(frames) for frames in result.frames.values())
            self.seconds[DECODING] += result.seconds
            return result
        sha256 = getattr(result, "media_sha256", None)  # of a FailedClipError: the bytes that failed
        self.counts["missing"] += str(result) == MISSING_REASON
        for name, wanted in self._wanted.items():
            if row in wanted:
                self.writers[name].fail(row, str(result), scope="clip", media_sha256=sha256)
        return None

    def _write_behind(self, writer: BlockWriter, arrays: Mapping, kept: Mapping[int, tuple[int, Decoded]]) -> None:
        def write() -> None:
            for row, (slot, decoded) in kept.items():
                parts = {name: array[slot] for name, array in arrays.items()}
                writer.add(row, parts, media_sha256=decoded.media_sha256, decoder=decoded.decoder)

        self._writes.append(self._behind.submit(write))
        self._drain(WRITES_IN_FLIGHT)

    def _refuse_vanished_media(self) -> None:
        """Media were there when the block was planned: if all are gone, a share was unmounted, no clip is broken."""
        if len(self._needed) > 1 and self.counts["missing"] == len(self._needed):
            raise RunStoppedError(
                f"all {len(self._needed)} media files of a block have vanished from {self.task.root} since they were "
                "listed: mount the share again and run the same command again; nothing was quarantined"
            )

    def _drain(self, keep: int) -> None:
        began = time.monotonic()
        while len(self._writes) > keep:
            self._writes.popleft().result()
        self.seconds["write wait"] += time.monotonic() - began


def _failures(receipts: Mapping[str, Receipt], wanted: Mapping[str, frozenset[int]]) -> dict[int, str]:
    """Row -> reason, for rows that failed with any encoder."""
    reasons = {}
    for name, receipt in receipts.items():
        for row in sorted(wanted[name]):
            outcome = receipt.rows[row % len(receipt.rows)]
            if outcome.state == "failed":
                reasons[row] = outcome.reason if outcome.scope == "clip" else f"{name}: {outcome.reason}"
    return reasons


def _batches(rows: Sequence[tuple[int, Clip]], size: int) -> Iterator[list[int]]:
    numbers = [row for row, _ in rows]
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _decode_ahead(
    task: BlockTask, engine: Engine, needed: frozenset[int]
) -> Iterator[tuple[int, Decoded | MediaError]]:
    """Decode the needed rows in order, a bounded number ahead of the one asked for."""
    views = tuple(dict.fromkeys(engine.encoders[name].view for name in task.wanted))
    settings = task.engine.encoders[0]
    jobs = (
        (
            row,
            DecodeJob(
                root=task.root,
                clip=clip,
                views=views,
                decoder=settings.decoder,
                accept_damaged=task.accept_damaged,
            ),
        )
        for row, clip in task.rows
        if row in needed
    )
    ahead: deque[tuple[int, Future]] = deque()
    lookahead = 2 * task.batch + engine.num_decoders
    try:
        for row, job in jobs:
            ahead.append((row, engine.pool.submit(job)))
            if len(ahead) > lookahead:
                yield _result(*ahead.popleft())
        while ahead:
            yield _result(*ahead.popleft())
    finally:
        for _, future in ahead:
            future.cancel()


def _result(row: int, future: Future) -> tuple[int, Decoded | MediaError]:
    try:
        return row, future.result()
    except MediaError as reason:
        return row, reason


def _check_identities(engine: Engine, task: BlockTask) -> None:
    """A worker that loads other weights than the driver planned must not write a byte."""
    for name in task.wanted:
        ours = engine.encoders[name].identity.group_name
        if ours != task.groups[name]:
            raise RunStoppedError(
                f"this worker loads {name} as {ours}, the plan says {task.groups[name]}: "
                "give every worker the same weights folder and version"
            )
