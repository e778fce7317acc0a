"""Explain: what an extraction with other settings would have to compute, what it would cost, and what stays valid.

Comes in: a store and settings; those that are not given are taken from the newest run in the store's journal. Goes
out: an `Explanation`: by encoder the fields of its identity that differ and the clips, hours and bytes of the
difference, and what became of the media. Nothing is written to the store. Costs are those of its own runs, or of a
probe.

What is to be computed, counted and priced: by encoder and kind, in clips, hours and bytes.

Comes in: a store, an identity that is wanted, the clips and what became of their media. Goes out: `Cost` rows. Seconds
are those of the store's own runs or of a probe; bytes are those of the encoder's stored clips, else of the probe, else
before compression. Each row says which.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import pyarrow.compute as pc

from featurestore.clips import KINDS, Clip
from featurestore.identity import FeatureIdentity
from featurestore.locate import Place
from featurestore.records import driver_runs
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter
from featurestore.zarr_metadata import clip_bytes
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import MediaError, UserError
from pipeline.config import RUN_ONLY_SETTINGS, EncoderSettings, ExtractConfig, read_config
from pipeline.datasets import DatasetListing, list_clips
from pipeline.encoders.weights import cache_weights_digest, cached_weights_digest, weights_fingerprint
from pipeline.media import Source
from pipeline.refresh import StaleMedia, stale_media
from pipeline.summary import changed_versions, past_rate, settings_of
from pipeline.worker.reports import ProbeRecord


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Clips of one kind that one encoder would compute."""

    kind: str
    missing: int  # never computed under the wanted identity
    stale: int  # computed, from media that changed since: with --refresh
    quarantined: int  # failed before; left alone but with --retry-quarantine, and in no other figure here
    bytes: int  # of missing and stale clips
    bytes_from: str
    seconds: float | None  # of one worker; None: nobody knows
    seconds_from: str

    @property
    def clips(self) -> int:
        return self.missing + self.stale


Measured = Mapping[str, Sequence[ProbeRecord]]  # kind -> probed clips


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What prices are taken from."""

    store: FeatureStore
    runs: Sequence[Mapping[str, Any]]  # of the store, oldest first
    measured: Measured  # empty without a probe


def costs_of(evidence: Evidence, identity: FeatureIdentity, clips: Sequence[Clip], media: StaleMedia) -> list[Cost]:
    """A row for each kind of which something is to be computed."""
    store = evidence.store
    key = next((key for key, stored in store.encoders.items() if stored.id == identity.id), None)
    removed = {clip for stone in store.tombstones.values() for clip in stone.clips}
    held = set(store.clips.filter(store.clips[key])["clip_id"].to_pylist()) if key else set()
    failed = set()
    if key:
        quarantine = store.quarantine
        failed = set(quarantine.filter(pc.equal(quarantine["encoder"], key))["clip_id"].to_pylist())
    stale = media.changed.get(identity.encoder, frozenset()) if key else frozenset()
    found = []
    for kind in KINDS:
        ids = {clip.clip_id for clip in clips if clip.kind == kind} - removed
        missing, again, waiting = ids - held - failed, ids & stale, ids & failed
        if missing or again or waiting:
            counts = {"missing": len(missing), "stale": len(again), "quarantined": len(waiting)}
            found.append(_priced(evidence, identity, kind, counts))
    return found


def probe_costs(config: ExtractConfig, listing: DatasetListing, probe: int, say: Callable[[str], None]) -> Measured:
    """`probe` clips of each kind, really decoded and encoded on a worker of the cluster asked for."""
    from jobs.clusters import connect
    from pipeline.forecast import probe_workers, spread_clips
    from pipeline.run_encoders import Loading

    chosen = {kind: spread_clips([c for c in listing.clips if c.kind == kind], probe) for kind in KINDS}
    with connect(config.cluster_request, say=say) as client:
        return probe_workers(client, config, listing.root, chosen, workers=1, listener=Loading(say).listener).clips


def _priced(evidence: Evidence, identity: FeatureIdentity, kind: str, counts: dict[str, int]) -> Cost:
    """Counted clips of one kind, with the bytes and seconds that they would take."""
    clips = counts["missing"] + counts["stale"]
    probed = [clip for clip in evidence.measured.get(kind, ()) if identity.encoder in clip.encoders]
    per_clip, bytes_from = _bytes_per_clip(evidence.store, identity, kind, probed)
    seconds, seconds_from = _seconds_per_clip(evidence, identity, kind, probed)
    return Cost(
        kind=kind,
        **counts,
        bytes=round(clips * per_clip),
        bytes_from=bytes_from,
        seconds=None if seconds is None else clips * seconds,
        seconds_from=seconds_from,
    )


def _seconds_per_clip(
    evidence: Evidence, identity: FeatureIdentity, kind: str, probed: Sequence[ProbeRecord]
) -> tuple[float | None, str]:
    """Seconds of one worker, and where they are from: the probe, else the store's own runs."""
    if probed:
        each = [_share(clip, identity.encoder) for clip in probed]
        return statistics.fmean(each), f"a probe of {len(each)} clips"
    stored = {one.group_name: one for one in evidence.store.encoders.values()}
    rate = past_rate(evidence.runs, stored, identity, kind)
    if rate is None:
        return None, "no run of this store computed it: give --probe 4"
    return rate.seconds, rate.source


