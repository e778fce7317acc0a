"""What a worker of the simulation has in the place of a GPU: encoders whose forwards are times on a device's clock.

`install` puts such an engine where `compute_block` finds it; everything else of the worker is the real code. Costs of
the host's own work are charged where it is done, on a core of the simulated host (`simulated_decoder.Cores`).
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pipeline.decode.worker as decode_worker
from benchmarks.simulated_decoder import Cores
from featurestore import group_writer
from featurestore.shards import Shard
from pipeline.config import EncoderSettings, EngineSettings
from pipeline.decode.pool import DecodePool
from pipeline.worker import engine as engines
from pipeline.worker.block import BlockTask
from pipeline.worker.encode import EncodedBatch, fill_slots
from pipeline.worker.reports import BlockReport
from pipeline.worker.stages import Stages

# Assumed, of an H100: GPU milliseconds per video in a batch of 8, bfloat16 (published throughputs); a still costs the
# share of a video's frames that the encoder computes of it.
GPU_MS = {
    "video": {"languagebind": 7.9, "dinov2": 5.8, "vivit": 2.1, "siglip": 1.2},
    "image": {"languagebind": 7.9 / 2, "dinov2": 5.8 / 16, "vivit": 2.1, "siglip": 1.2 / 16},
}
DECODE_S = {"video": 0.316, "image": 0.015}  # assumed, core seconds; of a video: the mean over videollava_mini
LAUNCH_S = 0.008  # assumed, of the encoding thread per forward: some 400 kernel launches
LINK_BYTES_PER_S = 25e9  # assumed, pinned copies over PCIe, each direction
WIDTHS = {"languagebind": 1024, "dinov2": 1024, "vivit": 768, "siglip": 768}
NARROWED = 64  # tokens that are really written are so much narrower; host work is charged for the full width


@dataclass(frozen=True, kw_only=True)
class HostCosts:
    """Core seconds per byte of stored tokens, uncompressed; measured on this machine."""

    compress: float
    digest: float
    write: float
    read_back: float  # with both hashes


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker simulates."""

    fifo: str
    dilation: float
    encoders: tuple[str, ...]
    kind: str
    decoders: int
    cores: int
    decode_s: float
    costs: HostCosts


