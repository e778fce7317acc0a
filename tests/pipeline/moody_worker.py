"""A decode process whose decoder hangs or crashes on some clips: those named hang.mp4 and crash.mp4."""

import signal
import time

from pipeline.decode import worker
from pipeline.decode.decoders import DECODERS

exact = DECODERS["frames/1"]


def moody(source, collector, *, accept_damaged):
    if source.path.endswith("hang.mp4"):
        time.sleep(600)
    if source.path.endswith("crash.mp4"):
        signal.raise_signal(signal.SIGSEGV)
    return exact(source, collector, accept_damaged=accept_damaged)


DECODERS["frames/1"] = moody

if __name__ == "__main__":
    worker.main()
