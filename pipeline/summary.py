"""The record of a run: what it did, its predicted alongside its measured cost, and what earlier records say of cost.

It is provenance (settings, host, versions, times) in the store's journal, and decides no stored bytes. Its keys are
read back by `explain`, `quarantine retry`, `status` and forecasts.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featurestore.identity import FeatureIdentity
from featurestore.store import FeatureStore
from mervcache.console import format_bytes, format_duration, plural
from mervcache.errors import UserError
from mervcache.reprs import brief
from pipeline.config import ExtractConfig
from pipeline.datasets import LINKS_OPTION, DatasetListing
from pipeline.media import MediaRoot, Root
from pipeline.remote_shards import remote_root
from pipeline.worker.reports import BlockReport

FIRST_SHARE = 0.05  # of the clips: then the pace is known, and most of the run is still to come
DECIDES_COST = ("encoder", "architecture", "num_frames", "compute_dtype")  # fields of an identity


@dataclass(kw_only=True)
class ExtractSummary:
    """What a run did; amounts are of this run, not of the store. Field names are keys of the journal."""

    store: str
    run: str
    snapshot: str | None = None
    dataset: str = ""
    listed: int = 0  # clips that the dataset lists
    samples: int = 0  # conversations that it lists
    clips: int = 0  # computed or failed in this run
    failed: int = 0
    missing: dict[str, int] = field(default_factory=dict)  # folder -> media listed but absent
    missing_files: tuple[str, ...] = field(default=(), repr=False)  # their paths
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> annotation records refused
    skipped: dict[str, int] = field(default_factory=dict)  # what the dataset does not read by its rules -> files
    committed: int = 0  # listed clips that every encoder of this run has tokens of, since this run or earlier ones
    quarantined: int = 0  # listed clips that some encoder of this run has no tokens of, since this run or earlier ones
    unchanged: int = 0  # quarantined clips that were tried again and fail as before
    reasons: dict[str, int] = field(default_factory=dict)  # why clips were quarantined
    examples: dict[str, str] = field(default_factory=dict)  # such a reason -> the first clip by id
    frames: int = 0
    bytes: int = 0
    blocks: int = 0
    canaries: list[str] = field(default_factory=list)  # "kind/group" whose reference clips this run wrote
    reused: int = 0  # cells (clip and encoder) copied from another store
    same_media: int = 0  # cells copied from clips of the same media in other datasets of this store
    predicted: dict[str, Any] | None = None  # a `Prediction`, for comparison with elapsed_s and bytes
    halvings: int = 0  # batches cut for lack of device memory
    elapsed_s: float = 0.0  # since `startup_s` was over
    startup_s: float = 0.0  # before the first block: listing, start of the cluster, loading of encoders, planning
    worker_s: float = 0.0  # time that workers were held, idle or not, summed over them; from the first task on
    device: str = ""  # of the workers; on "cuda" each holds one GPU
    gpu_cost: float | None = None  # of a worker's hour
    stage_s: dict[str, float] = field(default_factory=dict)  # summed over workers
    made: dict[str, dict[str, float]] = field(default_factory=dict)  # "kind/encoder" -> clips, seconds, bytes
    refreshed: int = 0  # clips given new rows because their media changed
    changed: int = 0  # clips whose media changed and whose tokens stay as they are
    not_compared: int = 0  # clips whose media were touched and not read
    blocks_of: dict[str, list[int]] = field(default_factory=dict, repr=False)  # kind -> blocks committed in this run

    def __repr__(self) -> str:
        amounts = f"{self.clips} clips computed, {self.failed} failed, {self.listed} listed, {self.elapsed_s:.1f} s"
        return brief(self, f"{self.run}: {self.dataset} to {self.store} at {self.snapshot}: {amounts}")

    @classmethod
    def begin(cls, config: ExtractConfig, listing: DatasetListing) -> ExtractSummary:
        """The summary of a run that has listed its clips and done nothing yet; it names the run."""
        return cls(
            store=str(config.store_path),
            run=f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}",
            dataset=config.dataset,
            gpu_cost=config.gpu_cost,
            listed=len(listing.clips),
            samples=sum(len(samples) for samples in listing.samples.values()),
            missing=dict(listing.missing),
            missing_files=listing.missing_files,
            rejected={reason: records.count for reason, records in listing.rejected.items()},
            skipped=dict(listing.skipped),
        )

    def add(self, block: BlockReport) -> None:
        """Count a committed block."""
        self.blocks += 1
        for name in ("clips", "failed", "frames", "bytes", "reused", "same_media", "halvings"):
            setattr(self, name, getattr(self, name) + getattr(block, name))
        self.reasons = dict(Counter(self.reasons) + Counter(block.reasons))
        for clip_id, reason in block.failures.items():
            self.examples[reason] = min(clip_id, self.examples.get(reason, clip_id))  # blocks end in any order
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
    def duration_text(self) -> str:
        """`3.0 s after a start of 22.0 s`."""
        return f"{format_duration(self.elapsed_s)} after a start of {format_duration(self.startup_s)}"

    @property
    def failures(self) -> str:
        """What is not in the store of what was requested, in words; "" where nothing is missing."""
        counts = {
            "clip quarantined": self.quarantined,
            "medium listed but absent": sum(self.missing.values()),
            "record refused at listing": sum(self.rejected.values()),
        }
        return ", ".join(f"{count} x {what}" for what, count in counts.items() if count)

    @property
    def block_spans(self) -> dict[str, list[list[int]]]:
        """Committed blocks by kind, as half-open [first, stop) ranges."""
        spans: dict[str, list[list[int]]] = {}
        for kind, blocks in sorted(self.blocks_of.items()):
            ranges = spans.setdefault(kind, [])
            for block in sorted(set(blocks)):
                if ranges and ranges[-1][1] == block:
                    ranges[-1][1] += 1
                else:
                    ranges.append([block, block + 1])
        return spans


def run_record(
    config: ExtractConfig,
    listing: DatasetListing,
    encoders: Mapping[str, Mapping[str, str | int]],
    summary: ExtractSummary,
    started: float,
) -> dict[str, Any]:
    """A run for the journal; `encoders` gives each one's group, device and threads, `started` is a Unix time."""
    return {
        "started": started,
        "host": socket.gethostname(),
        "root": str(listing.root),
        **({"media_links": listing.root.links} if isinstance(listing.root, MediaRoot) else {}),
        "config": config.to_dict(),
        "versions": software_versions(),
        "encoders": {name: dict(entry) for name, entry in encoders.items()},
        "blocks": summary.block_spans,
        "summary": {name: value for name, value in summary.to_dict().items() if name != "missing_files"},
    }


