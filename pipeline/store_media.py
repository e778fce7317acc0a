"""The media of a store's clips, where they are still there: properties and pictures of clips."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from featurestore.store import FeatureStore
from featurestore.token_maps import principal_maps
from mervcache.errors import MediaError
from pipeline.decode.pool import DecodePool, decode_ahead
from pipeline.decode.sampling import DecodeJob
from pipeline.media import Root
from pipeline.properties import DEFINITIONS, LUMA, SIDE, ClipProperties, clip_of, properties_of, root_of
from pipeline.report import png_url, thumbnails
from pipeline.summary import media_roots
from pipeline.views import BASE_FRAMES, ResizeRule, View

MAX_PROCESSES = 8


@dataclass(frozen=True, kw_only=True)
class ClipPictures:
    """Pictures of one clip, spread over its time, as data URLs; frames, or maps of tokens where there are no media."""

    urls: list[str]
    are_frames: bool


class StoreMedia:
    """Media of the clips of a store, under `root` or where the extractions that wrote it found them."""

    definitions = DEFINITIONS  # property -> how it is measured

    def __init__(self, store: FeatureStore, root: str | None = None) -> None:
        self._store, self._roots = store, media_roots(store.runs(), root)
        self._rows = {row["clip_id"]: row for row in store.clips.to_pylist()}

    def reachable(self, clip_ids: Iterable[str]) -> list[str]:
        """The clips of datasets whose folder of media is known and there."""
        folders: dict[str, bool] = {}
        found = []
        for clip_id in clip_ids:
            row = self._rows[clip_id]
            if row["dataset"] not in folders:
                folders[row["dataset"]] = root_of(row, self._roots) is not None
            if folders[row["dataset"]]:
                found.append(clip_id)
        return found

    def measure(self, clip_ids: Sequence[str]) -> Iterator[tuple[str, ClipProperties | str]]:
        """(clip id, properties or why there are none) of reachable clips, in their order.

        Clips are decoded in processes that can be killed.
        """
        view = View(rule=ResizeRule(size=SIDE), num_frames=BASE_FRAMES)
        rows = [self._rows[clip_id] for clip_id in clip_ids]
        jobs = (
            (place, DecodeJob(root=cast("Root", root_of(row, self._roots)), clip=clip_of(row), views=(view,)))
            for place, row in enumerate(rows)
        )
        processes = min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
        with DecodePool(processes) as pool:
            for place, decoded in decode_ahead(jobs, pool, 2 * processes):
                if isinstance(decoded, MediaError):
                    yield clip_ids[place], str(decoded)
                    continue
                luma_TSS = decoded.frames[view].astype(np.float32) @ LUMA
                yield clip_ids[place], properties_of(luma_TSS, clip_of(rows[place]), decoded.num_frames, decoded.fps)

    def pictures(self, clip_ids: Sequence[str], *, encoder: str, count: int) -> dict[str, ClipPictures]:
        """`count` pictures of every video, one of every still: frames, or maps of the encoder's tokens.

        Colours of maps are comparable between the clips of one call.
        """
        found, gone = {}, []
        for clip_id in clip_ids:
            frames = thumbnails(self._rows[clip_id], self._roots)
            if frames is None:
                gone.append(clip_id)
            else:
                found[clip_id] = ClipPictures(urls=_spread(frames, count), are_frames=True)
        if gone:
            maps_BTHWC = principal_maps(self._store.read(gone, encoder=encoder))
            for clip_id, maps_THWC in zip(gone, maps_BTHWC, strict=True):
                is_video = self._rows[clip_id]["kind"] == "video"
                shown = maps_THWC if is_video else maps_THWC[:1]
                found[clip_id] = ClipPictures(urls=_spread(shown, count), are_frames=False)
        return {clip_id: found[clip_id] for clip_id in clip_ids}


def _spread(pictures_THWC: np.ndarray, count: int) -> list[str]:
    """`count` of the pictures, evenly spaced, or all of fewer."""
    places = np.arange(min(count, len(pictures_THWC))) * len(pictures_THWC) // min(count, len(pictures_THWC))
    return [png_url(pictures_THWC[place]) for place in places]
