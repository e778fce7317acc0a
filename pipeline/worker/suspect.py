"""A block under suspicion: workers died while they had it, so it is computed where a crash hurts nobody.

Comes in: a `BlockTask` that Dask gave up, or that runs died of. Goes out: its `BlockReport`.
The block runs in a process of its own, one clip per forward, all other slots zeroed: bits are those of a normal run,
and the last clip announced before a crash is the culprit. It is tried twice, as a clip that crashes its decoder is;
then that encoder fails on it, and the rest is committed. A process that is killed from outside says nothing about
clips: the run stops.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from jobs.run import TaskReporter
from mervcache.errors import RunStoppedError
from pipeline.decode.child import FROM_OUTSIDE, how_it_ended
from pipeline.decode.worker import die_with_parent
from pipeline.worker import crash_marks
from pipeline.worker.block import BlockTask, EncoderRow, Watch, extract_block
from pipeline.worker.engine import close_engines
from pipeline.worker.reports import BlockCounts, BlockReport

COMMAND = (sys.executable, "-P", "-m", "pipeline.worker.suspect")
TRIES = 2  # a crash may be the machine's; the second one on the same clip is the clip's
MAX_CULPRITS = 3  # of one block; more of them speak of the machine
LAST_WORDS_S = 10.0  # for a process that has told its result to end


def compute_block(task: BlockTask) -> BlockReport:
    """Compute and commit one block, under suspicion if a process has crashed on it."""
    if crash_marks.has_crashed(task):
        return extract_suspect(task)
    with crash_marks.marked(task):
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
            crash_marks.forget(task)
            return _report(answer)
        _check_its_own_doing(task, last, status)
        deaths[last] = deaths.get(last, 0) + 1
        if deaths[last] < TRIES:
            continue
        if last is None or len(crashed) == MAX_CULPRITS:
            raise RunStoppedError(
                f"{_name(task)} brings its process down ({how_it_ended(status)}) "
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
        f"{_name(task)} was killed from outside ({how_it_ended(status)}){at}; if it was for lack of memory, give a "
        "smaller --batch in the config or a larger machine, and run the same command again"
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
            status = child.wait(LAST_WORDS_S)
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


def _name(task: BlockTask) -> str:
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
        send({"report": extract_block(task, watch=Watch(announce=announce, crashed=crashed)).to_dict()})
    except RunStoppedError as error:
        send({"stopped": str(error)})
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}"})
    finally:
        close_engines()


if __name__ == "__main__":
    main()
