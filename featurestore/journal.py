"""Journal records: provenance that must not change bytes (times, hosts, versions, rates); one per run and worker."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featurestore.digests import canonical_json, record_digest
from featurestore.errors import StoreDamagedError, StoreError, UserError
from featurestore.layout import JOURNAL, journal_key, journal_names
from featurestore.metadata import load_json
from featurestore.places.objects import Objects, get_bounded

MAX_JOURNAL_BYTES = 16 << 20
THREADS_PER_CPU = 4
MANY_THREADS = 256  # as a large server has: its stores are repaired and checked on small machines, slowly


def journal_bytes(record: Mapping[str, Any]) -> bytes:
    """A record with its own digest beside it."""
    digest = record_digest(record)
    return (canonical_json({"record": dict(record), "digest": digest}) + "\n").encode()


def parse_journal(data: bytes, name: str) -> dict[str, Any]:
    """The record, if it is whole."""
    document = load_json(data, f"journal {name}")
    record = document.get("record") if isinstance(document, dict) else None
    try:
        is_whole = isinstance(record, dict) and journal_bytes(record) == data
    except (ValueError, RecursionError):  # NaN, or nested without end
        is_whole = False
    if not is_whole:
        raise StoreDamagedError(
            f"journal {name} does not match its own digest; it tells of a run, no tokens depend on it"
        )
    return record


def driver_runs(objects: Objects) -> list[dict[str, Any]]:
    """Records of the store's extractions, oldest first; damaged ones, and what is no run, are left aside."""
    runs = []
    for name in journal_names(objects.list_names(JOURNAL)):
        if name.endswith("-driver"):
            try:
                run = parse_journal(get_bounded(objects, journal_key(name), MAX_JOURNAL_BYTES), name)
            except StoreError:
                continue
            if _is_run(run):
                runs.append(run)
    return sorted(runs, key=lambda run: run["started"])


@dataclass(frozen=True, kw_only=True)
class Maker:
    """The newest run that wrote to a group."""

    run: Mapping[str, Any]
    encoder: str  # as the run names it
    threads: int | None  # of torch, which decide the last bits of a sum; None where the run does not tell


def maker_of(objects: Objects, group: str) -> Maker | None:
    """Who made a group's tokens, as the journal tells; refuses a number of threads that this machine cannot start."""
    for run in reversed(driver_runs(objects)):
        for name, entry in run["encoders"].items():
            if entry.get("group") == group:
                threads = entry.get("threads")
                _check_threads(threads, group)
                return Maker(run=run, encoder=name, threads=threads)
    return None


def _check_threads(threads: Any, group: str) -> None:
    """A stranger may name any number, and fewer threads than it says would make other bits: no cap, an error."""
    most = max(MANY_THREADS, THREADS_PER_CPU * (os.cpu_count() or 1))
    if threads is not None and not (type(threads) is int and 1 <= threads <= most):
        raise UserError(
            f"the journal says that {group} was computed with {threads!r:.40} threads, this machine starts 1 to "
            f"{most}: use a larger machine, or fetch damaged blocks with `merv-pipeline repair --from OTHER_STORE`"
        )


def _is_run(record: Mapping[str, Any]) -> bool:
    """A journal may be a stranger's: what every reader of runs looks into must be there."""
    mappings = [record.get(name) for name in ("config", "encoders", "summary")]
    if not all(isinstance(value, dict) for value in mappings) or type(record.get("started")) not in (int, float):
        return False
    if not all(type(text) is str for text in (record.get("root"), record["config"].get("dataset"))):
        return False
    if not all(isinstance(entry, dict) for entry in record["encoders"].values()):
        return False
    summary, stage_s = record["summary"], record["summary"].get("stage_s")
    numbers = [summary.get(name) for name in ("clips", "failed", "bytes", "elapsed_s")]
    if not isinstance(stage_s, dict) or type(summary.get("run")) is not str:
        return False
    return all(type(number) in (int, float) for number in [*numbers, *stage_s.values()])
