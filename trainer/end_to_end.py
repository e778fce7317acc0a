"""End to end: tokens made on the spot, through the code that extraction runs. The trainer's one door to the pipeline.

Comes in: a training config and the settings of an extraction. Goes out: samples and `LiveTokens`, a source like a
store's; model, loop and order of the batches do not know the difference. Decode processes, views, encoders, batch
shape, alignment and storage dtype are extraction's own. **Tolerance**: on one machine, with the batch shape and torch
threads of the extraction, live tokens have the bits of stored ones, and a run on the CPU has the same losses to the
bit. With another shape, thread count or device they differ by rounding.

What cannot be decoded must be known before the first step, as it is in a store: every clip is decoded once up front,
see `media_check.py`. `is_trusted` leaves that out, and a clip that then fails ends the run. So does a clip whose tokens
overflow the storage dtype, with the advice to take bfloat16: to find it early would cost a pass of all encoders.

Encoders named in `train_encoders` join the model with weights in float32; their tokens are cast to no storage dtype:
nothing is stored, and the cast has no gradient. Their first tokens are those of a store to the rounding of that cast.

B clips, T time, H W height width, C colours, K prefix tokens, D encoder width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from featurestore import FeatureIdentity, Sample
from featurestore.clips import KINDS, Clip
from mervcache.errors import UserError, unknown_name
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
from trainer.data.tokens import ClipTokens, MemoryTokens, Part, TokenSource
from trainer.live.media_check import MediaCheck
from trainer.live.tokens import Arrays, LiveTokens, chosen
from trainer.loop.launch import is_first_rank
from trainer.model.resamplers import parts_of
from trainer.runs.record import RunRecord


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
