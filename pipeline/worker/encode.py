"""Encoders of a run on a device: small frames in, tokens as they are stored out.

On a GPU one stream computes, because bits are guaranteed for one active stream only; two more copy frames to the device
and tokens from it, through pinned memory, while it computes. Tokens are cast to the storage dtype and checked for
overflow before they are copied, which halves the copy; uint8, whose scale is taken per clip and channel, is cast by the
writer on the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from featurestore.identity import FeatureIdentity
from featurestore.storage_dtypes import overflow_reason
from pipeline.config import EncoderSettings
from pipeline.encoders.loading import Encoder, Frames
from pipeline.encoders.weights import weights_fingerprint
from pipeline.views import View

DEVICE_CASTS = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # storage dtypes that a device casts to
# Kernels chosen by timing them would give other bits on another day.
COMPILE_OPTIONS = {
    "max_autotune": False,
    "max_autotune_gemm": False,
    "max_autotune_pointwise": False,
    "coordinate_descent_tuning": False,
    "triton.autotune_pointwise": False,
    "triton.cudagraphs": False,
}
Tensors = dict[str, torch.Tensor]  # "tokens" [B, T, H, W, D], maybe "prefix" [B, T, K, D]


class TokenEncoder:
    """A loaded `Encoder` with the settings of a run: small frames in, aligned tokens to store out."""

    def __init__(
        self, settings: EncoderSettings, device: str, *, compiled: bool = False, loaded: LoadedNetwork | None = None
    ) -> None:
        loaded = loaded or load_network([settings], device, compiled=compiled)
        spec = settings.spec
        self.settings = settings
        self.stores_prefix = settings.prefix_tokens and spec.prefix_tokens > 0  # SigLIP, for one, has none
        self.loaded = loaded.encoders[settings.key]
        self.fingerprint = loaded.fingerprints[settings.key]
        self.load_s = loaded.seconds
        self.view: View = self.loaded.spec.view
        self.weights_label: str = self.loaded.weights_label
        self.identity: FeatureIdentity = settings.identity(self.loaded.weights_sha256)

    def blank_frames(self, kind: str, clips: int) -> np.ndarray:
        """Frames of black clips."""
        num_frames, size = self.view.num_frames if kind == "video" else 1, self.view.rule.size
        return np.zeros((clips, num_frames, size, size, 3), self.view.rule.dtype)

    def encode(self, frames_BTHWC: Frames) -> Tensors:
        """Frames of a batch -> float32 tokens, and prefix tokens where they are stored, on the device."""
        tokens_BTHWD, prefix_BTKD = self.loaded.encode_tokens(
            frames_BTHWC, grid=self.settings.grid, prefix_tokens=self.stores_prefix
        )
        return {"tokens": tokens_BTHWD} | ({} if prefix_BTKD is None else {"prefix": prefix_BTKD})

    def align(self, features: Tensors) -> Tensors:
        """`encode`, given the layer's "features" and "prefix" tokens of a forward."""
        prefix_BTKD = features.get("prefix") if self.stores_prefix else None
        tokens_BTHWD, prefix_BTKD = self.loaded.align_features(
            features["features"], prefix_BTKD, grid=self.settings.grid
        )
        return {"tokens": tokens_BTHWD} | ({} if prefix_BTKD is None else {"prefix": prefix_BTKD})

    def tokens(self, frames_BTHWC: np.ndarray) -> dict[str, np.ndarray]:
        """`encode`, with float32 arrays on the host."""
        return {name: tensor.cpu().numpy() for name, tensor in self.encode(frames_BTHWC).items()}

    def launch(self, frames_BTHWC: torch.Tensor, staging: Staging) -> PendingTokens:
        """Encode frames that are on the device; the tokens, cast as they are stored, are on their way to the host."""
        began = staging.mark()
        floats, halvings = _halve_until_it_fits(lambda part: self.encode(part["frames"]), {"frames": frames_BTHWC})
        tensors, checks = storable(floats, self.identity.storage_dtype)
        return staging.download(tensors, checks, began, halvings)


