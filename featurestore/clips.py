"""Clips: the unit that is encoded. A media file with a span or an end frame, or a still image.

Comes in: what a dataset lists. Goes out: `Clip` values; their Parquet columns stand in `columns.py`.
A clip's id is made from what names it (dataset, path, span), not from its bytes: ids must exist before any
media is read. Equality of content is the receipt's `media_sha256`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from featurestore.errors import UserError

Kind = Literal["video", "image"]
KINDS: tuple[Kind, ...] = ("video", "image")
MAX_PATH_LENGTH = 1024  # characters; POSIX PATH_MAX is 4096 bytes
# Patterns, not loops over characters: a million clips are checked when a store is planned (3 s instead of 12).
_FORBIDDEN_CHARACTER = re.compile(r"[\x00-\x1f\\]")
_AMBIGUOUS_PART = re.compile(r"(?:^|/)\.{0,2}(?:/|\Z)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One thing to encode; hashable, checked at birth."""

    dataset: str  # name of the dataset that lists it
    path: str  # POSIX path relative to the dataset's root; a tar member is "shard.tar/member"
    kind: Kind
    start_s: float | None = None  # span in seconds; None is the start of the file
    end_s: float | None = None  # None is the end of the file
    end_frame: int | None = None  # last frame index; overrides the span (as in princetonvisualai/merv)

    def __post_init__(self) -> None:
        check_relative_path(self.path)
        if self.kind not in KINDS:
            raise UserError(f"clip kind must be one of {', '.join(KINDS)}, got {self.kind!r} for {self.path}")
        if not self.dataset or "/" in self.dataset:
            raise UserError(f"dataset name must be non-empty and without '/', got {self.dataset!r}")
        for name, seconds in (("start_s", self.start_s), ("end_s", self.end_s)):
            if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
                raise UserError(f"{name} must be a finite number of seconds >= 0, got {seconds} for {self.path}")
        if self.start_s is not None and self.end_s is not None and self.end_s <= self.start_s:
            raise UserError(f"span must end after it starts, got {self.start_s}..{self.end_s} s for {self.path}")
        if self.end_frame is not None and self.end_frame < 0:
            raise UserError(f"end_frame must be >= 0, got {self.end_frame} for {self.path}")

    @property
    def clip_id(self) -> str:
        """`dataset/path`, then a fragment for the span: unique in a store and readable.

        >>> Clip(dataset="eval", path="tvqa/a.mp4", kind="video", start_s=1.5, end_s=4.0).clip_id
        'eval/tvqa/a.mp4#t=1.5,4.0'
        """
        quoted = self.path
        if "%" in quoted or "#" in quoted:
            quoted = quoted.replace("%", "%25").replace("#", "%23")
        return f"{self.dataset}/{quoted}{self._fragment()}"

    def _fragment(self) -> str:
        if self.start_s is None and self.end_s is None and self.end_frame is None:
            return ""
        if self.end_frame is not None:
            return f"#end_frame={self.end_frame}"
        start, end = ("" if s is None else repr(float(s)) for s in (self.start_s, self.end_s))
        return f"#t={start},{end}"


def check_relative_path(path: str) -> None:
    """Refuse a path that is absolute, climbs out of its root, or could mean two things."""
    problem = None
    if not path or len(path) > MAX_PATH_LENGTH:
        problem = f"its length must be 1..{MAX_PATH_LENGTH} characters"
    elif _FORBIDDEN_CHARACTER.search(path):
        problem = "it holds a control character or a backslash"
    elif path.startswith("/") or path[1:3] == ":/":
        problem = "it is absolute"
    elif _AMBIGUOUS_PART.search(path):
        problem = "it holds an empty, '.' or '..' part"
    if problem:
        raise UserError(f"media path {path[:200]!r} is refused: {problem}; paths are relative to the dataset's root")
