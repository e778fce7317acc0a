"""Media of a clip: from a path relative to the dataset's root to the bytes and their digest.

Paths come from untrusted annotations, so nothing outside the real root is ever opened: a symbolic link inside the root
may lead only into it (the root itself may be a link) or into the one folder that the user names (`MediaRoot.links`),
and devices, pipes and sockets are refused. A fault of one clip is a `MediaError` whose text holds no absolute path; a
root that is gone or a share that stopped responding is a `RunStoppedError`, because it would otherwise quarantine the
whole dataset. Below a URL, paths name members of tar shards, which are fetched into the host's spool to be read.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from featurestore.clips import Kind, check_relative_path
from mervcache.errors import MediaError, RunStoppedError, UserError
from pipeline.remote_shards import RemoteRoot, RemoteShard, remote_root, split_member, spooled
from pipeline.tar_index import TarIndex, tar_index

VIDEO_EXTENSIONS = frozenset(  # of the formats that the decoder opens; .ogg and .m4a are mostly sound alone
    f".{name}"
    for name in (
        "264 265 266 3g2 3gp asf avc avi dif divx dv f4v flv gif h264 h265 h266 hevc ivf m1v m2t m2ts m2v m4v mj2 "
        "mjpeg mjpg mk3d mkv mov mp4 mpe mpeg mpg mpv mts mxf nut obu ogm ogv qt rm rmvb swf ts vob vvc webm wmv wtv"
    ).split()
)
FRAME_EXTENSIONS = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
OTHER_IMAGES = frozenset((".apng", ".dib", ".jfif", ".jpe", ".pbm", ".pgm", ".pnm", ".ppm"))
IMAGE_EXTENSIONS = FRAME_EXTENSIONS | OTHER_IMAGES

MISSING_REASON = "media file is missing"
DENIED_REASON = "media file may not be read: permission denied"
UNREACHABLE = frozenset((MISSING_REASON, DENIED_REASON))  # the clip's fault, or a share's or a node's
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
READ_BYTES = 1 << 20
# A clip cannot cause these: the disk, the share, the account or this process is at fault.
MACHINE_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        "EIO EREMOTEIO ESTALE ENOSPC EDQUOT ENODEV ENXIO EMFILE ENFILE EKEYEXPIRED ENOTCONN ECONNRESET ECONNABORTED "
        "ESHUTDOWN EHOSTDOWN EHOSTUNREACH ETIMEDOUT ENETDOWN ENETUNREACH ENOLINK ECOMM"
    ).split()
    if hasattr(errno, name)
)


@dataclass(frozen=True)
class MediaRoot:
    """A dataset's root and the folder outside of it that links under the root may lead into; a path-like value."""

    path: str  # absolute
    links: str  # absolute

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path


LocalRoot = str | Path | MediaRoot
Root = LocalRoot | RemoteRoot  # text may be a URL


def root_from_record(record: str | Mapping[str, Any]) -> Root:
    """A root from its JSON form."""
    if isinstance(record, str):
        return record
    return RemoteRoot(**record) if "url" in record else MediaRoot(**record)


@dataclass(frozen=True)
class LocalFile:
    """A regular file with at least one byte."""

    path: Path  # real, absolute


@dataclass(frozen=True)
class FrameFolder:
    """A folder whose images are the frames of a clip."""

    paths: tuple[Path, ...]  # real, absolute, in the order of the numbers in their names


@dataclass(frozen=True)
class TarMember:
    """A regular file inside an uncompressed tar: `size` bytes from `offset` on."""

    tar_path: Path  # real, absolute
    offset: int
    size: int
    name: str  # inside the archive; its extension gives the kind of media


@dataclass(frozen=True)
class RemoteMember:
    """A regular file inside a tar shard below a URL; `Source.fetched` makes a local file of it."""

    shard: str  # key below the root
    offset: int
    size: int
    name: str
    version: str  # of the shard that was indexed
    modified_s: float  # Unix time of the shard's last put


Media = LocalFile | FrameFolder | TarMember | RemoteMember


