"""Packets: what a file says of its frames before any is decoded.

Comes in: an open video. Goes out: a `PacketIndex`, every packet's times and flags in decode order, and the arithmetic
on it: which frame is number n, and from which keyframe it is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import av

from pipeline.decode.container import OpenVideo, reason


class UntrustedIndexError(Exception):
    """The packets do not tell which frames are shown when; decode in order instead."""


@dataclass(frozen=True)
class PacketIndex:
    """Every packet of the video stream, in decode order."""

    pts: tuple[int | None, ...]
    dts: tuple[int | None, ...]
    is_key: tuple[bool, ...]
    is_shown: tuple[bool, ...]  # False: hidden by an edit list, decoded only as a reference
    damage: str | None  # why reading stopped early or is not to be believed

    @cached_property
    def position(self) -> dict[int, int]:
        """Presentation time -> position in decode order."""
        return {time: i for i, time in enumerate(self.pts)}

    @cached_property
    def shown(self) -> list[int]:
        """Positions of the shown frames in presentation order: frame number -> position."""
        return sorted((i for i, shown in enumerate(self.is_shown) if shown), key=self.pts.__getitem__)

    def check_trust(self) -> None:
        """Raise where frames cannot be found by presentation time."""
        if None in self.pts or len(self.position) != len(self.pts):
            raise UntrustedIndexError("missing or repeated presentation times")
        if not self.is_key or not self.is_key[0]:
            raise UntrustedIndexError("stream does not begin with a keyframe")

    def segments(self, wanted: list[int]) -> list[tuple[int, int]]:
        """Stretches of packets (first, last) to decode for the wanted positions; each begins with a keyframe."""
        stretches: list[tuple[int, int]] = []
        for position in sorted(wanted):
            key = self._keyframe_for(position)
            while stretches and key <= stretches[-1][1]:  # leading frames of an open group begin before its keyframe
                key = min(key, stretches.pop()[0])
            stretches.append((key, position))
        return stretches

    def _keyframe_for(self, position: int) -> int:
        """The last keyframe before `position` in decode order that is shown no later than it."""
        for i in range(position, -1, -1):
            if self.is_key[i] and self.pts[i] <= self.pts[position]:
                return i
        raise UntrustedIndexError("frame is shown before the first keyframe")


def scan_packets(video: OpenVideo) -> PacketIndex:
    """Read every packet's times and flags, up to the end or to where the file breaks."""
    rows: list[tuple] = []
    damage = None
    try:
        for packet in video.packets():
            if packet.size == 0 and packet.dts is None:
                continue  # the mark for the end of the stream, not a packet of the file
            if packet.is_corrupt:
                damage = "a packet is corrupt"
            rows.append((packet.pts, packet.dts, packet.is_keyframe, not packet.is_discard))
    except av.error.FFmpegError as error:
        damage = reason(error)
    pts, dts, is_key, is_shown = zip(*rows, strict=True) if rows else ((), (), (), ())
    return PacketIndex(pts, dts, is_key, is_shown, damage)