def _share(clip: ProbeRecord, encoder: str) -> float:
    """An encoder's part of a probed clip's time: its own, and of decoding what does not hide behind the encoders."""
    encode_s = sum(probed.seconds for probed in clip.encoders.values())
    return clip.encoders[encoder].seconds * max(1.0, clip.wall_s / encode_s if encode_s else 1.0)


def _bytes_per_clip(
    store: FeatureStore, identity: FeatureIdentity, kind: str, probed: Sequence[ProbeRecord]
) -> tuple[float, str]:
    """Stored bytes: of the encoder's nearest stored identity, scaled by the sizes before compression."""
    if probed:
        sizes = [clip.encoders[identity.encoder].stored_bytes for clip in probed]
        return statistics.fmean(sizes), f"a probe of {len(sizes)} clips"
    mine = [one for one in store.encoders.values() if one.encoder == identity.encoder]
    for one in sorted(mine, key=lambda one: len(one.changes(identity))):
        stored_bytes, clips = store.stored_bytes(one, kind)
        if clips:
            scale = clip_bytes(identity, kind) / clip_bytes(one, kind)
            words = f"its {clips} stored clips" + ("" if scale == 1 else f", times {scale:.3g}")
            return stored_bytes / clips * scale, words
    return float(clip_bytes(identity, kind)), "before compression"


