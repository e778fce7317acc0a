"""Folder: every video and image under a root, without annotations.

Comes in: any folder. Goes out: one clip per file with a known extension, sorted by path; no samples. Hidden files and
folders are skipped; linked folders, and linked files whose target lies elsewhere, are refused and counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from mervcache.errors import UserError
from pipeline.datasets.base import DatasetSpec, ListingBuilder, RecordError
from pipeline.media import kind_of_path


def collect(builder: ListingBuilder, options: Mapping[str, Any]) -> None:
    """Add every media file; a name that cannot be a clip's path is refused and counted."""
    del options
    real_root = os.path.realpath(builder.root)
    paths = sorted(_media_paths(builder))
    if not paths:
        raise UserError(
            f"no video or image under {builder.root} (links to folders are not followed): give --root the folder that "
            "holds them"
        )
    for path in paths:
        if _leads_out(real_root, path):
            builder.reject("a linked file whose target is outside the root", path)
            continue
        try:
            builder.add_clip(path, kind_of_path(path))
        except RecordError as error:
            builder.reject(str(error), path)


def _media_paths(builder: ListingBuilder) -> Iterator[str]:
    """POSIX paths relative to the root, in the order of the disk."""
    for folder, folders, files in os.walk(builder.root, onerror=_cannot_list):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(folder, builder.root)
        prefix = "" if inside == "." else inside + "/"
        for name in folders:  # os.walk lists a linked folder and does not enter it
            if os.path.islink(os.path.join(folder, name)):
                builder.reject("a linked folder is not followed", prefix + name)
        yield from (prefix + name for name in files if not name.startswith(".") and kind_of_path(name))


def _leads_out(real_root: str, path: str) -> bool:
    whole = os.path.join(real_root, path)
    return os.path.islink(whole) and os.path.commonpath((real_root, os.path.realpath(whole))) != real_root


def _cannot_list(error: OSError) -> None:
    raise UserError(f"media folder {error.filename} cannot be listed: {error.strerror}") from error


SPEC = DatasetSpec(
    name="folder",
    summary="every video and image under a folder, without annotations",
    default_root="data/folder",
    download="Put videos and images there, in folders as you like.",
    collect=collect,
    lists_media=True,
)
