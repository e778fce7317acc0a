"""What this project calls of numcodecs.blosc, which has no types of its own."""

import numpy as np

SHUFFLE: int
use_threads: bool | None

def compress(source: np.ndarray, cname: bytes, clevel: int, shuffle: int = ..., blocksize: int = ...) -> bytes: ...
def decompress(source: np.ndarray, dest: np.ndarray | None = None) -> np.ndarray: ...
