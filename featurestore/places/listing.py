"""The listing: `listing.json`, what a store holds, for places that cannot be asked (web servers, the Hub).

Written by `push` after the snapshot. It is a hint and no promise: every byte that is read by it has its own digest.
"""

from __future__ import annotations

from collections.abc import Mapping

from featurestore.clips import check_relative_path
from featurestore.digests import canonical_json
from featurestore.errors import StoreFormatError, UserError
from featurestore.layout import LISTING
from featurestore.metadata import load_json

_FORMAT = 1


def listing_bytes(sizes: Mapping[str, int]) -> bytes:
    """Key -> size in bytes, as canonical JSON."""
    return (canonical_json({"format": _FORMAT, "objects": dict(sizes)}) + "\n").encode()


def parse_listing(data: bytes) -> dict[str, int]:
    """The listing of a stranger, every name and size checked."""
    document = load_json(data, LISTING)
    sizes = document.get("objects") if isinstance(document, dict) and document.get("format") == _FORMAT else None
    if not isinstance(sizes, dict):
        raise StoreFormatError(f"{LISTING} is not a listing of this version: push the store again")
    try:
        for key, size in sizes.items():
            check_relative_path(key)
            if type(size) is not int or size < 0:
                raise StoreFormatError(f"{LISTING} gives {key!r} the size {size!r}")
    except UserError as error:
        raise StoreFormatError(f"{LISTING} holds a name that no store has: {error}") from error
    return sizes
