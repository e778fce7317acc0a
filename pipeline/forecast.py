"""`plan`: clips, bytes, files and hours of an extraction before it is started, by stage, kind and encoder.

Hours come from decoding and encoding a few real clips on workers of the cluster, bytes from the layout and the
compression of those clips. Nothing is written.
"""

from __future__ import annotations

import logging
import math
import shutil
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurestore.clips import KINDS, Clip
from featurestore.identity import FeatureIdentity
from featurestore.layout import ROOT_METADATA, check_block_rows
from featurestore.locate import is_url
from featurestore.objects.base import Objects
from featurestore.shards import encode_row
from featurestore.snapshots import newest_snapshot_id
from featurestore.storage_dtypes import OverflowedTokens, to_stored
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter
from featurestore.zarr_metadata import array_specs, clip_bytes, parse_root
from jobs.clusters import connect
from jobs.run import Task, run_tasks
from mervcache.console import format_bytes, format_duration
from mervcache.errors import MediaError
from mervcache.reprs import brief
from pipeline.config import EngineSettings, ExtractConfig
from pipeline.datasets import DatasetListing, check_has_clips, list_clips
from pipeline.decode.sampling import Decoded
from pipeline.extract import check_place
from pipeline.media import Root
from pipeline.run_encoders import LoadingLog
from pipeline.worker.admission import run_alone
from pipeline.worker.encode import TokenEncoder, encode_batch_together
from pipeline.worker.engine import Engine, decode_job, reporting_engine
from pipeline.worker.forwards import SharedForwards
from pipeline.worker.reports import EncoderProbe, Probe, ProbeRecord

if TYPE_CHECKING:
    import numpy as np
    from distributed import Client

log = logging.getLogger(__name__)

MAX_WORKERS = 8  # probed: the error of a mean shrinks with the root of their number
FILES_PER_BLOCK = 2  # a shard and its receipt
INTERVAL = "two standard errors of the mean to each side, between clips or between workers, whichever is wider"