State = Literal["same", "changed", "new"]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class EncoderChange:
    """One encoder as it is wanted, beside what the store holds of it."""

    encoder: str
    state: State
    identity: str  # id of what is wanted
    stored: tuple[str, ...]  # ids of what is stored of this encoder
    weights: str  # how their digest is known: "remembered", "loaded", or "assumed"
    labels: tuple[str | None, str]  # weights in words: as stored, as wanted
    fields: Mapping[str, tuple[Any, Any]]  # of the nearest stored identity: name -> (stored, wanted)
    stays: tuple[str, ...]  # what remains valid, in words
    costs: tuple[Cost, ...]  # by kind, where anything is to be computed
    versions: Mapping[str, Mapping[str, Any]]  # library -> made with, here; in no identity


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a change would mean for a store."""

    store: str
    snapshot: str
    dataset: str
    root: str | None  # folder of the media that were looked at; None: they are not here
    settings: str  # where settings that were not given come from
    encoders: tuple[EncoderChange, ...]
    untouched: tuple[str, ...]  # stored encoders that the settings do not ask for
    other_datasets: Mapping[str, int]  # clips of datasets that this does not speak of
    looked_at: int = 0  # clips with tokens whose media were looked at
    changed: tuple[str, ...] = ()  # clips whose media changed and that --refresh would compute
    failed: tuple[str, ...] = ()  # clips whose new media were tried and failed
    gone: tuple[str, ...] = ()  # clips with tokens whose media are not there or cannot be read; these stay good
    unlisted: int = 0  # clips of the dataset in the store that its listing no longer names
    new: int = 0  # clips listed that the store has never seen
    problem: str = ""  # why the media were not looked at
    next: tuple[str, ...] = field(default=())  # what to do, in words

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def explain(
    path: Place,
    config: ExtractConfig,
    *,
    settings: str = "the config",
    full: bool = False,
    probe: int = 0,
    progress: ProgressLine = SILENT,
    say: Say = lambda line: None,
) -> Explanation:
    """What `extract` would do with this config; `full` reads every medium, `probe` clips of each kind are encoded."""
    store, media = FeatureStore.open(path), StaleMedia()
    runs = store.runs()
    listing, problem = _listing(config)
    wanted = [_wanted(each, store, runs, say) for each in config.encoder_settings]
    if listing is not None:
        media = stale_media(StoreWriter.open(path), listing, _compared(store, wanted), full=full, progress=progress)
    clips = listing.clips if listing else _stored_clips(store, config)
    measured = probe_costs(config, listing, probe, say) if probe and listing else {}
    evidence = Evidence(store=store, runs=runs, measured=measured)
    changes = tuple(_change(one, evidence, clips, media) for one in wanted)
    return Explanation(
        store=str(path),
        snapshot=store.snapshot,
        dataset=config.dataset,
        root=listing and listing.root,
        settings=settings,
        encoders=changes,
        untouched=_untouched(store, config, wanted),
        other_datasets=_others(store, config.dataset),
        problem=problem,
        next=_next(changes, media, problem),
        **_media_counts(store, config, listing, media),
    )


def explained_config(path: Place, config_file: str | None, given: Mapping[str, Any]) -> tuple[ExtractConfig, str]:
    """(config, where its settings come from): a file's, else those of the newest run of the dataset, or of any."""
    given = dict(given) | {"store": str(path)}
    runs = driver_runs(StoreWriter.open(path).objects)
    mine = [run for run in runs if run["config"]["dataset"] == given.get("dataset")] or runs
    if config_file or not mine:
        return read_config(config_file, given), config_file or "`extract`, for the store has no journal of a run"
    run, known = mine[-1], {setting.name for setting in fields(ExtractConfig)}  # a newer version may have others
    base = {name: value for name, value in settings_of(run, without=RUN_ONLY_SETTINGS).items() if name in known}
    if given.get("dataset", base["dataset"]) != base["dataset"]:
        base |= dict.fromkeys(("stage", "kind", "limit", "root")) | {"options": {}}
    else:
        base["root"] = run["root"]
    words = f"run {run['summary']['run']} of {run['config']['dataset']}"
    return read_config(base, given), words


def _listing(config: ExtractConfig) -> tuple[DatasetListing | None, str]:
    try:
        return list_clips(config), ""
    except UserError as error:
        return None, str(error).splitlines()[0]


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """An encoder as the config asks for it."""

    settings: EncoderSettings
    weights_sha256: str
    known: str  # how the digest is known: "remembered", "loaded", or "assumed"

    @cached_property
    def identity(self) -> FeatureIdentity:
        return self.settings.identity(self.weights_sha256)


