"""The progress line of all commands: counts, rates and what is left; live on a terminal, lines in a log."""

import io
import queue
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mervcache.console import Counts, ProgressLine, log_while_running


@pytest.fixture
def clock(stepped_clock):
    return stepped_clock("mervcache.console")


def test_the_line_tells_done_failed_rates_and_the_time_left(clock):
    progress = ProgressLine("extract", total=40, unit="clips", stream=io.StringIO())
    clock.now += 5
    progress.advance(10, failed=1, frames=320, MB=2.5)
    assert progress.text() == "10/40 clips, 1 failed, ETA 0:00:15, 2.0 clips/s, 64.0 frames/s, 0.5 MB/s"
    assert progress.text(60) == "10/40 clips, 1 failed, ETA 0:00:15, 2.0 clips/s"  # what matters most stays longest


def test_rates_and_the_time_left_are_of_the_last_minutes(clock):
    progress = ProgressLine("extract", total=100_000, unit="clips", stream=io.StringIO())
    for _ in range(360):  # an hour of one worker: a clip every ten seconds
        clock.now += 10
        progress.advance(1)
        progress.text()
    assert ", 0.1 clips/s" in progress.text()
    for _ in range(30):  # five minutes of a hundred
        clock.now += 10
        progress.advance(100)
        progress.text()
    assert ", ETA 2:41:04, 10.0 clips/s" in progress.text()


def test_while_nothing_moves_the_time_left_is_unknown(clock):
    progress = ProgressLine("extract", total=9, unit="clips", stream=io.StringIO())
    progress.advance(3)
    for _ in range(70):
        clock.now += 6
        line = progress.text()
    assert "3/9 clips, ETA unknown after 0:07:00, 0 clips/s" in line


def test_a_log_of_a_day_has_some_hundred_lines(clock):
    log = io.StringIO()
    with ProgressLine("extract", total=10**6, unit="clips", stream=log) as progress:
        for _ in range(24 * 360):
            clock.now += 10
            progress.advance(1)
    assert 300 < len(log.getvalue().splitlines()) < 700