@dataclass(frozen=True, kw_only=True)
class ForecastRow:
    """One kind of clip of one stage, with one encoder."""

    stage: str  # stages whose samples use the clips, joined by "+"; "-" for clips without samples
    kind: str
    encoder: str
    clips: int
    to_do: int  # not committed in the store yet
    reusable: int
    """Of these, clips whose tokens --reuse or other datasets of the store seem to hold, by file name and span. Bytes
    are compared at extraction, which may find more under other names."""
    bytes: int  # of what is to do
    files: int
    forwards: int
    """Clips whose forward these seconds hold: fewer than are to compute where rows above share it."""
    seconds: float | None  # on one worker; None without a probe

    @property
    def is_shared(self) -> bool:
        """Whether the seconds of other rows hold forwards of this one."""
        return self.forwards < self.to_do - self.reusable


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Whether a worker's decode processes keep up with its encoders, over all clips that are to do."""

    decoders: int  # decode processes of a worker
    decode_bound: bool  # its encoders wait for them
    cores_wanted: int  # of a worker, so that they do not: for decoding and for compressing tokens


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What an extraction would cost."""

    store: str
    rows: tuple[ForecastRow, ...]
    free_bytes: int | None  # None in a bucket, which reports none
    workers: int
    probed: int = 0  # clips encoded for the forecast
    probed_stored: int = 0  # of these, clips whose media other datasets of the store hold under any name: to be copied
    probed_workers: int = 0  # on so many workers
    device: str = ""
    batch: dict[str, int] = field(default_factory=dict)  # kind -> clips per forward, as given or as fits the device
    decode_s: float = 0.0  # per clip, in a decode process
    balance: Balance | None = None  # decoding alongside encoding; None without a probe
    startup_s: float = 0.0  # until a worker has loaded the encoders; a part of `seconds`
    seconds: float | None = None  # wall time of the whole run
    worker_s: float | None = None  # time that all workers are held
    gpu_cost: float | None = None  # of a worker's hour
    interval_s: tuple[float, float] | None = None
    interval: str = INTERVAL  # what the interval is

    def __repr__(self) -> str:
        to_do, size = sum(row.to_do for row in self.rows), format_bytes(sum(row.bytes for row in self.rows))
        time = "time not probed" if self.seconds is None else format_duration(self.seconds)
        return brief(self, f"{self.store}: {to_do} clips by encoder to do, {size}, {time} on {self.workers} workers")

    missing: dict[str, int] = field(default_factory=dict)  # folder -> media listed but absent
    missing_files: tuple[str, ...] = ()  # their paths
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> annotation records refused
    skipped: dict[str, int] = field(default_factory=dict)  # what the dataset does not read by its rules -> files

    @property
    def stored_notes(self) -> list[str]:
        """What seems to be stored already, under other names or elsewhere, in words."""
        to_do, reusable = (sum(getattr(row, name) for row in self.rows) for name in ("to_do", "reusable"))
        notes = []
        if reusable:
            share = f"{reusable} of {to_do} (clip, encoder) pairs ({reusable / to_do:.0%})"
            notes.append(f"{share} seem to be stored, by file name and span: copied where the media are the same bytes")
        if self.probed_stored:
            share = f"{self.probed_stored} of {self.probed} probed clips"
            notes.append(f"{share} are stored by other datasets of the store, under any name: such clips are copied")
        return notes

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes}


def forecast(config: ExtractConfig, *, probe: int = 4) -> Forecast:
    """Predict bytes, files, time and workers' hours of what is left to do for a `config`; nothing is written.

    `probe` clips of each kind are encoded on each of up to `MAX_WORKERS` workers; 0: no times. Errors are those of
    `extract`.
    """
    objects = check_place(config.store_path)
    listing = list_clips(config)
    check_has_clips(listing)
    names = ", ".join(config.encoders)
    log.info("%s: %d clips listed; loading %s for a probe", config.dataset, len(listing.clips), names)
    with connect(config.cluster_request) as client:
        present = len(client.scheduler_info(n_workers=-1)["workers"])
        workers = max(present, config.workers)
        num_probed = min(MAX_WORKERS, max(1, present))
        chosen = {kind: [clip for clip in listing.clips if clip.kind == kind] for kind in KINDS}
        chosen = {kind: spread_clips(clips, probe * num_probed) for kind, clips in chosen.items()}
        probed = probe_workers(client, config, listing.root, chosen, workers=num_probed)
    rows = tuple(_rows(config, objects, listing, probed))
    total, spread = total_seconds(rows, probed.clips, probed.forwards)
    decode_s = [record.decode_s for records in probed.clips.values() for record in records]
    startup_s, free_bytes = probed.startup_s, None
    if not is_url(config.store_path):  # the nearest folder that exists is on the disk it will be on
        path = Path(config.store_path).resolve()
        free_bytes = shutil.disk_usage(next(parent for parent in [path, *path.parents] if parent.exists())).free
    return Forecast(
        store=str(config.store_path),
        rows=rows,
        free_bytes=free_bytes,
        workers=workers,
        probed_workers=probed.workers,
        probed=len(decode_s),
        probed_stored=_probed_stored(config, objects, listing.name, probed),
        device=probed.device,
        batch={kind: probed.batch[kind] for kind, records in probed.clips.items() if records},
        decode_s=statistics.fmean(decode_s or [0.0]),
        balance=balance(rows, probed.clips),
        startup_s=startup_s,
        seconds=startup_s + total / workers if total else None,
        worker_s=startup_s * workers + total if total else None,
        gpu_cost=config.gpu_cost,
        interval_s=(startup_s + max(0.0, total - spread) / workers, startup_s + (total + spread) / workers)
        if total
        else None,
        missing=dict(listing.missing),
        missing_files=listing.missing_files,
        rejected={reason: records.count for reason, records in listing.rejected.items()},
        skipped=dict(listing.skipped),
    )


def spread_clips(clips: Sequence[Clip], number: int) -> list[Clip]:
    """`number` clips at even distances: neighbours in a listing are often alike."""
    if len(clips) <= number:
        return list(clips)
    return [clips[round(i * (len(clips) - 1) / max(1, number - 1))] for i in range(number)]


def probe_workers(
    client: Client, config: ExtractConfig, root: Root, chosen: Mapping[str, Sequence[Clip]], *, workers: int
) -> Probe:
    """Probe the chosen clips, split among `workers` workers of the cluster; records are marked with their worker.

    Workers of one cluster may differ (another GPU, a shared node), so the spread between them counts too.
    """
    parts = [{kind: clips[n::workers] for kind, clips in chosen.items()} for n in range(workers)]
    tasks = [
        Task(
            key=f"probe_clips-{n}-{uuid.uuid4().hex}",
            arguments=(probe_clips, config.engine_settings, root, part, config.batch),
        )
        for n, part in enumerate(parts)
        if n == 0 or any(part.values())
    ]
    probes, clips = [], {}
    wait_s, listener = config.cluster_request.worker_wait_s, LoadingLog().listener
    for outcome in run_tasks(client, run_alone, tasks, attempts=1, worker_wait_s=wait_s, listener=listener):
        if outcome.error is not None:
            raise outcome.error
        for kind, records in outcome.result.clips.items():
            clips.setdefault(kind, []).extend(replace(record, worker=len(probes)) for record in records)
        probes.append(outcome.result)
    startup_s = max(probe.startup_s for probe in probes)
    return replace(probes[0], clips=clips, startup_s=startup_s, workers=len(probes))


def probe_clips(
    settings: EngineSettings,
    root: Root,
    chosen: Mapping[str, Sequence[Clip]],
    batch: Mapping[str, int],
) -> Probe:
    """Run by a worker: load the encoders and encode the chosen clips; clips that cannot be decoded are left out.

    `batch` is kind -> clips per forward, where given.
    """
    started = time.monotonic()
    engine = reporting_engine(settings)
    startup_s = time.monotonic() - started
    sizes = {kind: batch.get(kind) or engine.batch_of(kind) for kind in chosen}
    return Probe(
        device=engine.device,
        startup_s=startup_s,
        identities={name: run.identity for name, run in engine.encoders.items()},
        clips={kind: _probe_kind(engine, root, kind, clips, sizes[kind]) for kind, clips in chosen.items()},
        batch=sizes,
        forwards=engine.forwards,
    )


def _probe_kind(engine: Engine, root: Root, kind: str, clips: Sequence[Clip], batch: int) -> list[ProbeRecord]:
    """One forward of each encoder per batch: at full size on a CPU a forward is half a minute, so none is repeated."""
    decoded: list[Decoded] = []
    clips_of: list[Clip] = []
    for clip in clips:
        try:
            decoded.append(engine.pool.submit(decode_job(root, clip, engine.encoders.values())).result())
            clips_of.append(clip)
        except MediaError:
            continue
    if engine.device != "cpu" and decoded:
        for keys in engine.forwards:
            _probe_encoders(engine, keys, kind, decoded[:1], batch)  # the first forward on a device selects kernels
    records = []
    for start in range(0, len(decoded), batch):
        clips_of_batch = decoded[start : start + batch]
        encoders: dict[str, EncoderProbe] = {}
        for keys in engine.forwards:
            encoders |= _probe_encoders(engine, keys, kind, clips_of_batch, batch)
        encode_s = sum(probed.seconds for probed in encoders.values())
        for number, clip in enumerate(clips_of_batch, start):
            # Decoding runs in parallel with the encoders: it costs wall time only where it is the slower of the two.
            wall_s = max(encode_s, clip.seconds / engine.num_decoders)
            records.append(
                ProbeRecord(
                    decode_s=clip.seconds,
                    wall_s=wall_s,
                    encoders=encoders,
                    decoders=engine.num_decoders,
                    media=(clips_of[number], clip.media_sha256),
                )
            )
    return records


def _probe_encoders(
    engine: Engine, keys: Sequence[str], kind: str, clips: Sequence[Decoded], batch: int
) -> dict[str, EncoderProbe]:
    """Encode these clips in one forward of a full batch, for all encoders that it serves; the first one's seconds
    hold the forward. A clip that would be quarantined counts no bytes.
    """
    runs = {key: engine.encoders[key] for key in keys}
    frames = {slot: decoded.frames[runs[keys[0]].view] for slot, decoded in enumerate(clips)}
    probes, started = {}, time.perf_counter()
    for key, arrays in encode_batch_together(runs, frames, range(batch)):
        seconds = (time.perf_counter() - started) / batch
        stored_bytes, write_s = _stored_bytes(runs[key], kind, frames, arrays)
        probes[key] = EncoderProbe(
            seconds=seconds, stored_bytes=stored_bytes / len(frames), write_s=write_s / len(frames)
        )
        started = time.perf_counter()
    return probes


def _stored_bytes(
    run: TokenEncoder, kind: str, slots: Iterable[int], arrays: Mapping[str, np.ndarray]
) -> tuple[int, float]:
    """Bytes of the clips' compressed tokens, and the processor time of compressing them."""
    specs, stored_bytes = array_specs(run.identity, kind, blocks=1, block_rows=1), 0
    began = time.thread_time()
    for slot in slots:
        try:
            stored = to_stored({name: items[slot] for name, items in arrays.items()}, run.identity.storage_dtype)
        except OverflowedTokens:
            continue
        stored_bytes += sum(len(encode_row(specs[name], array)) for name, array in stored.items())
    return stored_bytes, time.thread_time() - began