def _wanted(settings: EncoderSettings, store: FeatureStore, runs: list[dict[str, Any]], say: Say) -> _Wanted:
    """The digest of an encoder's weights is remembered, else learned by loading them, else as the store has it."""
    mark = weights_fingerprint(settings.spec, settings.weights)
    if sha256 := cached_weights_digest(mark):
        return _Wanted(settings=settings, weights_sha256=sha256, known="remembered")
    from pipeline.encoders import load_encoder  # torch

    say(f"loading {settings.name} to learn what its weights hash to; it is remembered then")
    try:
        sha256 = load_encoder(settings.spec, settings.weights).weights_sha256
    except UserError:
        if sha256 := _as_stored(settings, store, runs):
            return _Wanted(settings=settings, weights_sha256=sha256, known="assumed")
        raise
    if mark == weights_fingerprint(settings.spec, settings.weights):
        cache_weights_digest(mark, sha256)
    return _Wanted(settings=settings, weights_sha256=sha256, known="loaded")


def _as_stored(settings: EncoderSettings, store: FeatureStore, runs: list[dict[str, Any]]) -> str | None:
    """The digest of the newest run that named its weights in the same words: they are not on this machine."""
    stored = {identity.group_name: identity for identity in store.encoders.values()}
    for run in reversed(runs):
        named = run["config"].get("weights", {})
        group = run["encoders"].get(settings.name, {}).get("group")
        if named.get(settings.name, named.get("", "hub")) == settings.weights and group in stored:
            return stored[group].weights_sha256
    return None


def _compared(store: FeatureStore, wanted: Sequence[_Wanted]) -> dict[str, FeatureIdentity]:
    """Encoders whose tokens the media are compared with: those stored as wanted, else whatever is stored."""
    stored = {identity.id for identity in store.encoders.values()}
    same = {one.settings.name: one.identity for one in wanted if one.identity.id in stored}
    return same or store.encoders


def _untouched(store: FeatureStore, config: ExtractConfig, wanted: Sequence[_Wanted]) -> tuple[str, ...]:
    """Stored encoders that the config neither names nor has under the identity wanted."""
    asked = {one.identity.id for one in wanted} | set(config.encoders)
    return tuple(key for key, one in store.encoders.items() if not {one.id, one.encoder} & asked)


def _change(one: _Wanted, evidence: Evidence, clips: Sequence[Clip], media: StaleMedia) -> EncoderChange:
    """What the config means for one encoder: the fields that differ, what stays, what is to be computed."""
    store, name, wanted = evidence.store, one.settings.name, one.identity
    stored = {key: identity for key, identity in store.encoders.items() if identity.encoder == name}
    nearest = min(stored.values(), key=lambda identity: len(identity.changes(wanted)), default=None)
    changes = nearest.changes(wanted) if nearest else {}
    state: State = "new" if nearest is None else "changed" if changes else "same"
    costs = costs_of(evidence, wanted, clips, media)
    label = store.info()["groups"][nearest.group_name]["weights"] if nearest else None
    return EncoderChange(
        encoder=name,
        state=state,
        identity=wanted.id,
        stored=tuple(identity.id for identity in stored.values()),
        weights=one.known,
        labels=(label, one.settings.weights),
        fields=changes,
        stays=tuple(_stays(store, stored, nearest, wanted, changes, sum(cost.stale for cost in costs))),
        costs=tuple(costs),
        versions=changed_versions(evidence.runs, nearest.group_name) if nearest else {},
    )


def _stays(
    store: FeatureStore,
    stored: Mapping[str, FeatureIdentity],
    nearest: FeatureIdentity | None,
    wanted: FeatureIdentity,
    changes: Mapping[str, Any],
    num_stale: int,
) -> list[str]:
    """Which stored tokens stay valid after the change; only what is certain."""
    if nearest is None:
        return []
    held = {key: sum(store.clips[key].to_pylist()) for key in stored}
    if not changes:
        key = next(key for key, one in stored.items() if one.id == wanted.id)
        return [f"the tokens of {held[key] - num_stale} clips" + (f"; {num_stale} changed since" if num_stale else "")]
    words = [f"{count} clips under {key}, as they are, beside the new ones" for key, count in held.items()]
    if set(changes) <= {"grid", "pooling", "still_period"}:
        words.append(_grid_words(nearest, wanted))
    if "storage_dtype" in changes:
        words.append("stored numbers are rounded once already: no storage dtype can be had exactly from another")
    return words


