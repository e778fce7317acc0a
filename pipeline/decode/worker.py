"""A decode process: takes jobs from its standard input, answers on its standard output, until the pipe closes.

Started by the pool as `python -P -m pipeline.decode.worker`; -P keeps a folder of the user's named pipeline/ in the
working directory from being imported in our place. The process is meant to be killed: it holds nothing that
matters, and it limits its own memory and processor time, because media can make a decoder ask for any amount of both.

Messages between the pool and its decode processes: a JSON header and raw bytes behind it, over pipes.

    8 bytes   lengths of header and body, two big-endian uint32
    header    JSON
    body      frames, uint8, one view after the other

No pickle: a decode process reads files from strangers, and what it sends back must not be able to run code.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import resource
import select
import signal
import struct
import sys
import time
import traceback
from typing import Any

from mervcache.errors import MediaError, RunStoppedError, UserError
from pipeline.decode.decoders import OUT_OF_MEMORY, decode_clip
from pipeline.decode.sampling import Decoded, DecodeJob
from pipeline.media import Source

LENGTHS = struct.Struct(">II")
MAX_HEADER_BYTES = 1 << 20
MAX_BODY_BYTES = 1 << 31  # 2 GiB: 32 frames of 4,000 x 4,000 pixels
SLOWEST_BYTES_PER_S = 4e6  # media is given this long on top of the timeout: a 1 GB file four minutes more


class PipeClosedError(Exception):
    """The other side is gone."""


class DeadlineError(Exception):
    """Nothing complete came in time."""


def allowed_s(timeout_s: float, media_bytes: int) -> float:
    """Seconds that one try at a clip may take."""
    return timeout_s + media_bytes / SLOWEST_BYTES_PER_S


def send(pipe: int, header: dict[str, Any], *buffers: memoryview | bytes) -> None:
    """Write one message to a file descriptor."""
    text = json.dumps(header).encode()
    parts = [memoryview(LENGTHS.pack(len(text), sum(len(b) for b in buffers)) + text), *map(memoryview, buffers)]
    try:
        for part in parts:
            while part:
                part = part[os.write(pipe, part) :]
    except BrokenPipeError:
        raise PipeClosedError from None


def receive(pipe: int, deadline: float | None = None) -> tuple[dict[str, Any], bytearray]:
    """Read one message; `deadline` is on `time.monotonic`'s clock, None waits for ever."""
    header_bytes, body_bytes = LENGTHS.unpack(_read_exactly(pipe, LENGTHS.size, deadline))
    if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
        raise PipeClosedError
    try:
        header = json.loads(bytes(_read_exactly(pipe, header_bytes, deadline)))
    except ValueError:
        raise PipeClosedError from None
    return header, _read_exactly(pipe, body_bytes, deadline)


def _read_exactly(pipe: int, num_bytes: int, deadline: float | None) -> bytearray:
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        _wait_readable(pipe, deadline)
        count = os.readv(pipe, [view])
        if count == 0:
            raise PipeClosedError
        view = view[count:]
    return data


def _wait_readable(pipe: int, deadline: float | None) -> None:
    if deadline is None:
        return
    poll = select.poll()  # not select(): a driver may hold more than 1,024 open files
    poll.register(pipe, select.POLLIN)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise DeadlineError


CPU_SLACK = 2.0  # processor seconds per second allowed: the parent's clock is to strike first
PR_SET_PDEATHSIG = 1  # Linux's prctl option: the signal to get when the parent dies


def main() -> None:
    """Run until the pipe closes."""
    parser = argparse.ArgumentParser(description="decode process of the extraction pipeline; started by it")
    parser.add_argument("--memory-bytes", type=int, default=0, help="limit of the address space [bytes]; 0: none")
    parser.add_argument("--parent", type=int, default=0, help="process id of the parent")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    if arguments.memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (arguments.memory_bytes, arguments.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is an answer, not a file of 4 GB
    jobs, answers = _take_over_pipes()
    try:
        send(answers, {"ready": os.getpid()})
        while True:
            record, _ = receive(jobs)
            _serve(record, answers)
    except PipeClosedError:
        return


def _serve(record: dict[str, Any], answers: int) -> None:
    """Decode one job and answer; every outcome but a crash is an answer."""
    job = DecodeJob.from_record(record["job"])
    try:
        media_bytes = Source.find(job.root, job.clip.path).num_bytes
        send(answers, {"started": media_bytes})
        _limit_processor_time(CPU_SLACK * allowed_s(record["timeout_s"], media_bytes))
        decoded = decode_clip(job, on_read=lambda: send(answers, {"read": True}))
    except PipeClosedError:
        raise
    except Exception as error:
        send(answers, _error_record(error))
        return
    frames = [decoded.frames[view] for view in job.views]
    header = {"decoded": _decoded_record(decoded), "shapes": [list(array.shape) for array in frames]}
    send(answers, header, *(array.reshape(-1).data for array in frames))


def _error_record(error: Exception) -> dict[str, Any]:
    """The answer for a clip that did not decode; what no reader foresaw is named by type, its traceback on stderr."""
    if isinstance(error, MediaError):
        return {"error": "media", "message": str(error), "media_sha256": getattr(error, "media_sha256", None)}
    if isinstance(error, UserError):
        return {"error": "user", "message": str(error)}
    if isinstance(error, RunStoppedError):
        return {"error": "stopped", "message": str(error)}
    if isinstance(error, MemoryError):
        return {"error": "media", "message": OUT_OF_MEMORY}
    if isinstance(error, OSError):
        return {"error": "stopped", "message": f"decode process: {error}"}
    traceback.print_exception(error)
    return {"error": "media", "message": f"decoder failed: {type(error).__name__}"}


def _decoded_record(decoded: Decoded) -> dict[str, Any]:
    names = ("media_sha256", "decoder", "num_frames", "fps", "seconds")
    return {name: getattr(decoded, name) for name in names}


def _take_over_pipes() -> tuple[int, int]:
    """The two pipes under other numbers, so that whatever a library prints or reads cannot reach them."""
    jobs, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return jobs, answers


def _limit_processor_time(cpu_s: float) -> None:
    """End this process by SIGXCPU if one job spins past `cpu_s`: the guard that works when the parent is gone."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + cpu_s) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent dies, even while it spins in native code (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent and os.getppid() != parent:  # it died before we asked
        sys.exit(1)


if __name__ == "__main__":
    main()
