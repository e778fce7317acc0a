"""What an extraction with other settings would have to compute, what it would cost, and what stays valid.

Nothing is written to the store. Settings that are not given come from the newest run in its journal. Seconds are those
of the store's own runs or of a probe; bytes are those of the encoder's stored clips, else of a probe, else before
compression; each `Cost` names its source.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
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
from pipeline.config import RUN_ONLY_SETTINGS, ExtractConfig, read_config
from pipeline.datasets import DatasetListing, list_clips
from pipeline.media import Root, Source
from pipeline.plan import StoreView
from pipeline.refresh import StaleMedia, stale_media
from pipeline.run_encoders import WantedEncoder, resolve_weights
from pipeline.summary import changed_versions, past_rate, settings_of
from pipeline.worker.forwards import SharedForwards, same_forward
from pipeline.worker.reports import ProbeRecord

State = Literal["same", "changed", "new"]
POOLABLE = {"grid", "pooling", "still_period"}  # identity fields that training may change by pooling stored tokens


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Clips of one kind that one encoder would compute."""

    kind: str
    missing: int  # never computed under the wanted identity
    stale: int  # computed, from media that changed since: with --refresh
    quarantined: int  # failed before; left alone but with --retry-quarantine, and in no other figure here
    bytes: int  # of missing and stale clips
    bytes_from: str
    forwards: int
    """Clips whose forward these seconds hold: fewer than missing and stale ones where encoders above share it."""
    seconds: float | None  # of one worker; None: unknown
    seconds_from: str

    @property
    def clips(self) -> int:
        return self.missing + self.stale

    @property
    def is_shared(self) -> bool:
        """Whether the seconds of other encoders hold forwards of this one."""
        return self.forwards < self.clips


@dataclass(frozen=True, kw_only=True)
class EncoderChange:
    """One encoder as the settings want it, compared with what the store holds of it."""

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
    """What a change of settings would mean for a store."""

    store: str
    snapshot: str
    dataset: str
    root: str | None  # folder of the media that were checked; None: they are not here
    settings: str  # where settings that were not given come from
    encoders: tuple[EncoderChange, ...]
    untouched: tuple[str, ...]  # stored encoders that the settings do not name
    other_datasets: Mapping[str, int]  # clips of datasets that this does not cover
    looked_at: int = 0  # clips with tokens whose media were checked
    changed: tuple[str, ...] = ()  # clips whose media changed and that --refresh would compute
    failed: tuple[str, ...] = ()  # clips whose new media were tried and failed
    gone: tuple[str, ...] = ()  # clips with tokens whose media are absent or cannot be read; their tokens stay valid
    unlisted: int = 0  # clips of the dataset in the store that its listing no longer names
    new: int = 0  # clips listed that are not in the store
    problem: str = ""  # why the media were not checked
    next: tuple[str, ...] = field(default=())  # what to do, in words

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def explained_config(path: Place, config_file: str | None, given: Mapping[str, Any]) -> tuple[ExtractConfig, str]:
    """(config, where its settings come from): a file's, else those of the newest run of the dataset, or of any."""
    given = dict(given) | {"store": str(path)}
    runs = driver_runs(StoreWriter.open(path).objects)
    of_dataset = [run for run in runs if run["config"]["dataset"] == given.get("dataset")] or runs
    if config_file or not of_dataset:
        return read_config(config_file, given), config_file or "`extract`, because the store's journal has no run"
    run, known = of_dataset[-1], {setting.name for setting in fields(ExtractConfig)}  # a newer version may have others
    base = {name: value for name, value in settings_of(run, without=RUN_ONLY_SETTINGS).items() if name in known}
    if given.get("dataset", base["dataset"]) != base["dataset"]:
        base |= dict.fromkeys(("stage", "kind", "limit", "root")) | {"options": {}}
    else:
        base["root"] = run["root"]
    return read_config(base, given), f"run {run['summary']['run']} of {run['config']['dataset']}"


