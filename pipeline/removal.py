"""Remove clips for good: from the store, and from the copies that this machine keeps in spools and caches.

What no command can reach is named in the result, so that the rest of a deletion can be done by hand.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any, cast
from urllib.parse import urlsplit

from featurestore.locate import Place, is_url
from featurestore.maintenance.tombstone import tombstone
from featurestore.objects.cache import cache_folder, clear_cache
from featurestore.objects.remote import READ_ONLY
from featurestore.records import driver_runs
from featurestore.writer import StoreWriter
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import UserError
from mervcache.files import RENDERED_FOLDER, user_cache
from mervcache.text import redact
from pipeline.media import Root
from pipeline.media_cache import MediaCache
from pipeline.remote_shards import RemoteRoot, address_of, forget_shard, split_member
from pipeline.summary import media_root

SHOWN = 3  # places of media in the result


def remove_clips(
    place: Place,
    names: Iterable[str],
    *,
    reason: str,
    all_copies: bool | None = None,
    progress: ProgressLine = SILENT,
) -> dict[str, Any]:
    """`tombstone`, then the removal of this machine's copies; errors are those of `tombstone`.

    For clips that were removed before, the copies alone are removed: as on another machine that has read them.
    """
    done = tombstone(place, names, reason=reason, all_copies=all_copies, progress=progress)
    writer = StoreWriter.open(place)
    removed = set(cast("list[str]", done["clips"]))
    table = writer.clips()
    paths = {
        (dataset, path)
        for clip_id, dataset, path in zip(*(table[c].to_pylist() for c in ("clip_id", "dataset", "path")), strict=True)
        if clip_id in removed
    }
    roots = _roots(driver_runs(writer.objects))
    media = {address(root, path) for dataset, path in paths for root in roots.get(dataset, ())}
    return done | {
        "files removed from spools and caches": forget_copies(paths, roots),
        "not reached": _not_reached(place, sorted(media)),
    }


def forget_copies(paths: Collection[tuple[str, str]], roots: Mapping[str, Collection[Root]]) -> int:
    """Remove what this machine keeps of clips, given as (dataset, path); returns how many files were removed.

    Members and captions of remote shards go by whole shards; the cache of remote stores and the rendered conversations
    as a whole, since they hold no names.
    """
    removed = clear_cache(cache_folder())
    for file in (user_cache() / RENDERED_FOLDER).glob("*"):
        file.unlink(missing_ok=True)
        removed += 1
    found = [(root, path) for dataset, path in paths for root in roots.get(dataset, ())]
    for root, path in found:
        if isinstance(root, RemoteRoot):
            removed += forget_shard(root, split_member(path)[0])
    with MediaCache() as cache:
        cache.forget({address(root, path) for root, path in found})
    return removed


def address(root: Root, path: str) -> str:
    """The file of a clip's media: a shard below a URL, a tar archive or the file itself."""
    file = split_member(path)[0]
    return address_of(root.url, file) if isinstance(root, RemoteRoot) else os.path.realpath(os.path.join(root, file))


def _roots(runs: Iterable[Mapping[str, Any]]) -> dict[str, list[Root]]:
    """Dataset -> every place where a run found its media."""
    found: dict[str, dict[str, Root]] = {}
    for run in runs:
        with suppress(UserError, KeyError):  # a journal is untrusted
            root = media_root(run)
            found.setdefault(run["config"]["dataset"], {})[f"{root!r}"] = root
    return {dataset: list(roots.values()) for dataset, roots in found.items()}


def _not_reached(place: Place, media: list[str]) -> list[str]:
    """Copies that this command leaves, with what removes them."""
    shown = ", ".join(map(redact, media[:SHOWN])) + (f" and {len(media) - SHOWN} more" if len(media) > SHOWN else "")
    lines = [f"the media: {shown}"] if media else []
    scheme = urlsplit(str(place)).scheme if is_url(place) else ""
    if scheme and scheme not in READ_ONLY:
        lines.append(
            f"older versions of objects below {redact(str(place))}, if the bucket keeps versions: delete those"
        )
    return [
        *lines,
        "spools and caches of other machines: run this command there too",
        "other copies of the store, until they are pushed to or pull from this one",
        "the history of a copy on the Hub, until it is squashed; versions of a copy in a bucket; backups",
        "what was made from the clip: exports, vectors, reports, predictions, trained models",
    ]
