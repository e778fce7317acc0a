"""A decode process of the simulation: holds a core for the time of decoding, then sends frames of full size.

    python simulated_decoder.py CORES_FIFO DILATION DECODE_S

It speaks the message format of `pipeline/decode/worker.py` and imports nothing of the project, so that two hundred of
them start in seconds. Sending is real; its processor time is charged to a core as well.
"""

import json
import os
import struct
import sys
import time
import zlib

LENGTHS = struct.Struct(">II")
QUANTUM_S = 0.1  # after which a core goes to who waits for it; long beside what it takes this machine to wake a process


class Cores:
    """The cores of a host, as tokens in a named pipe that all its processes share."""

    def __init__(self, fifo: str, dilation: float) -> None:
        self._pipe, self._dilation = os.open(fifo, os.O_RDWR), dilation
        self._ahead = 0.0  # seconds that were held too long before

    def hold(self, seconds: float) -> None:
        """Hold a core for so many simulated seconds, in quanta."""
        left = seconds - self._ahead
        while left > 0:
            os.read(self._pipe, 1)
            began = time.monotonic()
            time.sleep(min(QUANTUM_S, left) * self._dilation)
            left -= (time.monotonic() - began) / self._dilation
            os.write(self._pipe, b".")
        self._ahead = -left


def read_exactly(count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = os.read(0, count - len(data))
        if not part:
            sys.exit(0)
        data += part
    return data


def send(header: dict, body: memoryview) -> None:
    text = json.dumps(header).encode()
    for part in (memoryview(LENGTHS.pack(len(text), len(body)) + text), body):
        while part:
            part = part[os.write(1, part) :]


def spread(path: str) -> float:
    """Between 0.5 and 1.5, 1 in the mean: with equal times all decoders would deliver at once, batch after batch."""
    return 0.5 + zlib.crc32(path.encode()) / 2**32


def main() -> None:
    cores, decode_s = Cores(sys.argv[1], float(sys.argv[2])), float(sys.argv[3])
    send({"ready": os.getpid()}, memoryview(b""))
    frames, last_send_s = memoryview(b""), 0.0
    while True:
        header_bytes, body_bytes = LENGTHS.unpack(read_exactly(LENGTHS.size))
        job = json.loads(read_exactly(header_bytes))["job"]
        read_exactly(body_bytes)
        is_video = job["clip"]["kind"] == "video"
        shapes = [
            [view["num_frames"] if is_video else 1, view["rule"]["size"], view["rule"]["size"], 3]
            for view in job["views"]
        ]
        num_bytes = sum(shape[0] * shape[1] * shape[2] * shape[3] for shape in shapes)
        if len(frames) != num_bytes:
            frames = memoryview(bytes(num_bytes))
        this_s = decode_s * spread(job["clip"]["path"])
        cores.hold(this_s)
        decoded = {"media_sha256": "0" * 64, "decoder": "frames/1", "num_frames": 300, "fps": 30.0}
        began = time.process_time()
        send({"decoded": decoded | {"seconds": this_s + last_send_s}, "shapes": shapes}, frames)
        last_send_s = time.process_time() - began
        cores.hold(last_send_s)


if __name__ == "__main__":
    main()