def explain(
    path: Place,
    config: ExtractConfig,
    *,
    settings: str = "the config",
    full: bool = False,
    probe: int = 0,
    progress: ProgressLine = SILENT,
) -> Explanation:
    """What `extract` would do with this config.

    `settings` says where the config is from; `full` reads every media file; `probe` clips of each kind are encoded on
    a worker of the config's cluster.
    """
    store, view = FeatureStore.open(path), StoreView(StoreWriter.open(path))
    try:
        listing, problem = list_clips(config), ""
    except UserError as error:
        listing, problem = None, str(error).splitlines()[0]
    wanted = [resolve_weights(settings, store, view.runs) for settings in config.encoder_settings]
    records = store.clips.select(("dataset", "path", "kind", "start_s", "end_s", "end_frame")).to_pylist()
    in_dataset = [Clip(**r) for r in records if r["dataset"] == config.dataset and config.kind in (None, r["kind"])]
    if listing is None:
        media, probed, clips, counts = StaleMedia(), None, in_dataset, {}
    else:
        # Compare with tokens that are stored as wanted, else with whatever is stored.
        ids = {identity.id for identity in store.encoders.values()}
        same = {one.settings.key: one.identity for one in wanted if one.identity.id in ids}
        media = stale_media(view, listing, same or store.encoders, full=full, progress=progress)
        probed = None
        if probe:
            from jobs.clusters import connect
            from pipeline.forecast import probe_workers, spread_clips

            chosen = {kind: spread_clips([c for c in listing.clips if c.kind == kind], probe) for kind in KINDS}
            with connect(config.cluster_request) as client:
                probed = probe_workers(client, config, listing.root, chosen, workers=1)
        clips, counts = listing.clips, _media_counts(config, listing, in_dataset, media, view.removed)
    together = same_forward(config.encoder_settings, compiled=config.compiled)
    forwards = probed.forwards if probed else [[settings.key for settings in group] for group in together]
    prices = _Prices(
        store=store, runs=view.runs, probed=probed.clips if probed else {}, shared=SharedForwards(forwards)
    )
    changes = tuple(_change(one, store, view, prices, clips, media) for one in wanted)
    named = {one.identity.id for one in wanted} | set(config.encoders)
    return Explanation(
        store=str(path),
        snapshot=store.snapshot,
        dataset=config.dataset,
        root=listing and str(listing.root),
        settings=settings,
        encoders=changes,
        untouched=tuple(key for key, one in store.encoders.items() if not {one.id, one.encoder} & named),
        other_datasets=dict(Counter(name for name in store.clips["dataset"].to_pylist() if name != config.dataset)),
        problem=problem,
        next=_next_steps(changes, media, problem),
        **counts,
    )


def _media_counts(
    config: ExtractConfig,
    listing: DatasetListing,
    in_dataset: Iterable[Clip],
    media: StaleMedia,
    removed: frozenset[str],
) -> dict[str, Any]:
    listed = {clip.clip_id for clip in listing.clips}
    known = {clip.clip_id for clip in in_dataset}
    is_narrowed = config.limit is not None or config.stage is not None
    unlisted = [] if is_narrowed else [clip for clip in in_dataset if clip.clip_id not in listed]
    absent = {clip.clip_id for clip in unlisted if not _has_media(listing.root, clip)}
    return {
        "looked_at": media.looked_at,
        "changed": tuple(sorted(media.clips)),
        "failed": tuple(sorted(media.failed)),
        "gone": tuple(sorted(media.gone | absent)),
        "unlisted": len(unlisted) - len(absent),
        "new": len(listed - known - removed),
    }


def _has_media(root: Root, clip: Clip) -> bool:
    try:
        return Source.find(root, clip.path) is not None
    except MediaError:
        return False


def _change(
    wanted: WantedEncoder,
    store: FeatureStore,
    view: StoreView,
    prices: _Prices,
    clips: Sequence[Clip],
    media: StaleMedia,
) -> EncoderChange:
    """What the config means for one encoder: the fields that differ, what stays, what is to be computed."""
    name, identity = wanted.settings.name, wanted.identity
    stored = {key: known for key, known in store.encoders.items() if known.encoder == name}
    nearest = min(stored.values(), key=lambda known: len(known.changes(identity)), default=None)
    changes = nearest.changes(identity) if nearest else {}
    costs = _costs(wanted.settings.key, identity, store, view, prices, clips, media)
    return EncoderChange(
        encoder=wanted.settings.key,
        state="new" if nearest is None else "changed" if changes else "same",
        identity=identity.id,
        stored=tuple(known.id for known in stored.values()),
        weights=wanted.known,
        labels=(store.info()["groups"][nearest.group_name]["weights"] if nearest else None, wanted.settings.weights),
        fields=changes,
        stays=tuple(_stays(store, stored, nearest, identity, changes, sum(cost.stale for cost in costs))),
        costs=tuple(costs),
        versions=changed_versions(view.runs, nearest.group_name) if nearest else {},
    )


def _costs(
    name: str,  # of the encoder in the config's run
    identity: FeatureIdentity,
    store: FeatureStore,
    view: StoreView,
    prices: _Prices,
    clips: Sequence[Clip],
    media: StaleMedia,
) -> list[Cost]:
    """A row for each kind of which something is to be computed."""
    key = next((key for key, stored in store.encoders.items() if stored.id == identity.id), None)
    held, failed, stale = set(), set(), frozenset()
    if key:
        quarantine = store.quarantine
        held = set(store.clips.filter(store.clips[key])["clip_id"].to_pylist())
        failed = set(quarantine.filter(pc.equal(quarantine["encoder"], key))["clip_id"].to_pylist())
        stale = media.changed.get(name, frozenset())
    costs = []
    for kind in KINDS:
        ids = {clip.clip_id for clip in clips if clip.kind == kind} - view.removed
        missing, changed = ids - held - failed, ids & stale
        counts = {"missing": len(missing), "stale": len(changed), "quarantined": len(ids & failed)}
        if not any(counts.values()):
            continue
        per_clip, bytes_from = prices.bytes_per_clip(name, identity, kind)
        forwards = prices.shared.add(name, missing | changed)
        seconds, seconds_from = prices.seconds(name, identity, kind, forwards, len(missing) + len(changed))
        costs.append(
            Cost(
                kind=kind,
                **counts,
                bytes=round((len(missing) + len(changed)) * per_clip),
                bytes_from=bytes_from,
                forwards=forwards,
                seconds=seconds,
                seconds_from=seconds_from,
            )
        )
    return costs


