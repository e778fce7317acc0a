"""Findings: what a verification collects instead of raising."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa

from featurestore.errors import MervCacheError


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    key: str  # the object, relative to the store
    problem: str  # what is wrong with it


class Findings:
    """A growing list of findings, and the keys that were looked at."""

    def __init__(self) -> None:
        self._found: set[Finding] = set()
        self.looked_at: set[str] = set()  # keys that belong to the store

    def found(self, key: str, problem: str) -> None:
        self._found.add(Finding(key, problem))

    @contextmanager
    def reading(self, key: str) -> Iterator[None]:
        """Turn what an object does to its reader into a finding."""
        self.looked_at.add(key)
        try:
            yield
        except FileNotFoundError:
            self.found(key, "is missing")
        except (MervCacheError, OSError, pa.ArrowException) as error:
            self.found(key, str(error))

    def sorted(self) -> list[Finding]:
        return sorted(self._found, key=lambda finding: (finding.key, finding.problem))