def test_a_terminal_that_cannot_draw_over_a_line_gets_a_log(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with ProgressLine("extract", total=2, unit="clips", stream=terminal) as progress:
        progress.advance(2)
    assert terminal.getvalue().startswith("extract: 2/2 clips, took 0:00:00")


def test_before_anything_is_done_the_time_left_is_unknown():
    assert (
        ProgressLine("x", total=3, unit="clips", stream=io.StringIO())
        .text()
        .endswith("ETA unknown after 0:00:00, 0 clips/s")
    )


def test_in_a_log_file_a_line_is_written_now_and_then_and_at_the_end(clock):
    log = io.StringIO()
    with ProgressLine("extract", total=4, unit="clips", stream=log) as progress:
        for _ in range(4):
            clock.now += 6
            progress.advance(1)
    lines = log.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["extract: 2/4 clips", "extract: 4/4 clips"]


def test_a_log_ends_with_what_came_after_its_last_line(clock):
    log = io.StringIO()
    with ProgressLine("extract", total=4, unit="clips", stream=log) as progress:
        clock.now += 12
        progress.advance(3)
        clock.now += 2
        progress.advance(1)
    assert log.getvalue().splitlines()[-1] == "extract: 4/4 clips, took 0:00:14, 0.29 clips/s"


def test_the_time_before_the_first_item_is_shown_beside_the_time_taken_and_in_no_rate(clock):
    progress = ProgressLine("extract", total=6, unit="clips", startup_s=22.0, stream=io.StringIO())
    clock.now += 3
    progress.advance(6)
    assert progress.text() == "6/6 clips, took 0:00:03 after a start of 0:00:22, 2.0 clips/s"
    assert (progress.figures()["elapsed_s"], progress.figures()["startup_s"]) == (3.0, 22.0)


def test_a_line_of_a_log_has_120_characters_at_most(clock):
    log = io.StringIO()
    stages = {"languagebind": 336.0, "dinov2": 215.4, "vivit": 182.4, "siglip": 49.1, "decode wait": 2.7}
    with ProgressLine("extract", total=1_000_000, unit="clips", stream=log) as progress:
        clock.now += 3600
        progress.report("a", "1", Counts(done=12345, amounts={"frames": 99999, "MB": 60000.0}, seconds=stages))
    (line,) = log.getvalue().splitlines()
    assert "ETA 80:00:16, 3.4 clips/s" in line
    assert line.endswith("; languagebind 43%, dinov2 27%")
    assert len(line) <= 120


def test_quiet_writes_nothing_anywhere(terminal):
    for stream in (io.StringIO(), terminal):
        with ProgressLine("extract", total=1, unit="clips", quiet=True, stream=stream) as progress:
            progress.advance(1)
        assert stream.getvalue() == ""


@pytest.mark.parametrize("done", [0, 9])
def test_without_work_there_is_no_line(done):
    log = io.StringIO()
    with ProgressLine("extract", total=done, first=done, unit="clips", stream=log):
        pass
    assert log.getvalue() == ""


def test_a_resumed_run_counts_from_where_it_was_and_shows_its_postfix(clock):
    log = io.StringIO()
    with ProgressLine("train", total=120, first=100, unit="steps", stream=log) as progress:
        for step in range(20):
            clock.now += 3
            progress.set_postfix(f"loss {step}")
            progress.advance()
    assert log.getvalue().splitlines() == [
        "train: 104/120 steps, ETA 0:00:48, loss 3",
        "train: 108/120 steps, ETA 0:00:36, loss 7",
        "train: 112/120 steps, ETA 0:00:24, loss 11",
        "train: 116/120 steps, ETA 0:00:12, loss 15",
        "train: 120/120 steps, took 0:01:00, loss 19",
    ]


def test_a_postfix_is_never_cut(clock):
    progress = ProgressLine("train", total=120, unit="steps", stream=io.StringIO())
    progress.set_postfix("loss 1.0  " + "held out " * 20)
    assert progress.text(40).startswith("0/120 steps, ETA unknown after 0:00:00, loss 1.0  held out held out ")
    assert progress.text(40).endswith("held out ")


def test_items_are_counted_as_they_come_and_none_is_lost(clock):
    log = io.StringIO()
    with ProgressLine("score", total=3, unit="questions", stream=log) as progress:
        assert list(progress.over("abc")) == ["a", "b", "c"]
    assert log.getvalue().startswith("score: 3/3 questions, took 0:00:00")


def test_a_call_that_finds_its_total_itself_gets_a_line_for_every_start(capsys):
    with ProgressLine("push", unit="MB", scale=1e6) as progress:
        progress.start(2_500_000)
        progress.advance(700_000)
        progress.advance(1_800_000)
        progress.start(1_000_000)
        progress.advance(1_000_000)
    sent, read = capsys.readouterr().err.splitlines()
    assert sent.startswith("push: 3/3 MB, took")
    assert read.startswith("push: 1/1 MB, took")


def test_items_counted_by_several_threads_are_all_counted(capsys):
    with ProgressLine("verify", unit="blocks") as progress, ThreadPoolExecutor(8) as pool:
        progress.start(400)
        list(pool.map(lambda _: progress.advance(MB=0.5), range(400)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("verify: 400/400 blocks")
    assert " MB/s" in line


def test_a_call_that_fails_leaves_its_last_line(capsys):
    def interrupted() -> None:
        with ProgressLine("copy", unit="cells") as progress:
            progress.start(9)
            progress.advance(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert capsys.readouterr().err.startswith("copy: 4/9 cells")


def test_a_report_after_the_end_writes_nothing(clock):
    log = io.StringIO()
    with ProgressLine("extract", total=8, unit="clips", stream=log) as progress:
        progress.advance(8)
    clock.now += 60
    progress.report("late", "1", Counts(done=3))
    assert len(log.getvalue().splitlines()) == 1


def test_a_call_that_never_starts_shows_nothing(capsys):
    with ProgressLine("copy", unit="cells"):
        pass
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_one_live_line_is_drawn(terminal):
    with ProgressLine("extract", total=2, unit="clips", stream=terminal) as progress:
        progress.advance(2, failed=1)
        assert "2/2 clips, 1 failed" in progress.text()
        progress.set_postfix("loss 0.5")
    assert "2/2 clips, 1 failed" in terminal.getvalue()
    assert "loss 0.5" in terminal.getvalue()


def counts(done: int, **seconds: float) -> Counts:
    return Counts(done=done, failed=done // 4, amounts={"frames": 32 * done}, seconds=seconds)


def test_a_part_counts_once_however_often_it_is_reported_tried_again_and_told_late():
    progress = ProgressLine("extract", total=40, unit="clips", stream=io.StringIO())
    progress.report("a", "first", counts(3))
    progress.report("b", "other", counts(2))
    progress.report("a", "first", counts(8))
    assert (progress.counts.done, progress.counts.failed, progress.counts.amounts) == (10, 2, {"frames": 320})
    progress.report("a", "second", counts(1))  # its worker died, another one begins anew
    progress.report("a", "first", counts(9))  # the dead one's last words
    assert progress.counts.done == 3
    progress.finish("a", counts(12))
    progress.report("a", "second", counts(11))
    assert progress.counts.done == 14
    progress.finish("b", counts(4))
    assert (progress.counts.done, progress.counts.amounts["frames"]) == (16, 16 * 32)


def test_shares_of_stages_are_told_where_there_is_room_and_notes_where_there_is_reason():
    progress = ProgressLine("extract", total=8, unit="clips", stream=io.StringIO())
    progress.report("a", "1", counts(4, dinov2=6.0, commit=0.01) + Counts(seconds={"decode wait": 4.0}))
    assert progress.text(400).endswith("; dinov2 60%, decode wait 40%")
    assert progress.text(len(progress.text()) - len(", decode wait 40%")).endswith("; dinov2 60%")
    assert "dinov2" not in progress.text(60)
    progress.finish("a", Counts(done=8, notes={"batches halved": 2, "batches lost": 0}))
    assert progress.text().startswith("8/8 clips, 2 batches halved, ")
    assert "lost" not in progress.text()


def test_why_nothing_moves_stands_at_the_head_of_the_line_until_it_moves():
    progress = ProgressLine("extract", total=8, unit="clips", stream=io.StringIO())
    progress.wait("no worker for 60 s")
    assert progress.text().startswith("no worker for 60 s, 0/8 clips, ")
    progress.wait("")
    assert progress.text().startswith("0/8 clips, ")


def test_a_run_that_ends_while_it_waits_leaves_the_reason():
    log = io.StringIO()
    with ProgressLine("extract", total=8, unit="clips", stream=log) as progress:
        progress.wait("no worker for 60 s")
    assert log.getvalue() == "extract: no worker for 60 s, 0/8 clips, ETA unknown after 0:00:00, 0 clips/s\n"


def test_threads_may_report_while_others_finish():
    progress = ProgressLine("extract", total=800, unit="clips", stream=io.StringIO())

    def work(number: int) -> None:
        for done in range(100):
            progress.report(f"part-{number}", "1", counts(done))
        progress.finish(f"part-{number}", counts(100))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (progress.counts.done, progress.counts.failed) == (800, 200)


def test_a_log_shows_life_while_one_item_takes_long(monkeypatch):
    monkeypatch.setattr("mervcache.console.PULSE_S", 0.01)
    monkeypatch.setattr("mervcache.console.LOG_INTERVAL_S", 0.0)
    lines = queue.Queue()

    class Log(io.StringIO):
        def write(self, text):
            lines.put(text)
            return len(text)

    with ProgressLine("train", total=9, unit="steps", stream=Log()):
        assert lines.get(timeout=60) == "train: 0/9 steps, ETA unknown after 0:00:00, 0 steps/s"  # no step was counted


def test_a_call_without_steps_shows_life(monkeypatch):
    monkeypatch.setattr("mervcache.console.PULSE_S", 0.0)
    monkeypatch.setattr("mervcache.console.LOG_INTERVAL_S", 0.01)
    lines = queue.Queue()
    monkeypatch.setattr("mervcache.console.echo", lambda line, **fields: lines.put(line))
    with log_while_running("loading llm"):
        assert lines.get(timeout=60).startswith("loading llm: 0:00:00")


def test_a_bar_of_80_columns_keeps_step_and_eta_and_whole_figures(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with ProgressLine("train", total=1000, unit="steps", stream=terminal) as progress:
        progress.advance(10)
        progress.set_postfix("loss 1.2345  lr 1.0e-03  12.3 samples/s  held out: loss 0.25")
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).split("\r")[-1].strip()
    assert re.search(r"10/1000 steps, ETA \d+:\d\d:\d\d, loss 1\.2345$", last), last
    assert len(last) <= 80
