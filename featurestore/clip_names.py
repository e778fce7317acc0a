"""Clips by the names that people type: a whole id, or an end of one that no other clip has.

`tombstone` and `inspect` understand the same names. An end begins at a slash wherever that names a clip ("v1.mp4" is
videos/v1.mp4 and not videos/old-v1.mp4), else anywhere. What fits several clips or none is an error with a few ids.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence

from featurestore.errors import UserError

SHOWN = 3  # ids in an error
MAX_COMPARED = 20_000  # ids that are searched for a similar one: a million would take a minute


def clips_named(known: Collection[str], names: Iterable[str]) -> list[str]:
    """The id of each name, in the order given.

    >>> clips_named(["d/films/v1.mp4", "d/films/v11.mp4"], ["films/v1.mp4"])
    ['d/films/v1.mp4']
    """
    ids = known if isinstance(known, set | frozenset | dict) else dict.fromkeys(known)
    return [name if name in ids else _only(name, ids) for name in names]


def _only(name: str, ids: Collection[str]) -> str:
    found = [clip_id for clip_id in ids if clip_id.endswith("/" + name)] if name else []
    found = found or [clip_id for clip_id in ids if name and clip_id.endswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{name!r} is the end of {len(found)} clip ids, give more of one: {_some(sorted(found))}")
    inside = sorted(clip_id for clip_id in ids if name and name in clip_id)
    if inside:
        raise UserError(f"{name!r} is part of {len(inside)} clip ids, give one, or its end: {_some(inside)}")
    near = _nearest(name, sorted(ids)[:MAX_COMPARED])
    hint = f"; near: {_some(near)}" if near else f"; its ids are like {min(ids)}" if ids else ""
    raise UserError(f"no clip of this store is named {name!r}{hint}")


def _nearest(name: str, ids: Sequence[str]) -> list[str]:
    """Ids whose end looks like the name."""
    ends = {clip_id[-max(1, len(name)) :]: clip_id for clip_id in reversed(ids)}
    whole = difflib.get_close_matches(name, ids, n=SHOWN, cutoff=0.6)
    return list(dict.fromkeys([*whole, *(ends[end] for end in difflib.get_close_matches(name, ends, n=SHOWN))]))[:SHOWN]


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (", ..." if ids[SHOWN:] else "")
