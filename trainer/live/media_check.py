"""Media check: every clip of an end-to-end run is decoded once before the first step.

A store knows which clips failed, because it has decoded them all; a live source must look for itself. Which samples are
left decides the batches of every step, so what cannot be decoded has to be known before the first one: a clip that
failed in the middle of a run could only be swapped, skipped or fatal, and none of them is the run that a cache gives.
The look costs one decoding of the clips (no encoder runs); what it found stands in the run's folder, a line per clip
as it is found, so a resumed run looks at nothing twice and a person can list what is broken and why:

    {"clip_id": "demo/videos/0001.mp4", "media_sha256": "..."}
    {"clip_id": "demo/videos/0002.mp4", "reason": "container is damaged"}
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TextIO

from mervcache.errors import MediaError
from trainer.bar import Bar

POLL_S = 1.0  # between looks at what the first rank has found so far


class MediaCheck:
    """What is known of the clips' media: digests of those that can be decoded, reasons for those that cannot."""

    def __init__(self, path: Path | None, *, is_first_rank: bool = True) -> None:
        self.media_sha256: dict[str, str] = {}
        self.broken: dict[str, str] = {}
        self._path, self._is_first_rank = path, is_first_rank
        self._read_lines = 0

    def look(self, clip_ids: Sequence[str], submit: Callable[[str], Future], *, limit: int) -> None:
        """Decode the clips that are not known yet, `limit` at once. Other ranks wait for what the first one writes."""
        self._load()
        while (unknown := self._unknown(clip_ids)) and self._path is not None and not self._is_first_rank:
            time.sleep(POLL_S)
            self._load()
        if not unknown:
            return
        with _appending(self._path) as file, Bar("decoding every clip once", total=len(unknown)) as bar:
            for record in bar.over(_outcomes(unknown, submit, limit)):
                self._keep(record)
                file.write(f"\n{json.dumps(record)}")  # the end of a line that a killed run left comes first
                file.flush()

    def _unknown(self, clip_ids: Sequence[str]) -> list[str]:
        return [clip_id for clip_id in clip_ids if clip_id not in self.media_sha256 and clip_id not in self.broken]

    def _keep(self, record: dict[str, Any]) -> None:
        if "reason" in record:
            self.broken[record["clip_id"]] = record["reason"]
        else:
            self.media_sha256[record["clip_id"]] = record["media_sha256"]

    def _load(self) -> None:
        """Lines that are new since the last time; one that was cut short is left out and its clip looked at again."""
        if self._path is None or not self._path.is_file():
            return
        with self._path.open() as file:
            lines = file.read().split("\n")
        for line in lines[self._read_lines :]:
            try:
                self._keep(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue
        self._read_lines = max(0, len(lines) - 1)  # the last line may still be growing


def _outcomes(clip_ids: Iterable[str], submit: Callable[[str], Future], limit: int) -> Iterator[dict[str, Any]]:
    """A record per clip, in order, with at most `limit` clips in work."""
    ahead: deque[tuple[str, Future]] = deque()
    for clip_id in clip_ids:
        ahead.append((clip_id, submit(clip_id)))
        if len(ahead) >= limit:
            yield _outcome(*ahead.popleft())
    while ahead:
        yield _outcome(*ahead.popleft())


def _outcome(clip_id: str, future: Future) -> dict[str, Any]:
    try:
        return {"clip_id": clip_id, "media_sha256": future.result().media_sha256}
    except MediaError as reason:
        return {"clip_id": clip_id, "reason": str(reason)}


def _appending(path: Path | None) -> TextIO:
    if path is None:
        return open(os.devnull, "w")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a")
