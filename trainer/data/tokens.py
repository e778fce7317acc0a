"""Token sources: clip ids -> one tensor per encoder, read from a store, computed live or held in memory.

`StoreTokens` reads a feature store, `MemoryTokens` holds tensors, `trainer.end_to_end` computes them. Where a resampler
reads class tokens, the value is a `PrefixedTokens` instead of a tensor.

B clips, T time, H W height width, K prefix tokens, D encoder width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from featurestore import Clip, FeatureStore, Sample
from featurestore.quality import read_parity
from mervcache.errors import UserError
from trainer.data.windows import ShownWindows

Part = Literal["tokens", "prefix"]  # of what a store holds of an encoder: its grid, or class and register tokens


@dataclass(frozen=True, kw_only=True)
class PrefixedTokens:
    """Class and register tokens of clips, the class token first, with or without the tokens of the grid."""

    tokens_BTHWD: Tensor | None  # None where only the prefix is read
    prefix_BTKD: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PrefixedTokens:
        """The same on `device`, as `Tensor.to` gives it."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PrefixedTokens:
        """The same in page-locked memory, as `Tensor.pin_memory` gives it."""
        return self._each(Tensor.pin_memory)

    def __getitem__(self, rows: Sequence[int]) -> PrefixedTokens:
        """The clips at these rows, as a tensor gives them."""
        return self._each(lambda value: value[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> PrefixedTokens:
        tokens_BTHWD = None if self.tokens_BTHWD is None else change(self.tokens_BTHWD)
        return replace(self, tokens_BTHWD=tokens_BTHWD, prefix_BTKD=change(self.prefix_BTKD))


ClipTokens = Tensor | PrefixedTokens  # a tensor is tokens_BTHWD


def grid_of(tokens: ClipTokens) -> Tensor | None:
    """tokens_BTHWD; None where only the prefix was read."""
    return tokens.tokens_BTHWD if isinstance(tokens, PrefixedTokens) else tokens


@dataclass(frozen=True, kw_only=True)
class TokenShape:
    """What a source gives for one encoder."""

    grid: tuple[int, int, int]  # T, H, W of every clip
    width: int  # D
    is_pooled: bool  # the grid is an average of the encoder's own
    identity: str  # names what made the tokens; a checkpoint is only used with equal identities
    num_prefix: int = 0  # K that the source can give; 0: none is stored, or the encoder has none
    native_grid: tuple[int, int, int] | None = None  # T, H, W that the encoder made, before any pooling, where known

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> TokenShape:
        """A shape that was written as JSON."""
        native = record.get("native_grid")
        return cls(**{**record, "grid": tuple(record["grid"]), "native_grid": native and tuple(native)})


class TokenSource(Protocol):
    """Tokens by clip id."""

    shapes: Mapping[str, TokenShape]  # encoder -> shape, in the order of the encoders
    trained: Mapping[str, nn.Module] = MappingProxyType({})  # encoders that join the model; `fetch` gives their frames
    live: Mapping[str, Any] | None = None  # settings of the live extraction; None: tokens are stored
    facts: Mapping[str, Mapping[str, Any]] = MappingProxyType({})  # encoder -> `identity`, `weights` label, where known
    snapshot: str = ""  # of a store: the id of the snapshot that is read
    has_windows: bool = False  # whether videos are windows, which are clips of their own

    def windows(self, clip_id: str) -> tuple[str, ...]:
        """The clips whose tokens a sample about a clip is shown: the windows of a video that have some, else itself."""
        return (clip_id,)

    def fetch(self, clip_ids: Sequence[str]) -> dict[str, ClipTokens]:
        """encoder -> tokens_BTHWD on the CPU, B in the given order; safe to call from several threads."""
        ...

    def expect(self, clip_ids: Iterable[str]) -> None:
        """Announce what will be fetched soon, in that order, so that a live source can start on it."""

    def available(self, clip_ids: Iterable[str]) -> set[str]:
        """Those of the clips that have tokens of every encoder."""
        ...

    def stills(self, clip_ids: Iterable[str]) -> set[str]:
        """Those of the clips that are images, where the source knows; validation reports their loss separately."""
        return set()

    def data_digest(self, clip_ids: Iterable[str], samples: Iterable[Sample]) -> str:
        """64 hex digits over the clips' tokens of every encoder and the samples, whatever their order."""
        ...


class StoreTokens(TokenSource):
    """Tokens that a feature store holds, of some of its encoders.

    `encoders` are as for `FeatureStore.encoder_key`, or from a run's names for them to such. `parts` is what is read of
    each clip, which a projector's `parts_of` says: one class token per frame is a small fraction of a raw grid's bytes.
    """

    def __init__(
        self,
        store: FeatureStore,
        encoders: Sequence[str] | Mapping[str, str],
        *,
        parts: Sequence[Part] = ("tokens",),
        clips_with: Sequence[str] = (),
        max_windows: int | None = None,
    ) -> None:
        """Only clips that have tokens of the `clips_with` encoders too are available.

        Of a video in windows at most `max_windows` are shown, None: all.
        """
        self._store, self._parts = store, parts
        keys = encoders if isinstance(encoders, Mapping) else {encoder: encoder for encoder in encoders}
        self._keys = {encoder: store.encoder_key(key) for encoder, key in keys.items()}
        if len(set(self._keys.values())) < len(self._keys):
            raise UserError(f"two of the encoders {', '.join(self._keys)} are the same in this store; name each once")
        self.snapshot = store.snapshot
        identities = {encoder: store.encoders[key] for encoder, key in self._keys.items()}
        self.shapes = {
            encoder: TokenShape(
                grid=identity.grid,
                width=identity.width,
                is_pooled=identity.pooling != "none",
                identity=identity.id,
                num_prefix=identity.prefix_tokens,
                native_grid=identity.native_grid,
            )
            for encoder, identity in identities.items()
        }
        clips, wanted = store.committed, dict.fromkeys([*self._keys.values(), *map(store.encoder_key, clips_with)])
        has_all = np.logical_and.reduce([clips[key].to_numpy(zero_copy_only=False) for key in wanted])
        self._available = set(clips["clip_id"].filter(pa.array(has_all)).to_pylist())
        rules = [identity.frame_rule for identity in identities.values()]
        self._windows = ShownWindows(clips["clip_id"].to_pylist(), rules, max_windows)
        self.has_windows = self._windows.exist

    @cached_property
    def facts(self) -> dict[str, dict[str, Any]]:
        """Read when the run's record is written: checks are journals, which are listed."""
        labels, checks = self._store.info()["groups"], read_parity(self._store)
        identities = {encoder: self._store.encoders[key] for encoder, key in self._keys.items()}
        return {
            encoder: {
                "weights": labels[identity.group_name]["weights"],
                "identity": identity.to_dict(),
                "parity": checks[self._keys[encoder]],
            }
            for encoder, identity in identities.items()
        }

    def fetch(self, clip_ids: Sequence[str]) -> dict[str, ClipTokens]:
        return {encoder: self._read(clip_ids, encoder) for encoder in self.shapes}

    def windows(self, clip_id: str) -> tuple[str, ...]:
        return tuple(window for window in self._windows.of(clip_id) if window in self._available)

    def available(self, clip_ids: Iterable[str]) -> set[str]:
        if not self.has_windows:
            return self._available.intersection(clip_ids)
        return {clip_id for clip_id in clip_ids if self.windows(clip_id)}

    def stills(self, clip_ids: Iterable[str]) -> set[str]:
        clips = self._store.committed
        return set(clips.filter(pc.equal(clips["kind"], "image"))["clip_id"].to_pylist()).intersection(clip_ids)

    def data_digest(self, clip_ids: Iterable[str], samples: Iterable[Sample]) -> str:
        shown = {window for clip_id in clip_ids for window in self.windows(clip_id)} if self.has_windows else clip_ids
        return self._store.data_digest(shown, list(self._keys.values()), samples)

    def media_sha256(self) -> dict[str, str]:
        """Available clip -> sha256 of its media, where receipts record the same for every encoder."""
        media = [self._store.media_sha256(encoder=key) for key in self._keys.values()]
        return {
            clip_id: sha256
            for clip_id, sha256 in media[0].items()
            if clip_id in self._available and all(other.get(clip_id) == sha256 for other in media)
        }

    def listed(self) -> list[Clip]:
        """The available clips, with their paths and spans."""
        names = ("clip_id", "dataset", "path", "kind", "start_s", "end_s", "end_frame")
        rows = self._store.clips.select(names).to_pylist()
        return [Clip(**row) for row in rows if row.pop("clip_id") in self._available]

    def _read(self, clip_ids: Sequence[str], encoder: str) -> ClipTokens:
        key = self._keys[encoder]
        if "prefix" not in self._parts:
            return torch.from_numpy(self._store.read(clip_ids, encoder=key))
        has_grid = "tokens" in self._parts
        tokens_BTHWD = torch.from_numpy(self._store.read(clip_ids, encoder=key)) if has_grid else None
        prefix_BTKD = torch.from_numpy(self._store.read_prefix(clip_ids, encoder=key))
        return PrefixedTokens(tokens_BTHWD=tokens_BTHWD, prefix_BTKD=prefix_BTKD)


class MemoryTokens(TokenSource):
    """Tokens held in memory."""

    def __init__(
        self,
        clip_ids: Sequence[str],
        tokens: Mapping[str, Tensor],
        *,
        prefix: Mapping[str, Tensor] = MappingProxyType({}),
        is_pooled: bool = True,
    ) -> None:
        """encoder -> tokens_BTHWD, B in the order of `clip_ids`, and prefix_BTKD of those that have prefix tokens."""
        for encoder, tokens_BTHWD in tokens.items():
            if tokens_BTHWD.ndim != 5 or len(tokens_BTHWD) != len(clip_ids):
                raise UserError(
                    f"tokens of {encoder} must have shape [{len(clip_ids)}, T, H, W, D], got {list(tokens_BTHWD.shape)}"
                )
        for encoder, prefix_BTKD in prefix.items():
            batch, time, _, _, width = tokens[encoder].shape
            if prefix_BTKD.ndim != 4 or (*prefix_BTKD.shape[:2], prefix_BTKD.shape[3]) != (batch, time, width):
                raise UserError(
                    f"prefix tokens of {encoder} must have shape [{batch}, {time}, K, {width}],"
                    f" got {list(prefix_BTKD.shape)}"
                )
        self._rows = {clip_id: row for row, clip_id in enumerate(clip_ids)}
        self._tokens, self._prefix = dict(tokens), dict(prefix)
        self.shapes = {
            encoder: TokenShape(
                grid=cast("tuple[int, int, int]", tuple(tokens_BTHWD.shape[1:4])),
                width=tokens_BTHWD.shape[4],
                is_pooled=is_pooled,
                identity=f"memory:{encoder}",
                num_prefix=prefix[encoder].shape[2] if encoder in prefix else 0,
            )
            for encoder, tokens_BTHWD in tokens.items()
        }

    def fetch(self, clip_ids: Sequence[str]) -> dict[str, ClipTokens]:
        rows = torch.tensor([self._rows[clip_id] for clip_id in clip_ids])
        found: dict[str, ClipTokens] = {encoder: values[rows] for encoder, values in self._tokens.items()}
        for encoder, prefix_BTKD in self._prefix.items():
            found[encoder] = PrefixedTokens(tokens_BTHWD=self._tokens[encoder][rows], prefix_BTKD=prefix_BTKD[rows])
        return found

    def available(self, clip_ids: Iterable[str]) -> set[str]:
        return {clip_id for clip_id in clip_ids if clip_id in self._rows}

    def data_digest(self, clip_ids: Iterable[str], samples: Iterable[Sample]) -> str:
        state = hashlib.sha256()
        for clip_id in sorted(set(clip_ids)):
            state.update(clip_id.encode())
            for encoder, held in [*sorted(self._tokens.items()), *sorted(self._prefix.items())]:
                values = held[self._rows[clip_id]].contiguous().view(torch.uint8)
                state.update(encoder.encode() + values.numpy().tobytes())
        for digest in sorted(sample.digest for sample in samples):
            state.update(digest.encode())
        return state.hexdigest()