@dataclass(frozen=True, kw_only=True)
class LoadedNetwork:
    """Encoders by key that differ in layer and grid only, of one network where the family allows it."""

    encoders: Mapping[str, Encoder]
    fingerprints: Mapping[str, str | None]  # of the files; None: files that changed meanwhile have no name
    seconds: float


def load_network(settings: Sequence[EncoderSettings], device: str, *, compiled: bool = False) -> LoadedNetwork:
    """Load the encoders of settings that `same_forward` puts together."""
    first, started = settings[0], time.monotonic()
    before = {each.key: weights_fingerprint(each.spec, each.weights) for each in settings}
    loaded = Encoder.load_layers(
        [each.spec for each in settings], first.weights, device=device, compute_dtype=first.compute_dtype
    )
    after = {each.key: weights_fingerprint(each.spec, each.weights) for each in settings}
    if compiled:
        for network in {id(encoder.network): encoder.network for encoder in loaded}.values():
            network.compile(dynamic=False, options=COMPILE_OPTIONS)
    return LoadedNetwork(
        encoders={each.key: encoder for each, encoder in zip(settings, loaded, strict=True)},
        fingerprints={key: after[key] if before[key] in (None, after[key]) else None for key in after},
        seconds=time.monotonic() - started,
    )


def launch_together(
    encoders: Mapping[str, TokenEncoder], frames_BTHWC: torch.Tensor, staging: Staging
) -> Iterator[PendingTokens]:
    """`launch` of encoders that share a network, in their order: one forward, then the pooling of each as it is taken.

    The forward counts to the seconds of the first.
    """
    began = staging.mark()
    for name, floats, halvings in _encode_together(encoders, frames_BTHWC):
        tensors, checks = storable(floats, encoders[name].identity.storage_dtype)
        yield staging.download(tensors, checks, began, halvings)
        began = staging.mark()


def _encode_together(
    encoders: Mapping[str, TokenEncoder], frames_BTHWC: torch.Tensor
) -> Iterator[tuple[str, Tensors, int]]:
    """(key, float32 tensors, halvings) of encoders that share a network, from one forward."""
    first = next(iter(encoders.values())).loaded
    layers = list(dict.fromkeys(encoder.loaded.spec.chosen_layer for encoder in encoders.values()))
    with_prefix = any(encoder.stores_prefix for encoder in encoders.values())

    def forward(part: Tensors) -> Tensors:
        found = first.encode_layers(part["frames"], layers, prefix_tokens=with_prefix)
        features = {f"{layers.index(layer)} features": features for layer, (features, _) in found.items()}
        prefix = {f"{layers.index(layer)} prefix": tokens for layer, (_, tokens) in found.items() if tokens is not None}
        return features | prefix

    found, halvings = _halve_until_it_fits(forward, {"frames": frames_BTHWC})
    for name, encoder in encoders.items():
        number = f"{layers.index(encoder.loaded.spec.chosen_layer)} "
        own = {part.removeprefix(number): tensor for part, tensor in found.items() if part.startswith(number)}
        floats, more = _halve_until_it_fits(encoder.align, own)
        yield name, floats, halvings + more
        halvings = 0


def storable(floats: Tensors, storage_dtype: str) -> tuple[Tensors, Tensors]:
    """Float32 tensors -> (items as they are stored, by name bool [B, 2]: all values fit, all were finite).

    Round once to nearest even, as `featurestore.storage_dtypes` does: of float16, values below 65520 become 65504 and
    fit. A storage dtype that the host casts stays float32 and has no checks.
    """
    dtype = DEVICE_CASTS.get(storage_dtype)
    if dtype is None:
        return floats, {}
    with torch.inference_mode():
        items = {name: tensor.to(dtype).contiguous() for name, tensor in floats.items()}
        checks = {
            name: torch.stack([torch.isfinite(part.flatten(1)).all(1) for part in (items[name], tensor)], dim=1)
            for name, tensor in floats.items()
        }
    return {name: item.view(torch.int16) for name, item in items.items()}, checks


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """The tokens of a batch on the host; first axis: the batch's slots."""

    storage_dtype: str
    arrays: Mapping[str, np.ndarray]
    checks: Mapping[str, np.ndarray]  # as `storable` makes them; none where the host casts
    seconds: float  # of the device
    halvings: int  # how often the batch was cut for lack of memory

    @property
    def is_cast(self) -> bool:
        """Whether the arrays hold items as they are stored; else float32."""
        return bool(self.checks)

    def row(self, slot: int) -> dict[str, np.ndarray]:
        return {name: array[slot] for name, array in self.arrays.items()}

    def overflow(self, slot: int) -> str | None:
        """Why a clip's tokens do not fit their storage dtype; None where they do, or where the host casts."""
        for fits, is_finite in (check[slot] for check in self.checks.values()):
            if not fits:
                return overflow_reason(self.storage_dtype, is_finite=bool(is_finite))
        return None


