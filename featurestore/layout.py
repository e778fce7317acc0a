"""Keys of a store's files, and the arithmetic between rows and blocks: pure functions, no I/O.

A store is plain Zarr v3, Parquet and JSON. Listing keys answers most questions ("which blocks are committed?") without
opening a file; a file with another name than these is an orphan.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from featurestore.clips import KINDS
from mervcache.errors import StoreFormatError, UserError

FORMAT_VERSION = 1
DEFAULT_BLOCK_ROWS: dict[str, int] = {"video": 64, "image": 256}
MAX_BLOCK_ROWS = 65_536  # a shard's index is 16 bytes a row and must stay small

ROOT_METADATA = "zarr.json"
PARTS, SAMPLES, RECEIPTS, SNAPSHOTS, TAGS, JOURNAL, TOMBSTONES, CANARIES, TEMPORARY = (
    "clips",
    "samples",
    "receipts",
    "snapshots",
    "tags",
    "journal",
    "tombstones",
    "canaries",
    "tmp",
)
CARD, LISTING = "README.md", "listing.json"  # written by `push`: for people, and for places that cannot list
VIEWER = "viewer"  # tables written by `push` for the Hub's dataset viewer
NEWEST = "newest.json"  # in a bucket: what is newest, for readers; see newest.py
# Arrays of a group, in the order in which their shards are put and their rows digested: tokens last, see writer.py.
ARRAYS: tuple[str, ...] = ("prefix", "scale", "offset", "tokens")
TRAILING_AXES: dict[str, int] = {"prefix": 3, "scale": 1, "offset": 1, "tokens": 4}  # axes after "row"

GROUP_NAME = re.compile(r"[a-z0-9_.]+-[0-9a-f]{12}")
SAMPLES_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
JOURNAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")

_PART_FILE = re.compile(r"part-(\d{5,9})\.parquet")
_SAMPLES_FILE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,99})(?:\.([1-9]\d{0,5}))?\.parquet")
_RECEIPT_FILE = re.compile(r"(\d{8})\.json")
_JOURNAL_FILE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,209})\.json")
_TOMBSTONE_FILE = re.compile(r"([0-9a-f]{16})\.json")
_TAG = r"[A-Za-z0-9][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*"  # also a tag of git
MAX_TAG_CHARACTERS = 100
_TAG_FILE = re.compile(rf"({_TAG})\.json")
_SNAPSHOT_ID = r"\d{8}-[0-9a-f]{12}"
_CANARY_FILE = re.compile(rf"({GROUP_NAME.pattern})\.safetensors")
_SNAPSHOT_FILE = re.compile(rf"({_SNAPSHOT_ID})\.json")
_RECORD_FILES = {
    SNAPSHOTS: re.compile(rf"({_SNAPSHOT_ID})\.(?:json|parquet)"),
    TAGS: _TAG_FILE,
    JOURNAL: _JOURNAL_FILE,
    TOMBSTONES: _TOMBSTONE_FILE,
}


def allocated_blocks(max_row: int, block_rows: int) -> int:
    """Blocks that hold rows 0..max_row; max_row = -1 is no row at all."""
    return -(-(max_row + 1) // block_rows)


def first_row_of_next_block(max_row: int, block_rows: int) -> int:
    """First row of the next batch: a batch starts a new block, the tail of the last one stays unused."""
    return allocated_blocks(max_row, block_rows) * block_rows


def block_of(row: int, block_rows: int) -> int:
    return row // block_rows


def slot_of(row: int, block_rows: int) -> int:
    """Place of a row within its block."""
    return row % block_rows


def rows_of(block: int, block_rows: int) -> range:
    return range(block * block_rows, (block + 1) * block_rows)


def part_key(number: int) -> str:
    return f"{PARTS}/part-{number:05d}.parquet"


def samples_key(name: str, version: int = 1) -> str:
    """`samples/NAME.parquet`; later versions of the same name are NAME.2.parquet and so on."""
    if not SAMPLES_NAME.fullmatch(name):
        raise UserError(f"samples name must be letters, digits, '_' and '-', at most 100, got {name!r}")
    return f"{SAMPLES}/{name}.parquet" if version == 1 else f"{SAMPLES}/{name}.{version}.parquet"


def group_prefix(kind: str, group: str) -> str:
    """The Zarr group of one encoder and kind, checked: names may come from untrusted metadata."""
    if kind not in KINDS or not GROUP_NAME.fullmatch(group):
        raise StoreFormatError(f"{kind!r}/{group!r} does not name a feature group; expected KIND/ENCODER-IDENTITY12")
    return f"{kind}/{group}"


def group_metadata_key(kind: str, group: str) -> str:
    return f"{group_prefix(kind, group)}/zarr.json"


def array_metadata_key(kind: str, group: str, array: str) -> str:
    return f"{group_prefix(kind, group)}/{array}/zarr.json"


def shard_key(kind: str, group: str, array: str, block: int) -> str:
    """Zarr's default key of the shard: one shard holds whole rows, so every other index is 0."""
    zeros = "/0" * TRAILING_AXES[array]
    return f"{group_prefix(kind, group)}/{array}/c/{block}{zeros}"


