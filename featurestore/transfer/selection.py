"""Selections: which encoders, datasets, clips, kind and split of a store are copied."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from featurestore.clips import KINDS, Clip, Sample
from featurestore.encoder_keys import chosen_keys, encoder_keys
from featurestore.identity import FeatureIdentity
from featurestore.windows import videos_in_windows, window_length
from mervcache.errors import UserError, unknown_name

NO_VIDEOS: Mapping[str, set[str]] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which encoders, datasets, clips, kind and split of a store; None means all of them."""

    encoders: tuple[str, ...] | None = None  # as for `FeatureStore.encoder_key`; a bare name: every identity
    datasets: tuple[str, ...] | None = None
    clips: frozenset[str] | None = None  # clip ids
    kind: str | None = None
    split: str | None = None  # "train" or "heldout": conversations of this split, and the clips that they are about
    spoken_of: frozenset[str] | None = None  # these clips' ids, filled by `with_samples`

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise UserError(unknown_name("kind", self.kind, KINDS))

    @property
    def takes_all_clips(self) -> bool:
        return self.datasets is None and self.clips is None and self.kind is None

    @property
    def is_whole(self) -> bool:
        return self.encoders is None and self.takes_all_clips and self.split is None

    def with_samples(self, samples: Iterable[Sample], videos: Mapping[str, set[str]] = NO_VIDEOS) -> Selection:
        """This selection, knowing which clips the conversations of its split are about.

        `videos` are those that conversations name and that are stored as windows -> their windows.
        """
        if self.split is None:
            return self
        splits: dict[str, set[str]] = {}
        for sample in samples:
            about = splits.setdefault(sample.split, set())
            if sample.clip_id:
                about |= videos.get(sample.clip_id, {sample.clip_id})
        if self.split not in splits:
            raise UserError(unknown_name("split", self.split, sorted(splits)))
        return replace(self, spoken_of=frozenset(splits[self.split]))

    def takes_sample(self, sample: Sample, clips: Container[str]) -> bool:
        """Conversations about `clips`, the clips taken; those about no clip unless clips are selected otherwise."""
        is_of_split = self.split in (None, sample.split)
        return is_of_split and (sample.clip_id in clips if sample.clip_id else self.takes_all_clips)

    def takes(self, clip: Clip) -> bool:
        return (
            (self.datasets is None or clip.dataset in self.datasets)
            and (self.clips is None or clip.clip_id in self.clips)
            and (self.kind is None or clip.kind == self.kind)
            and (self.spoken_of is None or clip.clip_id in self.spoken_of)
        )

    def groups(self, identities: Iterable[FeatureIdentity]) -> set[str]:
        """Group names of the selected encoders among `identities`."""
        keys = encoder_keys(identities)
        selected = keys if self.encoders is None else chosen_keys(self.encoders, keys)
        return {keys[key].group_name for key in selected}

    def check(self, clips: Iterable[Clip]) -> None:
        """Refuse names that no clip has: a typing mistake would otherwise give an empty store."""
        clips = list(clips)
        known = sorted({clip.dataset for clip in clips})
        for name in self.datasets or ():
            if name not in known:
                raise UserError(unknown_name("dataset", name, known))
        if self.clips is not None and (absent := self.clips - {clip.clip_id for clip in clips}):
            raise UserError(f"{len(absent)} of the {len(self.clips)} clips are not there, one is {min(absent)!r}")


class SampleSource(Protocol):
    """What knows clips, conversations and encoders of a store."""

    def clips(self) -> list[Clip]: ...
    def samples(self) -> dict[str, list[Sample]]: ...
    def groups(self) -> Mapping[str, Any]: ...  # values with an `identity`


def windowed_videos(sources: Sequence[SampleSource]) -> dict[str, set[str]]:
    """Videos that conversations name and that are stored as windows -> their windows; reads nothing where none are."""
    rules = {group.identity.frame_rule for source in sources for group in source.groups().values()}
    if all(window_length(rule) is None for rule in rules):
        return {}
    clip_ids = {clip.clip_id for source in sources for clip in source.clips()}
    named = {sample.clip_id for source in sources for found in source.samples().values() for sample in found}
    return videos_in_windows(named, clip_ids)


def read_clip_list(path: str | Path, *, may_be_empty: bool = False) -> frozenset[str]:
    """Clip ids, one a line; empty lines are skipped.

    Raises UserError for a file that cannot be read, is not text, or has no id unless it `may_be_empty`.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise UserError(f"the list of clips {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the list of clips {path} is not text: give one clip id a line") from error
    if not may_be_empty and not any(lines):
        raise UserError(f"the list of clips {path} is empty: give one clip id a line, as in `store.clips`")
    return frozenset(line.strip() for line in lines if line.strip())
