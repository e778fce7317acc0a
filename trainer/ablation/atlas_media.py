"""Properties of an atlas's clips: a seeded sample of those whose media are there, decoded; what failed is kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mervcache.console import ProgressLine
from trainer.ablation.atlas import Atlas, Properties
from trainer.data.order import derive_seed

if TYPE_CHECKING:
    from trainer.end_to_end import StoreMedia

NUM_CLIPS = 512  # decoded by default: a minute or two


@dataclass(frozen=True, kw_only=True)
class MeasuredProperties:
    """Properties, and the clips that have none."""

    values: Properties
    drawn: int  # clips that were to be decoded
    reachable: int  # clips of the atlas whose media folder is there
    failed: dict[str, str]  # clip id -> why it could not be decoded
    definitions: dict[str, str]

    @property
    def measured(self) -> int:
        return self.drawn - len(self.failed)

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Why clips could not be decoded, and how many, most frequent first."""
        return Counter(self.failed.values()).most_common()


def measure_properties(
    media: StoreMedia, atlas: Atlas, count: int, *, seed: int = 0, quiet: bool = False
) -> MeasuredProperties:
    """Properties of at most `count` clips, drawn by seed and id alone."""
    reachable = media.reachable(atlas.clip_ids)
    drawn = sorted(reachable, key=lambda clip_id: (derive_seed("properties", seed, clip_id), clip_id))[:count]
    values: dict[str, dict[str, float | None]] = {name: {} for name in media.definitions}
    failed = {}
    with ProgressLine("properties", unit="clips", total=len(drawn), quiet=quiet) as progress:
        for clip_id, found in media.measure(drawn):
            if isinstance(found, str):
                failed[clip_id] = found
            else:
                for name, value in asdict(found).items():
                    values[name][clip_id] = value
            progress.advance(1)
    return MeasuredProperties(
        values=values,
        drawn=len(drawn),
        reachable=len(reachable),
        failed=failed,
        definitions=dict(media.definitions),
    )
