"""The engine of a worker: encoders loaded once, decode processes started once, kept between blocks.

The number of clips per forward is measured on the device with the encoders loaded, before a plan fixes the batch shape.
Imported by workers only, because it imports torch and the models.
"""

from __future__ import annotations

import atexit
import gc
import os
import threading
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Protocol

import torch

from featurestore.clips import KINDS, Clip
from featurestore.identity import FeatureIdentity
from jobs.run import TaskReporter
from mervcache.errors import UserError
from pipeline.config import EngineSettings, default_batch
from pipeline.decode.pool import DecodePool
from pipeline.decode.sampling import DecodeJob
from pipeline.media import Root
from pipeline.remote_shards import narrowed
from pipeline.views import View, distinct_views
from pipeline.worker.cores import free_cores, sharing_workers
from pipeline.worker.encode import (
    Staging,
    TokenEncoder,
    encode_batch_together,
    load_network,
    staging_for,
)
from pipeline.worker.forwards import same_forward
from pipeline.worker.reports import EncoderDescription
from pipeline.worker.stages import Stages

OnLoaded = Callable[[str, float], None]  # an encoder's name, and the seconds that loading it took
MIN_COMPRESSORS = 2  # threads that compress; as many as the worker has cores, where those are more
HEADROOM = 0.8  # of the free memory: fragments, other kernels on real frames and other programs need some


class Engine:
    """Frozen encoders and a decode pool, ready for blocks."""

    def __init__(self, settings: EngineSettings, on_loaded: OnLoaded = lambda name, seconds: None) -> None:
        self.settings = settings
        self.device = _check_device(settings.device)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.encoders: dict[str, TokenEncoder] = {}
        for group in same_forward(settings.encoders, compiled=settings.compiled):
            loaded = load_network(group, self.device, compiled=settings.compiled)
            self.encoders |= {each.key: TokenEncoder(each, self.device, loaded=loaded) for each in group}
            on_loaded(group[0].key, loaded.seconds)
        self.encoders = {each.key: self.encoders[each.key] for each in settings.encoders}
        self.cores = free_cores(sharing_workers())  # counted now: workers that start together have all joined
        self.num_decoders = settings.decode_processes or default_decoders(self.device, self.cores)
        self.pool = DecodePool(self.num_decoders, timeout_s=settings.decode_timeout_s)
        self._batches: dict[str, int] = {}

    @cached_property
    def forwards(self) -> tuple[tuple[str, ...], ...]:
        """Keys of the encoders, together where one forward gives the tokens of several."""
        keys: dict[int, tuple[str, ...]] = {}
        for key, run in self.encoders.items():
            keys[id(run.loaded.network)] = (*keys.get(id(run.loaded.network), ()), key)
        return tuple(keys.values())

    @cached_property
    def staging(self) -> Staging:
        """Copies to and from the device."""
        return staging_for(self.device)

    @cached_property
    def stages(self) -> Stages:
        """The threads that encode and compress; started for the first block."""
        return Stages(
            num_encoders=len(self.encoders),
            num_decoders=self.num_decoders,
            num_compressors=max(MIN_COMPRESSORS, self.cores),
            threads=torch.get_num_threads(),
        )

    def batch_of(self, kind: str) -> int:
        """Clips per forward: the device's default, or less where its memory is short.

        All encoders have the same number, because encoders of one batch shape share a block, and each of its clips is
        decoded once for all of them.
        """
        if kind not in self._batches:
            most, meter = default_batch(self.device, kind), MEMORIES.get(self.device.split(":")[0])
            fitting = [most]
            if meter:
                memory = meter(self.device)
                fitting += [clips_that_fit(self._blank(keys, kind), most, memory) for keys in self.forwards]
            self._batches[kind] = min(fitting)
        return self._batches[kind]

    def _blank(self, keys: Sequence[str], kind: str) -> Callable[[int], object]:
        """A function that runs one forward of a given number of black clips, for all of these encoders."""
        runs = {key: self.encoders[key] for key in keys}
        frames = runs[keys[0]].blank_frames
        return lambda clips: dict(encode_batch_together(runs, dict(enumerate(frames(kind, clips))), range(clips)))

    def close(self) -> None:
        self.pool.close()
        if "stages" in vars(self):
            self.stages.close()


class HasView(Protocol):
    """What decoding needs of an encoder, frozen or trained."""

    view: View
    identity: FeatureIdentity