class Host:
    """Charges work to the cores, by what it is."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._local = setup, threading.local()
        self.seconds: Counter[str] = Counter()
        self._lock = threading.Lock()

    def charge(self, what: str, seconds: float) -> None:
        with self._lock:
            self.seconds[what] += seconds
        if not hasattr(self._local, "cores"):
            self._local.cores = Cores(self._setup.fifo, self._setup.dilation)
        self._local.cores.hold(seconds)

    def charged(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function; what it really costs the processor is charged."""

        def run(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.charge(what, time.thread_time() - began)

        return run


@dataclass
class Device:
    """Clocks of a device: two copy streams and one that computes; times are real, dilated seconds."""

    dilation: float
    free: dict[str, float] = field(default_factory=dict)  # stream -> when it is free
    forwards: list[tuple[float, float]] = field(default_factory=list)  # begin and end of each

    def run(self, stream: str, seconds: float, after: float = 0.0) -> float:
        """Run something on a stream, not before `after`; returns when it ends."""
        began = max(time.monotonic(), after, self.free.get(stream, 0.0))
        end = self.free[stream] = began + seconds * self.dilation
        if stream == "compute":
            self.forwards.append((began, end))
        return end


@dataclass
class Pending:
    """Tokens on their way to the host."""

    arrays: Mapping[str, np.ndarray]
    computed: float
    copied: float
    seconds: float
    halvings: int = 0

    def is_done(self) -> bool:
        return time.monotonic() >= self.computed

    def wait(self, storage_dtype: str) -> EncodedBatch:
        time.sleep(max(0.0, self.copied - time.monotonic()))
        checks = {"tokens": np.ones((len(self.arrays["tokens"]), 2), dtype=bool)}
        return EncodedBatch(
            storage_dtype=storage_dtype, arrays=self.arrays, checks=checks, seconds=self.seconds, halvings=0
        )


class SimulatedStaging:
    """Frames are copied into a pinned buffer for real; the copy to the device takes its time on the device's clock."""

    def __init__(self, device: Device, host: Host) -> None:
        self._device, self._fill = device, host.charged("staging", fill_slots)
        self._buffers: dict[Any, np.ndarray] = {}  # pinned memory is kept

    def upload(self, frames_by_row: Mapping[int, np.ndarray], slots: Sequence[int | None]) -> torch.Tensor:
        shape = (len(slots), *next(iter(frames_by_row.values())).shape)
        buffer = self._buffers.setdefault(shape, np.empty(shape, np.uint8))
        batch = torch.from_numpy(self._fill(frames_by_row, slots, buffer))
        batch.uploaded = self._device.run("upload", buffer.nbytes / LINK_BYTES_PER_S)
        return batch


class SimulatedEncoder:
    """A forward is a time on the device's clock."""

    def __init__(self, name: str, setup: Setup, device: Device, host: Host) -> None:
        self.name, self.setup, self._device, self._host = name, setup, device, host
        self.settings = encoder_settings(name)
        self.identity = self.settings.identity("0" * 64)
        self.view = self.settings.spec.view
        self._row = np.ones((*self.identity.grid_of(setup.kind), self.identity.width), np.float16)
        self._ms = GPU_MS[setup.kind][name]

    def launch(self, frames_BTHWC: torch.Tensor, staging: SimulatedStaging) -> Pending:
        self._host.charge("launch", LAUNCH_S)
        clips = len(frames_BTHWC)
        seconds = clips * self._ms / 1000
        computed = self._device.run("compute", seconds, after=frames_BTHWC.uploaded)
        num_bytes = clips * self._row.nbytes * NARROWED
        copied = self._device.run("download", num_bytes / LINK_BYTES_PER_S, after=computed)
        return Pending({"tokens": np.broadcast_to(self._row, (clips, *self._row.shape))}, computed, copied, seconds)


class SimulatedEngine(engines.Engine):
    """The engine of a worker, with a simulated device and decode processes that sleep."""

    def __init__(self, setup: Setup, settings: EngineSettings) -> None:
        self.settings, self.device = settings, "cuda"
        self.host, self.clock = Host(setup), Device(setup.dilation)
        self.encoders = {name: SimulatedEncoder(name, setup, self.clock, self.host) for name in setup.encoders}
        self.forwards = tuple((name,) for name in self.encoders)
        self.cores = setup.cores
        self.num_decoders = setup.decoders
        script = Path(__file__).with_name("simulated_decoder.py")
        times = (setup.fifo, str(setup.dilation), str(setup.decode_s))
        command = (sys.executable, "-S", "-E", str(script), *times)
        self.pool = DecodePool(setup.decoders, timeout_s=36_000.0, memory_bytes=0, worker_command=command)
        self.staging = SimulatedStaging(self.clock, self.host)
        self.stages = Stages(
            num_encoders=len(self.encoders), num_decoders=setup.decoders, num_compressors=setup.cores, threads=1
        )
        self.cpu_s = time.process_time()


def encoder_settings(name: str) -> EncoderSettings:
    sizes = {"hidden_size": WIDTHS[name] // NARROWED, "num_heads": 1}
    return EncoderSettings(name=name, weights="random:0", architecture=sizes)


def install(setup: Setup, settings: EngineSettings) -> None:
    """Make this process's engine a simulated one, and charge the work of its writers and of its pipes."""
    engines.close_engines()
    engine = SimulatedEngine(setup, settings)
    engines._engines[engines.engine_key(settings)] = engine
    charge_host_work(engine.host, setup.costs)


_REAL = {
    "receive": decode_worker.receive,
    "encode_row": group_writer.encode_row,
    "row_digest": group_writer.row_digest,
    "build_shard": group_writer.build_shard,
    "record": Shard.record,
}


def charge_host_work(host: Host, costs: HostCosts) -> None:
    """Charge compressing, digests, writing and reading back for tokens of full width."""

    def full_bytes(items: int) -> int:
        return 2 * items * NARROWED

    def encode_row(spec, row):
        host.charge("compress", costs.compress * full_bytes(row.size))
        return _REAL["encode_row"](spec, row)

    def row_digest(stored):
        host.charge("digest", costs.digest * full_bytes(stored["tokens"].size))
        return _REAL["row_digest"](stored)

    def build_shard(spec, chunks):
        host.charge("write", costs.write * full_bytes(len(chunks) * math.prod(spec.row_shape)))
        return _REAL["build_shard"](spec, chunks)

    def record(self):
        host.charge("read back", costs.read_back * full_bytes(len(self.rows()) * math.prod(self.spec.row_shape)))
        return _REAL["record"](self)

    group_writer.encode_row, group_writer.row_digest = encode_row, row_digest
    group_writer.build_shard, Shard.record = build_shard, record
    decode_worker.receive = host.charged("pipe", _REAL["receive"])


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a worker's engine did, in real seconds of one clock per host."""

    forwards: list[tuple[float, float]]
    charged: dict[str, float]
    python_s: float  # processor time of the worker process, all threads
    reports: list[BlockReport]


_reports: list[BlockReport] = []


def compute(task: BlockTask) -> BlockReport:
    """What a worker does for one block."""
    from pipeline.worker.isolate import compute_block

    report = compute_block(task)
    _reports.append(report)
    return report


def look(settings: EngineSettings) -> Seen:
    """What this worker did since `install`."""
    engine = engines.engine_for(settings)
    seen = Seen(
        forwards=engine.clock.forwards,
        charged=dict(engine.host.seconds),
        python_s=time.process_time() - engine.cpu_s,
        reports=list(_reports),
    )
    _reports.clear()
    return seen
