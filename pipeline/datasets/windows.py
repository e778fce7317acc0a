"""Long videos as windows: every video of a listing becomes clips of equal length, as soon as its own length is known.

Lengths come from the headers of the media, in decode processes that can be killed: media are untrusted. Samples go on
naming the video that they are about; `featurestore.windows` finds its windows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction

from featurestore.clips import Clip
from featurestore.windows import SHORTEST_S, count_windows, window_of
from mervcache.console import ProgressLine, plural
from mervcache.errors import MediaError
from pipeline.datasets.base import EXAMPLES_KEPT, DatasetListing, Rejected
from pipeline.decode.pool import DecodePool, decode_ahead
from pipeline.decode.sampling import LengthJob
from pipeline.media import Root

ENDS_AT_FRAME = "a clip that ends at a frame's number has no windows in seconds"


def in_windows(
    listing: DatasetListing, length: Fraction, *, processes: int, timeout_s: float, progress: ProgressLine
) -> DatasetListing:
    """The listing with every video as windows of `length` seconds, in its order; images stay as they are.

    A video whose length cannot be found has one window, which extraction quarantines with the reason. A clip that ends
    at a frame's number is refused and counted. Raises `RunStoppedError` where the media are not there any more.
    """
    videos = [clip for clip in listing.clips if clip.kind == "video" and clip.end_frame is None]
    lengths_s = media_lengths(listing.root, videos, processes=processes, timeout_s=timeout_s, progress=progress)
    clips: dict[str, Clip] = {}
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
            clips.update((window.clip_id, window) for window in windows)
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
        videos=frozenset(clip.clip_id for clip in videos),
        samples={name: tuple(s for s in found if s.clip_id not in dropped) for name, found in listing.samples.items()},
        rejected=rejected,
        notes=(*listing.notes, *_notes(counts, length)),
    )


def media_lengths(
    root: Root, clips: list[Clip], *, processes: int, timeout_s: float, progress: ProgressLine
) -> dict[str, float]:
    """Path -> seconds of the clips' media; without those whose length cannot be found."""
    of_path = list({clip.path: clip for clip in clips}.values())
    if not of_path:
        return {}
    progress.start(len(of_path))
    found: dict[str, float] = {}
    with DecodePool(min(processes, len(of_path)), timeout_s=timeout_s) as pool:
        jobs = ((place, LengthJob(root=root, clip=clip)) for place, clip in enumerate(of_path))
        for place, seconds in decode_ahead(jobs, pool, 4 * processes):
            progress.advance()
            if not isinstance(seconds, MediaError):
                found[of_path[place].path] = seconds
    return found


def _notes(counts: Counter[str], length: Fraction) -> list[str]:
    if not counts["videos"]:
        return []
    windows = f"{plural(counts['videos'], 'video')} in {plural(counts['windows'], 'window')} of {float(length):g} s"
    notes = [f"{windows}; the last one of {counts['short']} is shorter, and repeats its last frame"]
    if counts["unknown"]:
        notes.append(f"{plural(counts['unknown'], 'video')} of unknown length: one window each, to report why")
    return notes
