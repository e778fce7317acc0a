"""Selections: which encoders, datasets, clips and kinds of a store are meant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from featurestore.clips import KINDS, Clip
from featurestore.errors import UserError, unknown_name


@dataclass(frozen=True, kw_only=True)
class Selection:
    """None means all of them."""

    encoders: tuple[str, ...] | None = None  # keys as `FeatureStore.encoders` has them; a bare name: every identity
    datasets: tuple[str, ...] | None = None
    clips: frozenset[str] | None = None  # clip ids
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise UserError(unknown_name("kind", self.kind, KINDS))

    @property
    def takes_all_clips(self) -> bool:
        return self.datasets is None and self.clips is None and self.kind is None

    @property
    def is_whole(self) -> bool:
        return self.encoders is None and self.takes_all_clips

    def takes(self, clip: Clip) -> bool:
        return (
            (self.datasets is None or clip.dataset in self.datasets)
            and (self.clips is None or clip.clip_id in self.clips)
            and (self.kind is None or clip.kind == self.kind)
        )

    def groups(self, keys: dict[str, str]) -> list[str]:
        """Group names of the encoders meant; `keys` is encoder key -> group name."""
        if self.encoders is None:
            return list(keys.values())
        found: dict[str, str] = {}
        for asked in self.encoders:
            mine = {key: group for key, group in keys.items() if asked in (key, key.split("@")[0])}
            if not mine:
                raise UserError(unknown_name("encoder", asked, keys))
            found |= mine
        return list(found.values())

    def check(self, clips: Iterable[Clip]) -> None:
        """Refuse names that no clip has: a typing mistake would otherwise give an empty store."""
        clips = list(clips)
        if self.datasets is not None:
            known = sorted({clip.dataset for clip in clips})
            for name in self.datasets:
                if name not in known:
                    raise UserError(unknown_name("dataset", name, known))
        if self.clips is not None:
            absent = sorted(self.clips - {clip.clip_id for clip in clips})
            if absent:
                raise UserError(f"{len(absent)} of the {len(self.clips)} clips are not there, one is {absent[0]!r}")


def read_clip_list(path: str | Path) -> frozenset[str]:
    """Clip ids, one a line; empty lines are skipped."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise UserError(f"the list of clips {path} cannot be read: {error.strerror}") from error
    if not any(lines):
        raise UserError(f"the list of clips {path} is empty: give one clip id a line, as `store.clips` has them")
    return frozenset(line.strip() for line in lines if line.strip())