def shard_place(key: str) -> tuple[str, str, str, int] | None:
    """(kind, group, array, block) of a shard's key; None of any other key."""
    parts = key.split("/")
    if len(parts) < 5 or parts[2] not in ARRAYS or not re.fullmatch(r"[0-9]{1,9}", parts[4]):
        return None
    place = (parts[0], parts[1], parts[2], int(parts[4]))
    try:
        return place if key == shard_key(*place) else None
    except StoreFormatError:
        return None


def receipts_prefix(kind: str, group: str) -> str:
    return f"{RECEIPTS}/{group_prefix(kind, group)}"


def journal_key(name: str) -> str:
    return f"{JOURNAL}/{name}.json"


def reference_clip_key(kind: str, group: str) -> str:
    """Tokens of the reference clips, see reference_clips.py."""
    return f"{CANARIES}/{group_prefix(kind, group)}.safetensors"


def reference_clip_groups(names: list[str]) -> set[str]:
    """Groups that have reference clips, among file names."""
    return {match[1] for name in names if (match := _CANARY_FILE.fullmatch(name))}


def receipt_key(kind: str, group: str, block: int) -> str:
    return f"{receipts_prefix(kind, group)}/{block:08d}.json"


def reference_clip_place(key: str) -> tuple[str, str] | None:
    """(kind, group) of the key of reference clips; None of any other key."""
    top, _, rest = key.partition("/")
    kind, _, file = rest.partition("/")
    match = _CANARY_FILE.fullmatch(file)
    return (kind, match[1]) if top == CANARIES and kind in KINDS and match else None


def receipt_place(key: str) -> tuple[str, str, int] | None:
    """(kind, group, block) of a receipt's key; None of any other key."""
    top, _, rest = key.partition("/")
    kind, _, rest = rest.partition("/")
    group, _, file = rest.partition("/")
    match = _RECEIPT_FILE.fullmatch(file)
    if top != RECEIPTS or kind not in KINDS or not GROUP_NAME.fullmatch(group) or not match:
        return None
    return kind, group, int(match[1])


def snapshot_keys(snapshot_id: str) -> tuple[str, str]:
    """(table, record) of a snapshot; the record is put last and commits it."""
    if not re.fullmatch(_SNAPSHOT_ID, snapshot_id):
        raise UserError(f"snapshot ids look like 00000003-0123456789ab, got {snapshot_id!r}")
    return f"{SNAPSHOTS}/{snapshot_id}.parquet", f"{SNAPSHOTS}/{snapshot_id}.json"


