"""Files of a folder that several processes write, each opened, named and made durable the careful way.

A file counts as put when its name cannot be lost by a power cut: its bytes and its folder's entry are on the disk.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from featurestore.errors import AlreadyExistsError, StoreFormatError

_NO_LINK = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


def open_plain(path: str, key: str) -> int:
    """A handle of a plain file: a pipe or device in a stranger's store would be waited for without end."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, path) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise StoreFormatError(f"{key} is refused: it is no plain file")
    return handle


def link_exclusively(temporary: str, path: str, lock: str) -> None:
    """Give a written file its name, unless the name is taken; `lock` serves file systems without links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A retransmitted link on NFS can report the success of its first try as "exists".
        if not os.path.samefile(temporary, path):
            raise _taken(path) from None
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        with file_lock(lock):  # no links on this file system: look, then rename, one process at a time
            if os.path.exists(path):
                raise _taken(path) from None
            os.rename(temporary, path)


def _taken(path: str) -> AlreadyExistsError:
    return AlreadyExistsError(f"{os.path.basename(path)} exists already: another process was first, read what it wrote")


@contextmanager
def file_lock(path: str) -> Iterator[None]:
    """Hold an advisory lock; nothing where the file system has none."""
    import fcntl  # POSIX only

    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def make_folder(path: str) -> None:
    """Make missing folders durably: a file's entry is safe only if its folder's own entry is."""
    if not os.path.isdir(path):
        make_folder(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path)
        sync_folder(os.path.dirname(path))


def sync_folder(path: str) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
