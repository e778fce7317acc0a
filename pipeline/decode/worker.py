"""A decode process: reads jobs from its standard input and writes results to its standard output until the pipe closes.

The pool starts it as `python -P -m pipeline.decode.worker`; -P keeps a folder named pipeline/ in the user's working
directory from being imported instead. It may be killed at any time, and limits its own memory and processor time,
because media can make a decoder use any amount of both. The pool imports this module for the message format below, so
decoders are imported in `main`.

    8 bytes   lengths of header and body, two big-endian uint32
    header    JSON: a job to decode, answered by "started", "read" with the media's sha256, and the result; if the job
              asks, the parent replies to "read" with "decode"; or under `length` a video whose length is wanted
    body      frames, one view after the other, each in its rule's dtype

No pickle: a decode process reads untrusted files, and what it sends back must not be able to run code.
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
from collections.abc import Callable
from functools import partial
from typing import Any

from mervcache.errors import MediaError, RunStoppedError, UserError
from pipeline.decode.sampling import OUT_OF_MEMORY, AnyJob, Decoded, DecodeJob, LengthJob, exception_name
from pipeline.media import Source

LENGTHS = struct.Struct(">II")
MAX_HEADER_BYTES = 1 << 20
MAX_BODY_BYTES = 1 << 31  # 2 GiB: 32 frames of 4,000 x 4,000 pixels
SLOWEST_BYTES_PER_S = 4e6  # added to the timeout for reading the media: four minutes for a file of 1 GB
CPU_SLACK = 2.0  # processor seconds per second allowed, so that the parent's deadline comes first
PR_SET_PDEATHSIG = 1  # Linux's prctl option: the signal to get when the parent dies


class PipeClosedError(Exception):
    """The other process closed the pipe or broke the message format."""


class DeadlineError(Exception):
    """No complete message arrived in time."""


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
        if deadline is not None:
            poll = select.poll()  # not select(): a driver may hold more than 1,024 open files
            poll.register(pipe, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise DeadlineError
        count = os.readv(pipe, [view])
        if count == 0:
            raise PipeClosedError
        view = view[count:]
    return data


def main() -> None:
    """Run until the pipe closes."""
    parser = argparse.ArgumentParser(description="decode process of the extraction pipeline; started by it")
    parser.add_argument("--memory-bytes", type=int, default=0, help="limit of the address space [bytes]; 0: none")
    parser.add_argument("--parent", type=int, default=0, help="process id of the parent")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    # FFmpeg's libraries; before "ready", so that no job pays for them
    from pipeline.decode.decoders import decode_clip
    from pipeline.decode.length import length_s

    if arguments.memory_bytes:
        _limit_memory(arguments.memory_bytes)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is reported, no core file of 4 GB is written
    # both pipes move to other numbers, so that nothing a library prints or reads can reach them
    jobs, results = os.dup(0), os.dup(1)
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.dup2(2, 1)
    os.close(devnull)
    try:
        send(results, {"ready": os.getpid()})
        while True:
            record, _ = receive(jobs)
            if "length" in record:
                length_job = LengthJob.from_record(record["length"])
                _serve(record, results, length_job, partial(_send_length, length_s, length_job, results))
            else:
                job = DecodeJob.from_record(record["job"])
                pipes = (jobs if record["asks"] else None, results)
                _serve(record, results, job, partial(_send_frames, decode_clip, job, *pipes))
    except PipeClosedError:
        return


def _serve(record: dict[str, Any], results: int, job: AnyJob, answer: Callable[[int], None]) -> None:
    """Do one job and send its result; every outcome but a crash is a result."""
    try:
        media_bytes = Source.find(job.root, job.clip.path).num_bytes
        send(results, {"started": media_bytes})
        _limit_processor_time(CPU_SLACK * allowed_s(record["timeout_s"], media_bytes))
        answer(media_bytes)
    except PipeClosedError:
        raise
    except Exception as error:
        match error:
            case MediaError():
                kind, message = "media", str(error)
            case UserError():
                kind, message = "user", str(error)
            case RunStoppedError():
                kind, message = "stopped", str(error)
            case MemoryError():
                kind, message = "media", OUT_OF_MEMORY
            case OSError():
                kind, message = "stopped", f"decode process: {error}"
            case _:  # foreseen by no reader: recorded by its type, traceback on stderr
                traceback.print_exception(error)
                kind, message = "media", f"decoder failed: {exception_name(error)}"
        send(results, {"error": kind, "message": message, "media_sha256": getattr(error, "media_sha256", None)})


def _send_length(length_s: Callable[[Source], float], job: LengthJob, results: int, media_bytes: int) -> None:
    with Source.find(job.root, job.clip.path).fetched(lambda: send(results, {"started": media_bytes})) as source:
        send(results, {"read": ""})  # a file that makes FFmpeg hang is at fault, not its disk: little is read
        send(results, {"length_s": length_s(source)})


def _send_frames(
    decode_clip: Callable[..., Decoded], job: DecodeJob, jobs: int | None, results: int, media_bytes: int
) -> None:
    """`jobs` is where the parent says whether media of that sha256 are to be decoded; None: they are."""

    def on_read(sha256: str) -> bool:
        send(results, {"read": sha256})
        return jobs is None or receive(jobs)[0]["decode"]

    decoded = decode_clip(
        job,
        on_read=on_read,
        on_wait=lambda: send(results, {"started": media_bytes}),  # the deadline is of the media, not of the wait
    )
    frames = [decoded.frames[view] for view in job.views] if decoded.frames else []
    header = {
        "decoded": {
            "media_sha256": decoded.media_sha256,
            "decoder": decoded.decoder,
            "num_frames": decoded.num_frames,
            "fps": decoded.fps,
            "seconds": decoded.seconds,
        },
        "shapes": [list(array.shape) for array in frames],
    }
    send(results, header, *(array.reshape(-1).view("uint8").data for array in frames))


def _limit_memory(num_bytes: int) -> None:
    """Limit the address space to `num_bytes`, or to less where this process may already use less (`ulimit -v`)."""
    limits = [limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit != resource.RLIM_INFINITY]
    limit = min([num_bytes, *limits])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


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
    if parent and os.getppid() != parent:  # it died before the call above
        sys.exit(1)


if __name__ == "__main__":
    main()