def software_versions() -> dict[str, str]:
    """Installed versions of what decodes, resizes, computes and stores; "absent" for what is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("merv-pipeline", "torch", "transformers", "av", "pillow", "numpy", "zarr"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was expected of a whole run."""

    by: str  # "plan", or "its first N clips"
    clips: int
    seconds: float | None  # None: a forecast without a probe
    interval_s: tuple[float, float] | None  # None: unknown
    bytes: int
    worker_s: float | None = None  # time that workers are held, summed over them

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def hours_text(worker_s: float, device: str, gpu_cost: float | None = None) -> str:
    """`12.30 GPU-hours, cost 30.75 at 2.5 an hour`; workers without a GPU are counted by worker-hours.

    >>> hours_text(3600.0, "cpu")
    '1.00 worker-hours'
    """
    hours = worker_s / 3600
    amount = f"{hours:.2f}" if hours >= 0.1 else f"{hours:.4f}"
    text = f"{amount} {'GPU-hours' if device.startswith('cuda') else 'worker-hours'}"
    return text if gpu_cost is None else f"{text}, cost {hours * gpu_cost:.2f} at {gpu_cost:g} an hour"


def prediction_text(prediction: Mapping[str, Any] | None, device: str = "") -> str:
    """`2.1 h (1.9 h to 2.4 h), 512.0 GB for 81000 clips, by plan` of a recorded `Prediction`."""
    if not prediction:
        return "-"
    time = "no time" if prediction["seconds"] is None else format_duration(prediction["seconds"])
    if prediction["interval_s"]:
        low, high = map(format_duration, prediction["interval_s"])
        time += f" ({low} to {high})"
    if (worker_s := prediction.get("worker_s")) is not None:
        time += f", {hours_text(worker_s, device)}"
    clips = plural(prediction["clips"], "clip")
    return f"{time}, {format_bytes(prediction['bytes'])} for {clips}, by {prediction['by']}"


