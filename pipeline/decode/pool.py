"""The pool: decode processes that can be killed, and a future per clip.

Plain subprocesses rather than `multiprocessing`: Dask's workers are daemonic and may have no such children. One thread
of ours minds one child: it hands over a job, waits with a deadline, and at the deadline kills the child's whole process
group and starts another. Decoders can spin for ever in native code, where neither a signal handler nor a thread of the
same process could stop them.

A timeout depends on how busy the machine is, so it counts after two tries; so does a crash. The reasons hold no times
and no process ids: the same broken clip gives the same record everywhere. What is not the clip's doing stops the run:
bytes that do not come (a share that hangs), and a process that is killed from outside (a kernel short of memory).
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from concurrent.futures import Future

from mervcache.errors import MediaError, RunStoppedError, UserError
from pipeline.decode import protocol
from pipeline.decode.child import FROM_OUTSIDE, DecodeChild, how_it_ended
from pipeline.decode.job import Decoded, DecodeJob

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
        self._minders = [_Minder(self._jobs, self._closed, command, timeout_s) for _ in range(num_processes)]
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


class _Minder(threading.Thread):
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
            except protocol.DeadlineError:
                self._end_child(hangs=True)
                failures.append(MediaError("decoding timed out twice") if child.has_read else _hanging_share(job))
            except protocol.PipeClosedError:
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
