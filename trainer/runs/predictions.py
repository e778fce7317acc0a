"""Records as JSON lines that survive a kill: predictions of a run, and answers of a judge.

RUN/predictions/BENCHMARK-PROTOCOL-stepN-KEY.jsonl   what the run answered to each question of a benchmark

The first line states what decides the records: step and weights, protocol, template, snapshot and versions of the
software. KEY is its digest, so answers under other conditions are another file. A line that a kill has cut short is
dropped, and the rest is read again. Several processes append to files of their own, `....rank1.jsonl`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mervcache.errors import RunStoppedError, StoreDamagedError, UserError
from mervcache.files import record_digest, replace_text
from mervcache.text import redact_all

PREDICTIONS_FOLDER = "predictions"
FORMAT = 1
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}

log = logging.getLogger(__name__)


class RecordLog:
    """Records by key, read from and appended to JSON lines; `records` holds what is known."""

    def __init__(
        self, path: Path | None, facts: Mapping[str, Any], *, key: str, rank: int = 0, starts_anew: bool = False
    ) -> None:
        """`facts` are the file's first line, `key` names the entry of a record that tells it from the others.

        Without a path records are in memory alone. Raises UserError where another process writes to the file, or it
        holds something else.
        """
        self.path, self._key = path, key
        self._head = {"format": FORMAT, **json.loads(json.dumps(redact_all(facts)))}
        self._own = path if path is None or rank == 0 else path.with_name(f"{path.stem}.rank{rank}.jsonl")
        self._descriptor = -1
        self.records: dict[str, dict[str, Any]] = {}
        if starts_anew and rank == 0:
            for part in self._parts():
                part.unlink()
        if not starts_anew:
            self.read()

    def __enter__(self) -> RecordLog:
        """Open the file of this process for appending; where it cannot be, records are kept in memory alone."""
        if self._own is None:
            return self
        try:
            self._own.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._own, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            log.warning("%s cannot be written (%s): a killed command would begin again", self._own, error.strerror)
            return self
        try:
            self._lock()
            kept = sum(len(line) + 1 for line in _whole_lines(self._own.read_bytes()))
            os.truncate(self._descriptor, kept)
        except BaseException:
            self.close()
            raise
        if not kept:
            self._write(self._head)
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def is_kept(self) -> bool:
        """Whether what is added is written to a file."""
        return self._descriptor >= 0

    def close(self) -> None:
        """Close the file, which releases its lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records; they are in the file when this returns."""
        found = [dict(record) for record in records]
        self.records |= {record[self._key]: record for record in found}
        if self._descriptor >= 0 and found:
            self._write(*found)

    def read(self) -> None:
        """Read what all processes have written."""
        for part in self._parts():
            self._read(part)

    def merge(self, keys: Sequence[str]) -> None:
        """Put the records of several processes into one file, in this order; the others' files are removed."""
        parts = [part for part in self._parts() if part != self.path]
        if parts and self.path is not None:
            rest = [key for key in self.records if key not in set(keys)]
            lines = [self._head, *(self.records[key] for key in (*keys, *rest))]
            replace_text(self.path, "".join(map(_line, lines)))
            for part in parts:
                part.unlink()

    def _parts(self) -> list[Path]:
        if self.path is None:
            return []
        found = [self.path, *sorted(self.path.parent.glob(f"{self.path.stem}.rank*.jsonl"))]
        return [part for part in found if part.is_file()]

    def _read(self, path: Path) -> None:
        for number, line in enumerate(_whole_lines(path.read_bytes()), start=1):
            record = _parse(line)
            if record is None or (number > 1 and not isinstance(record.get(self._key), str)):
                raise StoreDamagedError(f"line {number} of {path} is no record; remove that line, or the file")
            if number > 1:
                self.records[record[self._key]] = record
            elif record != self._head:
                raise UserError(f"{path} was made under other conditions than its name says; remove it")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return
            raise UserError(
                f"another process writes {self._own}; wait for it or stop it, then run this command again"
            ) from error

    def _write(self, *records: Mapping[str, Any]) -> None:
        """One write for all of them, so that a kill leaves at most one torn line."""
        data = "".join(map(_line, records)).encode()
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise RunStoppedError(
                f"{self._own} cannot be written ({error.strerror}); make room, then run this command again: it goes on"
                " with what is missing"
            ) from error


def log_path(folder: Path, name: str, facts: Mapping[str, Any]) -> Path:
    """The file of a run's records under these conditions; `name` may hold what paths are made of."""
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    return folder / f"{stem}-{record_digest(redact_all(facts))[:8]}.jsonl"


def _whole_lines(data: bytes) -> list[bytes]:
    """Lines without a torn one at the end, or a last one that a power cut has left as zeros."""
    lines = data.split(b"\n")[:-1]
    return lines[:-1] if lines and _parse(lines[-1]) is None else lines


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=True, allow_nan=False) + "\n"
