"""A decode process: takes jobs from its standard input, answers on its standard output, until the pipe closes.

Started by the pool as `python -P -m pipeline.decode.worker`; -P keeps a folder of the user's named pipeline/ in the
working directory from being imported in our place. The process is meant to be killed: it holds nothing that
matters, and it limits its own memory and processor time, because media can make a decoder ask for any amount of both.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import resource
import signal
import sys
import traceback
from typing import Any

from mervcache.errors import MediaError, RunStoppedError, UserError
from pipeline.decode import protocol
from pipeline.decode.decoders import OUT_OF_MEMORY, decode_clip
from pipeline.decode.job import Decoded, DecodeJob
from pipeline.decode.source import Source

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
        protocol.send(answers, {"ready": os.getpid()})
        while True:
            record, _ = protocol.receive(jobs)
            _serve(record, answers)
    except protocol.PipeClosedError:
        return


def _serve(record: dict[str, Any], answers: int) -> None:
    """Decode one job and answer; every outcome but a crash is an answer."""
    job = DecodeJob.from_record(record["job"])
    try:
        media_bytes = Source.find(job.root, job.clip.path).num_bytes
        protocol.send(answers, {"started": media_bytes})
        _limit_processor_time(CPU_SLACK * protocol.allowed_s(record["timeout_s"], media_bytes))
        decoded = decode_clip(job, on_read=lambda: protocol.send(answers, {"read": True}))
    except protocol.PipeClosedError:
        raise
    except Exception as error:
        protocol.send(answers, _error_record(error))
        return
    frames = [decoded.frames[view] for view in job.views]
    header = {"decoded": _decoded_record(decoded), "shapes": [list(array.shape) for array in frames]}
    protocol.send(answers, header, *(array.reshape(-1).data for array in frames))


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
