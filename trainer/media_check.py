"""Which media of a live run cannot be decoded, and decoding started before its clip is needed."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from mervcache.console import ProgressLine
from mervcache.errors import MediaError

POLL_S = 1.0  # how often other ranks read what the first rank has written of its media check


class MediaCheck:
    """Decodes every clip of an end-to-end run once before the first step, and keeps the results in the run's folder.

    Which samples are left decides the batches of every step, so clips that cannot be decoded must be known before the
    first one, as they are in a store. The file has a line per clip, so a resumed run decodes nothing twice:

        {"clip_id": "demo/videos/0001.mp4", "media_sha256": "..."}
        {"clip_id": "demo/videos/0002.mp4", "reason": "container is damaged"}

    Tokens that overflow the storage dtype are not looked for: that would cost a pass of all encoders.
    """

    def __init__(self, path: Path | None, *, is_first_rank: bool = True) -> None:
        self.media_sha256: dict[str, str] = {}
        self.broken: dict[str, str] = {}  # clip id -> reason
        self._path, self._is_first_rank = path, is_first_rank
        self._read_lines = 0

    def scan(self, clip_ids: Sequence[str], submit: Callable[[str], Future[Any]], *, limit: int) -> None:
        """Decode the clips that are not known yet, `limit` at once. Other ranks wait for what the first one writes."""
        self._load()
        while (unknown := self._unknown(clip_ids)) and self._path is not None and not self._is_first_rank:
            time.sleep(POLL_S)
            self._load()
        if not unknown:
            return
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        prefetch = ClipPrefetch(submit, limit - 1)
        prefetch.expect(unknown)
        line = ProgressLine("decode", total=len(unknown), unit="clips")
        with open(self._path or os.devnull, "a") as file, line as bar:
            for clip_id in bar.over(unknown):
                try:
                    record = {"clip_id": clip_id, "media_sha256": prefetch.take(clip_id).result().media_sha256}
                except MediaError as reason:
                    record = {"clip_id": clip_id, "reason": str(reason)}
                self._add(record)
                file.write(f"\n{json.dumps(record)}")  # the newline ends a line that a killed run left unfinished
                file.flush()

    def _unknown(self, clip_ids: Sequence[str]) -> list[str]:
        return [clip_id for clip_id in clip_ids if clip_id not in self.media_sha256 and clip_id not in self.broken]

    def _add(self, record: Mapping[str, str]) -> None:
        if "reason" in record:
            self.broken[record["clip_id"]] = record["reason"]
        else:
            self.media_sha256[record["clip_id"]] = record["media_sha256"]

    def _load(self) -> None:
        """Read the lines that are new; one that was cut short is left out, and its clip decoded again."""
        if self._path is None or not self._path.is_file():
            return
        lines = self._path.read_text().split("\n")
        for line in lines[self._read_lines :]:
            try:
                self._add(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue
        self._read_lines = max(0, len(lines) - 1)  # the last line may still be growing


class ClipPrefetch:
    """Decodes clips ahead of their use: at most `limit` are started and not yet taken. Thread-safe."""

    def __init__(self, submit: Callable[[str], Future[Any]], limit: int) -> None:
        self._submit, self._limit = submit, max(limit, 1)
        self._waiting: dict[str, None] = {}  # an ordered set
        self._started: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()

    def expect(self, clip_ids: Iterable[str]) -> None:
        """These clips are taken next, in this order; earlier expectations that are not among them are cancelled."""
        with self._lock:
            wanted = dict.fromkeys(clip_ids)
            for clip_id in [clip_id for clip_id in self._started if clip_id not in wanted]:
                self._started.pop(clip_id).cancel()
            self._waiting = {clip_id: None for clip_id in wanted if clip_id not in self._started}
            self._fill()

    def take(self, clip_id: str) -> Future[Any]:
        """The clip's future, started now if it was not; taken again, it is started anew."""
        with self._lock:
            self._waiting.pop(clip_id, None)
            future = self._started.pop(clip_id, None) or self._submit(clip_id)
            self._fill()
            return future

    def _fill(self) -> None:
        while self._waiting and len(self._started) < self._limit:
            clip_id = next(iter(self._waiting))
            del self._waiting[clip_id]
            self._started[clip_id] = self._submit(clip_id)
