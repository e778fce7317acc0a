"""Stale tokens: those whose media are no longer the bytes that they were made from.

Comes in: a store, a listing, and the encoders asked about. Goes out: which clips changed, by encoder. Receipts hold the
sha256 of what each row was made from; the newest committed row of a clip counts. As few files are read as possible. A
clip whose files were last touched before the run that made its tokens is unchanged (`quick`); the digests of the others
are remembered from the last time (`media.DigestCache`). `full` reads every file.

What quick cannot see: a file exchanged on a file system whose clock was set back, and bits that rotted under an old
date.

Refresh: what an extraction does about clips whose media changed since their tokens were stored.

Comes in: a store, a listing and the encoders of a run. Without `--refresh` changed clips are counted and told, and stay
as they are: never silently taken for what they no longer are, never silently computed. With it they get new rows, which
count from the moment they are committed; no stored byte changes, and old snapshots go on showing the old tokens.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from featurestore.clips import KINDS, Clip
from featurestore.identity import FeatureIdentity
from featurestore.layout import JOURNAL, block_of, journal_names
from featurestore.reader import encoder_keys
from featurestore.records import RowOutcome, driver_runs, tombstoned_clips
from featurestore.snapshots import column, load_snapshot, newest_snapshot_id, read_snapshot_table
from featurestore.writer import StoreWriter
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import MediaError, MervCacheError
from pipeline.datasets import DatasetListing
from pipeline.media import DigestCache, Source, newest_touch_s
from pipeline.plan import plan_blocks

CLOCK_SLACK_S = 60.0  # by which a file server's clock may be behind the driver's
MAX_RECEIPTS = 256  # kept in memory
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


class _Rows(NamedTuple):
    """The newest rows of a clip for one encoder."""

    ok: int  # of its tokens
    failed: int  # that failed, -1 for none


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stored:
    """A clip with tokens, and by encoder where they are."""

    clip: Clip
    rows: Mapping[str, _Rows]


@dataclass(frozen=True, kw_only=True, slots=True)  # there may be a million of them
class _Scan:
    """What a look at a clip's media says, before any of them is read."""

    stored: _Stored
    state: Literal["untouched", "touched", "gone"]
    source: Source | None = None  # of touched media: what to compare
    num_bytes: int = 0  # to be read for that; 0 where their digest is remembered


def stale_media(
    store: StoreWriter,
    listing: DatasetListing,
    identities: Mapping[str, FeatureIdentity],
    *,
    full: bool = False,
    budget_bytes: int | None = None,  # read at most so much; None: whatever it takes
    progress: ProgressLine = SILENT,
    on_compare: Callable[[int, int], None] = lambda clips, num_bytes: None,
) -> StaleMedia:
    """Which listed clips' tokens, at the newest snapshot, were made from other bytes than their media hold now.

    `on_compare` is told how many clips' media, and how many bytes of them, are read for that.
    """
    stored = _stored(store, listing.clips, identities)
    progress.start(len(stored))
    with DigestCache() as memory, ThreadPoolExecutor(4) as pool:
        media = _Media(root=listing.root, memory=memory, runs=_Runs(store), full=full, progress=progress)
        looks = [look for portion in pool.map(media.scan_all, _chunks(stored)) for look in portion]
        to_read, left = _fit_budget([look for look in looks if look.state == "touched"], budget_bytes)
        on_compare(len(to_read), sum(look.num_bytes for look in to_read))
        digests = dict(zip((look.stored for look in to_read), pool.map(media.sha256, to_read), strict=True))
    changed, failed = _classify(digests, _Receipts(store, identities))
    gone = [look.stored for look in looks if look.state == "gone"]
    unreadable = [each for each, sha256 in digests.items() if sha256 is None]
    return StaleMedia(
        looked_at=len(stored),
        changed=changed,
        failed=failed,
        not_compared=_clip_ids(look.stored for look in left),
        gone=_clip_ids([*gone, *unreadable]),
    )


