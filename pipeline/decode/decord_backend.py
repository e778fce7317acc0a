"""The reader "decord": for parity with published work, by name only.

decord counts hidden pre-roll frames of cut clips and returns wrong frames, without an error, for HEVC and MPEG-4 with
B-frames, open groups of pictures, AVI, TS and PS; on some files it never returns. The maintained fork (decord2, same
import) is what is tested. Indices, resizing and everything after are those of every other reader.
"""

from __future__ import annotations

from contextlib import nullcontext

from mervcache.errors import MediaError, UserError
from pipeline.decode.collector import FrameCollector
from pipeline.decode.container import open_video
from pipeline.decode.job import Reading
from pipeline.decode.source import Source
from pipeline.media import LocalFile

NAME = "decord"


def read_frames(source: Source, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    """Fill the collector with the frames that decord gives for the wanted indices."""
    try:
        import decord  # optional: 73 MB with its own FFmpeg
    except ImportError as error:
        raise UserError("decoder 'decord' is not installed; pip install 'merv-pipeline[decord]'") from error
    if accept_damaged:
        raise UserError("decoder 'decord' cannot accept damaged files; use --decoder frames/1")
    with open_video(source):
        pass  # the guards: a real video format, of a size that can be held
    decord.logging.set_level(decord.logging.QUIET)
    decord.bridge.set_bridge("native")
    is_local = isinstance(source.media, LocalFile)
    try:
        with nullcontext(str(source.media.path)) if is_local else source.open() as file:  # a file object is read whole
            reader = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1)
        fps = float(reader.get_avg_fps())
        for number in collector.choose(len(reader), fps):
            # get_batch, as in the reference: `reader[number]` seeks anew each time and can give other frames
            collector.add(number, reader.get_batch([number]).asnumpy()[0])
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise MediaError("decord cannot decode the file") from error
    return Reading(num_frames=len(reader), fps=fps, decoder=NAME)
