"""The packet index of a video: when each frame is shown, and which packets decode it, found without decoding.

There are two sources. An MP4 or MOV file has a table of its samples, which FFmpeg reads when it opens the file:
`index_from_tables` uses it without reading a packet. `scan_packets` reads every packet, so the whole file, and works
for every format.

The tables are used if all of this holds; otherwise the packets are scanned:

- the file is not fragmented: no `moof` box, no `mvex` in its `moov`. A fragment's samples are known when it is read;
- at most one edit shows media, and FFmpeg's index has exactly one entry per sample, each with bytes of its own and
  its own decode time: an edit list that drops, repeats or moves samples gives another number;
- the composition offsets (`ctts`), which FFmpeg's index does not expose, cover every sample, or there are none;
- presentation times are distinct. They are exact, so a variable frame rate and B-frames make no difference;
- every sample of the video, and the last one of every other stream, lies inside the file.

The tables are a claim: while frames are decoded, the packets that are read are compared with it (`pyav.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import av
import av.error
import numpy as np

from pipeline.decode.container import OpenVideo, reason
from pipeline.decode.joins import count_joins

MAX_MOOV_BYTES, MAX_SAMPLES = 1 << 26, 1 << 22  # 64 MiB of tables, 38 hours at 30 frames per second; else scanned
NO_TIME = -(1 << 63)  # FFmpeg's own value
IS_KEY, IS_HIDDEN = 1, 2  # flags of an index entry: AVINDEX_KEYFRAME, AVINDEX_DISCARD_FRAME
MAX_BOXES = 1000  # at the top level of a file; one that is not fragmented has about five


class UntrustedIndexError(Exception):
    """The index does not show which frames are shown when."""


@dataclass(frozen=True, eq=False)
class PacketIndex:
    """Every packet of the video stream, in decode order; times are in ticks of the stream, NO_TIME where missing."""

    pts: np.ndarray  # int64 [packets], when the packet's frame is shown
    dts: np.ndarray  # int64 [packets], when it is decoded
    is_key: np.ndarray  # bool [packets]
    is_shown: np.ndarray  # bool [packets]; False: hidden by an edit list, decoded only as a reference
    damage: str | None  # why reading stopped early or is not to be believed
    is_joined: bool = False  # a transport stream put together of whole ones: FFmpeg marks a packet at each join

    @cached_property
    def _order(self) -> np.ndarray:
        """Positions in presentation order."""
        return np.argsort(self.pts, kind="stable")

    @cached_property
    def shown(self) -> np.ndarray:
        """Positions of the shown frames in presentation order: frame number -> position."""
        return self._order[self.is_shown[self._order]]

    def check_trust(self) -> None:
        """Raise where frames cannot be found by presentation time."""
        if NO_TIME in self.pts or (np.diff(self.pts[self._order]) == 0).any():
            raise UntrustedIndexError("missing or repeated presentation times")
        if not self.is_key[:1].any():
            raise UntrustedIndexError("stream does not begin with a keyframe")

    def position_of(self, pts: int | None) -> int:
        """Position of the packet that is shown at a time; -1 if there is none."""
        if pts is None:
            return -1
        place = int(np.searchsorted(self.pts, pts, sorter=self._order))
        position = int(self._order[place]) if place < len(self.pts) else -1
        return position if position >= 0 and self.pts[position] == pts else -1

    def segments(self, wanted: Sequence[int]) -> list[tuple[int, int]]:
        """Stretches of packets (first, last) to decode for the wanted positions.

        Each begins with the last keyframe before a wanted position in decode order that is shown no later than it.
        """
        keys = np.flatnonzero(self.is_key)
        stretches: list[tuple[int, int]] = []
        for position in sorted(wanted):
            before = keys[: np.searchsorted(keys, position, side="right")]
            usable = before[self.pts[before] <= self.pts[position]]
            if not len(usable):
                raise UntrustedIndexError("frame is shown before the first keyframe")
            key = int(usable[-1])
            while stretches and key <= stretches[-1][1]:  # leading frames of an open group begin before its keyframe
                key = min(key, stretches.pop()[0])
            stretches.append((key, position))
        return stretches


def scan_packets(video: OpenVideo) -> PacketIndex:
    """Read every packet's times and flags, up to the end or to where the file breaks."""
    rows: list[tuple] = []
    marked: list[int] = []  # positions of packets that FFmpeg takes for corrupt
    damage = None
    try:
        for packet in video.packets():
            if packet.size == 0 and packet.dts is None:
                continue  # the mark for the end of the stream, not a packet of the file
            if packet.is_corrupt:
                marked.append(len(rows))
            times = (NO_TIME if time is None else time for time in (packet.pts, packet.dts))
            rows.append((*times, packet.is_keyframe, not packet.is_discard))
    except av.error.FFmpegError as error:
        damage = reason(error)
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    is_key, is_shown = table[:, 2] > 0, table[:, 3] > 0
    is_joined = bool(marked) and damage is None and _are_joins(video, marked, is_key)
    if marked and not is_joined:
        damage = damage or "a packet is corrupt"
    return PacketIndex(table[:, 0], table[:, 1], is_key, is_shown, damage, is_joined)


