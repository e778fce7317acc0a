"""One decode process as its parent sees it: start, ask, kill."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import tempfile
import time
from typing import Any

import numpy as np

from mervcache.errors import RunStoppedError, UserError
from pipeline.decode import protocol
from pipeline.decode.job import Decoded, DecodeJob, FailedClipError

LAST_WORDS_S = 5.0  # a crashed process needs a moment until its status is there
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
        protocol.send(self._process.stdin.fileno(), {"job": job.to_record(), "timeout_s": timeout_s})
        while True:
            header, body = protocol.receive(self._process.stdout.fileno(), deadline)
            if "started" in header:
                deadline = time.monotonic() + protocol.allowed_s(timeout_s, header["started"])
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
            self._process.wait(0 if hangs else LAST_WORDS_S)  # after its pipe closed: let it tell how it died
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
            header, _ = protocol.receive(self._process.stdout.fileno(), time.monotonic() + START_TIMEOUT_S)
        except (protocol.PipeClosedError, protocol.DeadlineError) as error:
            size = os.fstat(self._stderr.fileno()).st_size
            words = os.pread(self._stderr.fileno(), 2000, max(0, size - 2000)).decode(errors="replace").strip()
            raise RunStoppedError(f"a decode process did not start; it said: {words or 'nothing'}") from error
        self._is_ready = "ready" in header


def _read_answer(header: dict[str, Any], body: bytearray, job: DecodeJob) -> Decoded:
    """A `Decoded`, or the error that was sent, raised."""
    if "error" in header:
        _raise_error(header)
    if len(header["shapes"]) != len(job.views) or sum(map(math.prod, header["shapes"])) != len(body):
        raise protocol.PipeClosedError
    pixels, frames, offset = np.frombuffer(body, np.uint8), {}, 0
    for view, shape in zip(job.views, header["shapes"], strict=True):
        frames[view] = pixels[offset : offset + math.prod(shape)].reshape(shape)
        offset += math.prod(shape)
    return Decoded(frames=frames, **header["decoded"])


def _raise_error(header: dict[str, Any]) -> None:
    if header["error"] == "media":
        raise FailedClipError(header["message"], header.get("media_sha256"))
    raise {"stopped": RunStoppedError, "user": UserError}[header["error"]](header["message"])