def resolve_media(root: Root, path: str) -> Media:
    """Find a clip's media under `root`; raise `MediaError` (this clip) or `RunStoppedError` (the root is gone)."""
    try:
        check_relative_path(path)
        path.encode()
    except (UserError, UnicodeEncodeError):
        raise MediaError(
            "media path is refused: it is absolute, climbs out of the root or cannot be a file name"
        ) from None
    if (remote := remote_root(root)) is not None:
        return _find_remote(remote, path)
    assert not isinstance(root, RemoteRoot)
    try:
        return _resolve(allowed_folders(root), path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise MediaError("media path is a loop of symbolic links") from error
        if error.errno in _MISSING:  # a missing file under a root that is gone is no fault of the clip
            raise (_check_root(root) or MediaError(MISSING_REASON)) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise (_check_root(root) or MediaError(DENIED_REASON)) from error
        raise RunStoppedError(
            f"dataset root {root} cannot be read: {error.strerror}; check that its disk is there"
        ) from error


def allowed_folders(root: Root) -> tuple[str, ...]:
    """The real folders that hold media: the root, and the one that its links may lead into."""
    return tuple(os.path.realpath(folder) for folder in _named_folders(root))


def _named_folders(root: Root) -> list[LocalRoot]:
    assert not isinstance(root, RemoteRoot), "links are of folders"
    return [root, root.links] if isinstance(root, MediaRoot) else [root]


def is_inside(real_path: str, folders: Iterable[str]) -> bool:
    """True if a real path lies in one of the real folders, or is one of them."""
    return any(os.path.commonpath((folder, real_path)) == folder for folder in folders)


def folder_has_gone(root: Root, path: str) -> bool:
    """True if the folder that should hold the clip's file is missing or empty, as after its share was unmounted."""
    if remote_root(root) is not None:
        return False  # a shard that is gone stops the run where it is fetched
    assert not isinstance(root, RemoteRoot)
    root = os.path.realpath(root)
    folder = os.path.dirname(os.path.join(root, _split_tar(root, path)[0]))
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def kind_of_path(path: str) -> Kind | None:
    """ "video" or "image" by the extension, None for anything else."""
    extension = os.path.splitext(path)[1].lower()
    if extension in VIDEO_EXTENSIONS:
        return "video"
    return "image" if extension in IMAGE_EXTENSIONS else None


def frame_order(name: str) -> tuple:
    """Sort key of a frame's file name: numbers compare as numbers, so frame_10 follows frame_9."""
    return tuple((int(part), part) if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name))


def _resolve(folders: tuple[str, ...], path: str) -> Media:
    path, member = _split_tar(folders[0], path)
    real = _inside(folders, path)
    status = os.stat(real)
    if member or not stat.S_ISDIR(status.st_mode):
        _check_regular(status)
        return _find_member(real, member) if member else LocalFile(Path(real))
    with os.scandir(real) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    by_extension = [(os.path.splitext(name)[1].lower(), name) for name in names]
    names = [name for extension, name in by_extension if extension in FRAME_EXTENSIONS]
    names = names or [name for extension, name in by_extension if extension in OTHER_IMAGES]
    if not names:
        raise MediaError("frame folder holds no images")
    frames = [_inside(folders, os.path.join(real, name)) for name in sorted(names, key=frame_order)]
    for frame in frames:
        _check_regular(os.stat(frame))
    return FrameFolder(tuple(map(Path, frames)))


def _split_tar(root: str, path: str) -> tuple[str, str]:
    """("shards/0.tar", "a.mp4") where a part ends in .tar and is a file, else (path, "")."""
    parts = path.split("/")
    for i in range(1, len(parts)):
        archive = "/".join(parts[:i])
        if archive.lower().endswith(".tar") and not os.path.isdir(os.path.join(root, archive)):
            return archive, "/".join(parts[i:])
    return path, ""


def _inside(folders: tuple[str, ...], path: str) -> str:
    """The real path of an existing file or folder, which must lie in one of the real folders, the first the root."""
    real = os.path.realpath(os.path.join(folders[0], path), strict=True)
    if not is_inside(real, folders):
        raise MediaError("media path leads out of the dataset root through a symbolic link")
    return real


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise MediaError("media is not a regular file")
    if status.st_size == 0:
        raise MediaError("media file is empty")


def _find_member(tar_path: str, name: str) -> TarMember:
    return TarMember(Path(tar_path), *_place_of(tar_index(tar_path), name), name)


def _find_remote(root: RemoteRoot, path: str) -> RemoteMember:
    key, name = split_member(path)
    if not name:
        raise MediaError("media path names no member of a tar shard, and other files are not read from a URL")
    try:
        index = RemoteShard(root, key).index()
    except FileNotFoundError as error:
        raise MediaError(MISSING_REASON) from error
    return RemoteMember(key, *_place_of(index, name), name, index.version, index.modified_s)


def _place_of(index: TarIndex, name: str) -> tuple[int, int]:
    """Offset and size of a member."""
    if name in index.refused:
        raise MediaError(f"tar member is {index.refused[name]}, not a regular file")
    if name not in index.members:
        raise MediaError("tar archive is damaged before this member" if index.is_damaged else "tar member is missing")
    offset, size = index.members[name]
    if size == 0:
        raise MediaError("media file is empty")
    return offset, size


def _check_root(root: LocalRoot) -> RunStoppedError | None:
    """The error for a root that is gone; an empty folder is what an unmounted share leaves behind."""
    for folder in _named_folders(root):
        try:
            with os.scandir(folder) as entries:
                if next(entries, None) is None:
                    return RunStoppedError(f"dataset root {folder} is empty; check that its disk is mounted")
        except OSError as error:
            return RunStoppedError(f"dataset root {folder} is gone: {error.strerror}; check that its disk is mounted")
    return None