def _chunks(stored: Sequence[_Stored]) -> list[Sequence[_Stored]]:
    return [stored[first : first + PORTION] for first in range(0, len(stored), PORTION)]


def _clip_ids(stored: Iterable[_Stored]) -> frozenset[str]:
    return frozenset(each.clip.clip_id for each in stored)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Media:
    """The media under a root, looked at from several threads."""

    root: str
    memory: DigestCache
    runs: _Runs
    full: bool  # take no date and no remembered digest for an answer
    progress: ProgressLine  # advanced once for each clip that is done with

    def scan_all(self, some: Iterable[_Stored]) -> list[_Scan]:
        """A look at each of the clips; those whose media need no reading are done with."""
        looks = [self.look_at(each) for each in some]
        for look in looks:
            if look.state != "touched":
                self.progress.advance()
        return looks

    def look_at(self, each: _Stored) -> _Scan:
        """By the dates of the files, one system call or two for most of them; with `full`, all count as touched."""
        path, since = each.clip.path, 0.0 if self.full else self.runs.began(each)
        touch_s = None if self.full else _file_touch_s(self.root, path)
        if touch_s is not None and touch_s < since:
            return _Scan(stored=each, state="untouched")
        try:
            source = Source.find(self.root, path)
            if not self.full and touch_s is None and newest_touch_s(source) < since:
                return _Scan(stored=each, state="untouched")
            is_known = not self.full and self.memory.known(source)
            return _Scan(stored=each, state="touched", source=source, num_bytes=0 if is_known else source.num_bytes)
        except (MediaError, OSError):
            return _Scan(stored=each, state="gone")

    def sha256(self, look: _Scan) -> str | None:
        """Of touched media; None where they cannot be read after all."""
        try:
            return self.memory.sha256(look.source, anew=self.full)
        except (MervCacheError, OSError):
            return None
        finally:
            self.progress.advance()


def _fit_budget(looks: list[_Scan], budget_bytes: int | None) -> tuple[list[_Scan], list[_Scan]]:
    """Those whose bytes fit the budget together, the small ones first, and the others."""
    if budget_bytes is None:
        return looks, []
    taken, left, total = [], [], 0
    for look in sorted(looks, key=lambda look: look.num_bytes):
        total += look.num_bytes
        (taken if total <= budget_bytes else left).append(look)
    return taken, left


def _classify(
    digests: Mapping[_Stored, str | None], receipts: _Receipts
) -> tuple[dict[str, frozenset[str]], frozenset[str]]:
    """(encoder -> clips that are stale for it, clips whose new bytes failed), given what the bytes are now."""
    changed: dict[str, set[str]] = {}
    failed = set()
    for each, sha256 in digests.items():
        for name, rows in each.rows.items() if sha256 else ():
            if receipts.outcome(each.clip.kind, name, rows.ok).media_sha256 in (None, sha256):
                continue
            if rows.failed > rows.ok and receipts.outcome(each.clip.kind, name, rows.failed).media_sha256 == sha256:
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
    held = {group.split("/")[1] for group in record.groups}  # KIND/GROUP
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
        if mine := {name: _Rows(ok[line], failed[line]) for name, (ok, failed) in rows.items() if ok[line] >= 0}:
            found.append(_Stored(clip=clip, rows=mine))
    return found


class _Runs:
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
                for begin, stop in _ranges(run, kind):
                    first[begin:stop] = np.minimum(first[begin:stop], run["started"])
            self._first[kind] = np.where(np.isinf(first), self._unknown, first)

    def began(self, each: _Stored) -> float:
        """Unix time before which an unmodified file is certain to be what all of the clip's tokens were made from."""
        first = self._first[each.clip.kind]
        blocks = [block_of(rows.ok, self._block_rows[each.clip.kind]) for rows in each.rows.values()]
        return min(float(first[b]) if b < len(first) else self._unknown for b in blocks) - CLOCK_SLACK_S


