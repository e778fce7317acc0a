"""The progress line: counts, rates and what is left."""

import io

from jobs.progress import RunProgress


class SteppedClock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_the_line_tells_done_failed_rates_and_the_time_left(monkeypatch):
    clock = SteppedClock()
    monkeypatch.setattr("jobs.progress.time", clock)
    progress = RunProgress("extract", total=40, unit="clips", stream=io.StringIO())
    clock.now += 5
    progress.advance(10, failed=1, frames=320, MB=2.5)
    assert progress.text() == "10/40 clips, 1 failed, 2.0 clips/s, 64.0 frames/s, 0.5 MB/s, ETA 0:00:15"


def test_before_anything_is_done_the_time_left_is_unknown():
    assert RunProgress("x", total=3, unit="clips", stream=io.StringIO()).text().endswith("ETA unknown")


def test_in_a_log_file_a_line_is_written_now_and_then_and_at_the_end(monkeypatch):
    clock, log = SteppedClock(), io.StringIO()
    monkeypatch.setattr("jobs.progress.time", clock)
    with RunProgress("extract", total=4, unit="clips", stream=log) as progress:
        for _ in range(4):
            clock.now += 6
            progress.advance(1)
    lines = log.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["extract: 2/4 clips", "extract: 4/4 clips", "extract: 4/4 clips"]


def test_quiet_writes_nothing():
    log = io.StringIO()
    with RunProgress("extract", total=1, unit="clips", quiet=True, stream=log) as progress:
        progress.advance(1)
    assert log.getvalue() == ""


def test_without_work_there_is_no_line():
    log = io.StringIO()
    with RunProgress("extract", total=0, unit="clips", stream=log):
        pass
    assert log.getvalue() == ""


def test_on_a_terminal_one_live_line_is_drawn():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    with RunProgress("extract", total=2, unit="clips", stream=terminal) as progress:
        progress.advance(2, failed=1)
    assert "2/2 clips, 1 failed" in terminal.getvalue()
