"""Folder: every video and image under a root, without annotations; with `labels` also their classes.

One clip per file with a known extension, sorted by path. Hidden files and folders and files with other extensions are
skipped and counted; what links out of the root, and a linked folder whose files are listed elsewhere, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featurestore.clips import Kind
from mervcache.errors import UserError
from pipeline.datasets.base import DatasetSpec, ListingBuilder, Option, RecordError
from pipeline.datasets.labels import collect_labels
from pipeline.datasets.walk import check_link, ending, walk_files
from pipeline.media import kind_of_path


def collect(builder: ListingBuilder, options: Mapping[str, Any]) -> None:
    """Add every media file; a name that cannot be a clip's path is refused and counted."""
    kinds: dict[str, Kind] = {}
    for path in walk_files(builder):
        if kind := kind_of_path(path):
            kinds[path] = kind
        else:
            builder.skip(f"files that end in {ending(path)}")
    if not kinds and not builder.has_rejected:
        others = ", ".join(f"{count} {what}" for what, count in builder.skipped.items())
        raise UserError(
            f"no video or image under {builder.root}{f' ({others})' if others else ''}: give --root the folder that "
            "holds them"
        )
    for path, kind in sorted(kinds.items()):
        if not check_link(builder, path):
            continue
        try:
            builder.add_clip(path, kind)
        except RecordError as error:
            builder.reject(str(error), path)
    if options["labels"]:
        collect_labels(builder, str(options["labels"]), builder.clips)


LABELS = Option(
    default="",
    help="`folders`, where the folder of a file names its class, or a CSV with columns of paths and labels, relative "
    "to the root: conversations to train on, questions under val/ or test/, and classes to probe",
)

SPEC = DatasetSpec(
    name="folder",
    summary="every video and image under a folder, without annotations",
    default_root="data/folder",
    download="Put videos and images there, in folders as you like.",
    collect=collect,
    stages=("finetune", "eval"),
    options={"labels": LABELS},
    lists_media=True,
)
