"""Live tokens: a token source that makes what it is asked for, as a store's source reads it.

Comes in: encoders and a way to decode, both from `end_to_end.py`, which alone knows the pipeline. Goes out: tokens with
the bits of stored ones: in the fixed batch shape of each kind, through the storage dtype and back, a still's period
repeated. Decoding runs ahead of the encoders, for the clips that the batches say come next.

B clips, T time, H W height width, C colours, K prefix tokens, D encoder width.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from featurestore import FeatureIdentity, Sample
from featurestore.clips import Clip
from featurestore.storage_dtypes import OverflowedTokens, from_stored, to_stored
from mervcache.errors import MediaError, UserError
from trainer.data.tokens import ClipTokens, Part, PrefixedTokens, TokenShape, TokenSource
from trainer.live.ahead import Ahead
from trainer.live.media_check import MediaCheck

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
            hint = "; without --trust-media such clips are found and left out before the first step"
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
            " set storage_dtype: bfloat16 in --extract-config"
        ) from error
    logical_dtype = "bfloat16" if identity.storage_dtype == "bfloat16" else None
    affine = {name: stored[name] for name in ("scale", "offset") if name in stored}
    return {
        part: repeated(from_stored(stored[part], logical_dtype=logical_dtype, **affine), identity.grid[0])
        for part in arrays
    }


def repeated(values_T: np.ndarray, time: int) -> np.ndarray:
    """One period of a still -> all time steps."""
    return values_T if len(values_T) == time else values_T[np.arange(time) % len(values_T)]


def chosen(tokens: Tensor, prefix: Tensor | None = None, *, parts: Sequence[Part]) -> ClipTokens:
    """tokens_BTHWD and prefix_BTKD as a resampler that reads `parts` wants them."""
    if "prefix" not in parts:
        return tokens
    return PrefixedTokens(tokens_BTHWD=tokens if "tokens" in parts else None, prefix_BTKD=prefix)
