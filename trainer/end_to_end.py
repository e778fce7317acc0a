"""Live tokens: media decoded and encoded while training runs, by the code that extraction runs; and media to look at.

The only module of `trainer` that imports `pipeline`. On one machine, with the extraction's batch shape and number of
torch threads, live tokens are bit-identical to stored ones, and so are the losses of a run on the CPU; with another
batch shape, thread count or device they differ by rounding.

B clips, T time, H W height width, C colours, K prefix tokens, D encoder width.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from featurestore import FeatureIdentity, FeatureStore, Sample
from featurestore.clips import KINDS, Clip, Kind
from mervcache.errors import MediaError, UserError, unknown_name
from mervcache.files import canonical_json
from pipeline.align import align, align_time
from pipeline.config import EncoderSettings, EngineSettings, ExtractConfig, read_config
from pipeline.datasets import list_clips
from pipeline.datasets.windows import split_long
from pipeline.decode.sampling import Decoded
from pipeline.encoders.loading import keep_steps
from pipeline.encoders.network import EncoderNetwork, build_network
from pipeline.encoders.weights import fill_random, weights_by_encoder
from pipeline.media import Root, Source, kind_of_path
from pipeline.store_media import StoreMedia
from pipeline.views import FrameRule
from pipeline.worker.cores import free_cores
from pipeline.worker.encode import TokenEncoder, encode_batch
from pipeline.worker.engine import Engine, decode_job
from trainer.config import LISTING, TrainConfig, in_paper_order, used_encoders
from trainer.data.batches import named_samples
from trainer.data.tokens import ClipTokens, MemoryTokens, Part, PrefixedTokens, TokenShape, TokenSource
from trainer.data.wanted_tokens import made_otherwise
from trainer.data.windows import ShownWindows
from trainer.media_check import ClipPrefetch, MediaCheck
from trainer.model.projectors import parts_of
from trainer.storage_cast import Arrays, repeat_steps, through_storage


class TokenRecord(Protocol):
    """What a run's record says about its tokens; `trainer.runs` imports this module, so its class is not named here."""

    @property
    def shapes(self) -> Mapping[str, TokenShape]: ...

    @property
    def encoders(self) -> Mapping[str, Mapping[str, Any]]: ...  # of each: identity, weights label, weights_from

    @property
    def live(self) -> Mapping[str, Any] | None: ...  # of an end-to-end run: the extraction's settings

    @property
    def wanted(self) -> Mapping[str, Mapping[str, str]]: ...  # encoder -> what an imported checkpoint wants


@contextmanager
def live_source(
    config: TrainConfig,
    settings: Mapping[str, Any],
    config_file: Path | None = None,
    *,
    out: Path | None = None,  # the run's folder, which keeps the results of the media check
    is_trusted: bool = False,  # no media check: a clip that cannot be decoded ends the run
    recorded: Sequence[str] = (),  # encoders of the run that is resumed or started from, in its order
) -> Iterator[tuple[list[Sample], LiveTokens]]:
    """Samples and tokens of a dataset; `settings` and `config_file` are those of `merv-pipeline extract`."""
    extract = _extract_config(config, settings, config_file, recorded)
    if several := [settings.key for settings in extract.encoder_settings if settings.label]:
        raise UserError(f"end-to-end training takes one grid and one layer of each encoder, got {', '.join(several)}")
    listing = list_clips(extract)
    samples = named_samples(config.samples, sorted(listing.samples), listing.samples.__getitem__)
    extract, parts = replace(extract, root=str(listing.root)), parts_of(config.projector)
    with closing(Engine(_settings_of_this_rank(replace(extract.engine_settings, encoders=())))) as engine:
        frozen, trained = {}, {}
        for encoder in extract.encoder_settings:
            if encoder.name in config.train_encoders:
                run = TokenEncoder(replace(encoder, compute_dtype="float32"), "cpu")
                trained[encoder.name] = TrainableEncoder(
                    run.loaded.network,
                    run.identity,
                    parts,
                    weights_label=run.weights_label,
                    weights_from=encoder.weights,
                )
            else:
                frozen[encoder.name] = TokenEncoder(encoder, engine.device)
        batch = _batch_sizes(extract, engine)
        source = LiveTokens(
            engine,
            frozen,
            trained,
            batch,
            order=extract.encoders,
            parts=parts,
            num_ahead=2 * batch["video"],
            accept_damaged=extract.accept_damaged,
            check=None if is_trusted else _kept_check(out, extract),
            live=yaml.safe_load(extract.to_yaml()) | {"trust_media": is_trusted},
            max_windows=config.max_windows,
        )
        source.include(listing.root, listing.clips)
        yield samples, source


