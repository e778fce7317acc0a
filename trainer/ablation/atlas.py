"""Atlas: what each encoder contributes to the visual tokens of every clip, by a checkpoint's projectors and fusion.

RUN/atlas/NAME.parquet has a row per clip: clip_id, dataset, kind, a column weight_ENCODER where the fusion has weights,
a column norm_ENCODER, and the properties that were measured (null: not measured). Checkpoint, snapshot and definitions
are in the file's metadata under `merv_cache.atlas`.

C clips, E encoders, B clips at once, N visual tokens, M LLM width.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from featurestore import FeatureStore
from featurestore.parquet import table_bytes
from mervcache.console import ProgressLine
from mervcache.errors import UserError
from mervcache.files import canonical_json
from mervcache.text import redact
from trainer.ablation.rank import draw_clips
from trainer.ablation.statistics import Floats
from trainer.ablation.visual import VisualPart, load_visual, open_tokens
from trainer.data.tokens import StoreTokens

FORMAT = 1
METADATA = b"merv_cache.atlas"
FOLDER = "atlas"  # in a run's folder
CLIPS_AT_ONCE = 4  # four projected encoders of 1,024 tokens of width 4,096 are 64 MiB a clip
NORM = (
    "mean over the visual tokens of the Euclidean norm of the encoder's part of the token: its weight times its"
    " projected token"
)
NORMS = {  # by fusion, where it is not NORM
    "concat_sequence": "mean over the encoder's own visual tokens of the Euclidean norm of the projected token",
    "concat_channel": "mean over the visual tokens of the Euclidean norm of what the encoder's channels add to the"
    " token",
    "concat_channel_ln": "mean over the visual tokens of the Euclidean norm of what the encoder's channels, behind the"
    " layer norm over all channels, add to the token",
}


Properties = Mapping[str, Mapping[str, float | None]]  # name -> clip id -> value; None: the clip has no such property


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """Weights and norms of one checkpoint over the clips of one snapshot."""

    run: str  # name
    step: int
    folder: Path  # of the run
    store: str
    snapshot: str
    fusion: str
    encoders: tuple[str, ...]
    weights_labels: Mapping[str, str]  # encoder -> what its weights are, `random:SEED` for a stand-in
    identities: Mapping[str, str]
    clip_ids: tuple[str, ...]
    datasets: tuple[str, ...]
    kinds: tuple[str, ...]
    media: tuple[str, ...]  # dataset and path of each clip's file: spans of one are not independent
    weight_CE: Floats | None = field(repr=False)  # None: the fusion has none
    norm_CE: Floats = field(repr=False)
    available: int  # clips with tokens of every encoder
    without: int  # other clips of the store
    seed: int  # of the sample, where `clip_ids` are not all that are available

    @property
    def has_clip_weights(self) -> bool:
        """Whether weights differ between clips: those of a learned or equal mix do not."""
        return self.weight_CE is not None and bool((np.ptp(self.weight_CE, axis=0) > 0).any())

    @property
    def share_CE(self) -> Floats:
        """Each encoder's part of the sum of the norms of a clip."""
        return self.norm_CE / self.norm_CE.sum(axis=1, keepdims=True)

    @property
    def measures(self) -> dict[str, Floats]:
        """What may differ between clips, by name: norms, shares of several encoders, weights where they do."""
        found = {"norm": self.norm_CE}
        if len(self.encoders) > 1:
            found["share"] = self.share_CE
        if self.has_clip_weights and self.weight_CE is not None:
            found["weight"] = self.weight_CE
        return found

    @property
    def activation(self) -> str:
        """The measure that says which encoder a clip activates: shares, since a clip may have large norms of all."""
        return "share" if len(self.encoders) > 1 else "norm"

    @property
    def random_encoders(self) -> list[str]:
        """Encoders whose weights were never trained."""
        return [encoder for encoder, label in self.weights_labels.items() if label.startswith("random")]

    @property
    def norm_definition(self) -> str:
        return NORMS.get(self.fusion, NORM)

    @property
    def name(self) -> str:
        """The file's stem: store, snapshot, step, and the sample where there is one."""
        stem = re.sub(r"[^\w.-]", "_", store_name(self.store).removesuffix(".zarr"))
        drawn = "" if len(self.clip_ids) == self.available else f"-{len(self.clip_ids)}-clips-seed-{self.seed}"
        return f"{stem}-{self.snapshot}-step-{self.step:08d}{drawn}"

    def relative(self, measure: str) -> Floats:
        """[C, E]: a measure divided by the encoder's mean over the clips; 1 where that is 0."""
        values_CE = self.measures[measure]
        mean_E = values_CE.mean(axis=0)
        return np.divide(values_CE, mean_E, out=np.ones_like(values_CE), where=mean_E > 0)


