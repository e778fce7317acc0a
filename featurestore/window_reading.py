"""Reading a video's windows by the video's id: the part of `FeatureStore` for stores of windows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from featurestore.identity import FeatureIdentity
from featurestore.pooling import FloatDtype
from featurestore.reader import Frames
from featurestore.schemas import windows_to_table
from featurestore.windows import WindowIndexes, spread_windows
from mervcache.errors import ClipUnavailableError


class WindowReading:
    """What a store of windows offers beside its clips."""

    @property
    @abstractmethod
    def encoders(self) -> Mapping[str, FeatureIdentity]: ...

    @property
    @abstractmethod
    def committed(self) -> pa.Table: ...

    @abstractmethod
    def read(self, clip_ids: Sequence[str], *, encoder: str, **options: Any) -> np.ndarray: ...

    @abstractmethod
    def _key(self, encoder: str) -> str: ...

    @cached_property
    def _windows(self) -> WindowIndexes:
        return WindowIndexes(self.committed["clip_id"].to_pylist)

    @cached_property
    def _with_tokens(self) -> dict[str, set[str]]:
        return {}  # by encoder key, as far as it was needed

    def windows(self, clip_id: str, *, encoder: str) -> pa.Table:
        """`WINDOW_SCHEMA`: the windows of a video, in their order; `clip_id` is that of the video or of a span of it.

        Empty where the store has none of it; UserError for an encoder whose tokens are of whole clips.
        """
        key = self._key(encoder)
        found = self._windows.of(key, self.encoders[key].frame_rule).windows(clip_id)
        if key not in self._with_tokens:
            committed = self.committed
            self._with_tokens[key] = set(committed["clip_id"].filter(committed[key]).to_pylist())
        return windows_to_table(found, [window in self._with_tokens[key] for window in found.values()])

    def read_windows(
        self,
        clip_id: str,
        *,
        encoder: str,
        limit: int | None = None,
        skip_failed: bool = False,
        frames: Frames = None,
        dtype: FloatDtype | None = None,
    ) -> np.ndarray:
        """Tokens of a video's windows as floats [windows, T, H, W, D], in their order; `frames`, `dtype` as in `read`.

        Of more than `limit` windows, so many spread evenly over the video. Windows without tokens are left out with
        `skip_failed`; else they are a ClipUnavailableError, as is a video that has no windows here.
        """
        windows = self.windows(clip_id, encoder=encoder)
        if not windows.num_rows:
            raise ClipUnavailableError(f"the store has no windows of {clip_id!r}; see store.clips for its clips")
        chosen = spread_windows(windows["clip_id"].to_pylist(), limit)
        if skip_failed:
            has_tokens = set(windows.filter(windows["has_tokens"])["clip_id"].to_pylist())
            chosen = [window for window in chosen if window in has_tokens]
        return self.read(chosen, encoder=encoder, frames=frames, dtype=dtype)
