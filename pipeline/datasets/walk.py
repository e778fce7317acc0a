"""Files under a dataset's root, for datasets that list media instead of reading annotations."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from mervcache.errors import UserError
from pipeline.datasets.base import FOLDER_FAULTS, NOT_FOLLOWED, OUTSIDE_FILE, ListingBuilder
from pipeline.media import allowed_folders, is_inside

TOO_LONG = "media folder has too long a path"


def walk_files(builder: ListingBuilder) -> Iterator[str]:
    """POSIX paths relative to the root, in no certain order.

    Hidden files and folders are skipped and counted. A linked folder is entered only where it leads into the folder
    that the user names for links; other linked folders are refused. `check_link` is for the files.
    """

    def cannot_list(error: OSError) -> None:
        reason = TOO_LONG if error.errno == errno.ENAMETOOLONG else FOLDER_FAULTS.get(error.errno or 0)
        if reason is None:
            raise UserError(f"media folder {error.filename} cannot be listed: {error.strerror}") from error
        builder.reject(reason, os.path.relpath(error.filename, builder.root))

    root, allowed = str(builder.root), allowed_folders(builder.media_root)
    to_walk, linked = [root], set()
    while to_walk:
        for folder, folders, files in os.walk(to_walk.pop(), onerror=cannot_list):
            if hidden := [name for name in folders if name.startswith(".")]:
                builder.skip("hidden folders", len(hidden))
            folders[:] = [name for name in folders if not name.startswith(".")]
            inside = os.path.relpath(folder, root)
            prefix = "" if inside == "." else inside + "/"
            for name in folders:  # os.walk lists a linked folder and does not enter it
                path = os.path.join(folder, name)
                if not os.path.islink(path):
                    continue
                real = os.path.realpath(path)
                if is_inside(real, allowed[1:]) and real not in linked:
                    linked.add(real)  # once: links may form a loop
                    to_walk.append(path)
                else:
                    builder.reject(NOT_FOLLOWED, prefix + name)
            for name in files:
                if name.startswith("."):
                    builder.skip("hidden files")
                else:
                    yield prefix + name


def check_link(builder: ListingBuilder, path: str) -> bool:
    """False, and counted as refused, for a file that is a link out of the root."""
    file = os.path.join(builder.root, path)
    if os.path.islink(file) and not is_inside(os.path.realpath(file), allowed_folders(builder.media_root)):
        builder.reject(OUTSIDE_FILE, path)
        return False
    return True


def ending(name: str) -> str:
    """ ".txt" of a file's name, or "no extension", to count files by."""
    extension = os.path.splitext(name)[1].lower()[:12]
    return (extension if extension.isprintable() else ascii(extension)[1:-1]) or "no extension"