def _ranges(run: Mapping[str, Any], kind: str) -> list[tuple[int, int]]:
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


MAX_UNREQUESTED_READ_BYTES = 2 << 30  # of touched media that an extraction reads to compare them, a few seconds' worth
WARN_BYTES = 1 << 30  # from here on a person may wonder what takes so long


def scan_media(
    store: StoreWriter,
    listing: DatasetListing,
    identities: Mapping[str, FeatureIdentity],
    *,
    refresh: bool,
    say: Callable[[str], None],
) -> StaleMedia:
    """What changed since its tokens were made, told to `say`; with `refresh`, changed clips have new rows after it."""
    if refresh:
        store.publish_snapshot()  # what a run that was cut short has refreshed is not to be given rows again

    def comparing(clips: int, num_bytes: int) -> None:
        if num_bytes > WARN_BYTES:
            say(f"comparing {clips} media that were touched since: {num_bytes / 1e9:.1f} GB to read, once")

    budget = None if refresh else MAX_UNREQUESTED_READ_BYTES
    found = stale_media(store, listing, identities, budget_bytes=budget, on_compare=comparing)
    if refresh:
        _give_rows(store, listing, identities, found)
    for line in _told(found, refresh):
        say(line)
    return found


def _give_rows(
    store: StoreWriter, listing: DatasetListing, identities: Mapping[str, FeatureIdentity], found: StaleMedia
) -> None:
    """New rows for stale clips, but for those that wait in a row of a refresh that was cut short."""
    waiting: dict[str, set[str]] = {name: set() for name in identities}
    for block in plan_blocks(store, identities, clip_ids=found.clips, stale=found.changed):
        ids = dict(zip(block.clips["row"].to_pylist(), block.clips["clip_id"].to_pylist(), strict=True))
        for name, rows in block.wanted.items():
            waiting[name].update(ids[row] for row in rows)
    without = frozenset().union(*(clips - waiting[name] for name, clips in found.changed.items()))
    store.add_clips([clip for clip in listing.clips if clip.clip_id in without], retry=True)


def identity_notes(store: StoreWriter, identities: Mapping[str, FeatureIdentity]) -> list[str]:
    """What becomes of the tokens that were there, where an encoder is now stored under several identities."""
    groups = [f"{kind}/{name}" for kind in KINDS for name in store.encoder_groups(kind)]
    keys = {group: key for key, group in encoder_keys(groups).items()}
    lines = []
    for name, identity in identities.items():
        others = sorted(key for group, key in keys.items() if group.rpartition("-")[0] == name)
        if len(others) > 1:
            mine = keys[identity.group_name]
            others.remove(mine)
            lines.append(
                f"{name} is stored under several identities: this run's is {mine}; {', '.join(others)} stays as it is, "
                "and `merv-pipeline subset` makes a store without it"
            )
    return lines


def _told(found: StaleMedia, refresh: bool) -> list[str]:
    """A line for each thing that became of the media; none where nothing did."""
    lines = []
    if found.clips and refresh:
        lines.append(f"{_clips(found.clips)} other media than their tokens were made from: computed again")
    elif found.clips:
        lines.append(
            f"{_clips(found.clips)} other media than their tokens were made from; nothing is computed for that: "
            "`merv-pipeline explain` lists them, `extract --refresh` computes them again"
        )
    if found.failed:
        lines.append(
            f"{_clips(found.failed)} new media that failed: the tokens of the old ones stay; "
            "`merv-pipeline tombstone` removes a clip"
        )
    if found.not_compared:
        lines.append(
            f"{_clips(found.not_compared)} media that were touched since and are too many to read unasked: "
            "`merv-pipeline explain` compares them, once"
        )
    return lines


def _clips(ids: frozenset[str]) -> str:
    return "1 clip has" if len(ids) == 1 else f"{len(ids)} clips have"
