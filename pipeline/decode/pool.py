"""The pool: decode processes that can be killed, and a future per clip.

Plain subprocesses rather than `multiprocessing`: Dask's workers are daemonic and may have no such children. One thread
of ours minds one child: it hands over a job, waits with a deadline, and at the deadline kills the child's whole process
group and starts another. Decoders can spin for ever in native code, where neither a signal handler nor a thread of the
same process could stop them.

A timeout depends on how busy the machine is, so it counts after two tries; so does a crash. The reasons hold no times
and no process ids: the same broken clip gives the same record everywhere. What is not the clip's doing stops the run:
bytes that do not come (a share that hangs), and a process that is killed from outside (a kernel short of memory).

One decode process as its parent sees it: start, ask, kill.

Decoding ahead: clips in order, a bounded number of them in the making.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np

from mervcache.errors import MediaError, RunStoppedError, UserError
from pipeline.decode import worker
from pipeline.decode.sampling import Decoded, DecodeJob, FailedClipError

EXIT_GRACE_S = 5.0  # a crashed process needs a moment until its status is there
START_TIMEOUT_S = 120.0  # imports from a slow share
STDERR_BYTES = 1 << 20  # kept of what the child's libraries print
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYAV_LOGGING": "off"}
# Signals that a process does not send itself: a person, a cluster, or a kernel short of memory does.
FROM_OUTSIDE = frozenset((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))


def how_it_ended(status: int) -> str:
    """An exit status in words: "signal SIGSEGV" or "exit status 1"."""
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


class DecodeChild:
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
        self._is_ready = False
        self.has_read = False  # the job's media, to the last byte: what comes then is the decoder's doing

    def ask(self, job: DecodeJob, timeout_s: float) -> Decoded:
        """Hand over one job and wait for its answer.

        Raises what the job's error is, `protocol.DeadlineError` when time is up and `protocol.PipeClosedError` when the
        process died of it. The clock starts when the process is up, and is set anew when it knows the media's size.
        """
        self.wait_until_ready()
        if os.fstat(self._stderr.fileno()).st_size > STDERR_BYTES:
            self._stderr.truncate(0)
        self.has_read = False
        deadline = time.monotonic() + timeout_s
        worker.send(self._process.stdin.fileno(), {"job": job.to_record(), "timeout_s": timeout_s})
        while True:
            header, body = worker.receive(self._process.stdout.fileno(), deadline)
            if "started" in header:
                deadline = time.monotonic() + worker.allowed_s(timeout_s, header["started"])
            elif "read" in header:
                self.has_read = True
            else:
                return _read_answer(header, body, job)

    def kill(self) -> None:
        """SIGKILL to the whole process group."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self, *, hangs: bool) -> int:
        """Reap what has ended, kill what runs on, close; returns the exit status, below zero for a signal."""
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if hangs else EXIT_GRACE_S)  # after its pipe closed: let it tell how it died
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the programs it had started go too
        status = self._process.wait()
        for stream in (self._process.stdout, self._stderr):
            stream.close()
        return status

    def wait_until_ready(self) -> None:
        """Wait until the process takes jobs; `RunStoppedError` if it does not start, which blames no clip."""
        if self._is_ready:
            return
        try:
            header, _ = worker.receive(self._process.stdout.fileno(), time.monotonic() + START_TIMEOUT_S)
        except (worker.PipeClosedError, worker.DeadlineError) as error:
            size = os.fstat(self._stderr.fileno()).st_size
            words = os.pread(self._stderr.fileno(), 2000, max(0, size - 2000)).decode(errors="replace").strip()
            raise RunStoppedError(f"a decode process did not start; it said: {words or 'nothing'}") from error
        self._is_ready = "ready" in header


def _read_answer(header: dict[str, Any], body: bytearray, job: DecodeJob) -> Decoded:
    """A `Decoded`, or the error that was sent, raised."""
    if "error" in header:
        _raise_error(header)
    if len(header["shapes"]) != len(job.views) or sum(map(math.prod, header["shapes"])) != len(body):
        raise worker.PipeClosedError
    pixels, frames, offset = np.frombuffer(body, np.uint8), {}, 0
    for view, shape in zip(job.views, header["shapes"], strict=True):
        frames[view] = pixels[offset : offset + math.prod(shape)].reshape(shape)
        offset += math.prod(shape)
    return Decoded(frames=frames, **header["decoded"])


def _raise_error(header: dict[str, Any]) -> None:
    if header["error"] == "media":
        raise FailedClipError(header["message"], header.get("media_sha256"))
    raise {"stopped": RunStoppedError, "user": UserError}[header["error"]](header["message"])


WORKER_COMMAND = (sys.executable, "-P", "-m", "pipeline.decode.worker")
TRIES = 2  # a timeout or a crash may be the machine's; the second one is the clip's


