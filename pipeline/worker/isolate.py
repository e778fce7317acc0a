"""A block under suspicion: workers died while they had it, so it is computed where a crash hurts nobody.

Comes in: a `BlockTask` that Dask gave up, or that runs died of. Goes out: its `BlockReport`.
The block runs in a process of its own, one clip per forward, all other slots zeroed: bits are those of a normal run,
and the last clip announced before a crash is the culprit. It is tried twice, as a clip that crashes its decoder is;
then that encoder fails on it, and the rest is committed. A process that is killed from outside says nothing about
clips: the run stops.

Crash marks: which block a process was computing when it crashed, told to whoever comes next.

Comes in: a block about to be computed. Goes out: whether a process crashed on it before. A mark is a file under the
store's `tmp/`, made before a block and removed after it, into which Python's fault handler writes when a signal such as
SIGSEGV or SIGABRT ends the process. A process that was killed from outside writes nothing, so its mark says nothing.
Needed because the default worker lives in the driver: what brings it down takes all memory of it along. Stores in
buckets have no marks: there a task that workers die of is known to Dask alone.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from featurestore.layout import TEMPORARY
from featurestore.locate import is_url
from jobs.run import TaskReporter
from mervcache.errors import RunStoppedError
from pipeline.decode.pool import FROM_OUTSIDE, how_it_ended
from pipeline.decode.worker import die_with_parent
from pipeline.worker.block import BlockTask, CrashProbe, EncoderRow, extract_block
from pipeline.worker.engine import close_engines
from pipeline.worker.reports import BlockCounts, BlockReport

FOLDER = "crashes"


def has_crashed(task: BlockTask) -> bool:
    """Did a process crash while it computed this block?"""
    return any(_is_written(mark) for mark in _marks(task))


@contextmanager
def marked(task: BlockTask) -> Iterator[None]:
    """Wraps the computing of a block: a crash inside leaves a mark, an exception does not."""
    if is_url(task.store):
        yield
        return
    mark = _folder(task.store) / f"{_mark_name(task)}-{uuid.uuid4().hex}"
    was_enabled = faulthandler.is_enabled()
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        file = mark.open("w")
    except OSError:  # a full or read-only disk: the block itself will say so
        yield
        return
    with file:
        faulthandler.enable(file, all_threads=False)
        try:
            yield
        finally:
            faulthandler.disable()
            if was_enabled:
                with suppress(AttributeError, OSError, ValueError):  # standard error may be no file
                    faulthandler.enable()
            with suppress(OSError):  # of a disk that has turned read-only: the block itself says so
                mark.unlink()


def forget(task: BlockTask) -> None:
    """Remove the marks of a committed block."""
    for mark in _marks(task):
        mark.unlink(missing_ok=True)


def forget_all(store: str) -> None:
    """Remove all marks, once every block of a run is committed."""
    if not is_url(store):
        shutil.rmtree(_folder(store), ignore_errors=True)


def _marks(task: BlockTask) -> list[Path]:
    return [] if is_url(task.store) else list(_folder(task.store).glob(f"{_mark_name(task)}-*"))


def _is_written(mark: Path) -> bool:
    with suppress(FileNotFoundError):
        return mark.stat().st_size > 0
    return False


def _folder(store: str) -> Path:
    return Path(store) / TEMPORARY / FOLDER


def _mark_name(task: BlockTask) -> str:
    """Encoders of one block may be computed apart: those of another batch shape."""
    return f"{task.kind}-{task.block}-{task.batch}"


COMMAND = (sys.executable, "-P", "-m", "pipeline.worker.isolate")
TRIES = 2  # a crash may be the machine's; the second one on the same clip is the clip's
MAX_CULPRITS = 3  # of one block; more of them speak of the machine
EXIT_GRACE_S = 10.0  # for a process that has told its result to end


def compute_block(task: BlockTask) -> BlockReport:
    """Compute and commit one block, under suspicion if a process has crashed on it."""
    if has_crashed(task):
        return extract_suspect(task)
    with marked(task):
        return extract_block(task)


def extract_suspect(task: BlockTask) -> BlockReport:
    """Compute and commit one block although some of its clips crash the process that encodes them."""
    close_engines()  # the child needs the device's memory
    crashed: dict[EncoderRow, str] = {}
    deaths: dict[EncoderRow | None, int] = {}
    reporter = TaskReporter()
    while True:
        last, status, answer = _run_child(task, crashed, reporter)
        if answer is not None:
            forget(task)
            return _report(answer)
        _check_its_own_doing(task, last, status)
        deaths[last] = deaths.get(last, 0) + 1
        if deaths[last] < TRIES:
            continue
        if last is None or len(crashed) == MAX_CULPRITS:
            raise RunStoppedError(
                f"{_block_name(task)} brings its process down ({how_it_ended(status)}) "
                + ("before its first clip" if last is None else f"on more than {MAX_CULPRITS} clips")
                + ": it is the machine or the encoders' libraries rather than the clips; everything committed so far "
                "is kept, run the same command again after mending the cause"
            )
        crashed[last] = f"encoding crashes the process: {how_it_ended(status)}"


def _check_its_own_doing(task: BlockTask, last: EncoderRow | None, status: int) -> None:
    """Stop the run if a person, a cluster, or a kernel short of memory killed the process: that blames no clip."""
    if -status not in FROM_OUTSIDE:
        return
    at = f", while {last.encoder} encoded {dict(task.rows)[last.row].clip_id}" if last else ""
    raise RunStoppedError(
        f"{_block_name(task)} was killed from outside ({how_it_ended(status)}){at}; if it was for lack of memory, "
        "give a smaller --batch in the config or a larger machine, and run the same command again"
    )


def _run_child(
    task: BlockTask, crashed: dict[EncoderRow, str], reporter: TaskReporter
) -> tuple[EncoderRow | None, int, dict[str, Any] | None]:
    """(the last clip announced, exit status, the child's last message if it reached its end)."""
    reads, writes = os.pipe()
    command = (*COMMAND, str(writes), str(os.getpid()))
    last, answer = None, None
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr, pass_fds=(writes,)) as child:
        os.close(writes)
        threading.Thread(target=_hand_over, args=(child, (task, crashed)), daemon=True).start()
        for message in _messages(reads):
            if "encoding" in message:
                last = EncoderRow(*message["encoding"])
                reporter.tell(lambda counts=message["counts"]: counts)
            else:
                answer = message
        try:
            status = child.wait(EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            status = child.wait()
    return last, status, answer


def _hand_over(child: subprocess.Popen, words: tuple) -> None:
    try:
        child.stdin.write(pickle.dumps(words))  # ours to ours: what Dask sent us by the same means
        child.stdin.close()
    except OSError:
        pass  # it died at once; its status tells


def _messages(reads: int) -> Iterator[dict[str, Any]]:
    with open(reads) as lines:
        for line in lines:
            if line.endswith("\n"):  # the last one may be torn
                yield json.loads(line)


def _report(answer: dict[str, Any]) -> BlockReport:
    """The block's report, or the error that ended the child, raised."""
    if "stopped" in answer:
        raise RunStoppedError(answer["stopped"])
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return BlockReport.from_dict(answer["report"])


def _block_name(task: BlockTask) -> str:
    return f"block {task.block} of {task.kind}"


def main() -> None:
    """The child: computes one block, and writes each clip it encodes and its report as lines of JSON."""
    writes, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    task, crashed = pickle.loads(sys.stdin.buffer.read())

    def send(message: dict[str, Any]) -> None:
        os.write(writes, (json.dumps(message) + "\n").encode())

    def announce(cell: EncoderRow, counts: BlockCounts) -> None:
        send({"encoding": cell, "counts": counts.to_dict()})

    try:
        send({"report": extract_block(task, watch=CrashProbe(announce=announce, crashed=crashed)).to_dict()})
    except RunStoppedError as error:
        send({"stopped": str(error)})
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}"})
    finally:
        close_engines()


if __name__ == "__main__":
    main()
