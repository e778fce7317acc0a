import io
import sys

import pytest
from transformers.utils import logging

from trainer.cli import keep_bars_to_terminals


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "is_shown"), [(io.StringIO(), False), (Terminal(), True)])
def test_bars_are_drawn_only_where_a_person_looks(monkeypatch, stream, is_shown):
    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        monkeypatch.setattr(sys, "stderr", stream)
        keep_bars_to_terminals()
        assert logging.is_progress_bar_enabled() is is_shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
