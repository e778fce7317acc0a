"""Have the media changed since they were encoded? Receipts hold the sha256 of what each clip was made from.

Comes in: a store and the folders of its media. Goes out: findings. "full" hashes every file. "quick" hashes only files
that were modified, or moved into their place, after the store's first run began (the later of mtime and ctime), and
finds those that are gone. It cannot see what was exchanged on a file system whose clock was set back, bits that rotted
under an old date, or a store whose journal is lost; a folder that was copied since is hashed whole, as full would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from featurestore.clips import Clip, table_to_clips
from featurestore.locate import Place
from featurestore.maintenance.verify import Finding
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter
from mervcache.console import SILENT, ProgressCallback
from mervcache.errors import MervCacheError, UserError
from pipeline.costs.ledger import media_roots
from pipeline.decode.source import Source
from pipeline.media_memory import newest_touch_s

MediaLevel = Literal["quick", "full"]
MEDIA_LEVELS: tuple[MediaLevel, ...] = ("quick", "full")
_RESTORE = "restore the file it was made from, or compute it again with `extract --refresh`"


def verify_media(
    path: Place,
    level: MediaLevel,
    *,
    root: str | None = None,
    workers: int = 2,
    progress: ProgressCallback = SILENT,
) -> list[Finding]:
    """Media that are gone or whose bytes are no longer those that the receipts name; keys are clip ids."""
    if level not in MEDIA_LEVELS:
        raise UserError(f"media are checked {' or '.join(MEDIA_LEVELS)}, got {level!r}")
    store = FeatureStore.open(path)
    runs = [record for name, record in store.journal() if name.endswith("-driver")]
    roots = media_roots(runs, root)
    since = min((run["started"] for run in runs), default=0.0) if level == "quick" else 0.0
    known = _media_digests(path, set(store.tombstones) and {c for s in store.tombstones.values() for c in s.clips})
    progress.start(len(known))

    def check(entry: tuple[Clip, set[str]]) -> Finding | None:
        progress.advance()
        return _check(*entry, roots, since)

    with ThreadPoolExecutor(workers) as pool:
        found = [finding for finding in pool.map(check, known.values()) if finding is not None]
    return sorted(found, key=lambda finding: (finding.severity, finding.key))


def _media_digests(path: Place, removed: Iterable[str]) -> dict[str, tuple[Clip, set[str]]]:
    """Clip id -> the clip, and the sha256 of the media that each encoder's tokens of it were made from."""
    writer, removed = StoreWriter.open(path), set(removed)
    newest: dict[str, tuple[Clip, dict[str, str]]] = {}  # clip id -> the clip, and by group: a later row's wins
    clips = {(clip.kind, row): clip for row, clip in table_to_clips(writer.clips())}
    for kind in {kind for kind, _ in clips}:
        for name in writer.encoder_groups(kind):
            group = writer.open_group(kind, name)
            for block in sorted(group.committed_blocks()):
                receipt = group.receipt(block)
                for row, outcome in enumerate(receipt.rows, start=receipt.first_row()):
                    clip = clips.get((kind, row))
                    if outcome.state == "ok" and outcome.media_sha256 and clip and clip.clip_id not in removed:
                        newest.setdefault(clip.clip_id, (clip, {}))[1][name] = outcome.media_sha256
    return {clip_id: (clip, set(digests.values())) for clip_id, (clip, digests) in newest.items()}


def _check(clip: Clip, digests: set[str], roots: Mapping[str, str], since: float) -> Finding | None:
    root = roots.get(clip.dataset, roots.get(""))
    if root is None:
        return Finding(clip.clip_id, f"no run says where the media of {clip.dataset} are", "stray", "give --root DIR")
    try:
        source = Source.find(root, clip.path)
        if newest_touch_s(source) < since:
            return None
        now = source.sha256()
    except MervCacheError as error:
        return Finding(clip.clip_id, str(error), "stray", "its tokens stay good; restore the file to compute it again")
    except OSError as error:
        return Finding(clip.clip_id, f"cannot be read: {error.strerror}", "stray", "check the disk")
    if digests == {now}:
        return None
    if len(digests) > 1:
        words = "encoders saw different content of its media"
    else:
        words = "its media are not those that its tokens were made from"
    return Finding(clip.clip_id, words, "damage", _RESTORE)
