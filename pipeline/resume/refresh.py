"""Refresh: what an extraction does about clips whose media changed since their tokens were stored.

Comes in: a store, a listing and the encoders of a run. Without `--refresh` changed clips are counted and told, and stay
as they are: never silently taken for what they no longer are, never silently computed. With it they get new rows, which
count from the moment they are committed; no stored byte changes, and old snapshots go on showing the old tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from featurestore.clips import KINDS
from featurestore.identity import FeatureIdentity
from featurestore.reader import encoder_keys
from featurestore.writer import StoreWriter
from pipeline.datasets import DatasetListing
from pipeline.plan import plan_blocks
from pipeline.resume.stale import StaleMedia, stale_media

UNASKED_BYTES = 2 << 30  # of touched media that an extraction reads to compare them, a few seconds' worth
TOLD_BYTES = 1 << 30  # from here on a person may wonder what takes so long


def look_at_media(
    store: StoreWriter,
    listing: DatasetListing,
    identities: Mapping[str, FeatureIdentity],
    *,
    refresh: bool,
    say: Callable[[str], None],
) -> StaleMedia:
    """What changed since its tokens were made, told to `say`; with `refresh`, changed clips have new rows after it."""
    if refresh:
        store.publish_snapshot()  # what a run that was cut short has refreshed is not to be given rows again

    def comparing(clips: int, num_bytes: int) -> None:
        if num_bytes > TOLD_BYTES:
            say(f"comparing {clips} media that were touched since: {num_bytes / 1e9:.1f} GB to read, once")

    budget = None if refresh else UNASKED_BYTES
    found = stale_media(store, listing, identities, budget_bytes=budget, on_compare=comparing)
    if refresh:
        _give_rows(store, listing, identities, found)
    for line in _told(found, refresh):
        say(line)
    return found


def _give_rows(
    store: StoreWriter, listing: DatasetListing, identities: Mapping[str, FeatureIdentity], found: StaleMedia
) -> None:
    """New rows for stale clips, but for those that wait in a row of a refresh that was cut short."""
    waiting: dict[str, set[str]] = {name: set() for name in identities}
    for block in plan_blocks(store, identities, clip_ids=found.clips, stale=found.changed):
        ids = dict(zip(block.clips["row"].to_pylist(), block.clips["clip_id"].to_pylist(), strict=True))
        for name, rows in block.wanted.items():
            waiting[name].update(ids[row] for row in rows)
    without = frozenset().union(*(clips - waiting[name] for name, clips in found.changed.items()))
    store.add_clips([clip for clip in listing.clips if clip.clip_id in without], retry=True)


def told_identities(store: StoreWriter, identities: Mapping[str, FeatureIdentity]) -> list[str]:
    """What becomes of the tokens that were there, where an encoder is now stored under several identities."""
    groups = [f"{kind}/{name}" for kind in KINDS for name in store.encoder_groups(kind)]
    keys = {group: key for key, group in encoder_keys(groups).items()}
    lines = []
    for name, identity in identities.items():
        others = sorted(key for group, key in keys.items() if group.rpartition("-")[0] == name)
        if len(others) > 1:
            mine = keys[identity.group_name]
            others.remove(mine)
            lines.append(
                f"{name} is stored under several identities: this run's is {mine}; {', '.join(others)} stays as it is, "
                "and `merv-pipeline subset` makes a store without it"
            )
    return lines


def _told(found: StaleMedia, refresh: bool) -> list[str]:
    """A line for each thing that became of the media; none where nothing did."""
    lines = []
    if found.clips and refresh:
        lines.append(f"{_clips(found.clips)} other media than their tokens were made from: computed again")
    elif found.clips:
        lines.append(
            f"{_clips(found.clips)} other media than their tokens were made from; nothing is computed for that: "
            "`merv-pipeline explain` lists them, `extract --refresh` computes them again"
        )
    if found.failed:
        lines.append(
            f"{_clips(found.failed)} new media that failed: the tokens of the old ones stay; "
            "`merv-pipeline tombstone` removes a clip"
        )
    if found.not_compared:
        lines.append(
            f"{_clips(found.not_compared)} media that were touched since and are too many to read unasked: "
            "`merv-pipeline explain` compares them, once"
        )
    return lines


def _clips(ids: frozenset[str]) -> str:
    return "1 clip has" if len(ids) == 1 else f"{len(ids)} clips have"
