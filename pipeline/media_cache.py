"""Digests and lengths of media from earlier runs, in the user's cache folder."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from mervcache.files import record_digest, user_cache
from pipeline.media import RemoteMember, Source, TarMember, files_and_folders
from pipeline.remote_shards import address_of

_TABLES = {"media": "sha256 TEXT", "lengths": "seconds REAL"}  # table -> what it keeps of a location


class MediaCache:
    """What earlier runs read of media, so that a file that was not touched is not opened again. A context manager.

    Kept in a SQLite file by location, size and times (the change time too: it reveals a file that replaced another and
    kept its old date); new entries are saved on exit. Without that file everything is read anew, which costs time and
    nothing else. Safe to use from several threads.
    """

    _LOCK_WAIT_S = 5.0  # another process may be writing

    def __init__(self, file: Path | None = None) -> None:
        self._file = file or user_cache() / "merv-pipeline" / "media.sqlite"
        self._database: sqlite3.Connection | None = None  # None: nothing is known
        self._new: dict[str, dict[str, tuple[str, Any]]] = {table: {} for table in _TABLES}  # location -> stamp, value
        self._lock = threading.Lock()

    def __enter__(self) -> MediaCache:
        if self._file.is_file():
            with suppress(sqlite3.Error, OSError):
                self._database = sqlite3.connect(
                    self._file, timeout=self._LOCK_WAIT_S, check_same_thread=False
                )  # guarded by the lock
        return self

    def __exit__(self, *_: object) -> None:
        if self._database is not None:
            self._database.close()
        if any(self._new.values()):
            with suppress(sqlite3.Error, OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with closing(sqlite3.connect(self._file, timeout=self._LOCK_WAIT_S)) as database, database:
                    for table, entries in self._new.items():
                        columns = f"place TEXT PRIMARY KEY, stamp TEXT, {_TABLES[table]}"
                        database.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns}) WITHOUT ROWID")
                        rows = [(location, *entry) for location, entry in entries.items()]
                        database.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", rows)

    def known(self, source: Source) -> str | None:
        """The sha256 from an earlier run, if the media were not touched since; None if there is none."""
        return self._saved("media", source)

    def known_length_s(self, source: Source) -> float | None:
        """The same of the seconds that a video takes."""
        return self._saved("lengths", source)

    def sha256(self, source: Source, *, anew: bool = False) -> str:
        """The sha256 of the media's bytes as they are now; `anew` reads them even if it is known."""
        if not anew and (sha256 := self.known(source)):
            return sha256
        stamp = self.stamp(source)  # before the bytes: what changes while they are read is not saved as read
        sha256 = source.sha256()
        self._save("media", source, stamp, sha256)
        return sha256

    def save_length_s(self, source: Source, stamp: str, seconds: float) -> None:
        """Keep the length of a video whose `stamp` was taken before it was read."""
        self._save("lengths", source, stamp, seconds)

    def forget(self, files: Iterable[str]) -> None:
        """Remove what is saved of these files, and of the members of these archives."""
        if self._database is None:
            return
        places = [(file, f"{file}#", f"{file}#") for file in files]
        for table in _TABLES:
            query = f"DELETE FROM {table} WHERE place = ? OR substr(place, 1, length(?)) = ?"
            with self._lock, suppress(sqlite3.Error), self._database:  # a file of an earlier version has fewer tables
                self._database.executemany(query, places)

    @staticmethod
    def stamp(source: Source) -> str:
        """What differs once the media were touched."""
        if isinstance(source.media, RemoteMember):
            return record_digest([source.media.version, source.media.size])[:32]
        found = map(os.stat, files_and_folders(source))
        return record_digest([[s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in found])[:32]

    def _saved(self, table: str, source: Source) -> Any:
        with self._lock, suppress(sqlite3.Error):
            query, location = f"SELECT * FROM {table} WHERE place = ?", self._location(source)
            row = self._database and self._database.execute(query, (location,)).fetchone()
            return row[2] if row and row[1] == self.stamp(source) else None
        return None

    def _save(self, table: str, source: Source, stamp: str, value: Any) -> None:
        with self._lock:
            self._new[table][self._location(source)] = (stamp, value)

    @staticmethod
    def _location(source: Source) -> str:
        if isinstance(source.media, RemoteMember):
            return f"{address_of(str(source.root), source.media.shard)}#{source.media.offset}"
        if isinstance(source.media, TarMember):
            return f"{source.media.tar_path}#{source.media.offset}"
        return str(files_and_folders(source)[-1])  # of frames, their folder