def decode_job(root: Root, clip: Clip, encoders: Collection[HasView], *, accept_damaged: bool = False) -> DecodeJob:
    """The job for the frames that the encoders see of a clip; they must have one decoder, part of their identity."""
    (decoder,) = {encoder.identity.decode for encoder in encoders}
    views = distinct_views(encoder.view for encoder in encoders)
    return DecodeJob(
        root=narrowed(root, [clip.path]), clip=clip, views=views, decoder=decoder, accept_damaged=accept_damaged
    )


_engines: dict[str, Engine] = {}  # one per process in practice: a run has one setting
_CREDENTIALS = ("AWS_", "AZURE_", "GOOGLE_")  # variables that a decode process has from its start
_lock = threading.Lock()


def engine_for(settings: EngineSettings, on_loaded: OnLoaded = lambda name, seconds: None) -> Engine:
    """This process's engine for the settings, made on first use; another run's engine is closed first."""
    with _lock:
        key = engine_key(settings)
        if key not in _engines:
            close_engines()
            _engines[key] = Engine(settings, on_loaded)
        return _engines[key]


def engine_key(settings: EngineSettings) -> str:
    """What one engine serves: settings, and the credentials that its decode processes read buckets with."""
    return repr((settings, sorted(item for item in os.environ.items() if item[0].startswith(_CREDENTIALS))))


def reporting_engine(settings: EngineSettings) -> Engine:
    """`engine_for`, reporting each encoder to the driver as it is loaded: four take over a minute."""
    reporter = TaskReporter(interval_s=0.0)
    return engine_for(settings, lambda name, seconds: reporter.report(lambda: {"loaded": name, "seconds": seconds}))


def close_engines() -> None:
    """Stop the decode processes and forget the models; a device's memory is free for other processes afterwards."""
    while _engines:
        _engines.popitem()[1].close()
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


atexit.register(close_engines)  # the encoding thread must not be in native code when the interpreter ends


def describe_encoders(settings: EngineSettings) -> dict[str, EncoderDescription]:
    """Load the encoders and describe each for the driver."""
    engine = reporting_engine(settings)
    return {
        name: EncoderDescription(
            identity=run.identity,
            weights_label=run.weights_label,
            device=engine.device,
            threads=torch.get_num_threads(),
            batch={kind: engine.batch_of(kind) for kind in KINDS},
            load_s=run.load_s,
            fingerprint=run.fingerprint,
            compiled=settings.compiled,
        )
        for name, run in engine.encoders.items()
    }


def default_decoders(device: str, cores: int) -> int:
    """Decode processes of a worker that has `cores`: all of them, less one where the encoders compute on a CPU too."""
    return max(1, cores - 1) if device == "cpu" else cores


def _check_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


class DeviceMemory(Protocol):
    """The memory of a device, in bytes; a CPU has no meter, its memory is the machine's."""

    def free_bytes(self) -> int: ...

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most that `run` has held at once, above what was held before."""
        ...


class CudaMemory:
    """Memory of one CUDA device, as torch's allocator counts it."""

    def __init__(self, device: str) -> None:
        self._device = device

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()  # what this process keeps for itself is free to it
        return torch.cuda.mem_get_info(self._device)[0]

    def peak_bytes(self, run: Callable[[], object]) -> int:
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        return torch.cuda.max_memory_allocated(self._device) - before


MEMORIES: dict[str, Callable[[str], DeviceMemory]] = {"cuda": CudaMemory}


def clips_that_fit(forward: Callable[[int], object], most: int, memory: DeviceMemory) -> int:
    """The largest of `most`, its half, its quarter ... whose forward fits; at least one clip.

    `forward(n)` encodes n clips. Forwards of one and of two clips are measured; each further clip is taken to need what
    the second one added. One forward runs unmeasured before them, because the first also allocates what libraries keep
    (cuBLAS's workspace). Only halves of `most` are tried, so that devices of one model agree on one batch although
    their free memory differs a little.
    """
    try:
        forward(1)
        one, two = (memory.peak_bytes(lambda n=n: forward(n)) for n in (1, 2))
    except torch.OutOfMemoryError:
        return 1
    per_clip = max(two - one, 1)
    available = HEADROOM * memory.free_bytes()
    clips = most
    while clips > 1 and one + (clips - 1) * per_clip > available:
        clips //= 2
    return clips
