"""Writing a dataset's samples into a store that may hold those of other clips."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from featurestore.clips import Sample
from featurestore.writer import StoreWriter
from pipeline.datasets.base import DatasetListing


def add_listed_samples(store: StoreWriter, listing: DatasetListing, *, is_whole: bool) -> None:
    """Write a dataset's samples; `is_whole`: nothing was left out of the listing by request.

    A listing decides about the clips that it lists; samples of every other clip in the store stay, as its tokens do.
    Stored samples are read only where there are such clips.
    """
    listed = listing.clip_ids
    is_growing_only = is_whole and listed.issuperset(store.clips()["clip_id"].to_pylist())

    def stays(sample: Sample) -> bool:
        return not is_whole if sample.clip_id is None else sample.clip_id not in listed

    for name, samples in listing.samples.items():
        store.add_samples(name, samples if is_growing_only else merged(store.samples(name), samples, stays))


def merged(stored: Iterable[Sample], listed: Sequence[Sample], stays: Callable[[Sample], bool]) -> list[Sample]:
    """Listed samples, and of the stored ones those that stay, in the stored order; new ones follow."""

    def key(sample: Sample) -> tuple[str, str | None]:
        return sample.sample_id, sample.clip_id  # an edited annotation file may give one clip's record id to another

    fresh = {key(sample): sample for sample in listed}
    kept = [sample for sample in stored if key(sample) in fresh or stays(sample)]
    if all(key(sample) in fresh for sample in kept):
        return list(listed)
    return [*(fresh.pop(key(sample), sample) for sample in kept), *fresh.values()]
