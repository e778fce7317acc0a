"""Which store is meant: the one named, or the only one under features/, where extraction puts stores by default.

Shared by all command lines, so that they agree. A place is a folder (`Path`) or a URL (text). Nothing heavy is
imported: `--help` reads this room.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from featurestore.errors import UserError

FEATURES = Path("features")
ROOT_METADATA = "zarr.json"

Place = str | Path  # a URL as text, a folder as a path


def place_of(given: Place) -> Place:
    """A folder as a `Path` (`file://` too), any other URL as text without a slash at its end."""
    text = str(given)
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    return text.rstrip("/") if is_url(text) else Path(given)


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


def stores_under(folder: Path) -> list[Path]:
    """Folders in `folder` that are named like stores and hold their root metadata."""
    return sorted(path for path in folder.glob("*.zarr") if (path / ROOT_METADATA).is_file())


def no_store_at(path: Place) -> str:
    """The message for a path that holds no store: the ones nearby first, for it may be a typing mistake."""
    if is_url(path):
        return (
            f"there is no feature store at {path}: no {ROOT_METADATA} was found there; check the path (for a bucket, "
            "endpoint and region too), or put one there with `merv-pipeline push STORE URL`"
        )
    path = Path(path)
    nearby = [str(store) for folder in (path.parent, FEATURES) for store in stores_under(folder)]
    if nearby:
        return f"there is no feature store at {path}; nearby: {', '.join(dict.fromkeys(nearby))}"
    return f"there is no feature store at {path}; make one with `merv-pipeline extract --dataset NAME --store PATH`"