@dataclass(frozen=True)
class Source:
    """The media of one clip, found and safe under its root."""

    root: Root
    path: str  # relative, as the clip names it
    media: Media

    @classmethod
    def find(cls, root: Root, path: str) -> Source:
        """Resolve a clip's path; `MediaError` if nothing readable is there, `RunStoppedError` if the root is gone."""
        return cls(root, path, resolve_media(root, path))

    @contextmanager
    def fetched(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[Source]:
        """The source with its media on this host: itself, or while the block runs a copy in the spool.

        `on_wait` is called every few seconds while a full spool makes it wait.
        """
        if not isinstance(self.media, RemoteMember):
            yield self
            return
        media, root = self.media, remote_root(self.root)
        assert root is not None, "a remote member has a remote root"
        with spooled(root, media.shard, media.offset, media.size, media.version, on_wait) as copy:
            yield replace(self, media=LocalFile(copy))

    @property
    def files(self) -> tuple[Path, ...]:
        """The files on this host that hold the bytes: the file, the frames, or the archive."""
        if isinstance(self.media, RemoteMember):
            return ()
        if isinstance(self.media, FrameFolder):
            return self.media.paths
        return (self.media.tar_path if isinstance(self.media, TarMember) else self.media.path,)

    @property
    def num_bytes(self) -> int:
        """Size of everything that decoding may read."""
        if isinstance(self.media, TarMember | RemoteMember):
            return self.media.size
        return sum(os.stat(path).st_size for path in self.files)

    def open(self) -> io.BufferedReader:
        """The bytes of a file or tar member on this host, readable and seekable."""
        assert isinstance(self.media, LocalFile | TarMember), "a folder has no bytes of its own, and a URL is fetched"
        if isinstance(self.media, LocalFile):
            return open(self.media.path, "rb")
        window = FileWindow(self.media.tar_path, self.media.offset, self.media.size)
        return io.BufferedReader(window, buffer_size=READ_BYTES)

    @property
    def version(self) -> Version:
        """What changes when a file or tar member does."""
        assert isinstance(self.media, LocalFile | TarMember), "a folder of frames is many files, a URL is fetched first"
        if isinstance(self.media, TarMember):
            return _version(self.media.tar_path, self.media.offset, self.media.size)
        return _version(self.media.path)

    def head(self, num_bytes: int = 16) -> bytes:
        """The first bytes, which identify the format."""
        with self.open() as file:
            return file.read(num_bytes)

    def sha256(self) -> str:
        """Digest of a file's or tar member's bytes; of a folder's sorted "name NUL size NUL sha256" lines.

        Taken before decoding, of the whole file: it warms the page cache, and a failing disk shows here, through plain
        reads, where it cannot be mistaken for a damaged clip.
        """
        if isinstance(self.media, RemoteMember):
            with self.fetched() as local:
                return local.sha256()
        if not isinstance(self.media, FrameFolder):
            return _known_sha256(self.version, self.open)
        lines = sorted(f"{p.name}\0{os.stat(p).st_size}\0{_file_sha256(p)}\n" for p in self.media.paths)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def read_through(self) -> None:
        """Read every byte once more, to distinguish a failing disk from a damaged clip."""
        if isinstance(self.media, RemoteMember):
            with self.fetched() as local:
                local.read_through()
            return
        is_folder = isinstance(self.media, FrameFolder)
        for opener in [partial(open, path, "rb") for path in self.files] if is_folder else [self.open]:
            with opener() as file:
                while file.read(READ_BYTES):
                    pass

    def explain(self, error: OSError) -> MediaError | RunStoppedError:
        """The error to raise for a failed read: `MediaError` (the clip) or `RunStoppedError` (the machine)."""
        if error.errno is not None and error.errno in MACHINE_ERRNOS:
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


Version = tuple[str, int, int, int, int]  # path, bytes and date of a file; offset and bytes of a tar member, or zeros
_KNOWN_SHA256: dict[Version, str] = {}  # for this process


def _version(path: Path, offset: int = 0, size: int = 0) -> Version:
    status = os.stat(path)
    return str(path), status.st_size, status.st_mtime_ns, offset, size


def _known_sha256(version: Version, opener: Callable[[], BinaryIO]) -> str:
    """Digest of a file; clips of one file (spans) take it once per process, until it changes."""
    if version not in _KNOWN_SHA256:
        with opener() as file:
            _KNOWN_SHA256[version] = _digest(file)
    return _KNOWN_SHA256[version]


def _file_sha256(path: Path) -> str:
    return _known_sha256(_version(path), partial(open, path, "rb"))


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(READ_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def newest_touch_s(source: Source) -> float:
    """When the newest of a clip's files was last written or moved to its location, in Unix seconds."""
    if isinstance(source.media, RemoteMember):
        return source.media.modified_s
    return max(max(status.st_mtime, status.st_ctime) for status in map(os.stat, files_and_folders(source)))


def files_and_folders(source: Source) -> list[Path]:
    """What a change of the media touches: its files, and the folder of frames, which comes last."""
    folders = {path.parent for path in source.files} if isinstance(source.media, FrameFolder) else ()
    return [*source.files, *sorted(folders)]
