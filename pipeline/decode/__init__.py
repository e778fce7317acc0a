"""Decoding: one pass over a clip's media gives the small uint8 frames of every view.

`decoders.decode_clip` decodes in this process, `pool.DecodePool` in child processes that can be killed. Nothing here
imports torch: a decode process starts in a fraction of a second and is replaced as quickly.
"""
