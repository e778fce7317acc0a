"""Properties of an atlas's clips: a seeded sample of those whose media are there, decoded; what failed is kept.

What an earlier atlas of the run has measured over the same snapshot is read from its table and not decoded again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from featurestore.parquet import read_table
from mervcache.console import ProgressLine
from mervcache.errors import StoreFormatError
from trainer.ablation.atlas import FOLDER, Atlas, Properties, read_metadata, store_name
from trainer.data.order import derive_seed

if TYPE_CHECKING:
    from trainer.end_to_end import StoreMedia

NUM_CLIPS = 512  # decoded by default: a minute or two
ALWAYS = "edges"  # the property that every decoded clip has

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MeasuredProperties:
    """Properties, and the clips that have none."""

    values: Properties
    gone: int  # clips of the atlas whose media folder is gone or not known
    gone_unmeasured: int  # of them, those that no earlier atlas has measured
    failed: Mapping[str, str]  # clip id -> why it could not be decoded
    definitions: Mapping[str, str]

    @property
    def measured(self) -> int:
        return len(self.values.get(ALWAYS, ()))

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Why clips could not be decoded, and how many, most frequent first."""
        return Counter(self.failed.values()).most_common()


def measure_properties(
    media: StoreMedia, atlas: Atlas, count: int, *, seed: int = 0, quiet: bool = False
) -> MeasuredProperties:
    """Properties of at most `count` clips, drawn by seed and id alone, and of those that are known already."""
    reachable = media.reachable(atlas.clip_ids)
    drawn = sorted(reachable, key=lambda clip_id: (derive_seed("properties", seed, clip_id), clip_id))[:count]
    values = known_properties(atlas, media.definitions)
    missing = [clip_id for clip_id in drawn if clip_id not in values[ALWAYS]]
    gone = set(atlas.clip_ids).difference(reachable)
    unmeasured = len(gone.difference(values[ALWAYS]))
    failed = {}
    with ProgressLine("properties", unit="clips", total=len(missing), quiet=quiet) as progress:
        for clip_id, found in media.measure(missing):
            if isinstance(found, str):
                failed[clip_id] = found
            else:
                for name, value in asdict(found).items():
                    values[name][clip_id] = value
            progress.advance(1)
    return MeasuredProperties(
        values=values,
        gone=len(gone),
        gone_unmeasured=unmeasured,
        failed=failed,
        definitions=media.definitions,
    )


def known_properties(atlas: Atlas, definitions: Mapping[str, str]) -> dict[str, dict[str, float | None]]:
    """What the tables of the run hold for the clips of this atlas, measured by these definitions."""
    values: dict[str, dict[str, float | None]] = {name: {} for name in definitions}
    schema = pa.schema([("clip_id", pa.string()), *((name, pa.float64()) for name in definitions)])
    wanted = set(atlas.clip_ids)
    for path in sorted((atlas.folder / FOLDER).glob("*.parquet")):
        try:
            table = read_table(path.read_bytes(), schema, str(path), exactly=False)
            record = read_metadata(table)
        except (StoreFormatError, ValueError) as error:
            logger.warning(f"properties are not read from {path}: {error}")
            continue
        same = (record.get("store"), record.get("snapshot"), record.get("properties"))
        if same == (store_name(atlas.store), atlas.snapshot, definitions):
            _add(values, table.to_pylist(), wanted)
    return values


def _add(values: dict[str, dict[str, float | None]], rows: Iterable[Mapping], wanted: set[str]) -> None:
    for row in rows:
        if row["clip_id"] in wanted and row[ALWAYS] is not None:
            for name, found in values.items():
                found[row["clip_id"]] = row[name]