@contextmanager
def dataset_like(
    config: TrainConfig,
    record: TokenRecord,
    media: Mapping[str, Any],
    *,
    trained: Mapping[str, nn.Module],  # each a `TrainableEncoder`
    weights: Sequence[str] = (),
    device: str = "auto",
) -> Iterator[tuple[list[Sample], TokenSource]]:
    """Samples of a dataset and tokens for a finished run, made as those it was trained on, in batches.

    `media` holds dataset, root and other settings of an extraction that decide a listing. A clip that cannot be decoded
    has no tokens, as in a store. A run that was trained on text alone gets the samples and a source without tokens.
    """
    recorded = {name: value for name, value in (record.live or {}).items() if name not in (*LISTING, "trust_media")}
    extract = read_config(None, {**recorded, **media})
    listing = list_clips(extract)
    is_own = extract.dataset == (record.live or {}).get("dataset")  # other datasets have other sample sets
    samples = named_samples(config.samples if is_own else (), sorted(listing.samples), listing.samples.__getitem__)
    if not record.shapes:
        yield samples, MemoryTokens([], {})
        return
    with source_like(config, record, trained=trained, weights=weights, device=device, extract=extract) as source:
        source.include(listing.root, listing.clips)
        yield samples, source


@contextmanager
def source_like(
    config: TrainConfig,
    record: TokenRecord,
    *,
    trained: Mapping[str, nn.Module],  # each a `TrainableEncoder`
    weights: Sequence[str] = (),
    device: str = "auto",
    extract: ExtractConfig | None = None,
) -> Iterator[LiveTokens]:
    """Tokens for a finished run, made as those it was trained on: one clip at a time, or as `extract` would.

    `weights` are SPEC or NAME=SPEC, where the weights are now; by default where the record says they were. An encoder
    that the record does not describe (an imported model's) is loaded as published.
    """
    given = weights_by_encoder(tuple(weights))
    settings = EngineSettings(encoders=(), decode_processes=1) if extract is None else extract.engine_settings
    with closing(Engine(replace(settings, encoders=(), device=device))) as engine:
        batch: Mapping[str, int] = dict.fromkeys(map(str, KINDS), 1)
        options: dict[str, Any] = {}
        if extract is not None:
            batch = _batch_sizes(extract, engine)
            check = MediaCheck(None)
            options = {"num_ahead": 2 * batch["video"], "accept_damaged": extract.accept_damaged, "check": check}
        options["max_windows"] = config.max_windows or 1
        frozen = {
            name: _recorded_encoder(record, name, given.get(name, given.get("")), engine.device)
            for name in record.shapes
            if name not in trained
        }
        order, parts = tuple(record.shapes), parts_of(config.projector)
        joined = cast("Mapping[str, TrainableEncoder]", trained)
        yield LiveTokens(engine, frozen, joined, batch, order=order, parts=parts, **options)