class PendingTokens(Protocol):
    """Tokens that a device has been given to compute."""

    halvings: int

    def is_done(self) -> bool:
        """Whether the device has finished them."""
        ...

    def wait(self, storage_dtype: str) -> EncodedBatch:
        """Wait for the copy to the host; safe from several threads."""
        ...


class Staging(Protocol):
    """Copies between the host and a device; used by the encoding thread."""

    def upload(self, frames_by_row: Mapping[int, np.ndarray], slots: Sequence[int | None]) -> torch.Tensor: ...

    def mark(self) -> Any:
        """A point of time on the device."""
        ...

    def download(self, tensors: Tensors, checks: Tensors, began: Any, halvings: int) -> PendingTokens: ...


def as_arrays(tensors: Tensors, storage_dtype: str) -> dict[str, np.ndarray]:
    """Tensors on the host as the arrays that a store takes; no copy."""
    if storage_dtype not in DEVICE_CASTS:
        return {name: tensor.numpy() for name, tensor in tensors.items()}
    dtype = np.float16 if storage_dtype == "float16" else np.uint16
    return {name: tensor.numpy().view(dtype) for name, tensor in tensors.items()}


class HostStaging:
    """A CPU device: nothing is copied, and a launch returns when it is done."""

    def upload(self, frames_by_row: Mapping[int, np.ndarray], slots: Sequence[int | None]) -> torch.Tensor:
        return torch.from_numpy(fill_slots(frames_by_row, slots))

    def mark(self) -> float:
        return time.monotonic()

    def download(self, tensors: Tensors, checks: Tensors, began: float, halvings: int) -> _OnHost:
        return _OnHost(tensors, checks, time.monotonic() - began, halvings)


class _OnHost:
    def __init__(self, tensors: Tensors, checks: Tensors, seconds: float, halvings: int) -> None:
        self._tensors, self._checks, self._seconds, self.halvings = tensors, checks, seconds, halvings

    def is_done(self) -> bool:
        return True

    def wait(self, storage_dtype: str) -> EncodedBatch:
        return EncodedBatch(
            storage_dtype=storage_dtype,
            arrays=as_arrays(self._tensors, storage_dtype),
            checks={name: check.numpy() for name, check in self._checks.items()},
            seconds=self._seconds,
            halvings=self.halvings,
        )