def measure_atlas(
    run: Path,
    store: str | None = None,
    *,
    step: int | None = None,
    best: bool = False,
    clips: int | None = None,  # a sample of so many; None: all
    seed: int = 0,
    only: Sequence[str] | None = None,  # of these clips those that the run has tokens for
    quiet: bool = False,
) -> Atlas:
    """Weights and norms of a run's newest, best or given checkpoint over its store, or another with its tokens."""
    part = load_visual(run, step=step, best=best)
    path, _, source = open_tokens(part, store)
    drawn = draw_clips(path, source, clips, seed)
    opened = FeatureStore.open(path, snapshot=source.snapshot)
    chosen = set(drawn.clip_ids) if only is None else source.available(only)
    listed = opened.clips.select(["clip_id", "dataset", "path", "kind"]).to_pylist()
    rows = [row for row in listed if row["clip_id"] in chosen]
    if not rows:
        raise UserError(f"none of these clips has tokens of every encoder of {run} in {path}")
    clip_ids = [row["clip_id"] for row in rows]
    weight_CE, norm_CE = _measured(part, source, clip_ids, quiet=quiet)
    return Atlas(
        run=Path(run).resolve().name,
        step=part.step,
        folder=part.folder,
        store=path,
        snapshot=source.snapshot,
        fusion=part.config.fusion.name,
        encoders=tuple(part.projectors),
        weights_labels={encoder: str(source.facts[encoder]["weights"]) for encoder in part.projectors},
        identities={encoder: source.shapes[encoder].identity for encoder in part.projectors},
        clip_ids=tuple(clip_ids),
        datasets=tuple(row["dataset"] for row in rows),
        kinds=tuple(row["kind"] for row in rows),
        media=tuple(f"{row['dataset']}/{row['path']}" for row in rows),
        weight_CE=weight_CE,
        norm_CE=norm_CE,
        available=drawn.facts["available"],
        without=drawn.facts["without"],
        seed=seed,
    )


@torch.inference_mode()
def _measured(
    part: VisualPart, source: StoreTokens, clip_ids: Sequence[str], *, quiet: bool
) -> tuple[Floats | None, Floats]:
    """weight_CE, or None where the fusion has none, and norm_CE."""
    weights, norms = [], []
    with ProgressLine("atlas", unit="clips", total=len(clip_ids), quiet=quiet) as progress:
        for start in range(0, len(clip_ids), CLIPS_AT_ONCE):
            fetched = clip_ids[start : start + CLIPS_AT_ONCE]
            embeddings = part.project(source.fetch(fetched))
            _, weight_BE = part.fusion(embeddings)
            if weight_BE is not None:
                weights.append(weight_BE.double().cpu().numpy())
            parts = part.fusion.contributions(embeddings)
            norm_EB = [part_BNM.double().norm(dim=-1).mean(dim=1).cpu().numpy() for part_BNM in parts]
            norms.append(np.stack(norm_EB, axis=1))
            for clip_id, norm_E in zip(fetched, norms[-1], strict=True):
                if not np.isfinite(norm_E).all():
                    raise UserError(f"what the projectors of {part.folder} make of {clip_id} is not finite")
            progress.advance(len(fetched))
    return np.concatenate(weights) if weights else None, np.concatenate(norms)


def atlas_table(
    atlas: Atlas, properties: Mapping[str, Mapping[str, float | None]], facts: Mapping[str, Any]
) -> pa.Table:
    """The table with its metadata; `properties` are name -> clip id -> value, `facts` are added to the metadata."""
    columns: dict[str, Any] = {
        "clip_id": pa.array(atlas.clip_ids, pa.string()),
        "dataset": pa.array(atlas.datasets, pa.string()),
        "kind": pa.array(atlas.kinds, pa.string()),
    }
    for name, values_CE in (("weight", atlas.weight_CE), ("norm", atlas.norm_CE)):
        if values_CE is not None:
            columns |= {f"{name}_{e}": values_CE[:, place] for place, e in enumerate(atlas.encoders)}
    for name, found in properties.items():
        columns[name] = pa.array([found.get(clip_id) for clip_id in atlas.clip_ids], pa.float64())
    record = {
        "format": FORMAT,
        "run": atlas.run,
        "step": atlas.step,
        "store": store_name(atlas.store),
        "snapshot": atlas.snapshot,
        "fusion": atlas.fusion,
        "encoders": list(atlas.encoders),
        "weights": dict(atlas.weights_labels),
        "identities": dict(atlas.identities),
        "norm": atlas.norm_definition,
        "clips": len(atlas.clip_ids),
        "available": atlas.available,
        "without": atlas.without,
        "seed": atlas.seed,
        **facts,
    }
    return pa.table(columns).replace_schema_metadata({METADATA: canonical_json(record)})


def write_atlas(atlas: Atlas, table: pa.Table) -> Path:
    """Write RUN/atlas/NAME.parquet; equal tables are equal files."""
    path = atlas.folder / FOLDER / f"{atlas.name}.parquet"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        temporary.write_bytes(table_bytes(table))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_metadata(table: pa.Table) -> dict[str, Any]:
    """What `atlas_table` has put into the metadata; ValueError where it is not that."""
    record = json.loads((table.schema.metadata or {}).get(METADATA, b"null"))
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError("it is not a table of an atlas of this version")
    return record


def store_name(store: str) -> str:
    """A store's name without its folder, which says more about a machine than about a clip."""
    return redact(store).rstrip("/").rpartition("/")[2]
