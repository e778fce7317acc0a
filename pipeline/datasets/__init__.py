"""Datasets by name: from annotation files to clips and samples.

A plug-in is an entry point in the group `merv.datasets` whose value is a DatasetSpec; see docs/extending.md.
Listing opens no media, except to find how long videos are that are split into windows. Importing this package imports
nothing heavy: the command line's help reads the table.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurestore.clips import KINDS
from featurestore.locate import is_url
from mervcache.console import ProgressLine
from mervcache.errors import UserError, unknown_name
from mervcache.memory import gc_paused
from mervcache.plugins import PlugInTable
from mervcache.text import redact
from pipeline.datasets import demo, evaluation, folder, videollava, webdataset
from pipeline.datasets.base import (
    FILES_NAMED,
    DatasetListing,
    DatasetSpec,
    ListingBuilder,
    Option,
    Rejected,
    check_has_clips,
    folder_name,
    link_advice,
    loss_lines,
    missing_lines,
)

if TYPE_CHECKING:
    from pipeline.config import ExtractConfig

log = logging.getLogger(__name__)

BUILT_IN = {spec.name: spec for spec in (demo.SPEC, videollava.SPEC, webdataset.SPEC, folder.SPEC, evaluation.SPEC)}
DATASETS: PlugInTable[DatasetSpec] = PlugInTable(BUILT_IN, group="merv.datasets", what="dataset", kind=DatasetSpec)

MAX_LENGTH_PROCESSES = 8  # of the driver, that find out how long videos are
LINKS_OPTION = "media_links"
LINKS = Option(
    default="",
    help="folder outside the root that links under it may lead into, absolute or relative to the root, such as "
    "../../blobs in a Hub cache; empty: links that leave the root are refused",
)

__all__ = [
    "BUILT_IN",
    "DATASETS",
    "FILES_NAMED",
    "DatasetListing",
    "DatasetSpec",
    "ListingBuilder",
    "Option",
    "Rejected",
    "check_has_clips",
    "dataset_spec",
    "folder_name",
    "link_advice",
    "list_clips",
    "load_dataset",
    "loss_lines",
    "missing_lines",
    "options_of",
]


def list_clips(config: ExtractConfig) -> DatasetListing:
    """List the clips of an extraction and log what is left out; errors are those of `load_dataset`."""
    filters = {"stage": config.stage, "kind": config.kind, "limit": config.limit}
    listing = load_dataset(config.dataset, config.root, **filters, **config.options)
    if config.window_length is not None:
        from pipeline.datasets.windows import in_windows  # decode processes, only where they are wanted

        with ProgressLine("lengths of videos", unit="videos") as progress:
            listing = in_windows(
                listing,
                config.window_length,
                processes=config.decode_processes or min(MAX_LENGTH_PROCESSES, len(os.sched_getaffinity(0))),
                timeout_s=config.decode_timeout_s,
                progress=progress,
            )
    if listing.clips or any(listing.samples.values()):  # else `check_has_clips` has the same lines
        for line in loss_lines(listing):
            log.warning(line)
    return listing


def load_dataset(
    name: str,
    root: Path | str | None = None,
    *,
    stage: str | None = None,
    kind: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> DatasetListing:
    """List the dataset of that `name`: its clips and samples.

    Parameters
    ----------
    root
        Folder of media and annotations; None: the dataset's own default.
    stage, kind
        Records of this training stage, clips of this kind ("video", "image") only.
    limit
        Keep the first clips of the listing, and their samples.
    options
        The dataset's own; `merv-pipeline datasets NAME` lists them.

    Raises
    ------
    UserError
        The request cannot be met. A malformed record is counted in `rejected` instead.
    """
    spec = dataset_spec(name)
    known_options = options_of(spec)
    if unknown := sorted(set(options) - set(known_options)):
        known = ", ".join(known_options) or "none"
        raise UserError(f"dataset {name} has no option {', '.join(unknown)}; its options are: {known}")
    settings = {key: options.get(key, option.default) for key, option in known_options.items()}
    for what, value, choices in ((f"stage of {name}", stage, spec.stages), ("kind", kind, KINDS)):
        if value is not None and value not in choices:
            known = ", ".join(choices) or "(none: it has no samples)"
            raise UserError(f"{what} must be one of {known}, got {value!r}")
    if limit is not None and limit < 1:
        raise UserError(f"limit is a number of clips of at least 1, got {limit}")
    remote = spec.remote_root(None if root is None else str(root), settings)
    if remote is None and root is not None and is_url(root):
        raise UserError(
            f"dataset {name} reads a folder, and {root} is a URL: from URLs, dataset webdataset reads tar shards"
        )
    folder = Path(os.path.abspath(root if root is not None and remote is None else spec.default_root))
    if remote is None and not spec.makes_root and not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        if root is not None:  # probably a typing mistake: one line, not the download guide
            raise UserError(
                f"--root {folder} {state}; name the folder of dataset {name}, or leave --root out for what to download "
                "and where it goes"
            )
        raise UserError(
            f"the root of dataset {name}, {folder}, {state}.\n{spec.download}\n"
            "Give another place with --root DIR, or try everything without a download: --dataset demo"
        )
    links = settings.pop(LINKS_OPTION, "")
    if remote is not None and links:
        raise UserError(f"option {LINKS_OPTION} is about links in a folder, and the media are at {redact(remote.url)}")
    builder = ListingBuilder(name, folder, stage, _links_folder(folder, links), remote)
    with gc_paused():
        spec.collect(builder, settings)
        return builder.finish(kind=kind, limit=limit, look=not spec.lists_media)


def options_of(spec: DatasetSpec) -> dict[str, Option]:
    """A dataset's own options and, where it reads media of others, `media_links`."""
    return {**spec.options} if spec.makes_root else {**spec.options, LINKS_OPTION: LINKS}


def _links_folder(root: Path, given: object) -> str:
    if not given:
        return ""
    folder = os.path.normpath(os.path.join(root, str(given)))
    if not os.path.isdir(folder):
        raise UserError(f"option {LINKS_OPTION} must be a folder that links under {root} may lead into, got {folder}")
    return folder


def dataset_spec(name: str) -> DatasetSpec:
    """The dataset of that name; `UserError` names the nearest known one."""
    if name not in DATASETS:
        raise UserError(unknown_name("dataset", name, DATASETS))
    return DATASETS[name]
