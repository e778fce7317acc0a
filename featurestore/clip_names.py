"""Clips by name: an id as a value, and the ids that a person's shorter names stand for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from featurestore.clips import Clip
from mervcache.errors import UserError

MAX_SHOWN = 3  # ids in an error
MAX_COMPARED = 20_000  # ids that are searched for a similar one: a million would take a minute


def clips_named(known: Collection[str], names: Iterable[str]) -> list[str]:
    """The id of each name, in the order given; a name is a whole id, or an end of one that no other clip has.

    An end begins at a slash wherever that names a clip ("v1.mp4" is videos/v1.mp4 and not videos/old-v1.mp4), else
    anywhere. UserError lists a few ids for a name that fits several clips or none.

    >>> clips_named(["d/films/v1.mp4", "d/films/v11.mp4"], ["films/v1.mp4"])
    ['d/films/v1.mp4']
    """
    ids: Collection[str] = dict.fromkeys(known) if isinstance(known, Sequence) else known
    return [name if name in ids else _clip_that_ends_with(name, ids) for name in names]


def ids_that_end_with(name: str, ids: Iterable[str]) -> list[str]:
    """The `ids` that end with /`name`, else those that end with `name` anywhere."""
    ends = [clip_id for clip_id in ids if name and clip_id.endswith(name)]
    return [clip_id for clip_id in ends if clip_id.endswith("/" + name)] or ends


def _clip_that_ends_with(name: str, ids: Collection[str]) -> str:
    matches = ids_that_end_with(name, ids)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"{name!r} is the end of {len(matches)} clip ids, give more of one: {_some(sorted(matches))}")
    inside = sorted(clip_id for clip_id in ids if name and name in clip_id)
    if inside:
        raise UserError(f"{name!r} is part of {len(inside)} clip ids, give one, or its end: {_some(inside)}")
    compared = sorted(ids)[:MAX_COMPARED]
    ends = {clip_id[-max(1, len(name)) :]: clip_id for clip_id in reversed(compared)}
    near = difflib.get_close_matches(name, compared, n=MAX_SHOWN, cutoff=0.6)
    near += [ends[end] for end in difflib.get_close_matches(name, ends, n=MAX_SHOWN)]
    near = list(dict.fromkeys(near))[:MAX_SHOWN]
    hint = f"; near: {_some(near)}" if near else f"; its ids are like {min(ids)}" if ids else ""
    raise UserError(f"no clip of this store is named {name!r}{hint}")


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:MAX_SHOWN]) + (", ..." if ids[MAX_SHOWN:] else "")


def clip_of_id(clip_id: str, kind: str) -> Clip:
    """The clip that an id names; the inverse of `Clip.clip_id`."""
    dataset, _, rest = clip_id.partition("/")
    fragment = re.search(r"#(?:end_frame=(\d+)|t=([^,]*),([^,]*))\Z", rest)
    path = (rest[: fragment.start()] if fragment else rest).replace("%23", "#").replace("%25", "%")
    frame, start, end = fragment.groups() if fragment else (None, None, None)
    return Clip(
        dataset=dataset,
        path=path,
        kind=kind,  # type: ignore[arg-type] - Clip checks it
        start_s=float(start) if start else None,
        end_s=float(end) if end else None,
        end_frame=int(frame) if frame else None,
    )
