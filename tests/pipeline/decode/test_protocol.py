"""Messages over a pipe: whole, in time, or an error."""

import contextlib
import os
import threading
import time

import pytest

from pipeline.decode import worker


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    yield reading, writing
    for end in (reading, writing):
        with contextlib.suppress(OSError):  # the test may have closed it
            os.close(end)


def test_header_and_body_arrive_as_sent_though_larger_than_the_pipe(pipe) -> None:
    reading, writing = pipe
    body = os.urandom(300_000)
    sender = threading.Thread(target=worker.send, args=(writing, {"a": [1, "é"]}, body[:1000], body[1000:]))
    sender.start()
    assert worker.receive(reading) == ({"a": [1, "é"]}, body)
    sender.join()


def test_silence_ends_at_the_deadline_and_so_does_half_a_message(pipe) -> None:
    reading, writing = pipe
    for part in (b"", worker.LENGTHS.pack(10, 0) + b"{"):
        os.write(writing, part)
        with pytest.raises(worker.DeadlineError):
            worker.receive(reading, time.monotonic() + 0.05)


def test_closed_pipe_and_absurd_lengths_are_told_apart_from_messages(pipe) -> None:
    reading, writing = pipe
    os.write(writing, worker.LENGTHS.pack(0xFFFFFFFF, 0))
    with pytest.raises(worker.PipeClosedError):
        worker.receive(reading)
    os.write(writing, worker.LENGTHS.pack(3, 0) + b"no!")
    with pytest.raises(worker.PipeClosedError):
        worker.receive(reading)
    os.close(writing)
    with pytest.raises(worker.PipeClosedError):
        worker.receive(reading)


def test_writing_to_nobody_is_a_closed_pipe(pipe) -> None:
    reading, writing = pipe
    os.close(reading)
    with pytest.raises(worker.PipeClosedError):
        worker.send(writing, {"a": 1})


def test_larger_media_is_given_more_time() -> None:
    assert worker.allowed_s(60, 0) == 60
    assert worker.allowed_s(60, 400_000_000) == 160