def standard_error(records: Sequence[ProbeRecord]) -> float:
    """Standard error of the mean seconds per clip: between clips, or between workers' means where it is larger.

    >>> round(standard_error([ProbeRecord(decode_s=0.1, wall_s=s, encoders={}) for s in (1.0, 3.0)]), 6)
    1.0
    """

    def of_mean(values: Sequence[float]) -> float:
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0

    by_worker: dict[int, list[float]] = {}
    for record in records:
        by_worker.setdefault(record.worker, []).append(record.wall_s)
    means = [statistics.fmean(seconds) for seconds in by_worker.values()]
    return max(of_mean([record.wall_s for record in records]), of_mean(means))


def _rows(config: ExtractConfig, objects: Objects, listing: DatasetListing, probed: Probe) -> list[ForecastRow]:
    if objects.exists(ROOT_METADATA):
        block_rows = parse_root(objects.get(ROOT_METADATA))["block_rows"]
    else:
        block_rows = check_block_rows(config.block_rows)
    done = _done(config, objects, probed.identities)
    reusable: dict[str, set[str]] = {name: set() for name in probed.identities}
    if config.reuse is not None:
        from pipeline.reuse import OtherStore  # only where it is requested

        other = OtherStore(config.reuse)
        reusable = {name: set(other.proposals(one, listing.clips)) for name, one in probed.identities.items()}
    if newest_snapshot_id(objects) is not None:
        from pipeline.same_media import seem_held

        store = FeatureStore.open(config.store_path)
        for name, identity in probed.identities.items():
            reusable[name] |= seem_held(store, identity, listing.name, listing.clips)
    used_by: dict[str, set[str]] = {}  # clip id -> the stages whose samples use it
    for samples in listing.samples.values():
        for sample in samples:
            for clip_id in listing.videos.get(sample.clip_id, (sample.clip_id,)) if sample.clip_id else ():
                used_by.setdefault(clip_id, set()).add(sample.stage)
    clip_ids: dict[tuple[str, str], set[str]] = {}  # (stages, kind) -> clips
    for clip in listing.clips:
        clip_ids.setdefault(("+".join(sorted(used_by.get(clip.clip_id, ()))) or "-", clip.kind), set()).add(
            clip.clip_id
        )
    rows, shared = [], SharedForwards(probed.forwards)
    for (stage, kind), ids in sorted(clip_ids.items()):
        for name, identity in probed.identities.items():
            to_do = ids - done[name]
            to_compute = to_do - reusable[name]
            forwards, records = shared.add(name, to_compute), probed.clips[kind]
            costs = [record.encoders[name] for record in records]
            per_clip = statistics.fmean([cost.stored_bytes for cost in costs]) if costs else clip_bytes(identity, kind)
            seconds = [shared.seconds(record, name, forwards=forwards, clips=len(to_compute)) for record in records]
            rows.append(
                ForecastRow(
                    stage=stage,
                    kind=kind,
                    encoder=name,
                    clips=len(ids),
                    to_do=len(to_do),
                    reusable=len(to_do) - len(to_compute),
                    bytes=round(len(to_do) * per_clip),
                    files=FILES_PER_BLOCK * math.ceil(len(to_do) / block_rows[kind]),
                    forwards=forwards,
                    seconds=statistics.fmean(seconds) if seconds else None,
                )
            )
    return rows


