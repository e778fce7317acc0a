"""Memory of batches is used again, and never while anything still refers to it."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest
import torch

from featurestore.buffers import MIN_POOLED_BYTES, BufferPool

HALF = np.dtype(np.float16)
SHAPE = (2, MIN_POOLED_BYTES // 2)  # 2 MiB of float16


def address(array: np.ndarray) -> int:
    return array.ctypes.data


@pytest.mark.parametrize(
    "keep",
    [
        lambda array: array[1],
        lambda array: array.reshape(-1)[::7].view(np.int16),
        lambda array: memoryview(array)[1:],
        lambda array: torch.from_numpy(array)[1:, :5],
        lambda array: torch.from_dlpack(array).view(torch.int16),
        lambda array: torch.from_numpy(array).view(-1)[3:].numpy(),
    ],
    ids=["row", "strided view", "memoryview", "tensor", "dlpack", "array of a tensor"],
)
def test_memory_is_used_again_only_when_nothing_refers_to_it(keep):
    pool = BufferPool()
    array = pool.empty(SHAPE, HALF)
    place = address(array)
    array[...] = 1
    kept = keep(array)
    del array
    other = pool.empty(SHAPE, HALF)
    assert address(other) != place
    other[...] = 2
    del kept
    assert address(pool.empty(SHAPE, HALF)) == place
    assert (other == 2).all()


def test_arrays_are_like_those_of_numpy():
    pool = BufferPool()
    for shape in [SHAPE, (0, 3), (1,), (), (4, 3, MIN_POOLED_BYTES)]:
        array, expected = pool.empty(shape, HALF), np.empty(shape, HALF)
        assert (array.shape, array.dtype, array.strides) == (expected.shape, expected.dtype, expected.strides)
        assert array.flags.writeable
        assert array.flags.c_contiguous


def test_a_smaller_batch_takes_a_buffer_that_fits_and_a_tiny_one_wastes_none():
    pool = BufferPool()
    array = pool.empty((8, MIN_POOLED_BYTES), HALF)
    place = address(array)
    del array
    tiny = pool.empty((1, MIN_POOLED_BYTES), HALF)
    assert address(tiny) != place
    assert address(pool.empty((7, MIN_POOLED_BYTES), HALF)) == place


def test_idle_memory_is_bounded():
    pool = BufferPool(max_idle_bytes=3 * 2 * MIN_POOLED_BYTES)
    arrays = [pool.empty(SHAPE, HALF) for _ in range(8)]
    buffers = [weakref.ref(array.base.base.obj.base) for array in arrays]
    arrays.clear()
    assert sum(buffer() is not None for buffer in buffers) == 3


def test_threads_never_share_an_array():
    pool, wrong = BufferPool(), []

    def use(number: int) -> None:
        for _ in range(50):
            array = pool.empty(SHAPE, HALF)
            array[...] = number
            if not (array == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