def _are_joins(video: OpenVideo, marked: Sequence[int], is_key: np.ndarray) -> bool:
    """Whether every marked packet ends a whole transport stream that another one was joined to."""
    if video.container.format.name != "mpegts" or not all(is_key[i + 1 : i + 3].any() for i in marked):
        return False  # a part begins with a keyframe; FFmpeg marks the last packet before it, or the one before that
    with video.source.open() as file:
        return (count_joins(file, video.stream.id) or 0) >= len(marked)


def read_moov(file: BinaryIO) -> memoryview | None:
    """Content of the `moov` box, the tables of an MP4 or MOV file; None for other formats and fragmented files."""
    end, at, found = file.seek(0, os.SEEK_END), 0, None
    for _ in range(MAX_BOXES):
        if at == end:
            return found
        file.seek(at)
        name, header, size = _box_header(file.read(16), end - at)
        if name == b"moof" or size < header or at + size > end:
            return None
        if name == b"moov":
            if found is not None or size > MAX_MOOV_BYTES:
                return None
            file.seek(at + header)
            found = memoryview(file.read(size - header))
        at += size
    return None


def index_from_tables(video: OpenVideo, moov: memoryview) -> PacketIndex | None:
    """The packet index from the sample tables of an MP4 or MOV file; None where they cannot be trusted."""
    entries = video.stream.index_entries
    offsets = _composition_offsets(moov, video.stream.id, len(entries))
    if offsets is None or len(entries) != video.stream.frames:
        return None
    rows = ((entry.timestamp, entry.flags, entry.pos, entry.size) for entry in entries)
    dts, flags, starts, sizes = np.fromiter(rows, dtype=np.dtype((np.int64, 4)), count=len(entries)).T
    if (sizes < 1).any() or (np.diff(dts) <= 0).any() or (np.diff(np.sort(starts)) == 0).any():
        return None
    others = [stream.index_entries for stream in video.container.streams if stream.index != video.stream.index]
    ends = [int((starts + sizes).max()), *(index[-1].pos + index[-1].size for index in others if len(index))]
    if max(ends) > video.source.num_bytes:
        return None
    pts = dts + offsets + max(0, -int(offsets.min()))  # FFmpeg moves them so that none is shown before it is decoded
    return PacketIndex(pts, dts, flags & IS_KEY > 0, flags & IS_HIDDEN == 0, damage=None)


def _composition_offsets(moov: memoryview, track_id: int, num_samples: int) -> np.ndarray | None:
    """int64 [num_samples]: presentation minus decode time, in ticks of the track; zeros for a track without B-frames.

    None where the structure of the file does not allow its tables to be trusted. ISO/IEC 14496-12: `ctts` (8.6.1.3)
    holds runs of samples with the same offset. Offsets are read as signed, as FFmpeg does for both versions of the box.
    """
    if not 0 < num_samples <= MAX_SAMPLES:
        return None
    tracks = [track for track in _children(moov, b"trak") if _track_id(track) == track_id]
    if _children(moov, b"mvex") or len(tracks) != 1 or _num_shown_edits(tracks[0]) > 1:
        return None
    composition = _children(tracks[0], b"mdia", b"minf", b"stbl", b"ctts")
    if not composition:
        return np.zeros(num_samples, dtype=np.int64)
    num_runs = int.from_bytes(composition[0][4:8])
    table = composition[0][8 : 8 + 8 * num_runs]
    if len(composition) != 1 or len(table) != 8 * num_runs:
        return None
    counts, offsets = np.frombuffer(table, ">u4")[::2].astype(np.int64), np.frombuffer(table, ">i4")[1::2]
    return np.repeat(offsets.astype(np.int64), counts) if counts.sum() == num_samples else None


def _box_header(head: bytes | memoryview, available: int) -> tuple[bytes, int, int]:
    """(name, bytes of the header, bytes of the box); a size of 1 stands for 64 bits to come, 0 for the rest."""
    size, name = int.from_bytes(head[:4]), bytes(head[4:8])
    if size == 1:
        return name, 16, int.from_bytes(head[8:16])
    return name, 8, size or available


def _children(content: memoryview, *path: bytes) -> list[memoryview]:
    """Contents of the boxes along a path of names; what follows a broken box is not read."""
    found, at = [], 0
    while at + 8 <= len(content):
        name, header, size = _box_header(content[at : at + 16], len(content) - at)
        if size < header or at + size > len(content):
            break
        if name == path[0]:
            inside = content[at + header : at + size]
            found += _children(inside, *path[1:]) if path[1:] else [inside]
        at += size
    return found


def _track_id(track: memoryview) -> int | None:
    """`track_ID` of a track's header (8.3.2), behind two times of 4 or 8 bytes."""
    headers = _children(track, b"tkhd")
    if len(headers) != 1 or len(headers[0]) < 24:
        return None
    at = 20 if headers[0][0] == 1 else 12
    return int.from_bytes(headers[0][at : at + 4])


def _num_shown_edits(track: memoryview) -> int:
    """Edits of a track's edit list (8.6.6) that show media: `media_time` is not -1."""
    shown = 0
    for edits in _children(track, b"edts", b"elst"):
        wide = len(edits) > 0 and edits[0] == 1
        size, field = (20, slice(8, 16)) if wide else (12, slice(4, 8))
        entries = [edits[at : at + size] for at in range(8, len(edits) - size + 1, size)]
        shown += sum(int.from_bytes(entry[field], signed=True) != -1 for entry in entries)
    return shown