def _probed_stored(config: ExtractConfig, objects: Objects, dataset: str, probed: Probe) -> int:
    """Probed clips whose media and span other datasets of the store hold for all encoders; bytes are compared."""
    if newest_snapshot_id(objects) is None:
        return 0
    from pipeline.same_media import StoredMedia, same_media_task  # only where there is something to find

    count = 0
    for kind, records in probed.clips.items():
        task = same_media_task(StoreWriter.open(config.store_path), kind, probed.identities, dataset, None)
        stored = StoredMedia(str(config.store_path), kind, task) if task and records else None
        for record in records:
            if stored is None or record.media is None:
                continue
            clip, sha256 = record.media
            wanted = probed.identities.keys()
            count += stored.cells(sha256, clip, wanted, accept_damaged=config.accept_damaged).keys() == wanted
    return count


def _done(config: ExtractConfig, objects: Objects, identities: Mapping[str, FeatureIdentity]) -> dict[str, set[str]]:
    """Encoder -> clip ids that an existing store holds under the same identity, or will not try again."""
    if newest_snapshot_id(objects) is None:
        return {name: set() for name in identities}
    store = FeatureStore.open(config.store_path)
    clips, quarantine = store.clips, [] if config.retry_quarantine else store.quarantine.to_pylist()
    done = {}
    for name, identity in identities.items():
        key = next((key for key, stored in store.encoders.items() if stored.id == identity.id), None)
        committed = clips.filter(clips[key])["clip_id"].to_pylist() if key else []
        done[name] = set(committed) | {row["clip_id"] for row in quarantine if row["encoder"] == key}
    return done


