import io
import sys

import pytest
from transformers.utils import logging

from trainer.model.llm import load_llm


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "is_shown"), [(io.StringIO(), False), (Terminal(), True)])
def test_the_bar_of_an_llm_is_drawn_only_where_a_person_looks(monkeypatch, pretrained, stream, is_shown):
    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        monkeypatch.setattr(sys, "stderr", stream)
        load_llm(pretrained)
        assert ("Loading weights" in stream.getvalue()) is is_shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
