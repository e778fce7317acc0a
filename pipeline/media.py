"""Media: from a clip's path, relative to the dataset's root, to the bytes on this machine.

Comes in: a root folder and a POSIX path out of an annotation file. Goes out: a `LocalFile`, a `FrameFolder` (one image
per frame) or a `TarMember` ("shards/00000.tar/000000001.mp4"). Annotations are data from strangers, so nothing outside
the real root is ever named: a symbolic link inside the root may not lead out of it (the root itself may be a link), and
devices, pipes and sockets are refused before anybody opens them.

What is wrong with one clip is a `MediaError` whose text holds no absolute path; a root that is gone or a share that
stopped answering is a `RunStoppedError`, because it would otherwise quarantine the whole dataset.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from featurestore.clips import check_relative_path
from mervcache.errors import MediaError, RunStoppedError, UserError
from pipeline.tar_index import tar_index

VIDEO_EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("3gp", "avi", "flv", "gif", "m2ts", "m4v", "mkv", "mov", "mp4"),
        *("mpeg", "mpg", "mts", "ogv", "ts", "vob", "webm", "wmv"),
    )
)
IMAGE_EXTENSIONS = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))

_REFUSED_PATH = "media path is refused: it is absolute, climbs out of the root or cannot be a file name"
MISSING_REASON = "media file is missing"
DENIED_REASON = "media file may not be read: permission denied"
UNREACHABLE = frozenset((MISSING_REASON, DENIED_REASON))  # may be the clip's fault, or a share's or a node's
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


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
    name: str  # inside the archive; its extension tells the kind of media


Media = LocalFile | FrameFolder | TarMember


def resolve_media(root: Path | str, path: str) -> Media:
    """Find a clip's media under `root`; raise `MediaError` (this clip) or `RunStoppedError` (the root is gone)."""
    try:
        check_relative_path(path)
        path.encode()
    except (UserError, UnicodeEncodeError):
        raise MediaError(_REFUSED_PATH) from None
    try:
        return _resolve(os.path.realpath(root), path)
    except OSError as error:
        raise _explain(error, root) from error


def folder_has_gone(root: Path | str, path: str) -> bool:
    """Is the folder that should hold the clip's file missing or empty, as a share leaves it that was unmounted?"""
    root = os.path.realpath(root)
    folder = os.path.dirname(os.path.join(root, _split_tar(root, path)[0]))
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def kind_of_path(path: str) -> str | None:
    """ "video" or "image" by the extension, None for anything else."""
    extension = os.path.splitext(path)[1].lower()
    if extension in VIDEO_EXTENSIONS:
        return "video"
    return "image" if extension in IMAGE_EXTENSIONS else None


def frame_order(name: str) -> tuple:
    """Sort key of a frame's file name: numbers compare as numbers, so frame_10 follows frame_9."""
    return tuple((int(part), part) if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name))


def _resolve(root: str, path: str) -> Media:
    tar, member = _split_tar(root, path)
    if member:
        return _tar_member(_inside(root, tar), member)
    real = _inside(root, path)
    status = os.stat(real)
    if stat.S_ISDIR(status.st_mode):
        return FrameFolder(_frames(root, real))
    _check_regular(status)
    return LocalFile(Path(real))


def _split_tar(root: str, path: str) -> tuple[str, str]:
    """("shards/0.tar", "a.mp4") where a part ends in .tar and is a file, else (path, "")."""
    parts = path.split("/")
    for i in range(1, len(parts)):
        archive = "/".join(parts[:i])
        if archive.endswith(".tar") and not os.path.isdir(os.path.join(root, archive)):
            return archive, "/".join(parts[i:])
    return path, ""


def _inside(root: str, path: str) -> str:
    """The real path of an existing file or folder, which must lie under the real root."""
    real = os.path.realpath(os.path.join(root, path), strict=True)
    if os.path.commonpath((root, real)) != root:
        raise MediaError("media path leads out of the dataset root through a symbolic link")
    return real


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise MediaError("media is not a regular file")
    if status.st_size == 0:
        raise MediaError("media file is empty")


def _frames(root: str, folder: str) -> tuple[Path, ...]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _is_frame_name(entry.name)]
    if not names:
        raise MediaError("frame folder holds no images")
    paths = [_inside(root, os.path.join(folder, name)) for name in sorted(names, key=frame_order)]
    for path in paths:
        _check_regular(os.stat(path))
    return tuple(map(Path, paths))


def _is_frame_name(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def _tar_member(tar_path: str, name: str) -> TarMember:
    _check_regular(os.stat(tar_path))
    index = tar_index(tar_path)
    if name in index.refused:
        raise MediaError(f"tar member is {index.refused[name]}, not a regular file")
    if name not in index.members:
        raise MediaError("tar archive is damaged before this member" if index.is_damaged else "tar member is missing")
    offset, size = index.members[name]
    if size == 0:
        raise MediaError("media file is empty")
    return TarMember(Path(tar_path), offset, size, name)


def _explain(error: OSError, root: Path | str) -> MediaError | RunStoppedError:
    """One clip's fault, or the whole root's: a missing file in a root that is gone says nothing about the clip."""
    if error.errno == errno.ELOOP:
        return MediaError("media path is a loop of symbolic links")
    if error.errno in _MISSING:
        return _check_root(root) or MediaError(MISSING_REASON)
    if error.errno in (errno.EACCES, errno.EPERM):
        return _check_root(root) or MediaError(DENIED_REASON)
    return RunStoppedError(f"dataset root {root} cannot be read: {error.strerror}; check that its disk is there")


def _check_root(root: Path | str) -> RunStoppedError | None:
    """The error for a root that is gone; an empty folder is what an unmounted share leaves behind."""
    try:
        with os.scandir(root) as entries:
            if next(entries, None) is not None:
                return None
        return RunStoppedError(f"dataset root {root} is empty; check that its disk is mounted")
    except OSError as error:
        return RunStoppedError(f"dataset root {root} is gone: {error.strerror}; check that its disk is mounted")
