"""End to end: tokens made on the spot, through the code that extraction runs. The trainer's one door to the pipeline.

Comes in: a training config and the settings of an extraction. Goes out: samples and `LiveTokens`, a source like a
store's; model, loop and order of the batches do not know the difference. Decode processes, views, encoders, batch
shape, alignment and storage dtype are extraction's own. **Tolerance**: on one machine, with the batch shape and torch
threads of the extraction, live tokens have the bits of stored ones, and a run on the CPU has the same losses to the
bit. With another shape, thread count or device they differ by rounding.

What cannot be decoded must be known before the first step, as it is in a store: every clip is decoded once up front,
see `media_check.py`. `is_trusted` leaves that out, and a clip that then fails ends the run. So does a clip whose tokens
overflow the storage dtype, with the advice to take a wider one: to find it early would cost a pass of all encoders.

Encoders named in `train_encoders` join the model with weights in float32; their tokens are cast to no storage dtype:
nothing is stored, and the cast has no gradient. Their first tokens are those of a store to the rounding of that cast.

B clips, T time, H W height width, C colours, K prefix tokens, D encoder width.

Live tokens: a token source that makes what it is asked for, as a store's source reads it.

Comes in: encoders and a way to decode, both from `end_to_end.py`, which alone knows the pipeline. Goes out: tokens with
the bits of stored ones: in the fixed batch shape of each kind, through the storage dtype and back, a still's period
repeated. Decoding runs ahead of the encoders, for the clips that the batches say come next.

B clips, T time, H W height width, C colours, K prefix tokens, D encoder width.

Media check: every clip of an end-to-end run is decoded once before the first step.

A store knows which clips failed, because it has decoded them all; a live source must look for itself. Which samples are
left decides the batches of every step, so what cannot be decoded has to be known before the first one: a clip that
failed in the middle of a run could only be swapped, skipped or fatal, and none of them is the run that a cache gives.
The look costs one decoding of the clips (no encoder runs); what it found stands in the run's folder, a line per clip
as it is found, so a resumed run looks at nothing twice and a person can list what is broken and why:

    {"clip_id": "demo/videos/0001.mp4", "media_sha256": "..."}
    {"clip_id": "demo/videos/0002.mp4", "reason": "container is damaged"}

Ahead: work on what will be asked for soon is started before it is asked for, a bounded number at a time.

Comes in: names in the order in which they will be taken, and a function that starts the work on one. What a name's
work brings stays in memory until it is taken, so the bound is a bound of memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Protocol, TextIO, TypeVar

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from featurestore import FeatureIdentity, Sample
from featurestore.clips import KINDS, Clip
from featurestore.storage_dtypes import WIDEST, OverflowedTokens, from_stored, to_stored
from mervcache.console import Bar
from mervcache.errors import MediaError, UserError, unknown_name
from mervcache.files import canonical_json
from pipeline.align import align, align_time
from pipeline.config import EncoderSettings, EngineSettings, ExtractConfig, read_config
from pipeline.datasets import DatasetListing, list_clips
from pipeline.decode.sampling import Decoded
from pipeline.encoders.network import EncoderNetwork, build_network
from pipeline.encoders.weights import fill_random, weights_by_encoder
from pipeline.worker.engine import EncoderRun, Engine, decode_job, encode_batch, free_cores
from trainer.config import LISTING, TrainConfig, used_encoders
from trainer.data.batches import named_samples
from trainer.data.tokens import ClipTokens, MemoryTokens, Part, PrefixedTokens, TokenShape, TokenSource
from trainer.loop.launch import is_first_rank
from trainer.model.projectors import parts_of
from trainer.runs.run_record import RunRecord

POLL_S = 1.0  # between looks at what the first rank has found so far


class MediaCheck:
    """What is known of the clips' media: digests of those that can be decoded, reasons for those that cannot."""

    def __init__(self, path: Path | None, *, is_first_rank: bool = True) -> None:
        self.media_sha256: dict[str, str] = {}
        self.broken: dict[str, str] = {}
        self._path, self._is_first_rank = path, is_first_rank
        self._read_lines = 0

    def look(self, clip_ids: Sequence[str], submit: Callable[[str], Future], *, limit: int) -> None:
        """Decode the clips that are not known yet, `limit` at once. Other ranks wait for what the first one writes."""
        self._load()
        while (unknown := self._unknown(clip_ids)) and self._path is not None and not self._is_first_rank:
            time.sleep(POLL_S)
            self._load()
        if not unknown:
            return
        with _appending(self._path) as file, Bar("decoding every clip once", total=len(unknown)) as bar:
            for record in bar.over(_outcomes(unknown, submit, limit)):
                self._keep(record)
                file.write(f"\n{json.dumps(record)}")  # the end of a line that a killed run left comes first
                file.flush()

    def _unknown(self, clip_ids: Sequence[str]) -> list[str]:
        return [clip_id for clip_id in clip_ids if clip_id not in self.media_sha256 and clip_id not in self.broken]

    def _keep(self, record: dict[str, Any]) -> None:
        if "reason" in record:
            self.broken[record["clip_id"]] = record["reason"]
        else:
            self.media_sha256[record["clip_id"]] = record["media_sha256"]

    def _load(self) -> None:
        """Lines that are new since the last time; one that was cut short is left out and its clip looked at again."""
        if self._path is None or not self._path.is_file():
            return
        with self._path.open() as file:
            lines = file.read().split("\n")
        for line in lines[self._read_lines :]:
            try:
                self._keep(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue
        self._read_lines = max(0, len(lines) - 1)  # the last line may still be growing


def _outcomes(clip_ids: Iterable[str], submit: Callable[[str], Future], limit: int) -> Iterator[dict[str, Any]]:
    """A record per clip, in order, with at most `limit` clips in work."""
    ahead: deque[tuple[str, Future]] = deque()
    for clip_id in clip_ids:
        ahead.append((clip_id, submit(clip_id)))
        if len(ahead) >= limit:
            yield _outcome(*ahead.popleft())
    while ahead:
        yield _outcome(*ahead.popleft())


def _outcome(clip_id: str, future: Future) -> dict[str, Any]:
    try:
        return {"clip_id": clip_id, "media_sha256": future.result().media_sha256}
    except MediaError as reason:
        return {"clip_id": clip_id, "reason": str(reason)}


def _appending(path: Path | None) -> TextIO:
    if path is None:
        return open(os.devnull, "w")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a")


T = TypeVar("T")


class Ahead(Generic[T]):
    """Futures by name, at most `limit` of them started and not yet taken; safe among threads."""

    def __init__(self, submit: Callable[[str], Future[T]], limit: int) -> None:
        self._submit, self._limit = submit, max(limit, 1)
        self._waiting: dict[str, None] = {}  # an ordered set
        self._started: dict[str, Future[T]] = {}
        self._lock = threading.Lock()

    def expect(self, names: Iterable[str]) -> None:
        """These names come next, in this order; what was expected before and is not among them is given up."""
        with self._lock:
            wanted = dict.fromkeys(names)
            for name in [name for name in self._started if name not in wanted]:
                self._started.pop(name).cancel()
            self._waiting = {name: None for name in wanted if name not in self._started}
            self._fill()

    def take(self, name: str) -> Future[T]:
        """The work on `name`, started now if it was not; another taker of the same name starts it anew."""
        with self._lock:
            self._waiting.pop(name, None)
            future = self._started.pop(name, None) or self._submit(name)
            self._fill()
            return future

    def _fill(self) -> None:
        while self._waiting and len(self._started) < self._limit:
            name = next(iter(self._waiting))
            del self._waiting[name]
            self._started[name] = self._submit(name)


Arrays = dict[str, np.ndarray]


class FrameCount(Protocol):
    """How many frames of a clip an encoder wants."""

    num_frames: int


class LiveEncoder(Protocol):
    """What is asked of every encoder, frozen or trained."""

    identity: FeatureIdentity
    label: str  # "pretrained" or "random:SEED"
    weights_from: str  # "hub", a folder or "random:SEED"
    view: FrameCount


class FrozenEncoder(LiveEncoder, Protocol):
    """An encoder that is not trained: frames in, floats out."""

    batch: Mapping[str, int]  # kind -> clips per forward

    def tokens(self, kind: str, frames: Sequence[np.ndarray]) -> list[Arrays]:
        """uint8 frames_THWC of at most `batch[kind]` clips -> {"tokens": [T, H, W, D], "prefix": [T, K, D]} of each."""


class DecodedClip(Protocol):
    """What decoding brings."""

    frames: Mapping[Hashable, np.ndarray]  # view -> uint8 [T, H, W, C]; T = 1 of a still
    media_sha256: str


class LiveTokens(TokenSource):
    """Tokens of media, made when they are asked for."""

    def __init__(
        self,
        decode: Callable[[str, Clip], Future[DecodedClip]],  # root folder and clip -> frames of every encoder's view
        frozen: Mapping[str, FrozenEncoder],
        trained: Mapping[str, nn.Module],  # each a `LiveEncoder` that joins the model
        *,
        num_ahead: int,  # clips decoded and not yet encoded
        parts: Sequence[Part] = ("tokens",),  # of what the encoders give
        check: MediaCheck | None = None,  # None: the media are trusted
        live: Mapping[str, Any] | None = None,  # settings that a resumed run starts from
    ) -> None:
        self.trained, self.live = trained, live
        self._decode, self._frozen, self._parts, self._check = decode, frozen, parts, check
        encoders: dict[str, LiveEncoder] = {**frozen, **trained}
        names = sorted(encoders, key=lambda name: encoders[name].identity.group_name)  # as a store lists them
        self._encoders = {name: encoders[name] for name in names}
        self.shapes = {name: self._shape(name) for name in names}
        self.facts = {
            name: {"weights": e.label, "weights_from": e.weights_from, "identity": e.identity.to_dict()}
            for name, e in self._encoders.items()
        }
        self._clips: dict[str, tuple[str, Clip]] = {}  # clip id -> root folder, clip
        self._num_ahead, self._ahead = num_ahead, Ahead[DecodedClip](self._submit, num_ahead)
        self._lock = threading.Lock()  # one fetch at a time: a device runs one encoder at a time anyway

    def include(self, root: str, clips: Iterable[Clip]) -> None:
        """Let these clips be asked for; their paths are relative to `root`."""
        self._clips.update((clip.clip_id, (root, clip)) for clip in clips)

    def fetch(self, clip_ids: Sequence[str]) -> dict[str, ClipTokens]:
        """As every source does; for a trained encoder uint8 frames_BTHWC, which the model encodes itself."""
        rows: dict[str, dict[int, Arrays]] = {name: {} for name in self._encoders}
        with self._lock:
            for kind, places in self._of_one_shape(clip_ids):
                decoded = [self._decoded(clip_ids[place]) for place in places]
                for name in self._encoders:
                    rows[name] |= zip(places, self._made(name, kind, decoded), strict=True)
        return {name: self._stacked([found[place] for place in sorted(found)]) for name, found in rows.items()}

    def expect(self, clip_ids: Iterable[str]) -> None:
        self._ahead.expect(clip_ids)

    def available(self, clip_ids: Iterable[str]) -> set[str]:
        """Those that are listed and can be decoded; decodes what was not looked at before."""
        listed = sorted({clip_id for clip_id in clip_ids if clip_id in self._clips})
        if self._check is not None:
            self._check.look(listed, self._submit, limit=self._num_ahead)
            listed = [clip_id for clip_id in listed if clip_id not in self._check.broken]
        return set(listed)

    def stills(self, clip_ids: Iterable[str]) -> set[str]:
        return {clip_id for clip_id in clip_ids if clip_id in self._clips and self._clips[clip_id][1].kind == "image"}

    def data_digest(self, clip_ids: Iterable[str], samples: Iterable[Sample]) -> str:
        """Over clips, digests of their media where looked at, identities and samples: what decides the tokens."""
        media = self._check.media_sha256 if self._check is not None else {}
        identities = " ".join(shape.identity for shape in self.shapes.values())
        parts = [f"clip\t{clip_id}\t{media.get(clip_id, 'trusted')}\t{identities}" for clip_id in set(clip_ids)]
        parts += [f"sample\t{sample.digest}" for sample in samples]
        return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()

    def _shape(self, name: str) -> TokenShape:
        identity = self._encoders[name].identity
        return TokenShape(
            grid=identity.grid,
            width=identity.width,
            is_pooled=identity.pooling != "none",
            identity=identity.id + ("+trained" if name in self.trained else ""),  # no store holds these
            num_prefix=identity.prefix_tokens,
        )

    def _submit(self, clip_id: str) -> Future[DecodedClip]:
        return self._decode(*self._clips[clip_id])

    def _decoded(self, clip_id: str) -> DecodedClip:
        try:
            decoded = self._ahead.take(clip_id).result()
        except MediaError as error:
            hint = "; without --skip-media-check such clips are found and left out before the first step"
            is_unlooked = self._check is None and self.live is not None
            raise UserError(f"{clip_id} cannot be decoded: {error}{hint if is_unlooked else ''}") from error
        known = self._check.media_sha256.get(clip_id) if self._check is not None else None
        if known not in (None, decoded.media_sha256):
            raise UserError(f"the media of {clip_id} have changed since the run began; start a new run")
        return decoded

    def _of_one_shape(self, clip_ids: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
        """Places in `clip_ids` that are encoded together."""
        kinds = [self._clips[clip_id][1].kind for clip_id in clip_ids]
        for kind in sorted(set(kinds), reverse=True):
            places = [place for place, each in enumerate(kinds) if each == kind]
            size = min((encoder.batch[kind] for encoder in self._frozen.values()), default=len(places))
            yield from ((kind, places[start : start + size]) for start in range(0, len(places), size))

    def _made(self, name: str, kind: str, decoded: Sequence[DecodedClip]) -> list[Arrays]:
        """What a store would give back of each clip, or the frames of a trained encoder."""
        encoder = self._encoders[name]
        frames = [clip.frames[encoder.view] for clip in decoded]
        if name in self.trained:  # a still becomes a clip of equal frames, so that both fit one tensor
            return [{"frames": repeated(frames_THWC, encoder.view.num_frames)} for frames_THWC in frames]
        return [through_storage(arrays, encoder.identity) for arrays in self._frozen[name].tokens(kind, frames)]

    def _stacked(self, rows: Sequence[Arrays]) -> ClipTokens:
        stacked = {part: torch.from_numpy(np.stack([row[part] for row in rows])) for part in rows[0]}
        return stacked["frames"] if "frames" in stacked else chosen(**stacked, parts=self._parts)


def through_storage(arrays: Mapping[str, np.ndarray], identity: FeatureIdentity) -> Arrays:
    """Float tokens of one clip -> what a store gives back of them: rounded, a still's period repeated."""
    try:
        stored = to_stored(arrays, identity.storage_dtype)
    except OverflowedTokens as error:
        raise UserError(
            f"{identity.encoder}: {error}; a store would leave the clip out, a live run ends here:"
            f" set storage_dtype: {WIDEST} in --extract-config"
        ) from error
    floats = from_stored(stored, identity.storage_dtype)
    return {part: repeated(floats[part], identity.grid[0]) for part in arrays}


def repeated(values_T: np.ndarray, time: int) -> np.ndarray:
    """One period of a still -> all time steps."""
    return values_T if len(values_T) == time else values_T[np.arange(time) % len(values_T)]


def chosen(tokens: Tensor, prefix: Tensor | None = None, *, parts: Sequence[Part]) -> ClipTokens:
    """tokens_BTHWD and prefix_BTKD as a resampler that reads `parts` wants them."""
    if "prefix" not in parts:
        return tokens
    return PrefixedTokens(tokens_BTHWD=tokens if "tokens" in parts else None, prefix_BTKD=prefix)


class FixedBatch:
    """A frozen encoder as extraction runs it: batches of one shape, so that neighbours never change a clip's bits."""

    def __init__(self, run: EncoderRun, batch: Mapping[str, int]) -> None:
        self._run, self.batch = run, batch
        self.identity, self.label, self.view = run.identity, run.weights_label, run.view
        self.weights_from = run.settings.weights

    def tokens(self, kind: str, frames: Sequence[np.ndarray]) -> list[Arrays]:
        """Of at most `batch[kind]` clips; the rest of the batch is padding."""
        slots = [*range(len(frames)), *[None] * (self.batch[kind] - len(frames))]
        arrays, _ = encode_batch(self._run, dict(enumerate(frames)), slots)
        return [{part: values[slot] for part, values in arrays.items()} for slot in range(len(frames))]


class TrainedEncoder(nn.Module):
    """An encoder inside the model that is trained: uint8 frames in, aligned tokens out, gradients all the way.

    Without dropout, like a frozen one; under a run's bf16 its matrix products are bfloat16, its weights stay float32.
    """

    def __init__(
        self,
        network: EncoderNetwork,
        identity: FeatureIdentity,
        parts: Sequence[Part],
        *,
        label: str,  # of the weights that training starts from
        weights_from: str,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(True)
        self.identity, self.view, self._parts = identity, network.spec.view, parts
        self.label, self.weights_from = label, weights_from
        for name, values in (("mean_C", network.spec.mean), ("std_C", network.spec.std)):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def train(self, mode: bool = True) -> TrainedEncoder:
        return super().train(False)

    def forward(self, frames_BTHWC: Tensor) -> ClipTokens:
        pixels_BTHWC = (frames_BTHWC.float() / 255 - self.mean_C) / self.std_C
        features_BTHWD, prefix_BTKD = self.network(pixels_BTHWC.permute(0, 1, 4, 2, 3).contiguous())
        tokens_BTHWD = align(features_BTHWD, None if self.identity.pooling == "none" else self.identity.grid)
        if prefix_BTKD is not None and "prefix" in self._parts:
            prefix_BTKD = align_time(prefix_BTKD, self.identity.grid[0])
        return chosen(tokens_BTHWD, prefix_BTKD, parts=self._parts)


@contextmanager
def live_source(
    config: TrainConfig,
    settings: Mapping[str, Any],
    config_file: Path | None = None,
    *,
    out: Path | None = None,  # the run's folder, which keeps what the look at the media has found
    is_trusted: bool = False,
) -> Iterator[tuple[list[Sample], LiveTokens]]:
    """Samples and tokens of a dataset; `settings` and `config_file` are those of `merv-pipeline extract`."""
    extract = _extraction(config, settings, config_file)
    listing = _listing(extract)
    samples = named_samples(config.samples, sorted(listing.samples), listing.samples.__getitem__)
    extract = replace(extract, root=listing.root)
    with closing(Engine(_of_this_rank(replace(extract.engine_settings, encoders=())))) as engine:
        source = _open(config, extract, engine, None if is_trusted else _check_in(out, extract))
        source.include(listing.root, listing.clips)
        yield samples, source


@contextmanager
def dataset_like(
    config: TrainConfig,
    record: RunRecord,
    media: Mapping[str, Any],
    *,
    trained: Mapping[str, TrainedEncoder],
    weights: Sequence[str] = (),
    device: str = "auto",
) -> Iterator[tuple[list[Sample], TokenSource]]:
    """Samples of a dataset and tokens for a finished run, made as those it was trained on, in batches.

    `media` says dataset, root and what else decides a listing, in the words of an extraction. A clip that cannot be
    decoded has no tokens, as in a store. A run that was trained on text alone gets the samples, and tokens of nothing.
    """
    known = {name: value for name, value in (record.live or {}).items() if name not in (*LISTING, "trust_media")}
    extract = read_config(None, {**known, **media})
    listing = _listing(extract)
    is_own = extract.dataset == (record.live or {}).get("dataset")  # others have other sets
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
    record: RunRecord,
    *,
    trained: Mapping[str, TrainedEncoder],
    weights: Sequence[str] = (),
    device: str = "auto",
    extract: ExtractConfig | None = None,
) -> Iterator[LiveTokens]:
    """Tokens for a finished run, made as those it was trained on: one clip at a time, or as `extract` would.

    `weights` are SPEC or NAME=SPEC, where the weights are now; by default where the record says they were. An encoder
    that the record does not describe (an imported model's) is taken as published.
    """
    given = weights_by_encoder(tuple(weights))
    settings = EngineSettings(encoders=(), decode_processes=1) if extract is None else extract.engine_settings
    with closing(Engine(replace(settings, encoders=(), device=device))) as engine:
        batch, options = dict.fromkeys(KINDS, 1), {}
        if extract is not None:
            batch = _batch(extract, engine)
            check = MediaCheck(None)
            options = {"num_ahead": 2 * batch["video"], "accept_damaged": extract.accept_damaged, "check": check}
        frozen = {}
        for name in record.shapes:
            if name not in trained:
                spec = given.get(name, given.get(""))
                frozen[name] = FixedBatch(_encoder_of(record, name, spec, engine.device), batch)
        yield _live_tokens(engine, frozen, trained, parts=parts_of(config.projector), **options)


def empty_encoders(config: TrainConfig, encoders: Mapping[str, Mapping[str, Any]]) -> dict[str, TrainedEncoder]:
    """The encoders a run has trained, by its record, in shape only: their weights are in its checkpoints."""
    made = {}
    for name in config.train_encoders:
        fact = encoders[name]
        identity = FeatureIdentity.from_dict(fact["identity"])
        network = build_network(EncoderSettings.of_identity(identity, "random:0").spec)
        fill_random(network, 0)
        network.finish()
        made[name] = TrainedEncoder(
            network, identity, parts_of(config.projector), label=fact["weights"], weights_from=fact["weights_from"]
        )
    return made


def _extraction(config: TrainConfig, settings: Mapping[str, Any], config_file: Path | None) -> ExtractConfig:
    """The extraction whose tokens are made: its encoders are those that the run uses, in a store's order."""
    given = {name: value for name, value in settings.items() if value not in (None, ())}
    if isinstance(given.get("weights"), tuple):
        given["weights"] = weights_by_encoder(given["weights"])
    extract = read_config(config_file, given)
    names = used_encoders(config, list(config.encoders) or sorted(extract.encoders))
    for name in config.train_encoders:
        if name not in names:
            raise UserError(unknown_name("encoder in train_encoders", name, names))
    needs_prefix = "prefix" in parts_of(config.projector)
    return replace(extract, encoders=tuple(names), prefix_tokens=extract.prefix_tokens or needs_prefix)


def _open(config: TrainConfig, extract: ExtractConfig, engine: Engine, check: MediaCheck | None) -> LiveTokens:
    """Encoders loaded: frozen ones on the device, trained ones as modules that the model takes along."""
    frozen, trained, parts = {}, {}, parts_of(config.projector)
    batch = _batch(extract, engine)
    for settings in extract.encoder_settings:
        if settings.name in config.train_encoders:
            run = EncoderRun(replace(settings, compute_dtype="float32"), "cpu")
            trained[settings.name] = TrainedEncoder(
                run.loaded.network, run.identity, parts, label=run.weights_label, weights_from=settings.weights
            )
        else:
            frozen[settings.name] = FixedBatch(EncoderRun(settings, engine.device), batch)
    return _live_tokens(
        engine,
        frozen,
        trained,
        num_ahead=2 * batch["video"],
        accept_damaged=extract.accept_damaged,
        parts=parts,
        check=check,
        live=yaml.safe_load(extract.to_yaml()) | {"trust_media": check is None},
    )


def _batch(extract: ExtractConfig, engine: Engine) -> dict[str, int]:
    """Clips per forward by kind, as an extraction has them."""
    return {kind: extract.batch.get(kind) or engine.batch_of(kind) for kind in KINDS}


def _listing(extract: ExtractConfig) -> DatasetListing:
    return list_clips(extract)


def _live_tokens(
    engine: Engine,
    frozen: Mapping[str, FixedBatch],
    trained: Mapping[str, TrainedEncoder],
    *,
    num_ahead: int = 0,
    accept_damaged: bool = False,
    **options: Any,
) -> LiveTokens:
    """A source whose clips the engine's processes decode, once for all encoders."""
    encoders = [*frozen.values(), *trained.values()]
    decoders = sorted({encoder.identity.decode for encoder in encoders})
    if len(decoders) != 1:
        raise UserError(f"encoders must agree on one decoder, got {', '.join(decoders) or 'no encoder'}")

    def decode(root: str, clip: Clip) -> Future[Decoded]:
        return engine.pool.submit(decode_job(root, clip, encoders, accept_damaged=accept_damaged))

    return LiveTokens(decode, frozen, trained, num_ahead=num_ahead + engine.num_decoders, **options)


def _check_in(out: Path | None, extract: ExtractConfig) -> MediaCheck:
    """The check whose findings are kept in the run's folder; another root or way of decoding has a file of its own."""
    asked = {"root": extract.root, "decoder": extract.decoder, "accept_damaged": extract.accept_damaged}
    name = f"media-{hashlib.sha256(canonical_json(asked).encode()).hexdigest()[:12]}.jsonl"
    return MediaCheck(out / name if out is not None else None, is_first_rank=is_first_rank())


def _of_this_rank(settings: EngineSettings) -> EngineSettings:
    """Ranks of one machine each take their device and their share of the cores."""
    rank, ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if settings.device == "auto" and torch.cuda.is_available():
        settings = replace(settings, device=f"cuda:{rank}")
    if ranks > 1 and not settings.decode_processes:
        settings = replace(settings, decode_processes=free_cores(ranks))
    return settings


def _encoder_of(record: RunRecord, name: str, weights: str | None, device: str) -> EncoderRun:
    """The encoder whose tokens the run was trained on, or an error that names what differs."""
    if name not in record.encoders:
        run = EncoderRun(EncoderSettings(name=name, weights=weights or "hub"), device)
        wanted, made = record.shapes[name], run.identity
        if (wanted.grid, wanted.width) != (made.grid, made.width):
            raise UserError(
                f"{name} as published gives tokens {(*made.grid, made.width)}, the run takes"
                f" {(*wanted.grid, wanted.width)}, and its record does not say what made them"
            )
        return run
    fact = record.encoders[name]
    spec = weights or fact.get("weights_from", fact["weights"])
    recorded = FeatureIdentity.from_dict(fact["identity"])
    run = EncoderRun(EncoderSettings.of_identity(recorded, "hub" if spec == "pretrained" else spec), device)
    if odd := recorded.differences(run.identity):
        values = "; ".join(f"{field}: {before!r} then, {now!r} now" for field, (before, now) in odd.items())
        raise UserError(
            f"{name} is not the encoder that the run was trained on ({values}); say where its weights are with"
            f" --weights {name}=FOLDER"
        )
    return run
