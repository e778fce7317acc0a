"""A block under suspicion: workers died while they had it, so it is computed where a crash hurts nobody.

Comes in: a `BlockTask` that Dask gave up, or that runs died of. Goes out: what `extract_block` returns.
The block runs in a process of its own, one clip to a forward, all other slots zeroed: bits are those of a normal run,
and the last clip announced before a crash is the culprit. It is tried twice, as a clip that crashes its decoder is;
then that encoder fails on it, and the rest is committed. A process that is killed from outside says nothing about
clips: the run stops.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from featurestore.errors import RunStoppedError
from jobs.reports import TaskReporter
from pipeline import crash_marks
from pipeline.block import BlockTask, Watch, extract_block
from pipeline.decode.worker import die_with_parent
from pipeline.engine import close_engines

COMMAND = (sys.executable, "-P", "-m", "pipeline.suspect")
TRIES = 2  # a crash may be the machine's; the second one on the same clip is the clip's
MAX_CULPRITS = 3  # of one block; more of them speak of the machine
LAST_WORDS_S = 10.0  # for a process that has told its result to end

Place = tuple[str, int]  # encoder and row


def compute_block(task: BlockTask) -> dict:
    """Compute and commit one block, under suspicion if a process has crashed on it."""
    if crash_marks.has_crashed(task):
        return extract_suspect(task)
    with crash_marks.marked(task):
        return extract_block(task)


def extract_suspect(task: BlockTask) -> dict:
    """Compute and commit one block in spite of clips that bring the process down that encodes them."""
    close_engines()  # the child needs the device's memory
    crashed: dict[Place, str] = {}
    deaths: dict[Place | None, int] = {}
    reporter = TaskReporter()
    while True:
        place, status, result = _run_child(task, crashed, reporter)
        if result is not None:
            crash_marks.forget(task)
            return _result(result)
        _check_its_own_doing(task, place, status)
        deaths[place] = deaths.get(place, 0) + 1
        if deaths[place] < TRIES:
            continue
        if place is None or len(crashed) == MAX_CULPRITS:
            raise RunStoppedError(
                f"{_name(task)} brings its process down ({_how(status)}) "
                + ("before its first clip" if place is None else f"on more than {MAX_CULPRITS} clips")
                + ": it is the machine or the encoders' libraries rather than the clips; everything committed so far "
                "is kept, run the same command again after mending the cause"
            )
        crashed[place] = f"encoding crashes the process: {_how(status)}"


def _check_its_own_doing(task: BlockTask, place: Place | None, status: int) -> None:
    """SIGKILL, SIGTERM and the like come from outside: from a person, a cluster, or a kernel short of memory."""
    if status >= 0 or -status not in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return
    at = f", while {place[0]} encoded {dict(task.rows)[place[1]].clip_id}" if place else ""
    raise RunStoppedError(
        f"{_name(task)} was killed from outside ({_how(status)}){at}; if it was for lack of memory, give a smaller "
        "--batch in the config or a larger machine, and run the same command again"
    )


def _run_child(
    task: BlockTask, crashed: dict[Place, str], reporter: TaskReporter
) -> tuple[Place | None, int, dict | None]:
    """(the last place announced, exit status, the result if it came to one)."""
    reads, writes = os.pipe()
    command = (*COMMAND, str(writes), str(os.getpid()))
    place, result = None, None
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr, pass_fds=(writes,)) as child:
        os.close(writes)
        threading.Thread(target=_hand_over, args=(child, (task, crashed)), daemon=True).start()
        for message in _messages(reads):
            if "place" in message:
                place = (message["place"][0], message["place"][1])
                reporter.tell(lambda counts=message["counts"]: counts)
            else:
                result = message
        try:
            status = child.wait(LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            child.kill()
            status = child.wait()
    return place, status, result


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


def _result(message: dict[str, Any]) -> dict:
    if "stopped" in message:
        raise RunStoppedError(message["stopped"])
    if "error" in message:
        raise RuntimeError(message["error"])
    return message["result"]


def _name(task: BlockTask) -> str:
    return f"block {task.block} of {task.kind}"


def _how(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def main() -> None:
    """The child: one block, its places and result as lines of JSON."""
    writes, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    task, crashed = pickle.loads(sys.stdin.buffer.read())

    def send(message: dict[str, Any]) -> None:
        os.write(writes, (json.dumps(message) + "\n").encode())

    def announce(encoder: str, row: int, counts: dict[str, Any]) -> None:
        send({"place": [encoder, row], "counts": counts})

    try:
        send({"result": extract_block(task, watch=Watch(announce=announce, crashed=crashed))})
    except RunStoppedError as error:
        send({"stopped": str(error)})
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}"})
    finally:
        close_engines()


if __name__ == "__main__":
    main()
