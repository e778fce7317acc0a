"""Computes one block: decode, encode, compress, commit.

Dask calls `isolate.compute_block`, which calls `extract_block` here, in this process or in a child. One Dask task is
one block; its thread feeds the block's clips to the engine's stages (`stages.py`), waits for their rows and commits
them, so that it returns only after the block's receipts. Several blocks are in flight at once: while one commits on its
task's thread, the batches of the next are encoded and the clips of the one after are decoded.

Batches are cut by row, not by what happened to decode: a broken neighbour is a zeroed slot, and a clip's bits never
depend on the other clips of its batch.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch

from featurestore.clips import Clip
from featurestore.group_writer import BlockWriter
from featurestore.transfer.merge import LoadedCell, copy_cell
from featurestore.writer import StoreWriter
from jobs import metrics
from jobs.run import TaskReporter, metered
from mervcache.errors import MediaError, RunStoppedError
from pipeline.config import EngineSettings
from pipeline.decode.sampling import Decoded
from pipeline.media import UNREACHABLE, Root, folder_has_gone, resolve_media
from pipeline.reuse import ReuseTask, copy_cells
from pipeline.same_media import SameMediaTask, stored_media
from pipeline.views import View, distinct_views
from pipeline.worker.encode import PendingTokens, TokenEncoder, launch_together
from pipeline.worker.engine import Engine, decode_job, engine_for
from pipeline.worker.reports import COMMITTING, COMPRESSING, DECODING, BlockCounts, BlockReport, EncoderWork
from pipeline.worker.stages import Countdown

REPORT_S = 1.0  # between looks whether a report is due, while a forward takes longer


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
    same_media: SameMediaTask | None = None  # cells of other datasets of this store, likewise


@dataclass(kw_only=True, eq=False)
class _Forward:
    """A forward whose seconds are not counted yet: it is computed, or its rows are being compressed."""

    encoder: str
    began: float
    ended: float | None = None  # when the encoding thread was done with it; a GPU may still compute


class EncoderRow(NamedTuple):
    """One cell: a clip, by its row, with one encoder."""

    encoder: str
    row: int


@dataclass(frozen=True, kw_only=True)
class CrashProbe:
    """Makes a block run one clip per forward, announcing each clip before it is encoded."""

    announce: Callable[[EncoderRow, BlockCounts], None]  # with the counts so far
    crashed: Mapping[EncoderRow, str]  # cells that crashed a process -> how; not tried again


def frame_bytes(view: View, kind: str) -> int:
    """Bytes of one clip's small frames."""
    num_frames = view.num_frames if kind == "video" else 1
    return num_frames * view.rule.size**2 * 3 * np.dtype(view.rule.dtype).itemsize


def extract_block(task: BlockTask, *, probe: CrashProbe | None = None) -> BlockReport:
    """Compute and commit one block; its counts so far are reported to the driver meanwhile."""
    engine = engine_for(task.engine)
    for name in task.wanted:  # a worker that loads other weights than the driver planned must not write a byte
        loaded = engine.encoders[name].identity.group_name
        if loaded != task.groups[name]:
            raise RunStoppedError(
                f"this worker loads {name} as {loaded}, the plan has {task.groups[name]}: "
                "give every worker the same weights folder and version"
            )
    block = _Block(task, engine, probe)
    block.feed()
    block.wait()
    report = block.commit()
    metrics.count("blocks", "Blocks committed")
    metrics.count("clips", "Clips computed or failed", report.clips)
    metrics.count("clips_failed", "Clips quarantined", report.failed)
    metrics.count("stored_bytes", "Bytes of the committed shards", report.bytes)
    for stage, seconds in report.seconds.items():
        metrics.count("stage_seconds", "Seconds of blocks, by stage", seconds, stage=stage)
    return report


class _Batch:
    """The rows of one forward, and what has arrived of them."""

    def __init__(self, block: _Block, rows: Sequence[int], to_decode: Sequence[int], clip_bytes: int) -> None:
        self.rows, self.to_decode = rows, to_decode
        self.num_bytes = clip_bytes * len(to_decode)
        self.frames: dict[int, Mapping[View, np.ndarray]] = {}  # by row, until the batch is encoded
        self.about: dict[int, dict[str, str]] = {}  # by row: media_sha256 and decoder, for the receipt
        self._block = block

    def encode(self, waited_s: float) -> None:
        self._block.encode(self, waited_s)


