"""The batch that a device's memory holds. No GPU takes part: the device's meter is a stand-in at the CUDA boundary."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from featurestore.writer import StoreWriter
from pipeline.config import DEFAULT_BATCH
from pipeline.worker import engine as device_memory
from pipeline.worker.engine import CudaMemory, Engine, clips_that_fit, close_engines


@dataclass
class StandIn:
    """A device whose forwards hold a fixed number of bytes, and as many again per clip."""

    free: int
    fixed: int = 10
    per_clip: int = 100
    clips: list[int] = field(default_factory=list)

    def forward(self, clips: int) -> None:
        if self.fixed + clips * self.per_clip > self.free:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.clips.append(clips)

    def free_bytes(self) -> int:
        return self.free

    def peak_bytes(self, run) -> int:
        run()
        return self.fixed + self.clips[-1] * self.per_clip


@pytest.mark.parametrize(
    ("free", "most", "expected"),
    [
        (10_000, 8, 8),  # all of them
        (1013, 8, 8),  # 10 + 8 * 100 = 810 of 0.8 * 1013 = 810.4
        (1012, 8, 4),  # 809.6 is too little
        (1012, 6, 6),  # 10 + 6 * 100
        (700, 6, 3),
        (262, 8, 1),  # two clips would take 210 of 209.6
        (150, 8, 1),  # even two at once are too many
        (50, 8, 1),  # not even one: extraction reports it, with the clip
    ],
)
def test_the_batch_is_halved_until_the_forward_leaves_a_fifth_of_the_memory_free(free, most, expected):
    memory = StandIn(free)
    assert clips_that_fit(memory.forward, most, memory) == expected
    assert set(memory.clips) <= {1, 2}  # nothing larger is tried: what is too large may end a driver


def test_memory_that_does_not_grow_with_the_clips_is_no_division_by_nothing():
    memory = StandIn(1000, fixed=500, per_clip=0)
    assert clips_that_fit(memory.forward, 64, memory) == 64


def test_what_a_first_forward_takes_once_is_not_taken_for_a_clips():
    class FirstIsDearer(StandIn):
        def peak_bytes(self, run) -> int:
            once = 0 if self.clips else 90
            return super().peak_bytes(run) + once

    memory = FirstIsDearer(1012)
    assert clips_that_fit(memory.forward, 8, memory) == 4  # by 190 and 210, a clip would seem to take 10


@pytest.fixture
def short_of_memory(monkeypatch):
    """Engines find a stand-in that holds two clips a forward; the clips are black ones, really encoded."""

    class Alternating(StandIn):
        def peak_bytes(self, run) -> int:
            run()
            self.clips.append(len(self.clips) % 2 + 1)
            return self.fixed + self.clips[-1] * self.per_clip

    monkeypatch.setattr(device_memory, "MEMORIES", {"cpu": lambda device: Alternating(free=400)})
    monkeypatch.setitem(DEFAULT_BATCH, "cpu", {"video": 8, "image": 2})
    close_engines()
    yield
    close_engines()


def test_an_engine_has_one_batch_for_all_its_encoders(short_of_memory, extracted):
    engine = Engine(extracted.config(encoders=["siglip", "dinov2"], batch={}).engine_settings)
    try:
        assert engine.batch_of("video") == 2  # 10 + 2 * 100 of 320; four would take 410
        assert engine.batch_of("image") == 2  # no more than suits the device
    finally:
        engine.close()


def test_a_store_is_begun_with_the_batch_that_fits_and_keeps_it(short_of_memory, extracted, tmp_path, monkeypatch):
    path = tmp_path / "store.zarr"
    first = extracted.extract(store=path, encoders=["siglip"], batch={}, kind="video", limit=2)
    (name,) = StoreWriter.open(path).encoder_groups("video")
    assert StoreWriter.open(path).open_group("video", name).batch_shape == 2
    monkeypatch.setattr(device_memory, "MEMORIES", {})  # another device, of more memory
    second = extracted.extract(store=path, encoders=["siglip"], batch={}, kind="video", limit=4)
    assert (first.clips, second.clips) == (2, 2)
    assert StoreWriter.open(path).open_group("video", name).batch_shape == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_meter_of_a_gpu_counts_what_a_forward_held():
    memory = CudaMemory("cuda")
    assert memory.peak_bytes(lambda: torch.zeros(1 << 24, dtype=torch.uint8, device="cuda")) >= 1 << 24
    assert memory.free_bytes() > 0