def read_forecast(path: str | Path) -> Prediction:
    """The prediction in a file that holds what `merv-pipeline plan --json` printed; `UserError` for any other file."""
    try:
        forecast = json.loads(Path(path).read_text())
        by_clip: dict[tuple[str, str], int] = {}  # every encoder's rows count the same clips
        for row in forecast["rows"]:
            group = (row["stage"], row["kind"])
            by_clip[group] = max(by_clip.get(group, 0), int(row["to_do"]))
        startup_s = float(forecast.get("startup_s", 0.0))  # a run is timed from when the encoders are loaded
        interval = forecast["interval_s"]
        return Prediction(
            by="plan",
            clips=sum(by_clip.values()),
            seconds=None if forecast["seconds"] is None else float(forecast["seconds"]) - startup_s,
            interval_s=interval and (float(interval[0]) - startup_s, float(interval[1]) - startup_s),
            bytes=int(forecast["bytes"]),
            worker_s=forecast.get("worker_s") and float(forecast["worker_s"]),
        )
    except OSError as error:
        raise UserError(f"forecast {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f"{path} holds no forecast: save one with `merv-pipeline plan --json > {path}`") from error


def predict_from_first_blocks(
    *, done: int, total: int, seconds: float, num_bytes: int, worker_s: float = 0.0, loading_s: float = 0.0
) -> Prediction | None:
    """The whole run at the pace and size of the clips so far; None before `FIRST_SHARE` is done, and when all is.

    Of `worker_s`, the workers' time so far, `loading_s` passed before the first clip.
    """
    if not FIRST_SHARE * total <= done < total:
        return None
    scale = total / done
    return Prediction(
        by=f"its first {done} clips",
        clips=total,
        seconds=seconds * scale,
        interval_s=None,
        bytes=round(num_bytes * scale),
        worker_s=loading_s + (worker_s - loading_s) * scale,
    )


def last_run(store: FeatureStore) -> dict[str, Any] | None:
    """Of the newest run that computed anything: run, clips, seconds, bytes and what was predicted (or None)."""
    busy = [run["summary"] for run in store.runs() if run["summary"]["clips"]]
    if not busy:
        return None
    newest = max(busy, key=lambda summary: summary["run"])  # a run's name begins with its time
    return {
        "run": newest["run"],
        "clips": newest["clips"],
        "seconds": newest["elapsed_s"],
        "bytes": newest["bytes"],
        "predicted": newest.get("predicted"),
        **{name: newest[name] for name in ("worker_s", "device", "gpu_cost") if newest.get(name)},
    }


def spent(store: FeatureStore) -> list[dict[str, Any]]:
    """What the store's runs held, by device: runs, worker_s, and cost, as far as they recorded a price."""
    totals: dict[str, dict[str, Any]] = {}
    for summary in (run["summary"] for run in store.runs()):
        if worker_s := summary.get("worker_s"):
            device = summary["device"].partition(":")[0]
            total = totals.setdefault(device, {"device": device, "runs": 0, "worker_s": 0.0, "cost": None})
            total["runs"] += 1
            total["worker_s"] += worker_s
            if (price := summary["gpu_cost"]) is not None:
                total["cost"] = (total["cost"] or 0.0) + worker_s / 3600 * price
    return list(totals.values())


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Worker seconds per clip, including decode wait and write time."""

    seconds: float
    clips: int  # that were measured
    source: str  # "3 runs on cpu", for a person


def past_rate(
    runs: Sequence[Mapping[str, Any]], stored: Mapping[str, FeatureIdentity], wanted: FeatureIdentity, kind: str
) -> Rate | None:
    """What the encoder took in the store's own runs; None where no run computed this network on this kind.

    `stored` is group name -> identity. A rate holds for the same network in the same arithmetic (`DECIDES_COST`); grid,
    storage, weights and decoder do not change a forward's time. Runs on other devices than the newest one's are left
    out.
    """
    measured: list[tuple[str, float, float]] = []  # device, clips, seconds
    for run in runs:
        # several grids of the encoder share forwards, whose seconds are counted to the first of them
        keys = [key for key in run["encoders"] if key.partition("@")[0] == wanted.encoder]
        entry, summary = (run["encoders"][keys[0]] if keys else {}), run["summary"]
        works = [summary.get("made", {}).get(f"{kind}/{key}", {}) for key in keys]
        made = {name: [work.get(name) or 0 for work in works] for name in ("clips", "seconds")}
        identity = stored.get(entry.get("group", ""))
        if not (identity and any(made["clips"]) and any(made["seconds"])):
            continue
        ran, needed = identity.to_dict(), wanted.to_dict()
        if any(ran[name] != needed[name] for name in DECIDES_COST):
            continue
        encode_s = sum(seconds for name, seconds in summary["stage_s"].items() if name.startswith("encode:"))
        overhead = max(1.0, summary["stage_s"].get("total", 0.0) / encode_s) if encode_s else 1.0
        measured.append((str(entry.get("device", "?")), max(made["clips"]), sum(made["seconds"]) * overhead))
    if not measured:
        return None
    device = measured[-1][0]
    on_device = [(clips, seconds) for name, clips, seconds in measured if name == device]
    clips = sum(clips for clips, _ in on_device)
    source = f"{clips} clips of {len(on_device)} run{'s' if len(on_device) > 1 else ''} on {device}"
    return Rate(seconds=sum(seconds for _, seconds in on_device) / clips, clips=int(clips), source=source)


def changed_versions(runs: Sequence[Mapping[str, Any]], group: str) -> dict[str, dict[str, Any]]:
    """By library, where they differ: the versions that made a group's tokens, and the version here."""
    here, made_with = software_versions(), {}
    for run in runs:
        wrote = any(entry.get("group") == group for entry in run["encoders"].values()) and run["summary"]["clips"]
        for name, version in run.get("versions", {}).items() if wrote else ():
            made_with.setdefault(name, set()).add(version)
    return {
        name: {"made with": sorted(versions), "here": here[name]}
        for name, versions in made_with.items()
        if name in here and versions != {here[name]}
    }


def settings_of(run: Mapping[str, Any], *, without: Collection[str] = ()) -> dict[str, Any]:
    """A run's settings in the form that `read_config` takes, to repeat the run, without those named."""
    settings = {name: value for name, value in run["config"].items() if name not in without}
    return settings | {"grid": settings.get("grid") or "raw"}


def media_roots(runs: Iterable[Mapping], root: str | None) -> dict[str, Root]:
    """Dataset -> folder of its media: as given, else as in its newest run; "" is the key for every other dataset.

    A run that listed no clip with tokens counts only where no other is: it may have been given another folder.
    UserError where no folder has the name that is given.
    """
    if root and not os.path.isdir(root):
        raise UserError(
            f"there is no folder {root}: give that of the media, or leave it out for the one of the extraction"
        )
    newest: dict[str, Mapping] = {}
    for run in runs:
        if run["config"]["dataset"] not in newest or run["summary"].get("committed", 1):  # earlier versions count none
            newest[run["config"]["dataset"]] = run
    if not root:
        return {dataset: media_root(run) for dataset, run in newest.items()}
    return {"": root} | {dataset: media_root(run, root) for dataset, run in newest.items()}


def media_root(run: Mapping, root: str | None = None) -> Root:
    """Where a run's media are: under `root` now, or where they were; its links may lead where it allowed them to.

    A folder of links that the run named relative to its root is looked for relative to the root of now.
    """
    given = root or run["root"]
    if (remote := remote_root(given, run["config"].get("options"))) is not None:
        return remote
    links = run.get("media_links", "")
    if not links:
        return given
    if root:
        links = os.path.normpath(os.path.join(os.path.abspath(root), run["config"]["options"][LINKS_OPTION]))
    return MediaRoot(os.path.abspath(root) if root else run["root"], links)
