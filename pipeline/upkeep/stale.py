"""Stale tokens: those whose media are no longer the bytes that they were made from.

Comes in: a store, clips of one root, and the encoders asked about. Goes out: which clips changed, by encoder. Receipts
hold the sha256 of what each row was made from; the newest committed row of a clip counts. Files are read as little as
can be: a clip whose files were last touched before the run that made its tokens is as it was (`quick`), and of the
others the digest is remembered from the last time (`media_memory.py`). `full` reads every file.

What quick cannot see: a file exchanged on a file system whose clock was set back, and bits that rotted under an old
date.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from featurestore.clips import KINDS, Clip
from featurestore.errors import MediaError, MervCacheError
from featurestore.identity import FeatureIdentity
from featurestore.journal import driver_runs
from featurestore.layout import JOURNAL, block_of, journal_names
from featurestore.progress import SILENT, Progress
from featurestore.receipts import RowOutcome
from featurestore.snapshot_table import column
from featurestore.snapshots import load_snapshot, newest_snapshot_id, read_snapshot_table
from featurestore.tombstones import tombstoned_clips
from featurestore.writer import StoreWriter
from pipeline.decode.source import Source
from pipeline.media_memory import MediaMemory, media_memory, newest_touch_s

CLOCK_SLACK_S = 60.0  # by which a file server's clock may be behind the driver's
MAX_RECEIPTS = 256  # kept at hand
PORTION = 500  # clips that a thread looks at before it takes the next ones


@dataclass(frozen=True, kw_only=True)
class StaleMedia:
    """What became of the media of clips that have tokens."""

    looked_at: int = 0  # clips with tokens of any of the encoders
    changed: Mapping[str, frozenset[str]] = field(default_factory=dict)  # encoder -> clips made from other bytes
    failed: frozenset[str] = frozenset()  # clips whose new bytes were tried and failed: the old tokens still stand
    not_compared: frozenset[str] = frozenset()  # touched, and too many bytes to read them unasked
    gone: frozenset[str] = frozenset()  # media that are not there or cannot be read; tokens stay good

    @property
    def clips(self) -> frozenset[str]:
        """Clips that are stale for any encoder and whose new bytes were not tried."""
        return frozenset().union(*self.changed.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stored:
    """The newest rows of a clip: encoder -> (row of its tokens, newest row that failed or -1)."""

    clip: Clip
    rows: Mapping[str, tuple[int, int]]


_Looked = tuple[_Stored, Source | None, int]  # what is to be compared, None if nothing is; bytes to read, -1: gone


def stale_media(
    store: StoreWriter,
    clips: Iterable[Clip],
    root: str,
    identities: Mapping[str, FeatureIdentity],
    *,
    full: bool = False,
    budget_bytes: int | None = None,  # read at most so much; None: whatever it takes
    progress: Progress = SILENT,
    on_compare: Callable[[int, int], None] = lambda clips, num_bytes: None,
) -> StaleMedia:
    """Which clips' tokens, at the newest snapshot, were made from other bytes than lie under the root now.

    `on_compare` is told how many clips' media, and how many bytes of them, are read for that.
    """
    stored, started = _stored(store, clips, identities), _Started(store)
    progress.start(len(stored))
    with media_memory() as memory, ThreadPoolExecutor(4) as pool:

        def look(some: Sequence[_Stored]) -> list[_Looked]:
            found = [(each, *_look(each, root, memory, 0.0 if full else started.before(each), full)) for each in some]
            for _, source, _ in found:
                if source is None:
                    progress.advance()
            return found

        def compare(entry: _Looked) -> str | None:
            sha256 = _sha256(entry[1], memory, full)
            progress.advance()
            return sha256

        portions = [stored[first : first + PORTION] for first in range(0, len(stored), PORTION)]
        looked = [entry for found in pool.map(look, portions) for entry in found]
        to_read, left = _within([entry for entry in looked if entry[1] is not None], budget_bytes)
        on_compare(len(to_read), sum(size for _, _, size in to_read))
        digests = dict(zip((each for each, _, _ in to_read), pool.map(compare, to_read), strict=True))
    changed, failed = _judged(digests, _Receipts(store, identities))
    return StaleMedia(
        looked_at=len(stored),
        changed=changed,
        failed=failed,
        not_compared=frozenset(each.clip.clip_id for each, _, _ in left),
        gone=frozenset(each.clip.clip_id for each, source, size in looked if source is None and size < 0)
        | {each.clip.clip_id for each, sha256 in digests.items() if sha256 is None},
    )


def _judged(
    digests: Mapping[_Stored, str | None], receipts: _Receipts
) -> tuple[dict[str, frozenset[str]], frozenset[str]]:
    """(encoder -> clips that are stale for it, clips whose new bytes failed), given what the bytes are now."""
    changed: dict[str, set[str]] = {}
    failed = set()
    for each, sha256 in digests.items():
        for name, (row, failed_row) in each.rows.items() if sha256 else ():
            if receipts.outcome(each.clip.kind, name, row).media_sha256 in (None, sha256):
                continue
            if failed_row > row and receipts.outcome(each.clip.kind, name, failed_row).media_sha256 == sha256:
                failed.add(each.clip.clip_id)
            else:
                changed.setdefault(name, set()).add(each.clip.clip_id)
    return {name: frozenset(found) for name, found in changed.items()}, frozenset(failed)


def _stored(store: StoreWriter, clips: Iterable[Clip], identities: Mapping[str, FeatureIdentity]) -> list[_Stored]:
    """Clips that have tokens of any of the encoders at the newest snapshot, and where."""
    newest = newest_snapshot_id(store.objects)
    if newest is None:
        return []
    record = load_snapshot(store.objects, newest)
    held = {name for names in record.groups for name in [names.split("/")[1]]}
    groups = {name: identity.group_name for name, identity in identities.items() if identity.group_name in held}
    names = [column(group, suffix) for group in groups.values() for suffix in ("row", "failed_row")]
    table = read_snapshot_table(store.objects, record, ["clip_id", *names])
    lines = {clip_id: line for line, clip_id in enumerate(table["clip_id"].to_pylist())}
    rows = {
        name: tuple(table[column(group, suffix)].to_pylist() for suffix in ("row", "failed_row"))
        for name, group in groups.items()
    }
    found, removed = [], tombstoned_clips(store.objects)
    for clip in clips:
        line = lines.get(clip.clip_id)
        if line is None or clip.clip_id in removed:
            continue
        if mine := {name: (ok[line], bad[line]) for name, (ok, bad) in rows.items() if ok[line] >= 0}:
            found.append(_Stored(clip=clip, rows=mine))
    return found


class _Started:
    """When the run that made a row began, as far as the store's journal tells."""

    def __init__(self, store: StoreWriter) -> None:
        runs = driver_runs(store.objects)
        self._block_rows = store.block_rows
        self._first: dict[str, np.ndarray] = {}  # kind -> per block, start of the earliest run that committed it
        older = [run["started"] for run in runs if "blocks" not in run]  # of versions that did not note their blocks
        if any(name.startswith("combine-") for name in journal_names(store.objects.list_names(JOURNAL))):
            runs, older = [], [run["started"] for run in runs]  # of the stores it was laid from: other blocks
        self._unknown = min(older, default=0.0)  # 0: nobody knows, so every file may have been touched since
        for kind in KINDS:
            first = np.full(store.sealed_blocks(kind), np.inf)
            for run in runs:
                for begin, stop in _spans(run, kind):
                    first[begin:stop] = np.minimum(first[begin:stop], run["started"])
            self._first[kind] = np.where(np.isinf(first), self._unknown, first)

    def before(self, each: _Stored) -> float:
        """Unix seconds: files older than this are those that every token of the clip was made from."""
        first = self._first[each.clip.kind]
        blocks = [block_of(row, self._block_rows[each.clip.kind]) for row, _ in each.rows.values()]
        return min(float(first[b]) if b < len(first) else self._unknown for b in blocks) - CLOCK_SLACK_S