class CudaStaging:
    """A CUDA device: copies run on two streams of their own, beside the current stream, which computes.

    Pinned memory comes from torch's caching allocator, which reuses a buffer when the copies that it took part in are
    done.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._uploads, self._downloads = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)

    def upload(self, frames_by_row: Mapping[int, np.ndarray], slots: Sequence[int | None]) -> torch.Tensor:
        first = next(iter(frames_by_row.values()))
        dtype = torch.from_numpy(first[:0].copy()).dtype
        pinned = torch.empty((len(slots), *first.shape), dtype=dtype, pin_memory=True)
        fill_slots(frames_by_row, slots, pinned.numpy())
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._uploads):
            frames = pinned.to(self._device, non_blocking=True)
        compute.wait_stream(self._uploads)
        frames.record_stream(compute)
        return frames

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def download(self, tensors: Tensors, checks: Tensors, began: torch.cuda.Event, halvings: int) -> _OnDevice:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        computed = self.mark()
        self._downloads.wait_event(computed)
        with torch.cuda.stream(self._downloads):
            copies = {name: self._pinned_copy(tensor) for name, tensor in tensors.items()}
            checks = {name: self._pinned_copy(check) for name, check in checks.items()}
            copied = torch.cuda.Event()
            copied.record(self._downloads)
        return _OnDevice(copies, checks, began, computed, copied, halvings)

    def _pinned_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        tensor.record_stream(self._downloads)
        return pinned.copy_(tensor, non_blocking=True)


class _OnDevice:
    def __init__(
        self,
        tensors: Tensors,
        checks: Tensors,
        began: torch.cuda.Event,
        computed: torch.cuda.Event,
        copied: torch.cuda.Event,
        halvings: int,
    ) -> None:
        self._tensors, self._checks, self.halvings = tensors, checks, halvings
        self._began, self._computed, self._copied = began, computed, copied

    def is_done(self) -> bool:
        return self._computed.query()

    def wait(self, storage_dtype: str) -> EncodedBatch:
        self._copied.synchronize()
        seconds = self._began.elapsed_time(self._computed) / 1000
        return _OnHost(self._tensors, self._checks, seconds, self.halvings).wait(storage_dtype)


STAGINGS: dict[str, Callable[[str], Staging]] = {"cuda": CudaStaging}  # by kind of device; others need no copies


def staging_for(device: str) -> Staging:
    """The copies of a device such as "cuda:1" or "cpu"."""
    kind = device.split(":")[0]
    return STAGINGS[kind](device) if kind in STAGINGS else HostStaging()


def fill_slots(
    frames_by_row: Mapping[int, np.ndarray], slots: Sequence[int | None], batch: np.ndarray | None = None
) -> np.ndarray:
    """A batch of fixed shape, into `batch` where it is given: slots without frames are zero."""
    if batch is None:
        first = next(iter(frames_by_row.values()))
        batch = np.empty((len(slots), *first.shape), first.dtype)
    for slot, row in enumerate(slots):
        batch[slot] = 0 if row is None else frames_by_row.get(row, 0)
    return batch


def encode_batch(
    run: TokenEncoder, frames_by_row: Mapping[int, np.ndarray], rows: Sequence[int | None]
) -> tuple[dict[str, np.ndarray], int]:
    """Encode a batch of fixed shape: rows without frames are zeroed, so that neighbours never change a clip's bits.

    Returns float32 arrays, first axis in the order of `rows`, and how often the batch was halved for lack of memory.
    """
    frames_BTHWC = torch.from_numpy(fill_slots(frames_by_row, rows))
    tensors, halvings = _halve_until_it_fits(lambda part: run.encode(part["frames"]), {"frames": frames_BTHWC})
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}, halvings


def encode_batch_together(
    runs: Mapping[str, TokenEncoder], frames_by_row: Mapping[int, np.ndarray], rows: Sequence[int | None]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """`encode_batch` of encoders that share a network: (key, float32 arrays), each pooled as it is taken."""
    if len(runs) == 1:
        ((name, run),) = runs.items()
        yield name, encode_batch(run, frames_by_row, rows)[0]
        return
    for name, tensors, _ in _encode_together(runs, torch.from_numpy(fill_slots(frames_by_row, rows))):
        yield name, {part: tensor.cpu().numpy() for part, tensor in tensors.items()}


def _halve_until_it_fits(encode: Callable[[Tensors], Tensors], batch: Tensors) -> tuple[Tensors, int]:
    """`encode` of tensors whose first axis is the batch, in halves where the device's memory is short."""
    try:
        return encode(batch), 0
    except torch.OutOfMemoryError:
        size = min(map(len, batch.values()))
        if size == 1:
            raise
    half = size // 2
    halves = ({name: tensor[part] for name, tensor in batch.items()} for part in (slice(half), slice(half, None)))
    parts = [_halve_until_it_fits(encode, part) for part in halves]
    tensors = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
    return tensors, 1 + sum(part[1] for part in parts)
