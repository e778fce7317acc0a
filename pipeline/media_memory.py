"""Remembered media: what a file's bytes hash to, so that a file that nobody touched is not read again to learn it.

Comes in: a clip's source. Goes out: its sha256, as receipts have it. Kept under the user's cache folder by place, size
and times (the change time too: it tells a file put in another's place under an old date). Without that folder every
digest is taken anew, which costs time and nothing else.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from mervcache.files import record_digest, user_cache
from pipeline.decode.source import Source
from pipeline.media import FrameFolder, TarMember

_TABLE = "CREATE TABLE IF NOT EXISTS media (place TEXT PRIMARY KEY, stamp TEXT, sha256 TEXT) WITHOUT ROWID"
_FIND = "SELECT stamp, sha256 FROM media WHERE place = ?"
_LOCK_WAIT_S = 5.0  # another process may be writing


def memory_file() -> Path:
    """The database, of this user on this machine."""
    return user_cache() / "merv-pipeline" / "media.sqlite"


class MediaMemory:
    """Digests of media; safe to use from several threads. Make one with `media_memory`."""

    def __init__(self, database: sqlite3.Connection | None) -> None:
        self._database = database  # None: nothing is remembered
        self.fresh: dict[str, tuple[str, str]] = {}  # place -> stamp, sha256
        self._lock = threading.Lock()

    def known(self, source: Source) -> str | None:
        """The remembered sha256, if the media were not touched since; None if there is none."""
        with self._lock, suppress(sqlite3.Error):
            found = self._database and self._database.execute(_FIND, (_place(source),)).fetchone()
            return found[1] if found and found[0] == _stamp(source) else None
        return None

    def sha256(self, source: Source, *, anew: bool = False) -> str:
        """The sha256 of the media's bytes as they are now; `anew` reads them even if it is remembered."""
        if not anew and (sha256 := self.known(source)):
            return sha256
        stamp = _stamp(source)  # before the bytes: what changes while they are read is not remembered as read
        sha256 = source.sha256()
        with self._lock:
            self.fresh[_place(source)] = (stamp, sha256)
        return sha256


@contextmanager
def media_memory(file: Callable[[], Path] = memory_file) -> Iterator[MediaMemory]:
    """Open the digest cache; new digests are saved on exit."""
    database = None
    if file().is_file():
        with suppress(sqlite3.Error, OSError):
            database = sqlite3.connect(file(), timeout=_LOCK_WAIT_S, check_same_thread=False)  # guarded by a lock
    memory = MediaMemory(database)
    try:
        yield memory
    finally:
        if database is not None:
            database.close()
        if memory.fresh:
            _write(file(), memory.fresh)


def newest_touch_s(source: Source) -> float:
    """When the newest of a clip's files was last written or put in its place, in Unix seconds."""
    return max(max(status.st_mtime, status.st_ctime) for status in map(os.stat, _paths(source)))


def _paths(source: Source) -> list[Path]:
    if isinstance(source.media, FrameFolder):
        return [*source.media.paths, *sorted({Path(path).parent for path in source.media.paths})]
    return [source.media.tar_path if isinstance(source.media, TarMember) else source.media.path]


def _place(source: Source) -> str:
    if isinstance(source.media, TarMember):
        return f"{source.media.tar_path}#{source.media.offset}"
    return str(_paths(source)[-1])  # of frames, their folder


def _stamp(source: Source) -> str:
    found = map(os.stat, _paths(source))
    return record_digest([[s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in found])[:32]


def _write(file: Path, fresh: dict[str, tuple[str, str]]) -> None:
    with suppress(sqlite3.Error, OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file, timeout=_LOCK_WAIT_S)) as database, database:
            database.execute(_TABLE)
            rows = [(place, *entry) for place, entry in fresh.items()]
            database.executemany("INSERT OR REPLACE INTO media VALUES (?, ?, ?)", rows)
