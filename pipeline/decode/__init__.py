"""Decoding: one pass over a clip's media gives the small uint8 frames of every view.

    job           what is asked and what comes back
    indices       which frames of the clip are sampled
    resize        one native frame -> one small frame
    collector     native frames, one at a time -> the arrays of all views
    source        a clip's bytes and their digest; cut_short: files that end before they say
    container     a video file opened with guards, frames to RGB
    packets       what a file says of its frames before any is decoded
    packet_index  the default reader: exact frames by presentation time; in_order: where times cannot be trusted
    stills        images, GIFs, folders of frames
    decoders      the readers by name, and `decode_clip`, which runs one
    worker, pool  the same in killable child processes

Nothing here imports torch: a decode process starts in 0.2 s and is replaced as quickly.
"""
