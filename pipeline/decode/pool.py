"""Decode processes that can be killed, and a future per clip.

Decoders can spin for ever in native code, where neither a signal handler nor another thread can stop them, so each
runs in a child process that is killed at a deadline. Plain subprocesses rather than `multiprocessing`, because Dask's
daemonic workers may not have such children.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, overload

import numpy as np

from mervcache.errors import MediaError, RunStoppedError, UserError
from pipeline.decode import worker
from pipeline.decode.sampling import AnyJob, Decoded, DecodeJob, FailedClipError, LengthJob
from pipeline.media import Source, resolve_media
from pipeline.remote_shards import remote_root

IsKnown = Callable[[str], bool]  # of the sha256 of media: whether they need no decoding
WORKER_COMMAND = (sys.executable, "-P", "-m", "pipeline.decode.worker")
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYAV_LOGGING": "off",
    "TOKIO_WORKER_THREADS": "1",  # of the client of buckets
}
TRIES = 2  # a timeout or a crash may come from a busy machine; the second one counts against the clip
START_TIMEOUT_S = 120.0  # imports from a slow share
EXIT_GRACE_S = 5.0  # until the status of a crashed process is available
PIPE_BYTES = 1 << 20  # of results; Linux's default of 64 KiB costs a change of process for every 64 KiB of frames
STDERR_BYTES = 1 << 20  # kept of what the child's libraries print
# Signals that a process does not send itself: a person, a cluster, or a kernel short of memory does.
EXTERNAL_SIGNALS = frozenset((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))


def describe_exit(status: int) -> str:
    """An exit status in words: "signal SIGSEGV" or "exit status 1"."""
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


class DecodePool:
    """`num_processes` long-lived decode processes.

    submit() gives a future of `Decoded`; it raises `MediaError` (this clip: quarantine it), `RunStoppedError` (the
    machine: stop) or `UserError` (no such decoder). close() kills the children at once; what is still waiting is
    cancelled, what is being decoded fails with `RunStoppedError`.

    Reasons hold no times and no process ids, so that the same broken clip gives the same record everywhere. Media whose
    bytes do not arrive (a share that hangs) and a process killed from outside stop the run instead.
    """

    def __init__(
        self,
        num_processes: int,
        *,
        timeout_s: float = 60.0,  # per clip and try, added to the time allowed for reading its bytes
        memory_bytes: int = 4 << 30,  # address space of one process; 0: no limit
        worker_command: tuple[str, ...] = WORKER_COMMAND,
    ) -> None:
        if num_processes < 1 or timeout_s <= 0:
            raise UserError(f"a decode pool needs processes and time, got {num_processes} and {timeout_s} s")
        self._jobs: queue.SimpleQueue[tuple[AnyJob, Future, IsKnown | None] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        command = (*worker_command, "--memory-bytes", str(memory_bytes), "--parent", str(os.getpid()))
        self._threads = [_WorkerThread(self._jobs, self._closed, command, timeout_s) for _ in range(num_processes)]
        for thread in self._threads:
            thread.start()

    @overload
    def submit(self, job: DecodeJob, is_known: IsKnown | None = None) -> Future[Decoded]: ...
    @overload
    def submit(self, job: LengthJob) -> Future[float]: ...
    def submit(self, job: AnyJob, is_known: IsKnown | None = None) -> Future[Any]:
        """Decode one clip in the next free process, with an empty result where `is_known` says so of its media.

        Or find the seconds that a video takes. `is_known` is called on a thread of the pool.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._closed.is_set():
                raise RunStoppedError("the decode pool is closed")
            self._jobs.put((job, future, is_known))
        return future

    def close(self) -> None:
        """End every child now; safe to call twice."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            thread.interrupt()
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(queue.Empty):
            while True:
                if item := self._jobs.get_nowait():
                    item[1].cancel()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@overload
def decode_ahead(
    jobs: Iterable[tuple[int, DecodeJob]], pool: DecodePool, lookahead: int
) -> Iterator[tuple[int, Decoded | MediaError]]: ...
@overload
def decode_ahead(
    jobs: Iterable[tuple[int, LengthJob]], pool: DecodePool, lookahead: int
) -> Iterator[tuple[int, float | MediaError]]: ...
def decode_ahead(jobs: Iterable[tuple[int, AnyJob]], pool: DecodePool, lookahead: int) -> Iterator[tuple[int, Any]]:
    """(row, result or why there is none) in the order of the jobs, with `lookahead` further jobs submitted."""

    def result(row: int, future: Future) -> tuple[int, Any]:
        try:
            return row, future.result()
        except MediaError as reason:
            return row, reason

    ahead: deque[tuple[int, Future]] = deque()
    try:
        for row, job in jobs:
            ahead.append((row, pool.submit(job)))
            if len(ahead) > lookahead:
                yield result(*ahead.popleft())
        while ahead:
            yield result(*ahead.popleft())
    finally:
        for _, future in ahead:
            future.cancel()


class _WorkerThread(threading.Thread):
    """One thread, one child at a time.

    The child is started by this thread and by no other: Linux sends the parent-death signal when the *thread* that
    started a process ends.
    """

    def __init__(
        self, jobs: queue.SimpleQueue, closed: threading.Event, command: tuple[str, ...], timeout_s: float
    ) -> None:
        super().__init__(name="decode-worker", daemon=True)
        self._jobs, self._closed, self._command, self._timeout_s = jobs, closed, command, timeout_s
        self._child: _DecodeChild | None = None
        self._lock = threading.Lock()  # held while a child is started or reaped: interrupt() comes from outside

    def run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future, is_known = item
            if self._closed.is_set():
                future.cancel()
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._decode(job, is_known))
                except Exception as error:
                    is_closed = self._closed.is_set()
                    future.set_exception(RunStoppedError("the decode pool was closed") if is_closed else error)
        self._end_child(hangs=False)

    def interrupt(self) -> None:
        """Kill the child from another thread; this one sees its pipe close and cleans up."""
        with self._lock:
            if self._child:
                self._child.kill()

    def _decode(self, job: AnyJob, is_known: IsKnown | None) -> Decoded | float:
        """Do a job in the child; once more, in a new child, if it hangs or dies.

        A clip that ends two children fails with the digest of its bytes, taken here: the children are gone.
        """
        path, root = job.clip.path, job.root
        if remote_root(root) is not None:
            with contextlib.suppress(MediaError):  # the child finds the same fault, and reports it
                resolve_media(root, path)  # may have to index the shard, for which no clip's deadline is made
        child = failure = None
        for _ in range(TRIES):
            child = self._ready_child()
            try:
                return child.answer(job, self._timeout_s, is_known)
            except worker.DeadlineError:
                self._end_child(hangs=True)
                failure = MediaError("decoding timed out twice")
                if not child.has_read:
                    failure = RunStoppedError(
                        f"the bytes of {path} under {root} did not arrive in time, twice: its disk or share hangs; "
                        "nothing was quarantined, run the same command again when it responds (if it is only slow, "
                        "raise decode_timeout_s in --config)"
                    )
            except worker.PipeClosedError:
                status = self._end_child(hangs=False)
                failure = MediaError(f"decoder crashed: {describe_exit(status)}")
                if -status in EXTERNAL_SIGNALS:
                    failure = RunStoppedError(
                        f"the process that decoded {path} was killed from outside ({describe_exit(status)}), twice; if "
                        "it was for lack of memory, give the job more or use fewer decode_processes, and run the same "
                        "command again; nothing was quarantined"
                    )
        assert child is not None
        assert failure is not None
        if isinstance(failure, MediaError) and child.has_read:  # else the bytes may not arrive here either
            with contextlib.suppress(MediaError, RunStoppedError, OSError):
                failure = FailedClipError(str(failure), Source.find(root, path).sha256())
        raise failure

    def _ready_child(self) -> _DecodeChild:
        """The child, waiting for a job; one that dies while it starts is started again and blames no clip."""
        for attempt in range(1, TRIES + 1):
            with self._lock:
                if self._closed.is_set():
                    raise RunStoppedError("the decode pool was closed")
                child = self._child = self._child or _DecodeChild(self._command)
            try:
                child.wait_until_ready()
                break
            except RunStoppedError:
                self._end_child(hangs=False)
                if attempt == TRIES:
                    raise
        return child

    def _end_child(self, *, hangs: bool) -> int:
        """Reap the child, killing it if need be; returns its exit status."""
        with self._lock:
            child, self._child = self._child, None
        return child.end(hangs=hangs) if child else 0


class _DecodeChild:
    """A running decode process; used by one thread, `kill` by any."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._stderr = tempfile.TemporaryFile("ab+")  # noqa: SIM115 - closed by end()
        try:
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=os.environ | ONE_THREAD,
                start_new_session=True,  # a process group of its own: what a decoder starts is killed with it
            )
        except OSError as error:
            self._stderr.close()
            raise RunStoppedError(f"cannot start a decode process: {error}") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        with contextlib.suppress(OSError, AttributeError):  # a user may have no more pages for pipes; Linux only
            fcntl.fcntl(self._stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._is_ready = False
        self.has_read = False  # the job's media, to the last byte: a later timeout is the decoder's

    def wait_until_ready(self) -> None:
        """Wait until the process takes jobs; `RunStoppedError` if it does not start."""
        if self._is_ready:
            return
        try:
            header, _ = worker.receive(self._stdout.fileno(), time.monotonic() + START_TIMEOUT_S)
        except (worker.PipeClosedError, worker.DeadlineError) as error:
            size = os.fstat(self._stderr.fileno()).st_size
            output = os.pread(self._stderr.fileno(), 2000, max(0, size - 2000)).decode(errors="replace").strip()
            raise RunStoppedError(f"a decode process did not start; its output: {output or 'none'}") from error
        self._is_ready = "ready" in header

    def answer(self, job: AnyJob, timeout_s: float, is_known: IsKnown | None) -> Decoded | float:
        """Send one job and wait for its result.

        Raises the job's error, `worker.DeadlineError` when time is up and `worker.PipeClosedError` when the process
        died. The clock starts when the process is up, and again when it has reported the media's size.
        """
        self.wait_until_ready()
        if os.fstat(self._stderr.fileno()).st_size > STDERR_BYTES:
            self._stderr.truncate(0)
        self.has_read = False
        allowed_s = timeout_s
        deadline = time.monotonic() + allowed_s
        asks = is_known is not None
        what = "length" if isinstance(job, LengthJob) else "job"
        worker.send(self._stdin.fileno(), {what: job.to_record(), "timeout_s": timeout_s, "asks": asks})
        while True:
            header, body = worker.receive(self._stdout.fileno(), deadline)
            if "started" in header:
                allowed_s = worker.allowed_s(timeout_s, header["started"])
                deadline = time.monotonic() + allowed_s
            elif "read" in header:
                self.has_read = True
                if is_known is not None:
                    worker.send(self._stdin.fileno(), {"decode": not is_known(header["read"])})
                    deadline = time.monotonic() + allowed_s  # the answer may have taken its time
            else:
                return _parse_result(header, body, job)

    def kill(self) -> None:
        """SIGKILL to the whole process group."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self, *, hangs: bool) -> int:
        """Reap what has ended, kill what runs on, close; returns the exit status, below zero for a signal."""
        self._stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if hangs else EXIT_GRACE_S)  # after its pipe closed: its own exit status counts
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the programs it had started go too
        status = self._process.wait()
        for stream in (self._stdout, self._stderr):
            stream.close()
        return status


def _parse_result(header: dict[str, Any], body: bytearray, job: AnyJob) -> Decoded | float:
    """A `Decoded` or a length, or the error that was sent, raised."""
    if "error" in header:
        if header["error"] == "media":
            raise FailedClipError(header["message"], header.get("media_sha256"))
        raise {"stopped": RunStoppedError, "user": UserError}[header["error"]](header["message"])
    if isinstance(job, LengthJob):
        return float(header["length_s"])
    dtypes = [np.dtype(view.rule.dtype) for view in job.views]
    if not header["shapes"]:
        return Decoded(frames={}, **header["decoded"])
    if len(header["shapes"]) != len(job.views):
        raise worker.PipeClosedError
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(header["shapes"], dtypes, strict=True)]
    if sum(sizes) != len(body):
        raise worker.PipeClosedError
    frames, offset = {}, 0
    for view, shape, dtype, size in zip(job.views, header["shapes"], dtypes, sizes, strict=True):
        # copied where it may not be aligned; a view of whole bytes needs no copy
        part = memoryview(body)[offset : offset + size]
        frames[view] = np.frombuffer(part if dtype.itemsize == 1 else bytes(part), dtype).reshape(shape)
        offset += size
    return Decoded(frames=frames, **header["decoded"])