def _grid_words(stored: FeatureIdentity, wanted: FeatureIdentity) -> str:
    """Averages of averages are the averages only where windows nest, as the projectors of training have it."""
    have, want, is_raw = _grid(stored.grid), _grid(wanted.grid), stored.pooling == "none"
    axes = list(zip(stored.grid, wanted.grid, strict=True))
    if all(old >= new and (is_raw or old % new == 0) for old, new in axes):
        return (
            f"training can pool the stored {have} to {want} itself (projector.grid), up to the rounding of storage: "
            "then nothing is to be computed"
        )
    reason = (
        f"{want} is finer" if any(old < new for old, new in axes) else "those were pooled already, and windows overlap"
    )
    return f"{want} cannot be had from the stored {have}: {reason}"


def _grid(grid: tuple[int, ...]) -> str:
    return "x".join(map(str, grid))


def _stored_clips(store: FeatureStore, config: ExtractConfig) -> list[Clip]:
    names = ("dataset", "path", "kind", "start_s", "end_s", "end_frame")
    clips = [Clip(**record) for record in store.clips.select(names).to_pylist()]
    kinds = (config.kind,) if config.kind else KINDS
    return [clip for clip in clips if clip.dataset == config.dataset and clip.kind in kinds]


def _others(store: FeatureStore, dataset: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in store.clips["dataset"].to_pylist():
        if name != dataset:
            counts[name] = counts.get(name, 0) + 1
    return counts


def _media_counts(
    store: FeatureStore, config: ExtractConfig, listing: DatasetListing | None, media: StaleMedia
) -> dict[str, Any]:
    if listing is None:
        return {}
    listed = {clip.clip_id for clip in listing.clips}
    known = {clip.clip_id for clip in _stored_clips(store, config)}
    removed = {clip for stone in store.tombstones.values() for clip in stone.clips}
    narrowed = config.limit is not None or config.stage is not None
    left = [] if narrowed else [clip for clip in _stored_clips(store, config) if clip.clip_id not in listed]
    absent = {clip.clip_id for clip in left if not _is_there(listing.root, clip)}
    return {
        "looked_at": media.looked_at,
        "changed": tuple(sorted(media.clips)),
        "failed": tuple(sorted(media.failed)),
        "gone": tuple(sorted(media.gone | absent)),
        "unlisted": len(left) - len(absent),
        "new": len(listed - known - removed),
    }


def _is_there(root: str, clip: Clip) -> bool:
    try:
        return Source.find(root, clip.path) is not None
    except MediaError:
        return False


def _next(changes: Sequence[EncoderChange], media: StaleMedia, problem: str) -> tuple[str, ...]:
    """The commands that would bring the store up to the settings."""
    words = []
    missing = any(cost.missing for change in changes if change.state != "changed" for cost in change.costs)
    changed = [change.encoder for change in changes if change.state == "changed"]
    if missing or any(change.state == "new" for change in changes):
        words.append("`merv-pipeline extract` with these settings computes what is missing")
    if media.clips:
        words.append(
            "`merv-pipeline extract --refresh` with these settings computes the changed clips again, in new rows"
        )
    if changed:
        words.append(
            f"`merv-pipeline extract --new-identity` keeps other tokens of {', '.join(changed)} beside the stored "
            "ones, which stay; then name them by id, or drop the old ones with `merv-pipeline subset`"
        )
    if any(change.versions for change in changes):
        words.append("`merv-pipeline verify --parity` tells whether other library versions change any token")
    if problem:
        words.append("give --root DIR, the folder of the media, to have them compared")
    return tuple(words) or ("nothing: the store holds all that these settings ask for",)