@dataclass(frozen=True, kw_only=True)
class _Prices:
    """Bytes and seconds of clips, each with its source."""

    store: FeatureStore
    runs: Sequence[Mapping[str, Any]]
    probed: Mapping[str, Sequence[ProbeRecord]]  # by kind
    shared: SharedForwards

    def bytes_per_clip(self, name: str, identity: FeatureIdentity, kind: str) -> tuple[float, str]:
        """Stored bytes; stored clips of another identity are scaled by the sizes before compression."""
        if probed := self.probed.get(kind):
            sizes = [record.encoders[name].stored_bytes for record in probed]
            return statistics.fmean(sizes), f"a probe of {len(sizes)} clips"
        stored = [known for known in self.store.encoders.values() if known.encoder == identity.encoder]
        for known in sorted(stored, key=lambda known: len(known.changes(identity))):
            stored_bytes, clips = self.store.stored_bytes(known, kind)
            if clips:
                scale = clip_bytes(identity, kind) / clip_bytes(known, kind)
                source = f"its {clips} stored clips" + ("" if scale == 1 else f", times {scale:.3g}")
                return stored_bytes / clips * scale, source
        return float(clip_bytes(identity, kind)), "before compression"

    def seconds(
        self, name: str, identity: FeatureIdentity, kind: str, forwards: int, clips: int
    ) -> tuple[float | None, str]:
        """Seconds of one worker for an encoder's clips, of which `forwards` need a forward of their own."""
        if probed := self.probed.get(kind):
            shares = []
            for record in probed:  # the encoder's time, and its share of decoding that takes longer than all encoders
                encode_s = sum(cost.seconds for cost in record.encoders.values())
                scale = max(1.0, record.wall_s / encode_s if encode_s else 1.0)
                shares.append(self.shared.seconds(record, name, forwards=forwards, clips=clips) * scale)
            return statistics.fmean(shares), f"a probe of {len(shares)} clips"
        groups = {known.group_name: known for known in self.store.encoders.values()}
        if rate := past_rate(self.runs, groups, identity, kind):
            return forwards * rate.seconds, rate.source
        return None, "no run of this store computed it: give --probe 4"


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
        key = next(key for key, known in stored.items() if known.id == wanted.id)
        return [f"the tokens of {held[key] - num_stale} clips" + (f"; {num_stale} changed since" if num_stale else "")]
    lines = [f"{count} clips under {key}, as they are, alongside the new ones" for key, count in held.items()]
    if set(changes) <= POOLABLE:
        have, want = ("x".join(map(str, grid)) for grid in (nearest.grid, wanted.grid))
        axes, is_raw = list(zip(nearest.grid, wanted.grid, strict=True)), nearest.pooling == "none"
        if all(old >= new and (is_raw or old % new == 0) for old, new in axes):  # windows nest: the means are equal
            lines.append(
                f"training can pool the stored {have} to {want} itself (projector.grid), up to the rounding of "
                "storage: then nothing is to be computed"
            )
        else:
            is_finer = any(old < new for old, new in axes)
            reason = f"{want} is finer" if is_finer else "those were pooled already, and windows overlap"
            lines.append(f"{want} cannot be had from the stored {have}: {reason}")
    if "storage_dtype" in changes:
        lines.append("stored numbers are rounded once already: no storage dtype can be had exactly from another")
    return lines


def _next_steps(changes: Sequence[EncoderChange], media: StaleMedia, problem: str) -> tuple[str, ...]:
    """The commands that would bring the store up to the settings."""
    steps = []
    missing = any(cost.missing for change in changes if change.state != "changed" for cost in change.costs)
    changed = [change.encoder for change in changes if change.state == "changed"]
    if missing or any(change.state == "new" for change in changes):
        steps.append("`merv-pipeline extract` with these settings computes what is missing")
    if media.clips:
        steps.append(
            "`merv-pipeline extract --refresh` with these settings computes the changed clips again, in new rows"
        )
    if changed:
        steps.append(
            f"`merv-pipeline extract --new-identity` keeps other tokens of {', '.join(changed)} alongside the stored "
            "ones, which stay; then name them by id, or drop the old ones with `merv-pipeline subset`"
        )
    if any(change.versions for change in changes):
        steps.append("`merv-pipeline verify --parity` checks whether other library versions change any token")
    if problem:
        steps.append("give --root DIR, the folder of the media, to have them compared")
    return tuple(steps) or ("nothing: the store holds all that these settings need",)