def part_numbers(names: list[str]) -> list[int]:
    """Numbers of the clip parts among file names, ascending; a gap means that a part is lost."""
    numbers = sorted(int(match[1]) for name in names if (match := _PART_FILE.fullmatch(name)))
    if numbers != list(range(len(numbers))):
        missing = sorted(set(range(len(numbers))) - set(numbers))
        raise StoreFormatError(f"clip part {missing[0]} of {len(numbers)} is missing: rows cannot be assigned to clips")
    return numbers


def samples_versions(names: list[str]) -> dict[str, int]:
    """Newest version by samples name."""
    newest: dict[str, int] = {}
    for name in names:
        if match := _SAMPLES_FILE.fullmatch(name):
            newest[match[1]] = max(newest.get(match[1], 0), int(match[2] or 1))
    return newest


def samples_files(names: list[str]) -> dict[str, tuple[str, int]]:
    """Every version of every samples file among file names: name of the file -> (samples name, version)."""
    matches = ((name, _SAMPLES_FILE.fullmatch(name)) for name in names)
    return {name: (match[1], int(match[2] or 1)) for name, match in matches if match}


def tombstone_key(tombstone_id: str) -> str:
    return f"{TOMBSTONES}/{tombstone_id}.json"


def tombstone_names(names: list[str]) -> list[str]:
    return sorted(match[1] for name in names if (match := _TOMBSTONE_FILE.fullmatch(name)))


def block_number(text: object) -> int:
    """A block's number from metadata; a ValueError where it could not be the name of a receipt."""
    number = int(str(text)) if len(str(text)) <= 8 else -1
    if not 0 <= number < 10**8:
        raise ValueError(f"block {str(text)[:20]!r}")
    return number


def receipt_blocks(names: list[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := _RECEIPT_FILE.fullmatch(name))}


def journal_names(names: list[str]) -> list[str]:
    return sorted(match[1] for name in names if (match := _JOURNAL_FILE.fullmatch(name)))


def snapshot_ids(names: list[str]) -> list[str]:
    """Ids of the committed snapshots, oldest first; ties of racing publishers in the order of their digests."""
    return sorted(match[1] for name in names if (match := _SNAPSHOT_FILE.fullmatch(name)))


def is_snapshot_id(text: str) -> bool:
    return re.fullmatch(_SNAPSHOT_ID, text) is not None


def tag_key(name: str) -> str:
    """`tags/NAME.json`; UserError for a name that is no tag."""
    if len(name) > MAX_TAG_CHARACTERS or not re.fullmatch(_TAG, name) or is_snapshot_id(name):
        raise UserError(
            f"a tag is letters, digits, '_', '-' and single dots, at most {MAX_TAG_CHARACTERS} characters and no "
            f"snapshot id, got {name!r}"
        )
    return f"{TAGS}/{name}.json"


def tag_names(names: list[str]) -> list[str]:
    """Sorted tags among file names."""
    tags = sorted(match[1] for name in names if (match := _TAG_FILE.fullmatch(name)))
    return [tag for tag in tags if len(tag) <= MAX_TAG_CHARACTERS and not is_snapshot_id(tag)]


def viewer_key(name: str) -> str:
    """A table that `push` writes for the Hub's dataset viewer."""
    return f"{VIEWER}/{name}.parquet"


def record_name(key: str) -> str | None:
    """The id or name in the key of a snapshot, tag, journal or tombstone; None of any other key."""
    folder, _, file = key.partition("/")
    match = _RECORD_FILES[folder].fullmatch(file) if folder in _RECORD_FILES else None
    return match[1] if match else None


def check_block_rows(block_rows: Mapping[str, Any] | None) -> dict[str, int]:
    """Defaults filled in, values checked."""
    given = dict(block_rows or {})
    if unknown := sorted(set(given) - set(KINDS)):
        raise UserError(f"block rows are given per kind ({', '.join(KINDS)}), got {', '.join(map(str, unknown))}")
    rows = DEFAULT_BLOCK_ROWS | given
    for kind, count in rows.items():
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_BLOCK_ROWS:
            raise UserError(f"block rows of {kind} must be 1..{MAX_BLOCK_ROWS}, got {count!r}")
    return rows
