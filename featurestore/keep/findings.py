"""Findings: what a verification collects instead of raising."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from featurestore.errors import MervCacheError

# damage: a promise of the store does not hold. stray: nothing depends on it; it was left lying or is still being made.
Severity = Literal["damage", "stray"]
REPAIR = "run `merv-pipeline repair`"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    key: str  # the object, relative to the store
    problem: str  # what is wrong with it
    severity: Severity = "damage"
    advice: str = REPAIR  # what to do


class Findings:
    """A growing list of findings, and the keys that were looked at; threads may share one."""

    def __init__(self) -> None:
        self._found: set[Finding] = set()
        self.looked_at: set[str] = set()  # keys that belong to the store

    def found(self, key: str, problem: str, advice: str = REPAIR) -> None:
        self._found.add(Finding(key, problem, advice=advice))

    def stray(self, key: str, problem: str, advice: str) -> None:
        self._found.add(Finding(key, problem, "stray", advice))

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
        """Damage first."""
        return sorted(self._found, key=lambda finding: (finding.severity, finding.key, finding.problem))


def is_damaged(findings: list[Finding]) -> bool:
    return any(finding.severity == "damage" for finding in findings)
