"""Clips whose media are no longer the bytes that their tokens were made from, and what an extraction does about them.

Receipts hold the sha256 of what each row was made from; a clip's newest committed row counts. Files last touched before
the run that made the tokens count as unchanged, and digests of the others are cached; `full` reads every file. The
quick check misses a file exchanged on a file system whose clock was set back, and bits that rotted under an old date.
With `--refresh`, changed clips get new rows; without it they are counted and reported, and keep their tokens.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from featurestore.clips import KINDS, Clip
from featurestore.encoder_keys import encoder_keys
from featurestore.identity import FeatureIdentity
from featurestore.layout import JOURNAL, block_of, journal_names
from featurestore.records import RowOutcome
from featurestore.snapshots import column, load_snapshot, newest_snapshot_id, read_snapshot_table
from featurestore.writer import StoreWriter
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import MediaError, MervCacheError
from pipeline.datasets import DatasetListing
from pipeline.media import Root, Source, newest_touch_s
from pipeline.media_cache import MediaCache
from pipeline.plan import PlannedBlock, StoreView
from pipeline.remote_shards import RemoteRoot, remote_root

log = logging.getLogger(__name__)

CLOCK_SLACK_S = 60.0  # by which a file server's clock may be behind the driver's
MAX_RECEIPTS = 256  # kept in memory
CHUNK = 500  # clips that a thread checks before it takes the next ones
MAX_UNREQUESTED_READ_BYTES = 2 << 30  # of touched media that an extraction reads to compare them: a few seconds
WARN_BYTES = 1 << 30  # from here on the reading is announced


@dataclass(frozen=True, kw_only=True)
class StaleMedia:
    """What became of the media of clips that have tokens."""

    looked_at: int = 0  # clips with tokens of any of the encoders
    changed: Mapping[str, frozenset[str]] = field(default_factory=dict)  # encoder -> clips made from other bytes
    failed: frozenset[str] = frozenset()  # clips whose new bytes were tried and failed: the old tokens remain
    not_compared: frozenset[str] = frozenset()  # touched, and more bytes than the budget
    gone: frozenset[str] = frozenset()  # media that are absent or cannot be read; tokens stay valid

    @property
    def clips(self) -> frozenset[str]:
        """Clips that are stale for any encoder and whose new bytes were not tried."""
        return frozenset().union(*self.changed.values())


def scan_media(
    view: StoreView, listing: DatasetListing, identities: Mapping[str, FeatureIdentity], *, refresh: bool
) -> StaleMedia:
    """`stale_media` of an extraction, logged; without `refresh`, at most `MAX_UNREQUESTED_READ_BYTES` are read."""
    if refresh:
        view.writer.publish_snapshot()  # rows that an interrupted run has refreshed must not be allocated again

    def log_comparison(clips: int, num_bytes: int) -> None:
        if num_bytes > WARN_BYTES:
            log.info("comparing %d media that were touched since: %.1f GB to read, once", clips, num_bytes / 1e9)

    budget = None if refresh else MAX_UNREQUESTED_READ_BYTES
    media = stale_media(view, listing, identities, budget_bytes=budget, on_compare=log_comparison)
    if media.clips and refresh:
        log.info("%s other media than their tokens were made from: computed again", _clips_have(media.clips))
    elif media.clips:
        log.info(
            "%s other media than their tokens were made from; nothing is computed for that: `merv-pipeline explain` "
            "lists them, `extract --refresh` computes them again",
            _clips_have(media.clips),
        )
    if media.failed:
        log.info(
            "%s new media that failed: the tokens of the old ones stay; `merv-pipeline tombstone` removes a clip",
            _clips_have(media.failed),
        )
    if media.not_compared:
        log.info(
            "%s media that were touched since and are too large to read without a request: `merv-pipeline explain` "
            "compares them, once",
            _clips_have(media.not_compared),
        )
    return media


def _clips_have(ids: frozenset[str]) -> str:
    return "1 clip has" if len(ids) == 1 else f"{len(ids)} clips have"


def clips_without_rows(clips: Iterable[Clip], media: StaleMedia, planned: Iterable[PlannedBlock]) -> list[Clip]:
    """Stale clips that need new rows: those that no block of an interrupted refresh is planned for."""
    waiting: dict[str, set[str]] = {name: set() for name in media.changed}
    for block in planned:
        for name, ids in block.clip_ids_by_encoder.items():
            if name in waiting:
                waiting[name] |= ids
    without = frozenset().union(*(ids - waiting[name] for name, ids in media.changed.items()))
    return [clip for clip in clips if clip.clip_id in without]


def identity_notes(store: StoreWriter, identities: Mapping[str, FeatureIdentity]) -> list[str]:
    """A line for each encoder that is now stored under several identities."""
    stored = encoder_keys(identity for kind in KINDS for identity in store.encoder_groups(kind).values())
    keys = {identity.group_name: key for key, identity in stored.items()}
    lines, of_this_run = [], {identity.group_name for identity in identities.values()}
    for identity in identities.values():
        name, own = identity.encoder, keys[identity.group_name]
        others = sorted(
            key for group, key in keys.items() if group.rpartition("-")[0] == name and group not in of_this_run
        )
        if others:
            lines.append(
                f"{name} is stored under several identities: this run's is {own}; {', '.join(others)} stays as it is, "
                "and `merv-pipeline subset` makes a store without it"
            )
    return lines


class _NewestRows(NamedTuple):
    """The newest rows of a clip for one encoder."""

    ok: int  # of its tokens
    failed: int  # that failed, -1 for none


@dataclass(frozen=True, kw_only=True, eq=False)
class _StoredClip:
    """A clip with tokens, and by encoder where they are."""

    clip: Clip
    rows: Mapping[str, _NewestRows]


@dataclass(frozen=True, kw_only=True, slots=True)  # there may be a million of them
class _Scan:
    """The state of a clip's media before any of them is read."""

    stored: _StoredClip
    state: Literal["untouched", "touched", "gone"]
    source: Source | None = None  # of touched media: what to compare
    num_bytes: int = 0  # to be read for that; 0 where their digest is cached