def _spans(run: Mapping[str, Any], kind: str) -> list[tuple[int, int]]:
    """Blocks that a run committed, as its record has it; a journal may be a stranger's."""
    blocks = run.get("blocks")
    spans = blocks.get(kind, []) if isinstance(blocks, Mapping) else []
    pairs = [tuple(span) for span in spans if isinstance(span, list)] if isinstance(spans, list) else []
    return [pair for pair in pairs if len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)]


class _Receipts:
    """What receipts say of single rows."""

    def __init__(self, store: StoreWriter, identities: Mapping[str, FeatureIdentity]) -> None:
        self._store, self._identities = store, identities
        self._group = lru_cache(None)(store.open_group)
        self._receipt = lru_cache(MAX_RECEIPTS)(lambda kind, group, block: self._group(kind, group).receipt(block))

    def outcome(self, kind: str, encoder: str, row: int) -> RowOutcome:
        block = block_of(row, self._store.block_rows[kind])
        return self._receipt(kind, self._identities[encoder].group_name, block).outcome(row)


def _look(each: _Stored, root: str, memory: MediaMemory, since: float, full: bool) -> tuple[Source | None, int]:
    """(what to compare, bytes to read for it); (None, 0) where the media are as they were, (None, -1) if gone."""
    touch_s = None if full else _file_touch_s(root, each.clip.path)
    if touch_s is not None and touch_s < since:
        return None, 0
    try:
        source = Source.find(root, each.clip.path)
        if not full and touch_s is None and newest_touch_s(source) < since:
            return None, 0
        return source, 0 if not full and memory.known(source) else source.num_bytes
    except (MediaError, OSError):
        return None, -1


def _file_touch_s(root: str, path: str) -> float | None:
    """`newest_touch_s` of a file, or of the link to one, with one system call or two: a million clips are looked at."""
    try:
        whole = os.path.join(root, path)
        found = [os.lstat(whole)]
        if stat.S_ISLNK(found[0].st_mode):
            found.append(os.stat(whole))
    except OSError:
        return None
    if not stat.S_ISREG(found[-1].st_mode):
        return None
    return max(max(status.st_mtime, status.st_ctime) for status in found)


def _within(found: list, budget_bytes: int | None) -> tuple[list, list]:
    """Entries whose bytes fit the budget together, the small ones first, and the others."""
    if budget_bytes is None:
        return found, []
    taken, left, total = [], [], 0
    for entry in sorted(found, key=lambda entry: entry[2]):
        total += entry[2]
        (taken if total <= budget_bytes else left).append(entry)
    return taken, left


def _sha256(source: Source, memory: MediaMemory, full: bool) -> str | None:
    """None where it cannot be read after all."""
    try:
        return memory.sha256(source, anew=full)
    except (MervCacheError, OSError):
        return None
