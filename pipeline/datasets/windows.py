"""Long videos as windows: every video of a listing becomes clips of equal length, as soon as its own length is known.

Lengths come from the headers of the media, in decode processes that can be killed: media are untrusted. They are kept
for later runs. Samples go on naming the video that they are about; `featurestore.windows` finds its windows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction

from featurestore.clips import Clip
from featurestore.windows import SHORTEST_S, count_windows, window_of
from mervcache.console import SILENT, ProgressLine, plural
from mervcache.errors import MediaError
from pipeline.datasets.base import EXAMPLES_KEPT, DatasetListing, Rejected
from pipeline.decode.pool import DecodePool, decode_ahead
from pipeline.decode.sampling import LengthJob
from pipeline.media import Root, Source
from pipeline.media_cache import MediaCache

LOOKAHEAD = 64  # videos given to the decode processes ahead of their turn
ENDS_AT_FRAME = "a clip that ends at a frame's number has no windows in seconds"


def in_windows(
    listing: DatasetListing, length: Fraction, *, processes: int, timeout_s: float, progress: ProgressLine
) -> DatasetListing:
    """The listing with every video as windows of `length` seconds, in its order; images stay as they are.

    A video whose length cannot be found has one window, which extraction quarantines with the reason. A clip that ends
    at a frame's number is refused and counted. Raises `RunStoppedError` where the media are not there any more.
    """
    videos = [clip for clip in listing.clips if clip.kind == "video" and clip.end_frame is None]
    lengths_s: dict[str, float] = {}
    if videos:
        with DecodePool(min(processes, len(videos)), timeout_s=timeout_s) as pool:
            lengths_s = media_lengths(listing.root, videos, pool, progress)
    clips: dict[str, Clip] = {}
    split: dict[str, tuple[str, ...]] = {}
    refused: list[str] = []
    counts: Counter[str] = Counter()
    for clip in listing.clips:
        media_s = lengths_s.get(clip.path)
        if clip.kind != "video":
            clips[clip.clip_id] = clip
        elif clip.end_frame is not None:
            refused.append(clip.clip_id)
        else:
            number = 1 if media_s is None else count_windows(clip, length, media_s)
            windows = [window_of(clip, length, place) for place in range(number)]
            split[clip.clip_id] = tuple(window.clip_id for window in windows)
            clips.update(zip(split[clip.clip_id], windows, strict=True))
            end_s = media_s if media_s is None or clip.end_s is None else min(media_s, clip.end_s)
            short = end_s is not None and end_s < (windows[-1].start_s or 0.0) + float(length) - SHORTEST_S
            counts.update(videos=1, windows=number, short=int(short), unknown=int(media_s is None))
    dropped = set(refused)
    rejected = dict(listing.rejected)
    if refused:
        rejected[ENDS_AT_FRAME] = Rejected(count=len(refused), examples=tuple(refused[:EXAMPLES_KEPT]))
    return replace(
        listing,
        clips=tuple(clips.values()),
        videos=split,
        samples={name: tuple(s for s in found if s.clip_id not in dropped) for name, found in listing.samples.items()},
        rejected=rejected,
        notes=(*listing.notes, *_notes(counts, length)),
    )


def split_long(root: Root, clips: Iterable[Clip], length: Fraction, pool: DecodePool) -> list[Clip]:
    """The clips, those of videos that are longer than a window as windows; media of unknown length have one."""
    found = list(clips)
    long = [clip for clip in found if clip.kind == "video" and clip.end_frame is None and not _fits(clip, length)]
    lengths_s, is_long = media_lengths(root, long, pool), {clip.clip_id for clip in long}
    split: list[Clip] = []
    for clip in found:
        if clip.clip_id in is_long:
            number = count_windows(clip, length, lengths_s.get(clip.path, 0.0))
            split += [window_of(clip, length, place) for place in range(number)]
        else:
            split.append(clip)
    return split


def _fits(clip: Clip, length: Fraction) -> bool:
    return clip.end_s is not None and clip.end_s - (clip.start_s or 0.0) <= float(length) + SHORTEST_S


def media_lengths(
    root: Root, clips: Iterable[Clip], pool: DecodePool, progress: ProgressLine = SILENT
) -> dict[str, float]:
    """Path -> seconds of the clips' media; without those whose length cannot be found.

    Media that were not touched since an earlier run found their length are not opened.
    """
    of_path = {clip.path: clip for clip in clips}
    progress.start(len(of_path))
    found: dict[str, float] = {}
    unknown: list[Clip] = []
    stamped: dict[str, tuple[Source, str]] = {}  # path -> media and what shows that they were touched
    with MediaCache() as cache:
        for path, clip in of_path.items():
            with suppress(MediaError, OSError):  # the decode process finds the same fault, and reports it
                source = Source.find(root, path)
                stamped[path] = source, cache.stamp(source)
                if (known_s := cache.known_length_s(source)) is not None:
                    found[path] = known_s
                    progress.advance()
                    continue
            unknown.append(clip)
        jobs = ((place, LengthJob(root=root, clip=clip)) for place, clip in enumerate(unknown))
        for place, seconds in decode_ahead(jobs, pool, LOOKAHEAD):
            progress.advance()
            if not isinstance(seconds, MediaError):
                path = unknown[place].path
                found[path] = seconds
                if path in stamped:
                    cache.save_length_s(*stamped[path], seconds)
    return found


def _notes(counts: Counter[str], length: Fraction) -> list[str]:
    if not counts["videos"]:
        return []
    windows = f"{plural(counts['videos'], 'video')} in {plural(counts['windows'], 'window')} of {float(length):g} s"
    notes = [f"{windows}; the last one of {counts['short']} is shorter, and repeats its last frame"]
    if counts["unknown"]:
        notes.append(f"{plural(counts['unknown'], 'video')} of unknown length: one window each, to report why")
    return notes
