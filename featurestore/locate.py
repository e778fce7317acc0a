"""Which store a command line means: the one named, or the only one under features/, where extraction puts stores.

A place is a folder (`Path`) or a URL (text). Nothing heavy is imported, since `--help` imports this module.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mervcache.errors import UserError

FEATURES = Path("features")
ROOT_METADATA = "zarr.json"

Place = str | Path  # a URL as text, a folder as a path


def place_of(given: Place) -> Place:
    """A folder as a `Path` (`file://` too), any other URL as text without a slash at its end."""
    text = str(given)
    if re.match(r"[a-z][a-z0-9]+:/(?!/)", text):
        raise UserError(f"{text} is neither a folder nor an address; did you mean {text.replace(':/', '://', 1)}?")
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    return text.rstrip("/") if is_url(text) else Path(given)


def check_room_for_store(place: Place) -> None:
    """UserError where no store can be made; creates nothing, so it can run before anything is loaded."""
    if isinstance(place := place_of(place), Path):
        check_room(place, "store", "--store")


def check_room(path: Path, thing: str, option: str) -> None:
    """UserError where no folder can be made for a `thing`, whose path `option` sets."""
    nearest = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder))
    if not nearest.is_dir():
        raise UserError(f"a {thing} is a folder, and {nearest} is a file: give another {option}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"no {thing} can be made at {path}: {nearest} may not be written to; give another {option}")


def check_is_another(source: Place, destination: Place) -> None:
    """UserError if both are the same place: a store copied onto itself would look like a finished copy."""
    source, destination = place_of(source), place_of(destination)
    same = str(source) == str(destination) if is_url(source) else Path(source).resolve() == Path(destination).resolve()
    if same:
        raise UserError(f"{destination} is the store itself: name another place for the result")


def is_url(place: Place) -> bool:
    return "://" in str(place)


def find_store(given: Place | None) -> Place:
    """The store named, or the only one under features/ in this folder."""
    if given is not None:
        return place_of(given)
    found = stores_under(FEATURES)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"no store under {FEATURES.resolve()}: make one with `merv-pipeline extract`, or give its path")
    raise UserError(f"{len(found)} stores under {FEATURES}/, give the path of one: {', '.join(map(str, found))}")


def names_of(text: str) -> list[str]:
    """Names in one text, separated by commas."""
    return [name for part in text.split(",") if (name := part.strip())]


def store_first(words: Sequence[str], given: Place | None) -> tuple[Place, list[str]]:
    """(store, other words): the store `given`, else the first word if it is a store and others follow."""
    stores = [w for w in words if is_url(w) or (Path(w) / ROOT_METADATA).is_file()] if given is None else []
    if not stores:
        return find_store(given), list(words)
    if words[0] != stores[0]:
        others = [word for word in words if word != stores[0]]
        raise UserError(f"the store goes first: {' '.join([stores[0], *others])}")
    if len(words) == 1:
        raise UserError(
            f"{words[0]} is the store: name a clip behind it (to `inspect`, an encoder that `status` lists)"
        )
    return place_of(words[0]), list(words[1:])


def stores_under(folder: Path) -> list[Path]:
    """Folders in `folder` that are named like stores and hold their root metadata."""
    return sorted(path for path in folder.glob("*.zarr") if (path / ROOT_METADATA).is_file())


def no_store_at(path: Place) -> str:
    """The message for a path that holds no store; lists those nearby, as it may be a typing mistake."""
    if is_url(path):
        return (
            f"there is no feature store at {path}: no {ROOT_METADATA} was found there; check the path (for a bucket, "
            "endpoint and region too), or put one there with `merv-pipeline push STORE URL`"
        )
    path = Path(path)
    shown = path if path.is_absolute() else f"{path} ({path.absolute()})"
    nearby = [str(store) for folder in (path.parent, FEATURES) for store in stores_under(folder)]
    if nearby:
        return f"there is no feature store at {shown}; nearby: {', '.join(dict.fromkeys(nearby))}"
    return f"there is no feature store at {shown}; make one with `merv-pipeline extract --dataset NAME --store PATH`"
