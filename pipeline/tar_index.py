"""Index of an uncompressed tar (ustar, GNU, pax): name -> offset and size of its regular files, from headers alone.

The archive is read through a function, so that it may be a file or an object in a bucket.

Python's `tarfile` is not used, because archives are untrusted: it reads a pax header of any claimed size into memory,
and some versions loop on negative sizes. Here an extended header has at most `MAX_EXTENDED_BYTES`, offsets only grow,
and nothing is extracted: links, devices, sparse files and names that climb out have no entry.
"""

from __future__ import annotations

import functools
import os
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from featurestore.clips import check_relative_path
from mervcache.errors import MediaError, UserError

BLOCK_BYTES = 512  # unit of the tar format
MAX_EXTENDED_BYTES = 1 << 20  # of one long-name or pax header
MAX_OCTAL_BYTES = 8 << 30  # of a size in the header itself; of larger files an extended header may give it
MAX_MEMBERS = 2_000_000  # of one archive: about 400 MB of index
MAX_EXAMPLES = 5  # of names that no clip can have
CACHED_ARCHIVES = 32  # indexes kept in a process; one of 10,000 members is about 2 MB

REGULAR = (b"0", b"\0", b"7")
SPARSE = b"S"  # GNU's own sparse format: extension blocks may follow the header
EXTENDED = (b"L", b"K", b"x", b"g")  # headers that describe the member after them
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # their size field is ignored
FOLDER = b"5"
OTHER_KINDS = {
    b"1": "a link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    SPARSE: "a sparse file",
}


ReadAt = Callable[[int, int], bytes]  # (number of bytes, offset) -> the bytes, fewer at the end of the archive


@dataclass(frozen=True)
class TarIndex:
    """The regular files of one archive, in archive order; a name that comes twice means its last file, as in tar."""

    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (offset, size) in bytes
    refused: dict[str, str] = field(default_factory=dict)  # name -> what it is instead of a regular file
    unusable: tuple[str, ...] = ()  # the first few regular files whose names no clip can have: absolute, not UTF-8, ...
    num_unusable: int = 0
    num_replaced: int = 0  # files whose name comes again later in the archive
    is_damaged: bool = False  # a header cannot be read or data are cut off: what follows is unknown


@dataclass(frozen=True)
class _Header:
    name: str | None  # None: not valid UTF-8
    kind: bytes  # the type flag
    size: int  # bytes of data that follow
    is_sparse: bool = False


def tar_index(path: str) -> TarIndex:
    """The index of the archive at `path`, from the cache while size and time of the file stay the same."""
    status = os.stat(path)
    return _cached_index(path, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=CACHED_ARCHIVES)
def _cached_index(path: str, size: int, mtime_ns: int, inode: int) -> TarIndex:
    del mtime_ns, inode  # parts of the cache key only
    with open(path, "rb", buffering=0) as file:
        return read_index(functools.partial(os.pread, file.fileno()), size)


def read_index(
    read_at: ReadAt, archive_bytes: int, on_member: Callable[[str, int, int], None] = lambda name, offset, size: None
) -> TarIndex:
    """The index of an archive, by walking its headers from the first to the last.

    `on_member` is called with name, offset and size of every regular file, in archive order. Raises `MediaError` for
    what is no plain tar.
    """
    members: dict[str, tuple[int, int]] = {}
    refused: dict[str, str] = {}
    unusable: list[str] = []
    num_unusable = num_replaced = 0
    is_damaged = False
    try:
        for header, offset in _walk(read_at, archive_bytes):
            if header.kind == FOLDER:
                continue
            name = clip_name(header.name)
            if name is None:
                num_unusable += 1
                if len(unusable) < MAX_EXAMPLES:
                    unusable.append(repr(header.name)[:200])
                continue
            if len(members) + len(refused) >= MAX_MEMBERS:
                raise MediaError(f"tar archive has more than {MAX_MEMBERS} members")
            num_replaced += members.pop(name, None) is not None
            refused.pop(name, None)
            if header.kind in REGULAR and not header.is_sparse:
                members[name] = (offset, header.size)
                on_member(name, offset, header.size)
            else:
                refused[name] = "a sparse file" if header.is_sparse else OTHER_KINDS.get(header.kind, "of unknown type")
    except _DamagedTarError:
        if not members and not refused:
            raise MediaError("tar archive is not a plain, readable tar") from None
        is_damaged = True
    return TarIndex(members, refused, tuple(unusable), num_unusable, num_replaced, is_damaged)