def stale_media(
    view: StoreView,
    listing: DatasetListing,
    identities: Mapping[str, FeatureIdentity],
    *,
    full: bool = False,
    budget_bytes: int | None = None,  # read at most so much; None: no limit
    progress: ProgressLine = SILENT,
    on_compare: Callable[[int, int], None] = lambda clips, num_bytes: None,
) -> StaleMedia:
    """Which listed clips' tokens, at the newest snapshot, were made from other bytes than their media hold now.

    `on_compare` gets the number of clips whose media are read, and of the bytes, before they are read.
    """
    stored = _stored_clips(view, listing.clips, identities)
    progress.start(len(stored))
    with MediaCache() as cache, ThreadPoolExecutor(4) as pool:
        scanner = _Scanner(root=listing.root, cache=cache, starts=RunStarts(view), full=full, progress=progress)
        chunks = [stored[first : first + CHUNK] for first in range(0, len(stored), CHUNK)]
        scans = [scan for chunk in pool.map(scanner.scan_all, chunks) for scan in chunk]
        to_read, skipped = [], []
        total, counted = 0, set()
        for scan in sorted((scan for scan in scans if scan.state == "touched"), key=lambda scan: scan.num_bytes):
            path = scan.stored.clip.path  # spans of one file read it once
            num_bytes = 0 if path in counted else scan.num_bytes
            if budget_bytes is not None and total + num_bytes > budget_bytes:
                skipped.append(scan)
                continue
            total += num_bytes
            counted.add(path)
            to_read.append(scan)
        on_compare(len(to_read), total)
        digests = dict(zip((scan.stored for scan in to_read), pool.map(scanner.sha256, to_read), strict=True))
    changed, failed = _classify(digests, view.writer, identities)
    gone = [scan.stored for scan in scans if scan.state == "gone"]
    unreadable = [clip for clip, sha256 in digests.items() if sha256 is None]
    return StaleMedia(
        looked_at=len(stored),
        changed=changed,
        failed=failed,
        not_compared=frozenset(scan.stored.clip.clip_id for scan in skipped),
        gone=frozenset(stored.clip.clip_id for stored in [*gone, *unreadable]),
    )


def _stored_clips(
    view: StoreView, clips: Iterable[Clip], identities: Mapping[str, FeatureIdentity]
) -> list[_StoredClip]:
    """Clips that have tokens of any of the encoders at the newest snapshot, and where."""
    newest = newest_snapshot_id(view.objects)
    if newest is None:
        return []
    record = load_snapshot(view.objects, newest)
    held = {group.split("/")[1] for group in record.groups}  # KIND/GROUP
    groups = {name: identity.group_name for name, identity in identities.items() if identity.group_name in held}
    names = [column(group, suffix) for group in groups.values() for suffix in ("row", "failed_row")]
    table = read_snapshot_table(view.objects, record, ["clip_id", *names])
    lines = {clip_id: line for line, clip_id in enumerate(table["clip_id"].to_pylist())}
    rows = {
        name: tuple(table[column(group, suffix)].to_pylist() for suffix in ("row", "failed_row"))
        for name, group in groups.items()
    }
    stored = []
    for clip in clips:
        line = lines.get(clip.clip_id)
        if line is None or clip.clip_id in view.removed:
            continue
        newest_rows = {
            name: _NewestRows(ok[line], failed[line]) for name, (ok, failed) in rows.items() if ok[line] >= 0
        }
        if newest_rows:
            stored.append(_StoredClip(clip=clip, rows=newest_rows))
    return stored


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scanner:
    """Checks the media under a root, from several threads."""

    root: Root
    cache: MediaCache
    starts: RunStarts
    full: bool  # ignore dates and cached digests
    progress: ProgressLine  # advanced once for each clip that is done

    def scan_all(self, chunk: Iterable[_StoredClip]) -> list[_Scan]:
        """A scan of each clip; those whose media need no reading are done."""
        scans = [self.scan(stored) for stored in chunk]
        for scan in scans:
            if scan.state != "touched":
                self.progress.advance()
        return scans

    def scan(self, stored: _StoredClip) -> _Scan:
        """By the dates of the files, one system call or two for most of them; with `full`, all count as touched."""
        path = stored.clip.path
        since = 0.0 if self.full else self.starts.unchanged_before(stored.clip.kind, stored.rows)
        touch_s = None if self.full else _file_touch_s(self.root, path)
        if touch_s is not None and touch_s < since:
            return _Scan(stored=stored, state="untouched")
        try:
            source = Source.find(self.root, path)
            if not self.full and touch_s is None and newest_touch_s(source) < since:
                return _Scan(stored=stored, state="untouched")
            is_known = not self.full and self.cache.known(source)
            return _Scan(stored=stored, state="touched", source=source, num_bytes=0 if is_known else source.num_bytes)
        except (MediaError, OSError):
            return _Scan(stored=stored, state="gone")

    def sha256(self, scan: _Scan) -> str | None:
        """Of touched media; None where they cannot be read after all."""
        assert scan.source is not None
        try:
            return self.cache.sha256(scan.source, anew=self.full)
        except (MervCacheError, OSError):
            return None
        finally:
            self.progress.advance()


