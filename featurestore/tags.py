"""Tags: names of snapshots, such as paper-v1, that stay until they are moved on purpose.

A tag is one small JSON file that is created exclusively. Moving it replaces the file by one with the next number, so a
copy of the store can tell a moved tag from another tag of the same name. A tag keeps no clip from being removed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from featurestore.layout import ROOT_METADATA, TAGS, is_snapshot_id, tag_key, tag_names
from featurestore.locate import Place, no_store_at, place_of
from featurestore.objects.base import Objects, get_bounded, put_if_absent
from featurestore.objects.open import check_writable, open_objects
from featurestore.snapshots import load_snapshot, newest_snapshot_id
from mervcache.errors import StoreDamagedError, StoreError, StoreFormatError, StoreNotFoundError, UserError
from mervcache.files import canonical_json, is_json_object, load_json, record_digest

MAX_TAG_BYTES = 4096
MAX_NUMBER = 1_000_000
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Tag:
    """A name and the id of the snapshot that it names."""

    name: str
    snapshot: str
    number: int = 1  # one more each time the tag is moved

    def to_bytes(self) -> bytes:
        return (canonical_json(self._content() | {"digest": record_digest(self._content())}) + "\n").encode()

    def _content(self) -> dict[str, Any]:
        return {"format": _VERSION, "name": self.name, "snapshot": self.snapshot, "number": self.number}

    @classmethod
    def parse(cls, data: bytes, name: str) -> Tag:
        """A tag from its file, whole and undamaged."""
        what = f"tag {name}"
        record = load_json(data, what)
        fields = record if is_json_object(record) else {}
        snapshot, number = str(fields.get("snapshot")), fields.get("number") or 0
        if not is_snapshot_id(snapshot) or type(number) is not int or not 1 <= number <= MAX_NUMBER:
            raise StoreFormatError(f"{what} must name a snapshot and have a number, got {str(fields)[:200]}")
        tag = cls(name=name, snapshot=snapshot, number=number)
        if tag.to_bytes() != data:
            raise StoreDamagedError(f"{what} does not match its own digest; run `merv-pipeline repair`")
        return tag


def tag_snapshot(place: Place, name: str, *, snapshot: str | None = None, force: bool = False) -> Tag:
    """Name a snapshot of a store, by default the newest one; returns the tag.

    Naming the same snapshot again changes nothing. `force` moves a tag that names another one.

    Raises
    ------
    UserError
        For a name that cannot be a tag, and for a tag that names another snapshot, without `force`.
    StoreError
        For a store without that snapshot.
    """
    place, key = place_of(place), tag_key(name)
    check_writable(place)
    objects = open_objects(place)
    if not objects.exists(ROOT_METADATA):
        raise StoreNotFoundError(no_store_at(place))
    wanted = resolve_snapshot(objects, snapshot) if snapshot else newest_snapshot_id(objects)
    if wanted is None:
        raise StoreError(f"{place} has no snapshot yet: let its extraction end, or run it again to finish it")
    tag = Tag(name=name, snapshot=load_snapshot(objects, wanted).id)
    if put_if_absent(objects, key, tag.to_bytes()):
        return tag
    while True:
        old = read_tag(objects, name)
        if old.snapshot == tag.snapshot:
            return old
        if not force:
            raise UserError(
                f"the tag {name} names snapshot {old.snapshot}, not {tag.snapshot}: choose another name, or move it "
                "with --force"
            )
        moved = replace(tag, number=old.number + 1)
        if objects.compare_and_swap(key, old.to_bytes(), moved.to_bytes()):
            return moved


def read_tag(objects: Objects, name: str) -> Tag:
    """A tag by name; FileNotFoundError if there is none."""
    return Tag.parse(get_bounded(objects, tag_key(name), MAX_TAG_BYTES), name)


def read_tags(objects: Objects) -> dict[str, Tag]:
    """Every tag by name."""
    return {name: read_tag(objects, name) for name in tag_names(objects.list_names(TAGS))}


def resolve_snapshot(objects: Objects, name: str) -> str:
    """The id of the snapshot that a tag names; an id is returned as it is. StoreError for an unknown tag."""
    if is_snapshot_id(name):
        return name
    try:
        return read_tag(objects, name).snapshot
    except FileNotFoundError:
        known = ", ".join(tag_names(objects.list_names(TAGS))) or "none"
        raise StoreError(f"there is no tag {name!r}; the tags of this store are: {known}") from None
