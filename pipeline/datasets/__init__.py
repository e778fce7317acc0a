"""Datasets: from annotation files to clips and samples, by name.

Comes in: a name, a root folder and filters. Goes out: a `DatasetListing`. Nothing here opens media and nothing heavy is
imported: the command line's help reads this table.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurestore.clips import KINDS
from mervcache.errors import UserError, unknown_name
from pipeline.datasets import demo, evaluation, folder, videollava, webdataset
from pipeline.datasets.base import DatasetListing, DatasetSpec, ListingBuilder, Option, Rejected

if TYPE_CHECKING:
    from pipeline.config import ExtractConfig

DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec for spec in (demo.SPEC, videollava.SPEC, webdataset.SPEC, folder.SPEC, evaluation.SPEC)
}

__all__ = [
    "DATASETS",
    "DatasetListing",
    "DatasetSpec",
    "Option",
    "Rejected",
    "dataset_spec",
    "list_clips",
    "load_dataset",
]


def list_clips(config: ExtractConfig) -> DatasetListing:
    """List the clips that an extraction is asked for; errors are those of `load_dataset`."""
    narrowed = {"stage": config.stage, "kind": config.kind, "limit": config.limit}
    return load_dataset(config.dataset, config.root, **narrowed, **config.options)


def load_dataset(
    name: str,
    root: Path | str | None = None,
    *,
    stage: str | None = None,
    kind: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> DatasetListing:
    """List a dataset: `limit` keeps its first clips (and what is said of them), `None` means all.

    Raises `UserError` for a request that cannot be met; a record that is malformed is counted in `rejected` instead.
    """
    spec = dataset_spec(name)
    settings = _settings(spec, options)
    _check_choice(f"stage of {name}", stage, spec.stages)
    _check_choice("kind", kind, KINDS)
    if limit is not None and limit < 1:
        raise UserError(f"limit is a number of clips of at least 1, got {limit}")
    folder = Path(os.path.abspath(root if root is not None else spec.default_root))
    if not spec.makes_root and not folder.is_dir():
        raise UserError(_missing_root(spec, folder, is_default=root is None))
    builder = ListingBuilder(name, folder, stage)
    with _without_collector():
        spec.collect(builder, settings)
        return builder.finish(kind=kind, limit=limit, look=not spec.lists_media)


def dataset_spec(name: str) -> DatasetSpec:
    """The dataset of a name that a person gave."""
    if name not in DATASETS:
        raise UserError(unknown_name("dataset", name, DATASETS))
    return DATASETS[name]


def _settings(spec: DatasetSpec, options: Mapping[str, Any]) -> dict[str, Any]:
    """The dataset's options with their defaults; an unknown one lists the known."""
    if unknown := sorted(set(options) - set(spec.options)):
        known = ", ".join(spec.options) or "none"
        raise UserError(f"dataset {spec.name} has no option {', '.join(unknown)}; its options are: {known}")
    return {key: options.get(key, option.default) for key, option in spec.options.items()}


def _check_choice(what: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise UserError(f"{what} must be one of {', '.join(known) or '(none: it has no samples)'}, got {value!r}")


def _missing_root(spec: DatasetSpec, folder: Path, *, is_default: bool) -> str:
    state = "is not a folder" if folder.exists() else "does not exist"
    if not is_default:  # who names a folder has the data: a typing mistake wants one line, not a guide
        return (
            f"--root {folder} {state}; name the folder of dataset {spec.name}, or leave --root out to be told what to "
            "download and where it goes"
        )
    return (
        f"the root of dataset {spec.name}, {folder}, {state}.\n{spec.download}\n"
        "Give another place with --root DIR, or try everything without a download: --dataset demo"
    )


@contextmanager
def _without_collector() -> Iterator[None]:
    """Millions of small values without a cycle among them: the cyclic collector would walk them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
