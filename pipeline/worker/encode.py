"""Encoders of a run on a device: small frames in, tokens as they are stored out.

On a GPU one stream computes, because bits are guaranteed for one active stream only; two more copy frames to the device
and tokens from it, through pinned memory, while it computes. Tokens are cast to the storage dtype and checked for
overflow before they are copied, which halves the copy; uint8, whose scale is taken per clip and channel, is cast by the
writer on the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from featurestore.identity import FeatureIdentity
from featurestore.storage_dtypes import overflow_reason
from pipeline.config import EncoderSettings
from pipeline.encoders import load_encoder
from pipeline.encoders.loading import Frames
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

    def __init__(self, settings: EncoderSettings, device: str, *, compiled: bool = False) -> None:
        spec = settings.spec
        self.settings = settings
        self._prefix = settings.prefix_tokens and spec.prefix_tokens > 0  # SigLIP, for one, has none
        started, before = time.monotonic(), weights_fingerprint(spec, settings.weights)
        self.loaded = load_encoder(spec, settings.weights, device=device, compute_dtype=settings.compute_dtype)
        after = weights_fingerprint(spec, settings.weights)
        self.fingerprint = after if before in (None, after) else None  # None: files that changed meanwhile have no name
        if compiled:
            self.loaded.network.compile(dynamic=False, options=COMPILE_OPTIONS)
        self.load_s = time.monotonic() - started
        self.view: View = self.loaded.spec.view
        self.weights_label: str = self.loaded.weights_label
        self.identity: FeatureIdentity = settings.identity(self.loaded.weights_sha256)

    def blank(self, kind: str) -> Callable[[int], object]:
        """A function that runs one forward of a given number of black clips."""
        num_frames, size = self.view.num_frames if kind == "video" else 1, self.view.rule.size
        return lambda clips: self.tokens(np.zeros((clips, num_frames, size, size, 3), self.view.rule.dtype))

    def encode(self, frames_BTHWC: Frames) -> Tensors:
        """Frames of a batch -> float32 tokens, and prefix tokens where they are stored, on the device."""
        tokens_BTHWD, prefix_BTKD = self.loaded.encode_tokens(
            frames_BTHWC, grid=self.settings.grid, prefix_tokens=self._prefix
        )
        return {"tokens": tokens_BTHWD} | ({} if prefix_BTKD is None else {"prefix": prefix_BTKD})

    def tokens(self, frames_BTHWC: np.ndarray) -> dict[str, np.ndarray]:
        """`encode`, with float32 arrays on the host."""
        return {name: tensor.cpu().numpy() for name, tensor in self.encode(frames_BTHWC).items()}

    def launch(self, frames_BTHWC: torch.Tensor, staging: Staging) -> PendingTokens:
        """Encode frames that are on the device; the tokens, cast as they are stored, are on their way to the host."""
        began = staging.mark()
        floats, halvings = _halve_until_it_fits(self.encode, frames_BTHWC)
        tensors, checks = storable(floats, self.identity.storage_dtype)
        return staging.download(tensors, checks, began, halvings)


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
    tensors, halvings = _halve_until_it_fits(run.encode, torch.from_numpy(fill_slots(frames_by_row, rows)))
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}, halvings


def _halve_until_it_fits(encode: Callable[[torch.Tensor], Tensors], frames_BTHWC: torch.Tensor) -> tuple[Tensors, int]:
    try:
        return encode(frames_BTHWC), 0
    except torch.OutOfMemoryError:
        if len(frames_BTHWC) == 1:
            raise
    half = len(frames_BTHWC) // 2
    parts = [_halve_until_it_fits(encode, part) for part in (frames_BTHWC[:half], frames_BTHWC[half:])]
    tensors = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
    return tensors, 1 + sum(part[1] for part in parts)