class DecodePool:
    """`num_processes` long-lived decode processes.

    submit() gives a future of `Decoded`; it raises `MediaError` (this clip: quarantine it), `RunStoppedError` (the
    machine: stop) or `UserError` (no such decoder). close() kills the children at once; what is still waiting is
    cancelled, what is being decoded fails with `RunStoppedError`.
    """

    def __init__(
        self,
        num_processes: int,
        *,
        timeout_s: float = 60.0,  # per clip and try, beside the time that its bytes are given
        memory_bytes: int = 4 << 30,  # address space of one process; 0: no limit
        worker_command: tuple[str, ...] = WORKER_COMMAND,
    ) -> None:
        if num_processes < 1 or timeout_s <= 0:
            raise UserError(f"a decode pool needs processes and time, got {num_processes} and {timeout_s} s")
        self._jobs: queue.SimpleQueue[tuple[DecodeJob, Future] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        command = (*worker_command, "--memory-bytes", str(memory_bytes), "--parent", str(os.getpid()))
        self._minders = [_WorkerThread(self._jobs, self._closed, command, timeout_s) for _ in range(num_processes)]
        for minder in self._minders:
            minder.start()

    def submit(self, job: DecodeJob) -> Future[Decoded]:
        """Decode one clip in the next free process."""
        future: Future[Decoded] = Future()
        with self._lock:
            if self._closed.is_set():
                raise RunStoppedError("the decode pool is closed")
            self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """End every child now; safe to call twice."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            for _ in self._minders:
                self._jobs.put(None)
        for minder in self._minders:
            minder.interrupt()
        for minder in self._minders:
            minder.join()
        self._cancel_waiting()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cancel_waiting(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._jobs.get_nowait()
                if item:
                    item[1].cancel()


class _WorkerThread(threading.Thread):
    """One thread, one child at a time.

    The child is started by this thread and by no other: Linux sends the parent-death signal when the *thread* that
    started a process ends.
    """

    def __init__(
        self, jobs: queue.SimpleQueue, closed: threading.Event, command: tuple[str, ...], timeout_s: float
    ) -> None:
        super().__init__(name="decode-minder", daemon=True)
        self._jobs, self._closed, self._command, self._timeout_s = jobs, closed, command, timeout_s
        self._child: DecodeChild | None = None
        self._lock = threading.Lock()  # held while a child is started or reaped: interrupt() comes from outside

    def run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            if self._closed.is_set():
                future.cancel()
            elif future.set_running_or_notify_cancel():
                self._settle(job, future)
        self._end_child(hangs=False)

    def interrupt(self) -> None:
        """Kill the child from another thread; this one sees its pipe close and cleans up."""
        with self._lock:
            if self._child:
                self._child.kill()

    def _settle(self, job: DecodeJob, future: Future) -> None:
        try:
            future.set_result(self._decode(job))
        except Exception as error:
            future.set_exception(RunStoppedError("the decode pool was closed") if self._closed.is_set() else error)

    def _decode(self, job: DecodeJob) -> Decoded:
        """Ask the child; twice, if it hangs or dies."""
        failures: list[Exception] = []
        while len(failures) < TRIES:
            child = self._ready_child()
            try:
                return child.ask(job, self._timeout_s)
            except worker.DeadlineError:
                self._end_child(hangs=True)
                failures.append(MediaError("decoding timed out twice") if child.has_read else _hanging_share(job))
            except worker.PipeClosedError:
                failures.append(_crash(job, self._end_child(hangs=False)))
        raise failures[-1]

    def _ready_child(self) -> DecodeChild:
        """The child, up and waiting; one that dies while it starts says nothing about the clip and is started again."""
        starts = 0
        while True:
            child = self._running_child()
            try:
                child.wait_until_ready()
                return child
            except RunStoppedError:
                self._end_child(hangs=False)
                starts += 1
                if starts == TRIES:
                    raise

    def _running_child(self) -> DecodeChild:
        with self._lock:
            if self._closed.is_set():
                raise RunStoppedError("the decode pool was closed")
            if self._child is None:
                self._child = DecodeChild(self._command)
            return self._child

    def _end_child(self, *, hangs: bool) -> int:
        """Reap the child, killing it if need be; returns its exit status."""
        with self._lock:
            child, self._child = self._child, None
        return child.end(hangs=hangs) if child else 0


def _hanging_share(job: DecodeJob) -> RunStoppedError:
    return RunStoppedError(
        f"the bytes of {job.clip.path} under {job.root} did not come in time, twice: its disk or share hangs; nothing "
        "was quarantined, run the same command again when it answers (slow: raise decode_timeout_s in --config)"
    )


def _crash(job: DecodeJob, status: int) -> MediaError | RunStoppedError:
    how = how_it_ended(status)
    if -status not in FROM_OUTSIDE:
        return MediaError(f"decoder crashed: {how}")
    return RunStoppedError(
        f"the process that decoded {job.clip.path} was killed from outside ({how}), twice; if it was for lack of "
        "memory, give the job more or use fewer decode_processes, and run the same command again; nothing was "
        "quarantined"
    )


def decode_ahead(
    jobs: Iterable[tuple[int, DecodeJob]], pool: DecodePool, lookahead: int
) -> Iterator[tuple[int, Decoded | MediaError]]:
    """(row, frames or why there are none) in the order of the jobs, `lookahead` of them ahead of the one asked for."""
    ahead: deque[tuple[int, Future]] = deque()
    try:
        for row, job in jobs:
            ahead.append((row, pool.submit(job)))
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
