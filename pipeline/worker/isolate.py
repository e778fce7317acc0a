"""`compute_block`, which Dask runs, and the isolation of a block on which a process has crashed.

Blocks run several at a time (`admission.py`), and a crash of the process suspects all that were in flight. A suspect
waits until the others have left, and runs alone in a child process, one clip per forward, all other slots zeroed: bits
are those of a normal run, and the last clip announced before a crash is at fault. After a second crash that encoder
fails on it and the rest of the block is committed. A process that is killed from outside blames no clip: the run stops.

Crashes are remembered by crash marks, because the default worker runs in the driver process and takes the driver along.
A mark is a file under the store's `tmp/`, created before a block and removed after it, into which Python's fault
handler writes when a signal such as SIGSEGV ends the process. Stores in buckets have no marks: there only Dask knows
that workers die of a task.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import Any

from featurestore.zarr_metadata import clip_bytes
from jobs.run import TaskReporter
from mervcache.errors import RunStoppedError
from pipeline.decode.pool import EXTERNAL_SIGNALS, describe_exit
from pipeline.decode.worker import die_with_parent
from pipeline.worker.admission import IN_FLIGHT
from pipeline.worker.block import BlockTask, CrashProbe, EncoderRow, extract_block
from pipeline.worker.crash_marks import crash_mark, has_crashed, remove_marks
from pipeline.worker.engine import close_engines
from pipeline.worker.reports import BlockCounts, BlockReport

COMMAND = (sys.executable, "-P", "-m", "pipeline.worker.isolate")
DECODERS = 2  # of the child: it encodes one clip at a time
TRIES = 2  # a crash may be the machine's; the second one on the same clip is the clip's
MAX_CULPRITS = 3  # clips of one block; more of them suggest a machine problem
NO_DIGEST = "0" * 64  # of weights: sizes do not depend on it
EXIT_GRACE_S = 10.0  # for a process that has sent its result to end


def compute_block(task: BlockTask) -> BlockReport:
    """Compute and commit one block beside others, or alone and isolated if a process has crashed on it before."""
    if has_crashed(task):
        return extract_isolated(task)
    with IN_FLIGHT.admit(f"{task.store} {task.engine}", block_bytes(task)):
        leave_task_thread()
        with crash_mark(task):
            return extract_block(task)


def block_bytes(task: BlockTask) -> int:
    """Bytes of a block's tokens as they are stored, uncompressed."""
    identities = {settings.key: settings.identity(NO_DIGEST) for settings in task.engine.encoders}
    return sum(len(rows) * clip_bytes(identities[name], task.kind) for name, rows in task.wanted.items())


def leave_task_thread() -> None:
    """Let the Dask worker take its next task while this one goes on; outside of a Dask worker nothing happens."""
    if "distributed" in sys.modules:
        from distributed import secede

        with suppress(ValueError, AttributeError):  # no worker, or a worker without a task
            secede()


def extract_isolated(task: BlockTask) -> BlockReport:
    """Compute and commit one block although some of its clips crash the process that encodes them.

    It waits until the blocks in flight have left this worker, and no other is admitted meanwhile.
    """
    with IN_FLIGHT.alone():
        close_engines()  # the child needs the device's memory
        return _extract_isolated(task)


def _extract_isolated(task: BlockTask) -> BlockReport:
    name = f"block {task.block} of {task.kind}"
    crashed: dict[EncoderRow, str] = {}
    crashes: Counter[EncoderRow | None] = Counter()
    reporter = TaskReporter()
    while True:
        last, status, result = _run_child(task, crashed, reporter)
        if result is not None:
            remove_marks(task)
            if "stopped" in result:
                raise RunStoppedError(result["stopped"])
            if "error" in result:
                raise RuntimeError(result["error"])
            return BlockReport.from_dict(result["report"])
        if -status in EXTERNAL_SIGNALS:
            at = f", while {last.encoder} encoded {dict(task.rows)[last.row].clip_id}" if last else ""
            raise RunStoppedError(
                f"{name} was killed from outside ({describe_exit(status)}){at}; if it was for lack of memory, give "
                "the job more or use fewer decode_processes, and run the same command again"
            )
        crashes[last] += 1
        if crashes[last] < TRIES:
            continue
        if last is None or len(crashed) == MAX_CULPRITS:
            raise RunStoppedError(
                f"{name} crashes its process ({describe_exit(status)}) "
                + ("before its first clip" if last is None else f"on more than {MAX_CULPRITS} clips")
                + ": it is the machine or the encoders' libraries rather than the clips; everything committed so far "
                "is kept, run the same command again when the cause is fixed"
            )
        crashed[last] = f"encoding crashes the process: {describe_exit(status)}"


def _run_child(
    task: BlockTask, crashed: dict[EncoderRow, str], reporter: TaskReporter
) -> tuple[EncoderRow | None, int, dict[str, Any] | None]:
    """(the last clip announced, exit status, the child's last message if it reached its end)."""
    decode_processes = task.engine.decode_processes or DECODERS
    task = replace(task, engine=replace(task.engine, decode_processes=decode_processes))
    reading_end, writing_end = os.pipe()
    command = (*COMMAND, str(writing_end), str(os.getpid()))
    last, result = None, None
    environment = os.environ | {"CUDA_LAUNCH_BLOCKING": "1"}  # a kernel's fault ends the launch of its own clip
    pipes = {"stdin": subprocess.PIPE, "stdout": sys.stderr, "pass_fds": (writing_end,)}
    with subprocess.Popen(command, **pipes, env=environment) as child:
        os.close(writing_end)
        stdin = child.stdin
        assert stdin is not None

        def send_task() -> None:
            with suppress(OSError):  # it died at once; its exit status is what counts
                stdin.write(pickle.dumps((task, crashed)))  # between two processes of this program, as Dask does
                stdin.close()

        threading.Thread(target=send_task, daemon=True).start()
        with open(reading_end) as lines:
            for line in lines:
                if not line.endswith("\n"):
                    break  # the last one may be torn
                message = json.loads(line)
                if "encoding" in message:
                    last = EncoderRow(*message["encoding"])
                    reporter.report(lambda counts=message["counts"]: counts)
                else:
                    result = message
        try:
            status = child.wait(EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            status = child.wait()
    return last, status, result


def main() -> None:
    """The child: computes one block; announces each clip that it encodes, then its report, as lines of JSON."""
    pipe, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    task, crashed = pickle.loads(sys.stdin.buffer.read())

    def send(message: dict[str, Any]) -> None:
        os.write(pipe, (json.dumps(message) + "\n").encode())

    def announce(cell: EncoderRow, counts: BlockCounts) -> None:
        send({"encoding": cell, "counts": counts.to_dict()})

    try:
        send({"report": extract_block(task, probe=CrashProbe(announce=announce, crashed=crashed)).to_dict()})
    except RunStoppedError as error:
        send({"stopped": str(error)})
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}"})
    finally:
        close_engines()


if __name__ == "__main__":
    main()
