"""Samples into the store, so that a narrow run takes nothing away.

Comes in: a listing, perhaps of a few clips only (`--limit`, `--kind`, a folder that is not mounted today). Goes out:
new versions of the samples. A listing speaks for the clips that it lists; of every other clip in the store, whose
tokens stay as well, the samples stay. Stored samples are read only where there are such clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from featurestore.clips import Sample
from featurestore.writer import StoreWriter
from pipeline.datasets import DatasetListing


def add_listed_samples(store: StoreWriter, listing: DatasetListing, *, is_whole: bool) -> None:
    """Write a dataset's samples; `is_whole` says that nothing was left out of the listing by request."""
    listed = {clip.clip_id for clip in listing.clips}
    is_growing_only = is_whole and listed.issuperset(store.clips()["clip_id"].to_pylist())

    def stays(sample: Sample) -> bool:
        return not is_whole if sample.clip_id is None else sample.clip_id not in listed

    for name, samples in listing.samples.items():
        store.add_samples(name, samples if is_growing_only else merged(store.samples(name), samples, stays))


def merged(stored: Iterable[Sample], listed: Sequence[Sample], stays: Callable[[Sample], bool]) -> list[Sample]:
    """Listed samples, and of the stored ones those that stay, in the stored order; new ones follow."""
    fresh = {_key(sample): sample for sample in listed}
    kept = [sample for sample in stored if _key(sample) in fresh or stays(sample)]
    if all(_key(sample) in fresh for sample in kept):
        return list(listed)
    return [*(fresh.pop(_key(sample), sample) for sample in kept), *fresh.values()]


def _key(sample: Sample) -> tuple[str, str | None]:
    """An edited annotation file may give one clip's record id to another."""
    return sample.sample_id, sample.clip_id
