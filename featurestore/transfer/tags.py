"""Tags of a store that is pushed or pulled, and the snapshots that they name."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from featurestore.layout import SNAPSHOTS, snapshot_ids, snapshot_keys, tag_key
from featurestore.objects.base import Objects, put_if_absent
from featurestore.parquet import digested_file
from featurestore.records import read_tombstones
from featurestore.snapshots import load_snapshot
from featurestore.tags import Tag, read_tags
from featurestore.transfer.selection import Selection
from mervcache.errors import UserError

if TYPE_CHECKING:
    from featurestore.objects.hub import HubObjects

log = logging.getLogger(__name__)


def tags_to_send(origin: Objects, target: Objects, selection: Selection) -> list[Tag]:
    """The tags that the destination is to have; UserError where it has another tag of that name.

    A tag that was moved at the destination since is left there. A part of a store is another snapshot, without tags.
    """
    tags, theirs = read_tags(origin), read_tags(target)
    if tags and not selection.is_whole:
        log.warning(
            "%d tags are not sent, since they name snapshots of the whole store: %s", len(tags), ", ".join(tags)
        )
        return []
    present = set(snapshot_ids(origin.list_names(SNAPSHOTS)))
    found: list[Tag] = []
    for name, tag in tags.items():
        other = theirs.get(name)
        if tag.snapshot not in present:
            log.warning("tag %s is not sent: its snapshot %s is missing; verify the source", name, tag.snapshot)
        elif other is not None and other.number == tag.number and other != tag:
            raise UserError(
                f"the tag {name} names snapshot {tag.snapshot} here and {other.snapshot} at the destination; nothing "
                "was sent: move the one that is wrong with `merv-pipeline tag STORE NAME --snapshot ID --force`"
            )
        elif other is not None and other.number > tag.number:
            log.warning("tag %s was moved at the destination and names %s there", name, other.snapshot)
        else:
            found.append(tag)
    return found


def copy_tagged_snapshots(origin: Objects, target: Objects, tags: Sequence[Tag], *, newest: str) -> None:
    """Snapshots that tags name, before the newest one: with the versions of samples that only they name."""
    erased = {sha256 for tombstone in read_tombstones(target).values() for sha256 in tombstone.erased}
    for snapshot_id in sorted({tag.snapshot for tag in tags} - {newest}):
        table_key, record_key = snapshot_keys(snapshot_id)
        if target.exists(record_key):
            continue
        snapshot = load_snapshot(origin, snapshot_id)
        for entry in snapshot.samples.values():
            if entry["sha256"] not in erased and not target.exists(entry["key"]):
                put_if_absent(target, entry["key"], digested_file(origin, entry["key"], entry["sha256"]))
        put_if_absent(target, table_key, digested_file(origin, table_key, snapshot.table_sha256))
        put_if_absent(target, record_key, snapshot.to_bytes())


def copy_tags(target: Objects, tags: Iterable[Tag]) -> dict[str, bool]:
    """Put the tags, after the snapshots; returns those that were written and whether another one was replaced.

    What is replaced is a tag that was moved at the source since an earlier transfer.
    """
    written: dict[str, bool] = {}
    for tag in tags:
        key, data = tag_key(tag.name), tag.to_bytes()
        if put_if_absent(target, key, data):
            written[tag.name] = False
        elif target.get(key) != data:
            target.replace(key, data)
            written[tag.name] = True
    return written


def tag_revisions(hub: HubObjects, snapshot: str, written: Mapping[str, bool]) -> None:
    """Tag the repository's newest commit by each tag of its newest snapshot, which readers of the commit open.

    A repository's tag cannot say which store in it is meant, so a store in a folder has none. Tags of older snapshots
    have none either: the commit that had them as the newest one may be another, or never have been.
    """
    if not hub.is_whole_repository:
        return
    for name, tag in read_tags(hub).items():
        is_left = tag.snapshot == snapshot and not hub.tag_revision(name, moved=written.get(name, False))
        if is_left and name in written:
            log.warning("the repository has a tag %s already, which is not moved: delete it there and push again", name)
