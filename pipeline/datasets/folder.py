"""Folder: every video and image under a root, without annotations or samples.

One clip per file with a known extension, sorted by path. Hidden files and folders are skipped; linked folders, and
linked files whose target is outside the root, are refused and counted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NoReturn

from mervcache.errors import UserError
from pipeline.datasets.base import DatasetSpec, ListingBuilder, RecordError
from pipeline.media import kind_of_path


def collect(builder: ListingBuilder, options: Mapping[str, Any]) -> None:
    """Add every media file; a name that cannot be a clip's path is refused and counted."""
    del options

    def cannot_list(error: OSError) -> NoReturn:
        raise UserError(f"media folder {error.filename} cannot be listed: {error.strerror}") from error

    paths = []  # POSIX, relative to the root
    for folder, folders, files in os.walk(builder.root, onerror=cannot_list):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(folder, builder.root)
        prefix = "" if inside == "." else inside + "/"
        for name in folders:  # os.walk lists a linked folder and does not enter it
            if os.path.islink(os.path.join(folder, name)):
                builder.reject("a linked folder is not followed", prefix + name)
        paths += [prefix + name for name in files if not name.startswith(".") and kind_of_path(name)]
    if not paths:
        raise UserError(
            f"no video or image under {builder.root} (links to folders are not followed): give --root the folder that "
            "holds them"
        )
    real_root = os.path.realpath(builder.root)
    for path in sorted(paths):
        file = os.path.join(real_root, path)
        if os.path.islink(file) and os.path.commonpath((real_root, os.path.realpath(file))) != real_root:
            builder.reject("a linked file whose target is outside the root", path)
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
