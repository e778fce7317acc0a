"""What is wrong with a store: findings, as `verify` reports and `repair` answers them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from mervcache.errors import MervCacheError

REPAIR = "run `merv-pipeline repair`"

# damage: a digest does not hold or a file is missing; orphan: nothing depends on the file; notice: about media.
Severity = Literal["damage", "orphan", "notice"]


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    key: str  # the object, relative to the store
    problem: str
    severity: Severity = "damage"
    advice: str = REPAIR  # what to do


class Findings:
    """A growing set of findings, and the keys that were checked; threads may share one."""

    def __init__(self) -> None:
        self._all: set[Finding] = set()
        self.checked: set[str] = set()  # keys that belong to the store

    def add_damage(self, key: str, problem: str, advice: str = REPAIR) -> None:
        self._all.add(Finding(key, problem, advice=advice))

    def add_orphan(self, key: str, problem: str, advice: str) -> None:
        self._all.add(Finding(key, problem, "orphan", advice))

    def reading(self, key: str) -> _Reading:
        """Count the key as checked, and turn any error of reading it into damage."""
        self.checked.add(key)
        return _Reading(self, key)

    def sorted(self) -> list[Finding]:
        """Damage first."""
        return sorted(self._all, key=lambda finding: (finding.severity, finding.key, finding.problem))


@dataclass(frozen=True)
class _Reading:
    """A context that ends where reading an object fails; a class, so that a type checker knows that it does."""

    findings: Findings
    key: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        if not isinstance(error, MervCacheError | OSError | pa.ArrowException):
            return False
        self.findings.add_damage(self.key, "is missing" if isinstance(error, FileNotFoundError) else str(error))
        return True


def is_damaged(findings: list[Finding]) -> bool:
    return any(finding.severity == "damage" for finding in findings)