class _Block:
    """One block being computed: fed by its task's thread, then filled by the engine's stages, then committed.

    Batches never span blocks. What goes wrong in any stage fails the block; its other batches pass through the stages
    without work, so that nothing of it is left in them when its task ends.
    """

    def __init__(self, task: BlockTask, engine: Engine, probe: CrashProbe | None) -> None:
        self.task, self.engine, self._probe = task, engine, probe
        self.seconds = cast("dict[str, float]", Counter())  # by stage, 0 where it has not been
        self.counts: Counter[str] = Counter()
        self._clips = dict(task.rows)
        store = StoreWriter.open(task.store)
        self.writers: dict[str, BlockWriter] = {
            name: store.open_group(task.kind, task.groups[name]).begin(task.block, list(self._clips))
            for name in task.wanted
        }
        self._lock = threading.Lock()  # over counts, seconds, forwards and the error
        self._forwards: set[_Forward] = set()
        self._error: BaseException | None = None
        self._decodes: set[Future[Decoded]] = set()  # that have not arrived
        self._writes: list[Future[None]] = []
        self._encoded = threading.Event()  # every batch has left the encoding thread
        self._reporter = TaskReporter()
        self._unreachable: list[int] = []  # rows whose media are missing or may not be read

        self._to_encode = dict(task.wanted)  # less the rows that are copied from another store
        if task.reuse is not None:
            with self._stage("copy from another store"):
                copied = copy_cells(
                    task.reuse,
                    task.root,
                    self._clips,
                    task.kind,
                    self.writers,
                    task.groups,
                    accept_damaged=task.accept_damaged,
                )
            for name, rows in copied.items():
                self._to_encode[name] -= rows
                self.counts["reused"] += len(rows)
            self.seconds["total"] = self.seconds["copy from another store"]
        for name, writer in self.writers.items():
            for row in self._clips.keys() - task.wanted[name]:
                writer.skip(row)
        self._to_decode = frozenset().union(*self._to_encode.values())
        self._stored = None
        if task.same_media is not None and self._to_decode:
            with self._stage("read digests of the store"):
                self._stored = stored_media(task.store, task.kind, task.same_media)
            self.seconds["total"] += self.seconds["read digests of the store"]
        self._found: dict[int, dict[str, LoadedCell]] = {}  # by row, until the clip has arrived
        self._copied: set[EncoderRow] = set()  # from clips of the same media

    def feed(self) -> None:
        """Have the block's clips decoded, batch by batch, as far as frames fit the budget."""
        encoders = [self.engine.encoders[name] for name in self.task.wanted]
        rows, size = list(self._clips), self.task.batch
        clip_bytes = sum(frame_bytes(view, self.task.kind) for view in distinct_views(each.view for each in encoders))
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        batches = [_Batch(self, part, [row for row in part if row in self._to_decode], clip_bytes) for part in parts]
        self._left = Countdown(len(batches), self._encoded.set)
        with self.engine.stages.feeding:
            self._fed = time.monotonic()
            for batch in batches:
                self.engine.stages.frames.acquire(batch.num_bytes)
                if not batch.to_decode or self._error is not None:
                    self.engine.stages.put(batch)
                    continue
                arrivals = Countdown(len(batch.to_decode), partial(self.engine.stages.put, batch))
                for row in batch.to_decode:
                    self._decode(row, encoders, partial(self._arrived, batch, row, arrivals))

    def _decode(self, row: int, encoders: Sequence[TokenEncoder], arrived: Callable[[Future[Decoded]], object]) -> None:
        try:
            job = decode_job(self.task.root, self._clips[row], encoders, accept_damaged=self.task.accept_damaged)
            look_up = () if self._stored is None else (partial(self._is_known, row),)
            future = self.engine.pool.submit(job, *look_up)
        except Exception as error:  # the pool was closed
            future = Future()
            future.set_exception(error)
        self._decodes.add(future)
        future.add_done_callback(arrived)

    def _is_known(self, row: int, sha256: str) -> bool:
        """Look for cells of the same media in the store; True if they are all that the row wants."""
        assert self._stored is not None
        encoders = {name for name, to_encode in self._to_encode.items() if row in to_encode}
        assert self._stored is not None
        self._found[row] = self._stored.cells(
            sha256, self._clips[row], encoders, accept_damaged=self.task.accept_damaged
        )
        return self._found[row].keys() == encoders

    def _copy_found(self, row: int) -> None:
        cells = self._found.pop(row, {})
        for name, cell in cells.items():
            copy_cell(self.writers[name], row, cell)
            self._copied.add(EncoderRow(name, row))
        self._count(same_media=len(cells))

    def _arrived(self, batch: _Batch, row: int, arrivals: Countdown, future: Future[Decoded]) -> None:
        """Take a decoded clip; one that failed is recorded for every encoder that was to encode it."""
        self._decodes.discard(future)
        try:
            decoded = future.result()
            self._copy_found(row)
            self._spent(DECODING, decoded.seconds)
            if not decoded.frames:
                return
            batch.about[row] = {"media_sha256": decoded.media_sha256, "decoder": decoded.decoder}
            batch.frames[row] = decoded.frames
            self._count(frames=max(len(frames) for frames in decoded.frames.values()))
        except MediaError as reason:
            sha256 = getattr(reason, "media_sha256", None)  # of a FailedClipError: the bytes that failed
            if str(reason) in UNREACHABLE:
                self._unreachable.append(row)
            self._count(failed=1)
            for name, to_encode in self._to_encode.items():
                if row in to_encode and EncoderRow(name, row) not in self._copied:
                    self.writers[name].fail(row, str(reason), scope="clip", media_sha256=sha256)
        except CancelledError:
            self._fail(RunStoppedError("the decode pool was closed"))
        except BaseException as error:
            self._fail(error)
        finally:
            arrivals.down()

    def encode(self, batch: _Batch, waited_s: float) -> None:
        """Encode a batch with every encoder that has any of its rows to encode; called by the encoding thread."""
        began = time.monotonic()
        waited_s = min(waited_s, began - self._fed)  # an engine may have been without work before
        self._spent("decode wait", self.engine.stages.idle(waited_s))
        try:
            if self._error is None:
                if self._probe is None:
                    self._encode_together(batch)
                else:
                    self._encode_one_by_one(batch, self._probe)
        except BaseException as error:
            self._fail(error)
        finally:
            batch.frames.clear()
            self._spent("total", waited_s + time.monotonic() - began)
            self._left.down()

    def _encode_together(self, batch: _Batch) -> None:
        """One forward of each network; each row keeps its fixed slot even where other rows are missing."""
        on_device: dict[View, torch.Tensor] = {}  # encoders that share a view share the copy
        for keys in self.engine.forwards:
            wanted = [name for name in keys if name in self._to_encode]
            rows = {
                name: [row for row in batch.rows if row in batch.frames and self._is_to_encode(name, row)]
                for name in wanted
            }
            rows = {name: some for name, some in rows.items() if some}
            if rows:
                view = self.engine.encoders[keys[0]].view
                if view not in on_device:
                    on_device[view] = self._upload(batch, view, batch.frames)
                self._launch(batch, rows, on_device[view])
            for name in wanted:
                self._count(cells=len(self.task.wanted[name].intersection(batch.rows)))
            self._reporter.report(lambda: self._counts_so_far().to_dict())

    def _encode_one_by_one(self, batch: _Batch, probe: CrashProbe) -> None:
        """Each clip in a forward of its own, announced first; a clip that crashed this encoder before fails with it."""
        for name in self._to_encode:
            for row in sorted(row for row in batch.frames if self._is_to_encode(name, row)):
                cell = EncoderRow(name, row)
                if reason := probe.crashed.get(cell):
                    self.writers[name].fail(row, reason, scope="encoder", **batch.about[row])
                    continue
                probe.announce(cell, self._counts_so_far())
                frames = self._upload(batch, self.engine.encoders[name].view, {row: batch.frames[row]})
                self._launch(batch, {name: [row]}, frames)
                wait(self._writes)  # a crash while it is compressed is this clip's as well
            self._count(cells=len(self.task.wanted[name].intersection(batch.rows)))

    def _is_to_encode(self, name: str, row: int) -> bool:
        return row in self._to_encode[name] and EncoderRow(name, row) not in self._copied

    def _upload(self, batch: _Batch, view: View, frames: Mapping[int, Mapping[View, np.ndarray]]) -> torch.Tensor:
        slots = [*batch.rows, *[None] * (self.task.batch - len(batch.rows))]
        return self.engine.staging.upload({row: views[view] for row, views in frames.items()}, slots)

    def _launch(self, batch: _Batch, rows: Mapping[str, Sequence[int]], frames_BTHWC: torch.Tensor) -> None:
        """Start the forward of encoders, and have their rows compressed when their tokens are on the host."""
        encoders, stages = {name: self.engine.encoders[name] for name in rows}, self.engine.stages
        launches = self._launches(encoders, frames_BTHWC)
        for name in rows:
            began = time.monotonic()
            stages.behind.acquire()
            self._spent("write wait", stages.idle(time.monotonic() - began))
            forward = _Forward(encoder=name, began=time.monotonic())
            with self._lock:
                self._forwards.add(forward)
            try:
                tokens = stages.launched = next(launches)
            except BaseException:
                stages.behind.release()
                raise
            finally:
                forward.ended = time.monotonic()
            self._count(halvings=tokens.halvings)
            storage_dtype = encoders[name].identity.storage_dtype
            write = partial(self._write, name, batch, tokens, storage_dtype)
            self._writes += stages.compress(
                rows[name], write, partial(self._encoded_in, forward, tokens, storage_dtype)
            )

    def _launches(self, encoders: Mapping[str, TokenEncoder], frames_BTHWC: torch.Tensor) -> Iterator[PendingTokens]:
        """The tokens of each encoder in turn, all from one forward."""
        if len(encoders) > 1:
            yield from launch_together(encoders, frames_BTHWC, self.engine.staging)
        else:
            (encoder,) = encoders.values()
            yield encoder.launch(frames_BTHWC, self.engine.staging)

    def _encoded_in(self, forward: _Forward, tokens: PendingTokens, storage_dtype: str) -> None:
        seconds = tokens.wait(storage_dtype).seconds
        with self._lock:
            self._forwards.remove(forward)
            self.seconds[f"encode:{forward.encoder}"] += seconds

    def _write(self, name: str, batch: _Batch, tokens: PendingTokens, storage_dtype: str, row: int) -> None:
        """Compress one row; called by a compressor thread."""
        if self._error is not None:
            return
        try:
            encoded, began = tokens.wait(storage_dtype), time.monotonic()
            writer, slot, about = self.writers[name], batch.rows.index(row), batch.about[row]
            if reason := encoded.overflow(slot):
                writer.fail(row, reason, scope="encoder", **about)
            elif encoded.is_cast:
                writer.add_stored(row, encoded.row(slot), **about)
            else:
                writer.add(row, encoded.row(slot), **about)
            self._spent(COMPRESSING, time.monotonic() - began)
        except BaseException as error:
            self._fail(error)

    def wait(self) -> None:
        """Wait until every row has its outcome; raises what went wrong in any stage."""
        with metered("decode, encode, compress"):
            while not self._encoded.wait(REPORT_S):
                self._reporter.report(lambda: self._counts_so_far().to_dict())
            wait(self._writes)
        if self._error is not None:
            raise self._error

    def commit(self) -> BlockReport:
        """Commit every encoder's shard and report the block."""
        self._check_vanished_media()
        with self._stage(COMMITTING):
            receipts = {name: writer.commit() for name, writer in self.writers.items()}
        reasons: dict[int, str] = {}  # by row, of rows that failed with any encoder
        for name, receipt in receipts.items():
            for row in sorted(self.task.wanted[name]):
                outcome = receipt.outcome(row)
                if outcome.state == "failed":
                    reason = outcome.reason or ""
                    reasons[row] = reason if outcome.scope == "clip" else f"{name}: {reason}"
        return BlockReport(
            kind=self.task.kind,
            block=self.task.block,
            clips=len(self._all_wanted),
            failed=len(reasons),
            frames=self.counts["frames"],
            bytes=sum(receipt.stored_bytes for receipt in receipts.values()),
            halvings=self.counts["halvings"],
            reused=self.counts["reused"],
            same_media=self.counts["same_media"],
            made={
                name: EncoderWork(
                    clips=sum(self._is_to_encode(name, row) for row in self._to_encode[name]),
                    seconds=self.seconds[f"encode:{name}"],
                    bytes=receipt.stored_bytes,
                )
                for name, receipt in receipts.items()
            },
            reasons=dict(Counter(reasons.values())),
            failures={self._clips[row].clip_id: reason for row, reason in reasons.items()},
            seconds=dict(self.seconds),
        )

    def _counts_so_far(self) -> BlockCounts:
        """Counts so far, with the keys of the final report; clips are estimated from the share of cells done.

        A forward that is being computed counts as encoding: with a slow encoder it takes minutes.
        """
        cells, now = sum(map(len, self.task.wanted.values())), time.monotonic()
        with self._lock:
            seconds = cast("dict[str, float]", Counter(self.seconds))
            for forward in self._forwards:
                seconds[f"encode:{forward.encoder}"] += (forward.ended or now) - forward.began
        return BlockCounts(
            clips=self.counts["cells"] * len(self._all_wanted) // max(1, cells),
            failed=self.counts["failed"],
            frames=self.counts["frames"],
            bytes=sum(writer.encoded_bytes for writer in self.writers.values()),
            halvings=self.counts["halvings"],
            seconds=dict(seconds),
        )

    @property
    def _all_wanted(self) -> frozenset[int]:
        return frozenset().union(*self.task.wanted.values())

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """A stage on the task's own thread."""
        began = time.monotonic()
        with metered(name):
            yield
        self._spent(name, time.monotonic() - began)

    def _spent(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.seconds[stage] += seconds

    def _count(self, **counts: int) -> None:
        with self._lock:
            self.counts.update(counts)

    def _fail(self, error: BaseException) -> None:
        """Keep the first error, and cancel what is not being decoded yet."""
        with self._lock:
            self._error = self._error or error
        for future in list(self._decodes):
            future.cancel()

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
