"""Source: a clip's bytes, wherever they lie, and their digest.

A local file and a tar member are read alike; a folder of frames is a list of files. The digest is taken first, from
the whole file: it warms the page cache for the decoder, and a disk that fails shows here, through plain reads, where
it cannot be taken for a damaged clip.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mervcache.errors import MediaError, RunStoppedError
from pipeline.media import FrameFolder, LocalFile, Media, TarMember, resolve_media

READ_BYTES = 1 << 20
# A clip cannot cause these: the disk, the share, the account or this process is at fault.
MACHINE_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EREMOTEIO", "ESTALE", "ENOSPC", "EDQUOT", "ENODEV", "ENXIO", "EMFILE", "ENFILE", "EKEYEXPIRED"),
        *("ENOTCONN", "ECONNRESET", "ECONNABORTED", "ESHUTDOWN", "EHOSTDOWN", "EHOSTUNREACH", "ETIMEDOUT"),
        *("ENETDOWN", "ENETUNREACH", "ENOLINK", "ECOMM"),
    )
    if hasattr(errno, name)
)


@dataclass(frozen=True)
class Source:
    """The media of one clip, found and safe under its root."""

    root: str
    path: str  # relative, as the clip names it
    media: Media

    @classmethod
    def find(cls, root: str, path: str) -> Source:
        """Resolve a clip's path; `MediaError` if nothing readable is there, `RunStoppedError` if the root is gone."""
        return cls(root, path, resolve_media(root, path))

    @property
    def num_bytes(self) -> int:
        """Size of everything that decoding may read."""
        if isinstance(self.media, TarMember):
            return self.media.size
        paths = self.media.paths if isinstance(self.media, FrameFolder) else (self.media.path,)
        return sum(os.stat(path).st_size for path in paths)

    def open(self) -> BinaryIO:
        """The bytes of a file or tar member, readable and seekable."""
        assert not isinstance(self.media, FrameFolder), "a folder of frames has no bytes of its own"
        if isinstance(self.media, LocalFile):
            return open(self.media.path, "rb")
        window = FileWindow(self.media.tar_path, self.media.offset, self.media.size)
        return io.BufferedReader(window, buffer_size=READ_BYTES)

    def head(self, num_bytes: int = 16) -> bytes:
        """The first bytes, by which formats are told apart."""
        with self.open() as file:
            return file.read(num_bytes)

    def sha256(self) -> str:
        """Digest of a file's or tar member's bytes; of a folder's sorted "name NUL size NUL sha256" lines."""
        if isinstance(self.media, TarMember):
            with self.open() as file:
                return _digest(file)
        if isinstance(self.media, LocalFile):
            return _file_sha256(self.media.path)
        lines = sorted(f"{p.name}\0{os.stat(p).st_size}\0{_file_sha256(p)}\n" for p in self.media.paths)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def read_through(self) -> None:
        """Read every byte once more, to tell a failing disk from a damaged clip."""
        paths = self.media.paths if isinstance(self.media, FrameFolder) else ()
        for file in [self.open()] if not paths else map(_open_plain, paths):
            with file:
                while file.read(READ_BYTES):
                    pass

    def explain(self, error: OSError) -> MediaError | RunStoppedError:
        """Whose fault an error of reading is: the clip's or the machine's."""
        if error.errno in MACHINE_ERRNOS:
            return RunStoppedError(f"cannot read {self.path} under {self.root}: {os.strerror(error.errno)}")
        try:
            Source.find(self.root, self.path)
        except (MediaError, RunStoppedError) as found:
            return found
        return MediaError(f"media file cannot be read: {os.strerror(error.errno) if error.errno else 'unknown error'}")


class FileWindow(io.RawIOBase):
    """`size` bytes of a file from `offset` on, as a file of its own."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        wanted = max(0, min(len(buffer), self._size - self._position))
        data = os.pread(self._file.fileno(), wanted, self._offset + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "seek before the start")
        self._position = base + offset
        return self._position

    def close(self) -> None:
        self._file.close()
        super().close()


_KNOWN_SHA256: dict[tuple[str, int, int], str] = {}  # (path, bytes, mtime in ns) -> sha256, for this process


def _open_plain(path: Path) -> BinaryIO:
    return open(path, "rb")


def _file_sha256(path: Path) -> str:
    """Digest of a file; clips of one file (spans) take it once per process."""
    status = os.stat(path)
    key = (str(path), status.st_size, status.st_mtime_ns)
    if key not in _KNOWN_SHA256:
        with open(path, "rb") as file:
            _KNOWN_SHA256[key] = _digest(file)
    return _KNOWN_SHA256[key]


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(READ_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
