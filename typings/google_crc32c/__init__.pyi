"""What this project calls of google_crc32c, which has no annotations of its own."""

import numpy as np

def value(chunk: bytes | np.ndarray) -> int: ...
