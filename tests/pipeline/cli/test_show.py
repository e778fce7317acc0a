"""Progress of a library call, as a person sees it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.cli.options import progress


def test_what_is_counted_in_bytes_is_shown_in_mb_and_every_start_is_a_line(capsys):
    with progress("push", "MB", size=1e6) as shown:
        shown.start(2_500_000)
        shown.advance(700_000)
        shown.advance(1_800_000)
        shown.start(1_000_000)
        shown.advance(1_000_000)
    sent, read = capsys.readouterr().err.splitlines()
    assert sent.startswith("push: 3/3 MB, 0 failed")
    assert read.startswith("push: 1/1 MB, 0 failed")


def test_items_counted_by_several_threads_are_all_counted(capsys):
    with progress("verify", "blocks") as shown, ThreadPoolExecutor(8) as pool:
        shown.start(400)
        list(pool.map(lambda _: shown.advance(MB=0.5), range(400)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("verify: 400/400 blocks")
    assert " MB/s" in line


def test_a_call_that_fails_leaves_its_last_line(capsys):
    def interrupted() -> None:
        with progress("copy", "cells") as shown:
            shown.start(9)
            shown.advance(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert capsys.readouterr().err.startswith("copy: 4/9 cells")


def test_a_call_that_never_starts_shows_nothing(capsys):
    with progress("copy", "cells"):
        pass
    assert capsys.readouterr() == ("", "")