def balance(rows: Sequence[ForecastRow], probed: Mapping[str, Sequence[ProbeRecord]]) -> Balance | None:
    """Core seconds of the host per second of the encoders, summed over the clips of each kind."""
    encode_s = decode_s = write_s = 0.0
    for kind, records in probed.items():
        to_do = Counter()
        for row in (row for row in rows if row.kind == kind and records):
            to_do[row.encoder] += row.to_do - row.reusable
            encode_s += row.seconds or 0.0
        for name, clips in to_do.items():
            write_s += clips * statistics.fmean(record.encoders[name].write_s for record in records)
        if to_do:
            decode_s += max(to_do.values()) * statistics.fmean(record.decode_s for record in records)
    if not encode_s:
        return None
    decoders = min(record.decoders for records in probed.values() for record in records)
    return Balance(
        decoders=decoders,
        decode_bound=decode_s / decoders > encode_s,
        cores_wanted=math.ceil((decode_s + write_s) / encode_s),
    )


def total_seconds(
    rows: Sequence[ForecastRow], probed: Mapping[str, Sequence[ProbeRecord]], forwards: Sequence[Sequence[str]]
) -> tuple[float, float]:
    """Wall seconds of one worker for all kinds, and two standard errors of them.

    `probed` is by kind; `forwards` are the encoders, together where they share a forward.
    """
    total, variance, shared = 0.0, 0.0, SharedForwards(forwards)
    for kind, records in probed.items():
        to_do, to_forward = Counter[str](), Counter[str]()
        for row in (row for row in rows if row.kind == kind):
            to_do[row.encoder] += row.to_do - row.reusable
            to_forward[row.encoder] += row.forwards
        clips = max(to_do.values(), default=0)
        if not records or not clips:
            continue
        per_clip = []  # records of what is to do, where `wall_s` is of all encoders
        for record in records:
            encode_s = sum(shared.seconds(record, name, forwards=to_forward[name], clips=to_do[name]) for name in to_do)
            wall_s = max(encode_s / clips, record.decode_s / record.decoders)
            per_clip.append(replace(record, wall_s=wall_s))
        total += clips * statistics.fmean(record.wall_s for record in per_clip)
        variance += (clips * standard_error(per_clip)) ** 2
    return total, 2 * math.sqrt(variance)