def media_of(path: Path) -> tuple[Kind, str]:
    """Kind of a media file (of a folder of frames: video) and the sha256 that stores record of its bytes.

    Raises UserError for what cannot be read.
    """
    try:
        sha256 = Source.find(str(path.parent), path.name).sha256()
    except (MediaError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return kind_of_path(path.name) or "video", sha256


def empty_encoders(config: TrainConfig, encoders: Mapping[str, Mapping[str, Any]]) -> dict[str, TrainableEncoder]:
    """The encoders that a run has trained, by its record; their weights are in the run's checkpoints."""
    made = {}
    for name in config.train_encoders:
        facts = encoders[name]
        identity = FeatureIdentity.from_dict(facts["identity"])
        network = build_network(EncoderSettings.of_identity(identity, "random:0").spec)
        fill_random(network, 0)
        network.finish()
        made[name] = TrainableEncoder(
            network,
            identity,
            parts_of(config.projector),
            weights_label=facts["weights"],
            weights_from=facts["weights_from"],
        )
    return made


def store_media(store: FeatureStore, root: str | None = None) -> StoreMedia:
    """Properties and pictures of a store's clips, from their media."""
    return StoreMedia(store, root)


class LiveTokens(TokenSource):
    """Tokens of media, decoded and encoded when they are fetched: frozen encoders as extraction runs them.

    Decoding runs ahead of the encoders, for the clips that `expect` names.
    """

    def __init__(
        self,
        engine: Engine,
        frozen: Mapping[str, TokenEncoder],
        trained: Mapping[str, TrainableEncoder],  # these join the model; their frames are fetched
        batch: Mapping[str, int],  # kind -> clips per forward of a frozen encoder
        *,
        order: Sequence[str] = (),  # of all encoders; empty: the frozen ones, then the trained ones
        parts: Sequence[Part] = ("tokens",),  # which arrays the projector reads
        num_ahead: int = 0,  # clips decoded and not yet encoded, besides one for each decode process
        accept_damaged: bool = False,
        check: MediaCheck | None = None,  # None: the media are trusted
        live: Mapping[str, Any] | None = None,  # settings that a resumed run starts from
        max_windows: int | None = None,  # shown of a video in windows; None: all
    ) -> None:
        encoders: dict[str, TokenEncoder | TrainableEncoder] = {**frozen, **trained}
        decoders = sorted({encoder.identity.decode for encoder in encoders.values()})
        if len(decoders) != 1:
            raise UserError(f"encoders must agree on one decoder, got {', '.join(decoders) or 'no encoder'}")
        self._encoders = {name: encoders[name] for name in order or encoders}
        self.shapes = {
            name: TokenShape(
                grid=encoder.identity.grid,
                width=encoder.identity.width,
                is_pooled=encoder.identity.pooling != "none",
                identity=encoder.identity.id + ("+trained" if name in trained else ""),  # no store holds these
                num_prefix=encoder.identity.prefix_tokens,
                native_grid=encoder.identity.native_grid,
            )
            for name, encoder in self._encoders.items()
        }
        self.facts = {
            name: {
                "weights": encoder.weights_label,
                "weights_from": encoder.weights_from
                if isinstance(encoder, TrainableEncoder)
                else encoder.settings.weights,
                "identity": encoder.identity.to_dict(),
            }
            for name, encoder in self._encoders.items()
        }
        self.trained, self.live = trained, live
        self._engine, self._parts, self._check, self._accept_damaged = engine, parts, check, accept_damaged
        self._batch = batch if frozen else {}
        self._clips: dict[str, tuple[Root, Clip]] = {}  # clip id -> root folder, clip
        self._num_ahead = num_ahead + engine.num_decoders
        self._prefetch = ClipPrefetch(self._submit, self._num_ahead)
        self._frame_rules = [encoder.identity.frame_rule for encoder in self._encoders.values()]
        self._max_windows = max_windows
        self._windows = ShownWindows((), self._frame_rules, max_windows)
        self.has_windows = self._windows.exist
        self._lock = threading.Lock()  # one fetch at a time: a device runs one encoder at a time anyway

    def include(self, root: Root, clips: Iterable[Clip]) -> None:
        """Add clips that may be fetched, long videos as windows if tokens are of windows; paths are below `root`."""
        if (length := self._windows.length) is not None:
            clips = split_long(root, clips, length, self._engine.pool)
        self._clips.update((clip.clip_id, (root, clip)) for clip in clips)
        self._windows = ShownWindows(self._clips, self._frame_rules, self._max_windows)

    def windows(self, clip_id: str) -> tuple[str, ...]:
        broken = self._check.broken if self._check is not None else {}
        return tuple(each for each in self._windows.of(clip_id) if each in self._clips and each not in broken)

    def fetch(self, clip_ids: Sequence[str]) -> dict[str, ClipTokens]:
        """Tokens by encoder; for a trained encoder frames_BTHWC, which the model encodes itself."""
        kinds = [self._clips[clip_id][1].kind for clip_id in clip_ids]
        rows: dict[str, dict[int, Arrays]] = {name: {} for name in self._encoders}
        with self._lock:
            for kind in sorted(set(kinds), reverse=True):
                places = [place for place, other in enumerate(kinds) if other == kind]
                size = self._batch.get(kind, len(places))
                for chunk in (places[start : start + size] for start in range(0, len(places), size)):
                    decoded = [self._decoded(clip_ids[place]) for place in chunk]
                    for name in self._encoders:
                        rows[name] |= zip(chunk, self._encode(name, kind, decoded), strict=True)
        tokens: dict[str, ClipTokens] = {}
        for name, found in rows.items():
            ordered = [found[place] for place in sorted(found)]
            stacked = {part: torch.from_numpy(np.stack([row[part] for row in ordered])) for part in ordered[0]}
            tokens[name] = stacked["frames"] if "frames" in stacked else _select_parts(**stacked, parts=self._parts)
        return tokens

    def expect(self, clip_ids: Iterable[str]) -> None:
        self._prefetch.expect(window for clip_id in clip_ids for window in self.windows(clip_id))

    def available(self, clip_ids: Iterable[str]) -> set[str]:
        """The clips that are listed and can be decoded; decodes those that were not checked before."""
        wanted = set(clip_ids)
        if self._check is not None:
            shown = {window for clip_id in wanted for window in self._windows.of(clip_id)}
            self._check.scan(sorted(shown & self._clips.keys()), self._submit, limit=self._num_ahead)
        return {clip_id for clip_id in wanted if self.windows(clip_id)}

    def stills(self, clip_ids: Iterable[str]) -> set[str]:
        return {clip_id for clip_id in clip_ids if clip_id in self._clips and self._clips[clip_id][1].kind == "image"}

    def data_digest(self, clip_ids: Iterable[str], samples: Iterable[Sample]) -> str:
        """Over clips, digests of their media where checked, identities and samples: what decides the tokens."""
        media = self._check.media_sha256 if self._check is not None else {}
        ordered = sorted(
            self._encoders, key=lambda name: self._encoders[name].identity.group_name
        )  # whatever the run's
        identities = " ".join(self.shapes[name].identity for name in ordered)
        shown = {window for clip_id in clip_ids for window in self.windows(clip_id)}
        parts = [f"clip\t{clip_id}\t{media.get(clip_id, 'trusted')}\t{identities}" for clip_id in shown]
        parts += [f"sample\t{sample.digest}" for sample in samples]
        return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()

    def _submit(self, clip_id: str) -> Future[Decoded]:
        """Start decoding a clip, once for the views of all encoders."""
        root, clip = self._clips[clip_id]
        job = decode_job(root, clip, self._encoders.values(), accept_damaged=self._accept_damaged)
        return self._engine.pool.submit(job)

    def _decoded(self, clip_id: str) -> Decoded:
        try:
            decoded = self._prefetch.take(clip_id).result()
        except MediaError as error:
            hint = ""
            if self._check is None and self.live is not None:
                hint = "; without --skip-media-check such clips are found and left out before the first step"
            raise UserError(f"{clip_id} cannot be decoded: {error}{hint}") from error
        known = self._check.media_sha256.get(clip_id) if self._check is not None else None
        if known not in (None, decoded.media_sha256):
            raise UserError(f"the media of {clip_id} have changed since the run began; start a new run")
        return decoded

    def _encode(self, name: str, kind: str, decoded: Sequence[Decoded]) -> list[Arrays]:
        """Of each clip what a store would return, or the frames for a trained encoder."""
        encoder = self._encoders[name]
        frames = [clip.frames[encoder.view] for clip in decoded]
        if isinstance(encoder, TrainableEncoder):  # a still becomes a clip of equal frames, so that both fit one tensor
            return [{"frames": repeat_steps(frames_THWC, encoder.view.num_frames)} for frames_THWC in frames]
        # Batches of one shape, padded with zeros, so that neighbours never change a clip's bits.
        slots = [*range(len(frames)), *[None] * (self._batch[kind] - len(frames))]
        arrays, _ = encode_batch(encoder, dict(enumerate(frames)), slots)
        return [
            through_storage({part: values[slot] for part, values in arrays.items()}, encoder.identity)
            for slot in range(len(frames))
        ]


class TrainableEncoder(nn.Module):
    """An encoder inside the model that is trained: frames in, aligned tokens out, differentiable throughout.

    Without dropout, like a frozen one. Its weights stay float32; under a run's bf16 its matrix products are bfloat16.
    Its tokens are cast to no storage dtype: nothing is stored, and the cast has no gradient.
    """

    mean_C: Tensor
    std_C: Tensor

    def __init__(
        self,
        network: EncoderNetwork,
        identity: FeatureIdentity,
        parts: Sequence[Part],
        *,
        weights_label: str,  # of the weights that training starts from
        weights_from: str,  # "hub", a folder or "random:SEED"
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(True)
        self.identity, self.view, self._parts = identity, network.spec.view, parts
        self.weights_label, self.weights_from = weights_label, weights_from
        for name, values in (("mean_C", network.spec.mean), ("std_C", network.spec.std)):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def train(self, mode: bool = True) -> TrainableEncoder:
        return super().train(False)

    def forward(self, frames_BTHWC: Tensor) -> ClipTokens:
        pixels_BTHWC = (frames_BTHWC.float() / 255 - self.mean_C) / self.std_C
        features_BTHWD, prefix_BTKD = self.network(pixels_BTHWC.permute(0, 1, 4, 2, 3).contiguous())
        features_BTHWD, prefix_BTKD = keep_steps(self.network.spec, features_BTHWD, prefix_BTKD)
        tokens_BTHWD = align(features_BTHWD, None if self.identity.pooling == "none" else self.identity.grid)
        if prefix_BTKD is not None and "prefix" in self._parts:
            prefix_BTKD = align_time(prefix_BTKD, self.identity.grid[0])
        return _select_parts(tokens_BTHWD, prefix_BTKD, parts=self._parts)


def _select_parts(tokens: Tensor, prefix: Tensor | None = None, *, parts: Sequence[Part]) -> ClipTokens:
    """tokens_BTHWD and prefix_BTKD as a resampler that reads `parts` takes them."""
    if "prefix" not in parts:
        return tokens
    assert prefix is not None
    return PrefixedTokens(tokens_BTHWD=tokens if "tokens" in parts else None, prefix_BTKD=prefix)


def _extract_config(
    config: TrainConfig, settings: Mapping[str, Any], config_file: Path | None, recorded: Sequence[str]
) -> ExtractConfig:
    """The extraction whose tokens are made: its encoders are those that the run uses, in the run's order."""
    given = {name: value for name, value in settings.items() if value not in (None, ())}
    if isinstance(given.get("weights"), tuple):
        given["weights"] = weights_by_encoder(given["weights"])
    extract = read_config(config_file, given)
    names = used_encoders(config, list(config.encoders or recorded) or in_paper_order(extract.encoders))
    for name in config.train_encoders:
        if name not in names:
            raise UserError(unknown_name("encoder in train_encoders", name, names))
    needs_prefix = "prefix" in parts_of(config.projector)
    return replace(extract, encoders=tuple(names), prefix_tokens=extract.prefix_tokens or needs_prefix)


def _settings_of_this_rank(settings: EngineSettings) -> EngineSettings:
    """Ranks of one machine each take their device and their share of the cores."""
    rank, ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if settings.device == "auto" and torch.cuda.is_available():
        settings = replace(settings, device=f"cuda:{rank}")
    if ranks > 1 and not settings.decode_processes:
        settings = replace(settings, decode_processes=max(1, free_cores(ranks) - 1))
    return settings


def _batch_sizes(extract: ExtractConfig, engine: Engine) -> dict[str, int]:
    """Clips per forward by kind, as an extraction has them."""
    return {kind: extract.batch.get(kind) or engine.batch_of(kind) for kind in KINDS}


def _kept_check(out: Path | None, extract: ExtractConfig) -> MediaCheck:
    """The check whose results are kept in the run's folder; another root or way of decoding has its own file."""
    decides = {"root": extract.root, "decoder": extract.decoder, "accept_damaged": extract.accept_damaged}
    newer = {"frame_rule": extract.frame_rule, "exif": extract.exif}  # left out where they decide nothing
    decides |= {name: value for name, value in newer.items() if value not in ({}, "ignore")}
    name = f"media-{hashlib.sha256(canonical_json(decides).encode()).hexdigest()[:12]}.jsonl"
    return MediaCheck(out / name if out is not None else None, is_first_rank=os.environ.get("RANK", "0") == "0")


def _recorded_encoder(record: TokenRecord, name: str, weights: str | None, device: str) -> TokenEncoder:
    """The encoder whose tokens the run was trained on, or an error that names what differs."""
    if name not in record.encoders:
        rule = record.wanted.get(name, {}).get("frame_rule")
        sizes = {} if rule is None else {"num_frames": FrameRule.parse(rule).num_frames}
        wanted = record.shapes[name]
        settings = EncoderSettings(
            name=name, weights=weights or "hub", architecture=sizes, frame_rule=rule, grid=wanted.grid
        )
        run = TokenEncoder(settings, device)
        made = run.identity
        if (wanted.grid, wanted.width) != (made.grid, made.width):
            raise UserError(
                f"{name} as published gives tokens {(*made.grid, made.width)}, the run takes"
                f" {(*wanted.grid, wanted.width)}, and its record does not say what made them"
            )
        if reason := made_otherwise(name, record.wanted.get(name, {}), made.to_dict()):
            raise UserError(reason)
        return run
    facts = record.encoders[name]
    spec = weights or facts.get("weights_from", facts["weights"])
    recorded = FeatureIdentity.from_dict(facts["identity"])
    run = TokenEncoder(EncoderSettings.of_identity(recorded, "hub" if spec == "pretrained" else spec), device)
    if differing := recorded.differences(run.identity):
        values = "; ".join(f"{field}: {before!r} then, {now!r} now" for field, (before, now) in differing.items())
        raise UserError(
            f"{name} is not the encoder that the run was trained on ({values}); name the folder of its weights with"
            f" --weights {name}=FOLDER"
        )
    return run
