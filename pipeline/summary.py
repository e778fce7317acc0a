"""The summary of an extraction: what the run did, for the person who waits and for the store's journal.

Comes in: what blocks report as they are committed. Goes out: counts, and a record of how they came about (settings,
host, versions), which is provenance: it decides no bytes.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.config import ExtractConfig
from pipeline.datasets import DatasetListing
from pipeline.worker.reports import BlockReport

DECODING = "decode (in its processes)"  # a stage that runs beside the others


@dataclass(kw_only=True)
class ExtractSummary:
    """What a run did; amounts are of this run, not of the store."""

    store: str
    run: str
    snapshot: str | None = None
    dataset: str = ""
    listed: int = 0  # clips that the dataset lists
    samples: int = 0  # conversations that it lists
    clips: int = 0  # computed or failed in this run
    failed: int = 0
    missing: dict[str, int] = field(default_factory=dict)  # folder -> media listed but absent
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> annotation records refused
    unchanged: int = 0  # quarantined clips that were tried again and fail as before
    reasons: dict[str, int] = field(default_factory=dict)  # why clips were quarantined
    frames: int = 0
    bytes: int = 0
    blocks: int = 0
    canaries: list[str] = field(default_factory=list)  # "kind/group" whose canaries this run wrote
    reused: int = 0  # cells (clip and encoder) copied from another store
    predicted: dict[str, Any] | None = None  # a `Prediction`: beside elapsed_s and bytes, what was expected
    halvings: int = 0  # batches cut for lack of device memory
    elapsed_s: float = 0.0
    stage_s: dict[str, float] = field(default_factory=dict)  # summed over workers
    made: dict[str, dict[str, float]] = field(default_factory=dict)  # "kind/encoder" -> clips, seconds, bytes
    refreshed: int = 0  # clips given new rows because their media changed
    changed: int = 0  # clips whose media changed and whose tokens stay as they are
    not_compared: int = 0  # clips whose media were touched and not read
    blocks_of: dict[str, list[int]] = field(default_factory=dict, repr=False)  # kind -> blocks committed in this run

    @classmethod
    def begin(cls, config: ExtractConfig, listing: DatasetListing) -> ExtractSummary:
        """The summary of a run that has listed its clips and done nothing yet; it gives the run its name."""
        return cls(
            store=str(config.store_path),
            run=f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}",
            dataset=config.dataset,
            listed=len(listing.clips),
            samples=sum(len(samples) for samples in listing.samples.values()),
            missing=dict(listing.missing),
            rejected={reason: found.count for reason, found in listing.rejected.items()},
        )

    def add(self, block: BlockReport) -> None:
        """Count a committed block."""
        self.blocks += 1
        for name in ("clips", "failed", "frames", "bytes", "reused", "halvings"):
            setattr(self, name, getattr(self, name) + getattr(block, name))
        self.reasons = dict(Counter(self.reasons) + Counter(block.reasons))
        self.stage_s = dict(Counter(self.stage_s) + Counter(block.seconds))
        self.blocks_of.setdefault(block.kind, []).append(block.block)
        for encoder, work in block.made.items():
            amounts = asdict(work)
            sums = self.made.setdefault(f"{block.kind}/{encoder}", dict.fromkeys(amounts, 0))
            for name, amount in amounts.items():
                sums[name] += amount

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "blocks_of"}

    @property
    def block_spans(self) -> dict[str, list[list[int]]]:
        """Committed blocks by kind, as half-open [first, stop) ranges."""
        return {kind: _spans(sorted(set(blocks))) for kind, blocks in sorted(self.blocks_of.items())}


def run_record(
    config: ExtractConfig,
    listing: DatasetListing,
    encoders: Mapping[str, Mapping[str, str | int]],
    summary: ExtractSummary,
    started: float,
) -> dict[str, Any]:
    """A run for the journal; `encoders` tells each one's group, device and threads, `started` is a Unix time."""
    return {
        "started": started,
        "host": socket.gethostname(),
        "root": listing.root,
        "config": config.to_dict(),
        "versions": software_versions(),
        "encoders": {name: dict(entry) for name, entry in encoders.items()},
        "blocks": summary.block_spans,
        "summary": summary.to_dict(),
    }


def _spans(numbers: list[int]) -> list[list[int]]:
    """Ascending numbers as half-open [first, stop) ranges."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number:
            spans[-1][1] += 1
        else:
            spans.append([number, number + 1])
    return spans


def software_versions() -> dict[str, str]:
    """Installed versions of what decodes, resizes, computes and stores."""
    from importlib.metadata import PackageNotFoundError, version

    def found(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "absent"

    return {name: found(name) for name in ("merv-pipeline", "torch", "transformers", "av", "pillow", "numpy", "zarr")}
