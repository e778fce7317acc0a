"""The explorer: a page over the clips of a store, served on this machine or written to a folder."""

from pipeline.explorer.content import Explorer
from pipeline.explorer.server import serve, write_site

__all__ = ["Explorer", "serve", "write_site"]
