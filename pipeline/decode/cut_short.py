"""Files that end before they say: a download or copy that broke off.

An MP4 that is cut off lacks samples that its tables name, and FFmpeg reports it. Matroska and AVI are read up to the
last byte and given as a shorter video, without a word; but both declare their length in the first bytes.
"""

from __future__ import annotations

import os
from typing import BinaryIO

EBML_ID, SEGMENT_ID = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
MAX_EBML_HEADER_BYTES = 4096  # real ones have 40; where the segment is not found behind it, nothing is claimed


def ends_early(file: BinaryIO) -> bool:
    """True where a Matroska, WebM or RIFF file declares more bytes than there are."""
    present = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(MAX_EBML_HEADER_BYTES)
    declared = {EBML_ID: _matroska_bytes, b"RIFF": _riff_bytes}.get(head[:4], lambda _: None)(head)
    return declared is not None and declared > present


def _matroska_bytes(head: bytes) -> int | None:
    """End of the segment that follows the EBML header; None if it was written live, without a size."""
    size, start = _ebml_size(head, len(EBML_ID))
    if size is None or head[start + size : start + size + 4] != SEGMENT_ID:
        return None
    segment, begin = _ebml_size(head, start + size + len(SEGMENT_ID))
    return None if segment is None else begin + segment


def _ebml_size(head: bytes, at: int) -> tuple[int | None, int]:
    """(size, where the content begins) of an EBML element; the leading zero bits of a size count its further bytes."""
    if at >= len(head) or head[at] == 0:
        return None, at
    length = 9 - head[at].bit_length()
    value = int.from_bytes(head[at : at + length]) & ((1 << 7 * length) - 1)
    unknown = value == (1 << 7 * length) - 1
    return (None if unknown else value), at + length


def _riff_bytes(head: bytes) -> int | None:
    """End of the first RIFF chunk; 0 and all ones are left by recorders that never closed the file."""
    size = int.from_bytes(head[4:8], "little")
    return None if size in (0, 0xFFFFFFFF) else 8 + size