def clip_name(name: str | None) -> str | None:
    """A member's name as a clip's path has it: "./v//a.mp4" is "v/a.mp4"; None for a name that no clip can have."""
    if name is None or ".." in name.split("/"):
        return None
    name = posixpath.normpath(name)
    try:
        check_relative_path(name)
    except UserError:
        return None
    return name


class _DamagedTarError(Exception):
    """The archive cannot be followed further."""


def _walk(read_at: ReadAt, archive_bytes: int) -> Iterator[tuple[_Header, int]]:
    """Yield every member's header, extended headers applied, with the offset of its data."""
    offset, overrides = 0, {}
    while True:
        block = read_at(BLOCK_BYTES, offset)
        if not block.strip(b"\0"):
            if len(block) < BLOCK_BYTES and offset == 0:
                raise _DamagedTarError
            return  # a zero block or the end of the file ends the archive
        header = _parse_header(block)
        data = offset + BLOCK_BYTES
        has_more = header.kind == SPARSE and block[482]  # blocks that map the holes of GNU's sparse files
        while has_more:
            extension = read_at(BLOCK_BYTES, data)
            if len(extension) < BLOCK_BYTES:
                raise _DamagedTarError
            data, has_more = data + BLOCK_BYTES, extension[504]
        if header.kind in EXTENDED:
            if header.size > MAX_EXTENDED_BYTES or data + header.size > archive_bytes:
                raise _DamagedTarError
            content = read_at(header.size, data)
            if header.kind == b"L":
                overrides["path"] = _decode(content.split(b"\0", 1)[0])
            elif header.kind == b"x":
                overrides |= _parse_pax(content)
            # b"K" names a link's target, b"g" holds defaults: neither matters here
        else:
            header, overrides = _apply(header, overrides), {}
            if data + header.size > archive_bytes:
                raise _DamagedTarError
            yield header, data
        offset = data + -(-header.size // BLOCK_BYTES) * BLOCK_BYTES


def is_header_of(block: bytes, size: int) -> bool:
    """Whether a block is the header of a regular file of `size` bytes; a size in an extended header is not checked."""
    try:
        header = _parse_header(block)
    except _DamagedTarError:
        return False
    return header.kind in REGULAR and (header.size == size or size >= MAX_OCTAL_BYTES)


def _parse_header(block: bytes) -> _Header:
    if len(block) < BLOCK_BYTES:
        raise _DamagedTarError
    checksum = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    if _number(block[148:156]) != checksum:
        raise _DamagedTarError
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and prefix:
        name = prefix + b"/" + name
    kind = block[156:157]
    return _Header(_decode(name), kind, 0 if kind in WITHOUT_DATA else _number(block[124:136]))


def _number(digits: bytes) -> int:
    """A header's number: octal text, or base 256 where the first bit is set (GNU); never negative."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    try:
        value = int(digits.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        raise _DamagedTarError from None
    if value < 0:
        raise _DamagedTarError
    return value


def _parse_pax(content: bytes) -> dict[str, str | None]:
    """`LENGTH key=value\\n` records; keys that do not matter here are dropped."""
    found: dict[str, str | None] = {}
    start = 0
    while start < len(content) and content[start : start + 1] != b"\0":
        length, _, _ = content[start : start + 12].partition(b" ")
        if not length.isdigit() or not 5 <= int(length) <= len(content) - start:
            raise _DamagedTarError
        key, separator, value = content[start + len(length) + 1 : start + int(length) - 1].partition(b"=")
        if not separator:
            raise _DamagedTarError
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            found[key.decode("ascii", "replace")] = _decode(value)
        start += int(length)
    return found


def _apply(header: _Header, overrides: dict[str, str | None]) -> _Header:
    """The header with the path, size and sparse flag of the extended headers before it."""
    size = header.size
    if "size" in overrides and header.kind not in WITHOUT_DATA:
        text = overrides["size"] or ""
        if not (text.isascii() and text.isdigit() and len(text) <= 20):
            raise _DamagedTarError
        size = int(text)
    is_sparse = any(key.startswith("GNU.sparse.") for key in overrides)
    return _Header(overrides.get("path", header.name), header.kind, size, is_sparse)


def _decode(name: bytes) -> str | None:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return None
