"""One trainer per run folder: a lock that the kernel holds, so it ends with its process however that ends.

`flock` on a file in the folder. On a network file system it keeps hosts apart only where the mount carries locks to the
server (NFS on Linux does unless mounted with `nolock` or `local_lock`; Lustre wants the option `flock`); where locks
are not supported at all, the run goes on with a warning.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mervcache.errors import UserError

RUN_LOCK = ".train.lock"  # of one run
STAGES_LOCK = ".stages.lock"  # of a command, which may train several stages and checks media before the first
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}

logger = logging.getLogger(__name__)


@contextmanager
def run_lock(run: Path, name: str = RUN_LOCK) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made if need be; UserError if another trainer holds it."""
    has_begun = run.exists()
    run.mkdir(parents=True, exist_ok=True)
    descriptor = _open_locked(run / name)
    try:
        with suppress(OSError):  # a full disk: the text is only for the message of a refusal
            os.truncate(descriptor, 0)
            os.write(descriptor, json.dumps(_owner()).encode())
        yield
    finally:
        if not has_begun and [path.name for path in run.iterdir()] == [name]:  # nothing was begun: leave no trace
            (run / name).unlink()
            with suppress(OSError):
                run.rmdir()
        os.close(descriptor)


def lock_holder(run: Path, name: str = RUN_LOCK) -> str | None:
    """Process, host and start of the trainer that holds the lock of a run's folder; None where there is none."""
    try:
        descriptor = os.open(run / name, os.O_RDONLY)
    except OSError:  # no trainer has ever begun, or the folder may not be read
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in UNSUPPORTED else _read_owner(run / name)
    finally:
        os.close(descriptor)
    return None


def _open_locked(path: Path) -> int:
    """A descriptor that holds the lock on the file at `path`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                logger.warning(
                    f"{path.parent} is on a file system without locks: do not start a second trainer on this run"
                )
                return descriptor
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise UserError(_refusal(path)) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # its holder has removed it meanwhile
        path.parent.mkdir(parents=True, exist_ok=True)


def _owner() -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _refusal(path: Path) -> str:
    who = _read_owner(path)
    return f"another trainer works on {path.parent}: {who}; wait for it or stop it, or choose another --out"


def _read_owner(path: Path) -> str:
    who = "a process that is about to start"
    with suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads(path.read_text())
        who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    return who
