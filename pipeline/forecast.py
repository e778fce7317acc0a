"""The forecast: what an extraction would cost before it is started.

Comes in: an `ExtractConfig`. Goes out: clips, bytes, files and hours by stage, kind and encoder. Bytes follow from the
layout and the compression of a few clips; hours from really decoding and encoding those clips on a worker. Nothing
is written.

The probe: a few real clips decoded, encoded and compressed on a worker, for the forecast.

Comes in: engine settings and some clips per kind. Goes out: a `Probe`, seconds and bytes per clip and encoder. Clips
that cannot be decoded are left out: they count as failures, not as time.

The probe on a cluster: on several workers at a time, and what their spread says of the whole.

Comes in: a client, and a few clips of each kind per worker. Goes out: one `Probe`, its records marked with the worker
that they are from, and how far the mean may be off. Workers of one cluster may differ (another GPU, a shared
node), so what lies between workers counts as well as what lies between clips.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurestore.clips import KINDS, Clip
from featurestore.identity import FeatureIdentity
from featurestore.layout import ROOT_METADATA, check_block_rows
from featurestore.locate import Place, is_url
from featurestore.objects.open import open_objects
from featurestore.reader import encode_row
from featurestore.snapshots import newest_snapshot_id
from featurestore.storage_dtypes import OverflowedTokens, to_stored
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter
from featurestore.zarr_metadata import array_specs, clip_bytes
from jobs.clusters import connect
from jobs.run import Listener, Task, run_tasks
from mervcache.errors import MediaError
from pipeline.config import EngineSettings, ExtractConfig
from pipeline.datasets import DatasetListing, list_clips
from pipeline.decode.sampling import Decoded
from pipeline.extract import check_place
from pipeline.run_encoders import Loading
from pipeline.worker.engine import Engine, TokenEncoder, decode_job, encode_batch, reporting_engine
from pipeline.worker.reports import EncoderProbe, Probe, ProbeRecord

if TYPE_CHECKING:
    from distributed import Client


def probe_clips(
    settings: EngineSettings,
    root: str,
    chosen: Mapping[str, Sequence[Clip]],
    batch: Mapping[str, int],
) -> Probe:
    """Load the encoders and run the chosen clips through them; `batch` is kind -> clips per forward, where given."""
    started = time.monotonic()
    engine = reporting_engine(settings)
    startup_s = time.monotonic() - started
    sizes = {kind: batch.get(kind) or engine.batch_of(kind) for kind in chosen}
    return Probe(
        device=engine.device,
        startup_s=startup_s,
        identities={name: run.identity for name, run in engine.encoders.items()},
        clips={kind: _probe_kind(engine, root, kind, clips, sizes[kind]) for kind, clips in chosen.items()},
    )


def _probe_kind(engine: Engine, root: str, kind: str, clips: Sequence[Clip], batch: int) -> list[ProbeRecord]:
    """One forward of each encoder per batch: at full size on a CPU a forward is half a minute, so none is repeated."""
    decoded = [result for clip in clips if (result := _decode(engine, root, clip)) is not None]
    if engine.device != "cpu" and decoded:
        for run in engine.encoders.values():
            _probe_encoder(run, kind, decoded[:1], batch)  # the first forward on a device picks kernels
    records = []
    for start in range(0, len(decoded), batch):
        together = decoded[start : start + batch]
        encoders = {name: _probe_encoder(run, kind, together, batch) for name, run in engine.encoders.items()}
        records += [_record(engine, clip, encoders) for clip in together]
    return records


def _decode(engine: Engine, root: str, clip: Clip) -> Decoded | None:
    try:
        return engine.pool.submit(decode_job(root, clip, engine.encoders.values())).result()
    except MediaError:
        return None


def _record(engine: Engine, decoded: Decoded, encoders: Mapping[str, EncoderProbe]) -> ProbeRecord:
    encode_s = sum(probed.seconds for probed in encoders.values())
    # Decoding runs beside the encoders: it costs wall time only where it is the slower of the two.
    wall_s = max(encode_s, decoded.seconds / engine.num_decoders)
    return ProbeRecord(decode_s=decoded.seconds, wall_s=wall_s, encoders=encoders)


def _probe_encoder(run: TokenEncoder, kind: str, together: Sequence[Decoded], batch: int) -> EncoderProbe:
    """Encode these clips in one forward of a full batch."""
    frames = {slot: decoded.frames[run.view] for slot, decoded in enumerate(together)}
    started = time.perf_counter()
    arrays, _ = encode_batch(run, frames, range(batch))
    seconds = (time.perf_counter() - started) / batch
    sizes = [_stored_bytes(run.identity, kind, {name: a[slot] for name, a in arrays.items()}) for slot in frames]
    return EncoderProbe(seconds=seconds, stored_bytes=sum(sizes) / len(sizes))


def _stored_bytes(identity: FeatureIdentity, kind: str, arrays: Mapping[str, np.ndarray]) -> int:
    """Bytes of one clip as it would stand in a shard; none where it would be quarantined."""
    specs = array_specs(identity, kind, blocks=1, block_rows=1)
    try:
        stored = to_stored(arrays, identity.storage_dtype)
    except OverflowedTokens:
        return 0
    return sum(len(encode_row(specs[name], array)) for name, array in stored.items())


MAX_WORKERS = 8  # probed: the error of a mean shrinks with the root of their number
INTERVAL = "two standard errors of the mean to each side, between clips or between workers, whichever is wider"


def probe_workers(
    client: Client,
    config: ExtractConfig,
    root: str,
    chosen: Mapping[str, Sequence[Clip]],
    *,
    workers: int,
    listener: Listener = Listener(),
) -> Probe:
    """Probe the chosen clips, dealt out to `workers` workers of the cluster."""

    parts = [{kind: clips[n::workers] for kind, clips in chosen.items()} for n in range(workers)]
    tasks = [
        Task(
            key=f"probe-{n}-{uuid.uuid4().hex}",
            arguments=(config.engine_settings, root, part, config.batch),
        )
        for n, part in enumerate(parts)
        if n == 0 or any(part.values())
    ]
    probes = []
    wait_s = config.cluster_request.worker_wait_s
    for outcome in run_tasks(client, probe_clips, tasks, attempts=1, worker_wait_s=wait_s, listener=listener):
        if outcome.error is not None:
            raise outcome.error
        probes.append(outcome.result)
    return _together(probes)


def _together(probes: Sequence[Probe]) -> Probe:
    """One probe of several; every clip's record says which worker it is from."""
    clips: dict[str, list[ProbeRecord]] = {}
    for worker, probe in enumerate(probes):
        for kind, records in probe.clips.items():
            clips.setdefault(kind, []).extend(replace(record, worker=worker) for record in records)
    startup_s = max(probe.startup_s for probe in probes)
    return replace(probes[0], clips=clips, startup_s=startup_s, workers=len(probes))


