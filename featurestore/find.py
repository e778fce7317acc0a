"""Which store is meant: the one named, or the only one under features/, where extraction puts stores by default.

Shared by all command lines, so that they agree. Nothing heavy is imported: `--help` reads this room.
"""

from __future__ import annotations

from pathlib import Path

from featurestore.errors import UserError

FEATURES = Path("features")
ROOT_METADATA = "zarr.json"


def find_store(given: str | Path | None) -> Path:
    """The store named, or the only one under features/ in this folder."""
    if given is not None:
        return Path(given)
    found = stores_under(FEATURES)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"no store under {FEATURES.resolve()}: make one with `merv-pipeline extract`, or give its path")
    raise UserError(f"{len(found)} stores under {FEATURES}/, give the path of one: {', '.join(map(str, found))}")


def stores_under(folder: Path) -> list[Path]:
    """Folders in `folder` that are named like stores and hold their root metadata."""
    return sorted(path for path in folder.glob("*.zarr") if (path / ROOT_METADATA).is_file())


def no_store_at(path: str | Path) -> str:
    """The message for a path that holds no store: the ones nearby first, for it may be a typing mistake."""
    path = Path(path)
    nearby = [str(store) for folder in (path.parent, FEATURES) for store in stores_under(folder)]
    if nearby:
        return f"there is no feature store at {path}; nearby: {', '.join(dict.fromkeys(nearby))}"
    return f"there is no feature store at {path}; make one with `merv-pipeline extract --dataset NAME --store PATH`"
