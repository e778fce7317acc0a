"""Computes one block: decode ahead, encode, write behind, commit.

Dask calls `isolate.compute_block`, which calls `extract_block` here, in this process or in a child. The three stages
overlap: decode processes work on the next clips while the device encodes this batch and a thread compresses the last
one. Batches are cut by row, not by what happened to decode: a broken neighbour is a zeroed slot, and a clip's bits
never depend on the other clips of its batch.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from featurestore.clips import Clip
from featurestore.group_writer import BlockWriter
from featurestore.writer import StoreWriter
from jobs import metrics
from jobs.run import TaskReporter, metered
from mervcache.errors import MediaError, RunStoppedError
from pipeline.config import EngineSettings
from pipeline.decode.pool import decode_ahead
from pipeline.decode.sampling import Decoded
from pipeline.media import UNREACHABLE, Root, folder_has_gone, resolve_media
from pipeline.reuse import ReuseTask, copy_cells
from pipeline.worker.engine import Engine, decode_job, encode_batch, engine_for
from pipeline.worker.reports import DECODING, BlockCounts, BlockReport, EncoderWork

WRITES_IN_FLIGHT = 2  # batches compressed behind the encoder; bounds the memory


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """Everything a worker needs to compute one block of one kind."""

    store: str
    root: Root  # folder of the media
    kind: str
    block: int
    rows: tuple[tuple[int, Clip], ...]  # the block's planned rows, in order
    wanted: Mapping[str, frozenset[int]]  # encoder -> rows to compute; the block's other rows are skipped
    groups: Mapping[str, str]  # encoder -> group name, ENCODER-IDENTITY12
    batch: int  # clips per forward
    accept_damaged: bool
    engine: EngineSettings
    reuse: ReuseTask | None = None  # cells of another store that may be copied


class EncoderRow(NamedTuple):
    """One cell: a clip, by its row, with one encoder."""

    encoder: str
    row: int


@dataclass(frozen=True, kw_only=True)
class CrashProbe:
    """Makes a block run one clip per forward, announcing each clip before it is encoded."""

    announce: Callable[[EncoderRow, BlockCounts], None]  # with the counts so far
    crashed: Mapping[EncoderRow, str]  # cells that crashed a process -> how; not tried again


def extract_block(task: BlockTask, *, probe: CrashProbe | None = None) -> BlockReport:
    """Compute and commit one block; its counts so far are reported to the driver meanwhile."""
    started = time.monotonic()
    engine = engine_for(task.engine)
    for name in task.wanted:  # a worker that loads other weights than the driver planned must not write a byte
        loaded = engine.encoders[name].identity.group_name
        if loaded != task.groups[name]:
            raise RunStoppedError(
                f"this worker loads {name} as {loaded}, the plan has {task.groups[name]}: "
                "give every worker the same weights folder and version"
            )
    work = _BlockWork(task, engine, probe)
    try:
        rows = [row for row, _ in task.rows]
        for start in range(0, len(rows), task.batch):
            work.encode(rows[start : start + task.batch])
        report = work.finish(started)
    finally:
        work.close()
    metrics.count("blocks", "Blocks committed")
    metrics.count("clips", "Clips computed or failed", report.clips)
    metrics.count("clips_failed", "Clips quarantined", report.failed)
    metrics.count("stored_bytes", "Bytes of the committed shards", report.bytes)
    for stage, seconds in report.seconds.items():
        metrics.count("stage_seconds", "Seconds of blocks, by stage", seconds, stage=stage)
    return report


class _BlockWork:
    """The state of one block being computed."""

    def __init__(self, task: BlockTask, engine: Engine, probe: CrashProbe | None) -> None:
        self.task, self.engine, self._probe = task, engine, probe
        self.seconds: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self._clips = dict(task.rows)
        store = StoreWriter.open(task.store)
        self.writers: dict[str, BlockWriter] = {
            name: store.open_group(task.kind, task.groups[name]).begin(task.block, list(self._clips))
            for name in task.wanted
        }
        self._behind = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._writes: deque[Future] = deque()
        self._reporter = TaskReporter()
        self._unreachable: list[int] = []  # rows whose media are missing or may not be read

        self._to_encode = dict(task.wanted)  # less the rows that are copied from another store
        if task.reuse is not None:
            with self._stage("copy from another store"):
                copied = copy_cells(task.reuse, task.root, self._clips, task.kind, self.writers, task.groups)
            for name, rows in copied.items():
                self._to_encode[name] -= rows
                self.counts["reused"] += len(rows)
        self._to_decode = frozenset().union(*self._to_encode.values())

        encoders = [engine.encoders[name] for name in task.wanted]
        jobs = (
            (row, decode_job(task.root, clip, encoders, accept_damaged=task.accept_damaged))
            for row, clip in task.rows
            if row in self._to_decode
        )
        self._decoding = decode_ahead(jobs, engine.pool, 2 * task.batch + engine.num_decoders)

    def encode(self, rows: Sequence[int]) -> None:
        """Encode one batch of rows with every encoder that has any of them to encode."""
        decoded = {row: result for row in rows if row in self._to_decode and (result := self._decoded(row)) is not None}
        for name, to_encode in self._to_encode.items():
            for row in rows:
                if row not in self.task.wanted[name]:
                    self.writers[name].skip(row)
            ready = {row: decoded[row] for row in rows if row in to_encode and row in decoded}
            if self._probe is not None:
                self._encode_one_by_one(name, rows, ready)
            elif ready:
                self._encode_together(name, rows, ready)
            self.counts["cells"] += len(self.task.wanted[name].intersection(rows))
            self._reporter.report(lambda: self._counts_so_far().to_dict())

    def _encode_together(self, name: str, rows: Sequence[int], decoded: Mapping[int, Decoded]) -> None:
        """Run one forward and write behind; each row keeps its fixed slot even where other rows are missing."""
        encoder, writer = self.engine.encoders[name], self.writers[name]
        frames = {row: clip.frames[encoder.view] for row, clip in decoded.items()}
        slots = [*rows, *[None] * (self.task.batch - len(rows))]
        with self._stage(f"encode:{name}"):
            arrays, halvings = encode_batch(encoder, frames, slots)
        self.counts["halvings"] += halvings

        def write() -> None:
            for row, clip in decoded.items():
                parts = {part: array[slots.index(row)] for part, array in arrays.items()}
                writer.add(row, parts, media_sha256=clip.media_sha256, decoder=clip.decoder)

        self._writes.append(self._behind.submit(write))
        self._drain(WRITES_IN_FLIGHT)

    def _encode_one_by_one(self, name: str, rows: Sequence[int], decoded: Mapping[int, Decoded]) -> None:
        """Each clip in a forward of its own, announced first; a clip that crashed this encoder before fails with it."""
        for row, clip in decoded.items():
            cell = EncoderRow(name, row)
            if reason := self._probe.crashed.get(cell):
                self.writers[name].fail(
                    row, reason, scope="encoder", media_sha256=clip.media_sha256, decoder=clip.decoder
                )
                continue
            self._probe.announce(cell, self._counts_so_far())
            self._encode_together(name, rows, {row: clip})
            self._drain(0)  # a crash while it is compressed is this clip's as well

    def finish(self, started: float) -> BlockReport:
        """Commit every encoder's shard and report the block, which began at `started` of `time.monotonic`."""
        self._drain(0)
        self._check_vanished_media()
        with self._stage("commit"):
            receipts = {name: writer.commit() for name, writer in self.writers.items()}
        reasons: dict[int, str] = {}  # by row, of rows that failed with any encoder
        for name, receipt in receipts.items():
            for row in sorted(self.task.wanted[name]):
                outcome = receipt.outcome(row)
                if outcome.state == "failed":
                    reasons[row] = outcome.reason if outcome.scope == "clip" else f"{name}: {outcome.reason}"
        return BlockReport(
            kind=self.task.kind,
            block=self.task.block,
            clips=len(self._all_wanted),
            failed=len(reasons),
            frames=self.counts["frames"],
            bytes=sum(receipt.stored_bytes for receipt in receipts.values()),
            halvings=self.counts["halvings"],
            reused=self.counts["reused"],
            made={
                name: EncoderWork(
                    clips=len(self._to_encode[name]), seconds=self.seconds[f"encode:{name}"], bytes=receipt.stored_bytes
                )
                for name, receipt in receipts.items()
            },
            reasons=dict(Counter(reasons.values())),
            seconds={**self.seconds, "total": time.monotonic() - started},
        )

    def close(self) -> None:
        self._behind.shutdown(wait=True, cancel_futures=True)
        self._decoding.close()

    def _decoded(self, row: int) -> Decoded | None:
        """The clip's frames; None if it failed, which is then recorded for every encoder that was to encode it."""
        with self._stage("decode wait"):
            decoded_row, result = next(self._decoding)
        assert decoded_row == row, f"decoded rows come in order, got {decoded_row} for {row}"
        if isinstance(result, Decoded):
            self.counts["frames"] += max(len(frames) for frames in result.frames.values())
            self.seconds[DECODING] += result.seconds
            return result
        sha256 = getattr(result, "media_sha256", None)  # of a FailedClipError: the bytes that failed
        if str(result) in UNREACHABLE:
            self._unreachable.append(row)
        self.counts["failed"] += 1
        for name, to_encode in self._to_encode.items():
            if row in to_encode:
                self.writers[name].fail(row, str(result), scope="clip", media_sha256=sha256)
        return None

    def _counts_so_far(self) -> BlockCounts:
        """Counts so far, with the keys of the final report; clips are estimated from the share of cells done."""
        cells = sum(map(len, self.task.wanted.values()))
        return BlockCounts(
            clips=self.counts["cells"] * len(self._all_wanted) // max(1, cells),
            failed=self.counts["failed"],
            frames=self.counts["frames"],
            bytes=sum(writer.encoded_bytes for writer in self.writers.values()),
            halvings=self.counts["halvings"],
            seconds=dict(self.seconds),
        )

    @property
    def _all_wanted(self) -> frozenset[int]:
        return frozenset().union(*self.task.wanted.values())

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        with metered(name):
            yield
        self.seconds[name] += time.monotonic() - began

    def _drain(self, keep: int) -> None:
        """Wait until at most `keep` writes are left."""
        with self._stage("write wait"):
            while len(self._writes) > keep:
                self._writes.popleft().result()

    def _check_vanished_media(self) -> None:
        """Stop the run if all media of the block, or a whole folder, are gone since planning: no clip is broken.

        A share may have been unmounted in the middle of the block: clips decoded before are looked for once more.
        """
        root, paths = self.task.root, [self._clips[row].path for row in self._unreachable]
        clips = [self._clips[row] for row in self._to_decode]
        if paths and len(clips) > 1 and not any(map(self._is_there, clips)):
            raise RunStoppedError(
                f"all {len(clips)} media files of a block have vanished from {root} since they were listed, or "
                "may not be read by this worker: mount the share again, or let it read there, and run the same command "
                "again; nothing was quarantined"
            )
        if gone := next((path for path in paths if folder_has_gone(root, path)), None):
            raise RunStoppedError(
                f"the folder of {gone} under {root} is missing or empty, and held media when they were listed: mount "
                "its share again and run the same command again; nothing was quarantined"
            )

    def _is_there(self, clip: Clip) -> bool:
        try:
            return resolve_media(self.task.root, clip.path) is not None
        except MediaError as reason:
            return str(reason) not in UNREACHABLE