def _file_touch_s(root: Root, path: str) -> float | None:
    """`newest_touch_s` of a file, or of the link to one, in one or two system calls: a million clips are checked."""
    if isinstance(root, RemoteRoot) or remote_root(root) is not None:
        return None
    assert not isinstance(root, RemoteRoot)
    try:
        full_path = os.path.join(root, path)
        found = [os.lstat(full_path)]
        if stat.S_ISLNK(found[0].st_mode):
            found.append(os.stat(full_path))
    except OSError:
        return None
    if not stat.S_ISREG(found[-1].st_mode):
        return None
    return max(max(status.st_mtime, status.st_ctime) for status in found)


class RunStarts:
    """When the run that made a block began, as far as the store's journal records it."""

    def __init__(self, view: StoreView) -> None:
        runs = view.runs
        self._block_rows = view.writer.block_rows
        self._first: dict[str, np.ndarray] = {}  # kind -> per block, start of the earliest run that committed it
        older = [run["started"] for run in runs if "blocks" not in run]  # of versions that did not record their blocks
        if any(name.startswith("combine-") for name in journal_names(view.objects.list_names(JOURNAL))):
            runs, older = [], [run["started"] for run in runs]  # runs of the combined stores: other block numbers
        self._unknown = min(older, default=0.0)  # 0: not recorded, so every file may have been touched since
        for kind in KINDS:
            first = np.full(view.writer.allocated_blocks(kind), np.inf)
            for run in runs:
                for begin, stop in _block_ranges(run, kind):
                    first[begin:stop] = np.minimum(first[begin:stop], run["started"])
            self._first[kind] = np.where(np.isinf(first), self._unknown, first)

    def unchanged_before(self, kind: str, rows: Mapping[str, _NewestRows]) -> float:
        """Unix time; a file last touched before it is certain to be what all of a clip's tokens were made from."""
        first = self._first[kind]
        blocks = [block_of(newest.ok, self._block_rows[kind]) for newest in rows.values()]
        return min(float(first[b]) if b < len(first) else self._unknown for b in blocks) - CLOCK_SLACK_S


def _block_ranges(run: Mapping[str, Any], kind: str) -> list[tuple[int, int]]:
    """Blocks that a run committed, by its record; a journal is untrusted."""
    blocks = run.get("blocks")
    spans = blocks.get(kind, []) if isinstance(blocks, Mapping) else []
    pairs = [tuple(span) for span in spans if isinstance(span, list)] if isinstance(spans, list) else []
    return [pair for pair in pairs if len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)]


def _classify(
    digests: Mapping[_StoredClip, str | None], store: StoreWriter, identities: Mapping[str, FeatureIdentity]
) -> tuple[dict[str, frozenset[str]], frozenset[str]]:
    """(encoder -> clips that are stale for it, clips whose new bytes failed), given the media's digests now."""
    open_group = lru_cache(None)(store.open_group)
    read_receipt = lru_cache(MAX_RECEIPTS)(lambda kind, group, block: open_group(kind, group).receipt(block))

    def outcome(kind: str, encoder: str, row: int) -> RowOutcome:
        block = block_of(row, store.block_rows[kind])
        return read_receipt(kind, identities[encoder].group_name, block).outcome(row)

    changed: dict[str, set[str]] = {}
    failed = set()
    for stored, sha256 in digests.items():
        for name, rows in stored.rows.items() if sha256 else ():
            if outcome(stored.clip.kind, name, rows.ok).media_sha256 in (None, sha256):
                continue
            if rows.failed > rows.ok and outcome(stored.clip.kind, name, rows.failed).media_sha256 == sha256:
                failed.add(stored.clip.clip_id)
            else:
                changed.setdefault(name, set()).add(stored.clip.clip_id)
    return {name: frozenset(clips) for name, clips in changed.items()}, frozenset(failed)