def standard_error(records: Sequence[ProbeRecord]) -> float:
    """Standard error of the mean seconds per clip: between clips, or between workers' means where it is larger.

    >>> round(standard_error([ProbeRecord(decode_s=0.1, wall_s=s, encoders={}) for s in (1.0, 3.0)]), 6)
    1.0
    """
    by_worker: dict[int, list[float]] = {}
    for record in records:
        by_worker.setdefault(record.worker, []).append(record.wall_s)
    means = [statistics.fmean(seconds) for seconds in by_worker.values()]
    return max(_error_of_mean([record.wall_s for record in records]), _error_of_mean(means))


def _error_of_mean(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


FILES_PER_BLOCK = 2  # a shard and its receipt


@dataclass(frozen=True, kw_only=True)
class ForecastRow:
    """One kind of clip of one stage, with one encoder."""

    stage: str  # stages whose samples use the clips, joined by "+"; "-" for clips without samples
    kind: str
    encoder: str
    clips: int
    to_do: int  # not committed in the store yet
    reusable: int  # of these, clips whose tokens --reuse seems to hold; the media's bytes are compared at extraction
    bytes: int  # of what is to do
    files: int
    seconds: float | None  # on one worker; None without a probe


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What an extraction would cost."""

    store: str
    rows: tuple[ForecastRow, ...]
    free_bytes: int | None  # None in a bucket, which does not tell
    workers: int
    probed: int = 0  # clips really encoded
    probed_workers: int = 0  # on so many workers
    device: str = ""
    decode_s: float = 0.0  # per clip, in a decode process
    startup_s: float = 0.0  # until a worker has loaded the encoders; a part of `seconds`
    seconds: float | None = None  # wall time of the whole run
    interval_s: tuple[float, float] | None = None
    interval: str = INTERVAL  # what the interval is
    missing: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes}


def forecast(config: ExtractConfig, *, probe: int = 4, say: Callable[[str], None] = lambda line: None) -> Forecast:
    """Predict bytes, files and time of what is left to do.

    `probe` clips of each kind are really encoded on each of up to eight workers.
    """
    check_place(config.store_path)
    listing = list_clips(config)
    say(f"{config.dataset}: {len(listing.clips)} clips listed; loading {', '.join(config.encoders)} for a probe")
    with connect(config.cluster_request, say=say) as client:
        present = len(client.scheduler_info(n_workers=-1)["workers"])
        workers = max(present, config.workers)
        number = min(MAX_WORKERS, max(1, present))
        chosen = {kind: spread_clips([c for c in listing.clips if c.kind == kind], probe * number) for kind in KINDS}
        probed = probe_workers(client, config, listing.root, chosen, workers=number, listener=Loading(say).listener)
    done = _settled(config, probed.identities)
    reusable = _reusable(config, listing, probed.identities)
    rows = tuple(_rows(config, listing, done, reusable, probed))
    total, spread = _total_seconds(rows, probed.clips)
    low, startup_s = max(0.0, total - spread), probed.startup_s
    return Forecast(
        store=str(config.store_path),
        rows=rows,
        free_bytes=_free_bytes(config.store_path),
        workers=workers,
        probed_workers=probed.workers,
        probed=sum(map(len, probed.clips.values())),
        device=probed.device,
        decode_s=statistics.fmean([clip.decode_s for clips in probed.clips.values() for clip in clips] or [0.0]),
        startup_s=startup_s,
        seconds=startup_s + total / workers if total else None,
        interval_s=(startup_s + low / workers, startup_s + (total + spread) / workers) if total else None,
        missing=dict(listing.missing),
    )


def spread_clips(clips: Sequence[Clip], number: int) -> list[Clip]:
    """`number` clips at even distances: neighbours in a listing are often alike."""
    if len(clips) <= number:
        return list(clips)
    return [clips[round(i * (len(clips) - 1) / max(1, number - 1))] for i in range(number)]


def _settled(config: ExtractConfig, identities: Mapping[str, FeatureIdentity]) -> dict[str, set[str]]:
    """Encoder -> clip ids that an existing store holds under the same identity, or will not try again."""
    if newest_snapshot_id(open_objects(config.store_path)) is None:
        return {name: set() for name in identities}
    store = FeatureStore.open(config.store_path)
    clips, quarantine = store.clips, [] if config.retry_quarantine else store.quarantine.to_pylist()
    is_up_to_date = {}
    for name, identity in identities.items():
        key = next((key for key, stored in store.encoders.items() if stored.id == identity.id), None)
        committed = clips.filter(clips[key])["clip_id"].to_pylist() if key else []
        is_up_to_date[name] = set(committed) | {row["clip_id"] for row in quarantine if row["encoder"] == key}
    return is_up_to_date


def _reusable(
    config: ExtractConfig, listing: DatasetListing, identities: Mapping[str, FeatureIdentity]
) -> dict[str, set[str]]:
    """Encoder -> clip ids that the store of --reuse seems to hold."""
    if config.reuse is None:
        return {name: set() for name in identities}
    from pipeline.reuse import OtherStore  # only where it is asked for

    other = OtherStore(config.reuse)
    return {name: set(other.proposals(identity, listing.clips)) for name, identity in identities.items()}


def _block_rows(config: ExtractConfig) -> Mapping[str, int]:
    """Clips per block by kind: as the store was made with, else as it would be."""
    if open_objects(config.store_path).exists(ROOT_METADATA):
        return StoreWriter.open(config.store_path).block_rows
    return check_block_rows(config.block_rows)


def _rows(
    config: ExtractConfig,
    listing: DatasetListing,
    done: Mapping[str, set[str]],
    reusable: Mapping[str, set[str]],
    probed: Probe,
) -> Iterable[ForecastRow]:
    stages, block_rows = _stages(listing), _block_rows(config)
    for stage, kind in sorted({(stages.get(clip.clip_id, "-"), clip.kind) for clip in listing.clips}):
        ids = {c.clip_id for c in listing.clips if c.kind == kind and stages.get(c.clip_id, "-") == stage}
        for name, identity in probed.identities.items():
            to_do, reused = len(ids - done[name]), len((ids - done[name]) & reusable[name])
            costs = [clip.encoders[name] for clip in probed.clips[kind]]
            per_clip = statistics.fmean([cost.stored_bytes for cost in costs]) if costs else clip_bytes(identity, kind)
            blocks = math.ceil(to_do / block_rows[kind])
            yield ForecastRow(
                stage=stage,
                kind=kind,
                encoder=name,
                clips=len(ids),
                to_do=to_do,
                reusable=reused,
                bytes=round(to_do * per_clip),
                files=FILES_PER_BLOCK * blocks,
                seconds=(to_do - reused) * statistics.fmean([cost.seconds for cost in costs]) if costs else None,
            )


def _stages(listing: DatasetListing) -> dict[str, str]:
    """Clip id -> the stages whose samples use it."""
    found: dict[str, set[str]] = {}
    for samples in listing.samples.values():
        for sample in samples:
            if sample.clip_id:
                found.setdefault(sample.clip_id, set()).add(sample.stage)
    return {clip_id: "+".join(sorted(stages)) for clip_id, stages in found.items()}


def _total_seconds(rows: Sequence[ForecastRow], probed: Mapping[str, Sequence[ProbeRecord]]) -> tuple[float, float]:
    """Encoder seconds, plus decode seconds that do not hide behind them, and two standard errors of the whole."""
    total = variance = 0.0
    for kind, clips in probed.items():
        to_do = Counter()
        for row in (row for row in rows if row.kind == kind):
            to_do[row.encoder] += row.to_do - row.reusable
        if not clips or not to_do:
            continue
        number = max(to_do.values())
        total += number * statistics.fmean(clip.wall_s for clip in clips)
        variance += (number * standard_error(clips)) ** 2
    return total, 2 * math.sqrt(variance)


def _free_bytes(place: Place) -> int | None:
    """Free bytes of the disk that will hold the store; the nearest folder that exists above it is asked."""
    if is_url(place):
        return None
    path = Path(place).resolve()
    return shutil.disk_usage(next(parent for parent in [path, *path.parents] if parent.exists())).free
