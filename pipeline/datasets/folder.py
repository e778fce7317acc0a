"""Folder: every video and image under a root, without annotations or samples.

One clip per file with a known extension, sorted by path. Hidden files and folders and files with other extensions are
skipped and counted; what links out of the root, and a linked folder whose files are listed elsewhere, is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NoReturn

from mervcache.errors import UserError
from pipeline.datasets.base import NOT_FOLLOWED, OUTSIDE_FILE, DatasetSpec, ListingBuilder, RecordError
from pipeline.media import allowed_folders, is_inside, kind_of_path


def collect(builder: ListingBuilder, options: Mapping[str, Any]) -> None:
    """Add every media file; a name that cannot be a clip's path is refused and counted."""
    del options

    def cannot_list(error: OSError) -> NoReturn:
        raise UserError(f"media folder {error.filename} cannot be listed: {error.strerror}") from error

    root, allowed = str(builder.root), allowed_folders(builder.media_root)
    paths: list[str] = []  # POSIX, relative to the root
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
                elif kind_of_path(name):
                    paths.append(prefix + name)
                else:
                    builder.skip(f"files that end in {os.path.splitext(name)[1].lower()[:12] or 'no extension'}")
    if not paths and not builder.has_rejected:
        others = ", ".join(f"{count} {what}" for what, count in builder.skipped.items())
        raise UserError(
            f"no video or image under {builder.root}{f' ({others})' if others else ''}: give --root the folder that "
            "holds them"
        )
    for path in sorted(paths):
        file = os.path.join(root, path)
        if os.path.islink(file) and not is_inside(os.path.realpath(file), allowed):
            builder.reject(OUTSIDE_FILE, path)
            continue
        try:
            builder.add_clip(path, kind_of_path(path))
        except RecordError as error:
            builder.reject(str(error), path)


SPEC = DatasetSpec(
    name="folder",
    summary="every video and image under a folder, without annotations",
    default_root="data/folder",
    download="Put videos and images there, in folders as you like.",
    collect=collect,
    lists_media=True,
)
