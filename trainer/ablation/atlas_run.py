"""Makes an atlas: measures a checkpoint and the clips, compares with another one, writes the table and the page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featurestore import FeatureStore
from mervcache.errors import UserError
from mervcache.files import replace_text
from trainer.ablation.atlas import Atlas, atlas_table, measure_atlas, write_atlas
from trainer.ablation.atlas_findings import changes, correlations, select
from trainer.ablation.atlas_media import measure_properties
from trainer.ablation.atlas_page import AtlasResult, atlas_page, notices, published_findings
from trainer.end_to_end import store_media
from trainer.runs.stage_folders import check_are_runs


@dataclass(frozen=True, kw_only=True)
class AtlasRequest:
    """Which checkpoint, over which clips."""

    store: str | None = None
    step: int | None = None
    best: bool = False
    compare: str | None = None  # another run, or a step of the same
    root: str | None = None  # of the media
    clips: int | None = None  # None: all
    decode: int = 512  # at most so many
    draws: int = 10_000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class MadeAtlas:
    """An atlas, and the files that hold it."""

    result: AtlasResult
    table: Path
    page: Path

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: findings, not the values of every clip."""
        result, atlas = self.result, self.result.atlas
        return {
            "run": atlas.run,
            "step": atlas.step,
            "snapshot": atlas.snapshot,
            "fusion": atlas.fusion,
            "clips": len(atlas.clip_ids),
            "without": atlas.without,
            "encoders": {
                encoder: {
                    "weight": None if atlas.weight_CE is None else float(atlas.weight_CE[:, place].mean()),
                    "norm": float(atlas.norm_CE[:, place].mean()),
                    "share": float(atlas.share_CE[:, place].mean()),
                }
                for place, encoder in enumerate(atlas.encoders)
            },
            "random_encoders": atlas.random_encoders,
            "correlations": [asdict(each) | {"is_away": each.is_away} for each in result.correlations],
            "published": [
                dict(zip(("claim", "here", "verdict"), row, strict=True))
                for row in published_findings(atlas, result.correlations)
            ],
            "changes": [asdict(each) for each in result.changes],
            "failed": result.properties.failed,
            "notices": notices(result),
            "table": str(self.table),
            "page": str(self.page),
        }


def make_atlas(run: Path, request: AtlasRequest, *, page: Path | None = None, quiet: bool = False) -> MadeAtlas:
    """Measure, compare, and write RUN/atlas/NAME.parquet and the page, by default NAME.html alongside it."""
    options = {"clips": request.clips, "seed": request.seed, "quiet": quiet}
    atlas = measure_atlas(run, request.store, step=request.step, best=request.best, **options)
    before, after = _compared(run, request, atlas, quiet=quiet)
    store = FeatureStore.open(atlas.store, snapshot=atlas.snapshot)
    media = store_media(store, request.root)
    properties = measure_properties(media, atlas, request.decode, seed=request.seed, quiet=quiet)
    result = AtlasResult(
        atlas=atlas,
        properties=properties,
        correlations=correlations(atlas, properties.values, draws=request.draws, seed=request.seed),
        draws=request.draws,
        before=before,
        changes=changes(before, after, draws=request.draws, seed=request.seed) if before is not None else (),
        not_compared=len(atlas.clip_ids) - len(after.clip_ids),
    )
    facts = {"properties": properties.definitions, "decoded": properties.measured, "failed": len(properties.failed)}
    table = write_atlas(atlas, atlas_table(atlas, properties.values, facts))
    keys = {identity.id: key for key, identity in store.encoders.items()}
    html = atlas_page(result, media, {encoder: keys[atlas.identities[encoder]] for encoder in atlas.encoders})
    target = page or table.with_suffix(".html")
    try:
        replace_text(target, html)
    except OSError as error:
        raise UserError(f"the page cannot be written to {target}: {error.strerror}; give another --out") from error
    return MadeAtlas(result=result, table=table, page=target)


def _compared(run: Path, request: AtlasRequest, atlas: Atlas, *, quiet: bool) -> tuple[Atlas | None, Atlas]:
    """The other checkpoint and this one, over the clips that have tokens of the encoders of both."""
    if request.compare is None:
        return None, atlas
    is_step = request.compare.isdecimal()
    other = run if is_step else Path(request.compare)
    check_are_runs(other)
    before = measure_atlas(
        other, atlas.store, step=int(request.compare) if is_step else None, only=atlas.clip_ids, quiet=quiet
    )
    return before, select(atlas, before.clip_ids)
