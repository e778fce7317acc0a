"""Where an LLM is looked for: a folder, the Hub's cache, and the Hub only if it answers."""

import time

import pytest

from mervcache.errors import UserError
from trainer.model.llm import load_llm


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache, and a Hub at a port where nobody listens; whoever waits to ask it again fails."""
    from huggingface_hub import close_session, constants, hf_api

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # the next one reads the environment
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:1")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("asked again"))
    return tmp_path / "cache"


def test_an_llm_in_no_cache_is_an_error_at_once_where_the_hub_does_not_answer(hub):
    message = (
        r"'acme/llm' cannot be loaded: it is not in the Hub's cache, .* not answer \(.*refused\); .*`make smollm2`"
    )
    with pytest.raises(UserError, match=message):
        load_llm("acme/llm")


def test_offline_mode_is_named_where_it_keeps_an_llm_away(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"not in the Hub's cache.*HF_HUB_OFFLINE"):
        load_llm("acme/llm")


def test_an_llm_in_the_cache_needs_no_hub(hub, pretrained):
    """The cache's real layout, made by hand: a reference to a commit, a snapshot of its files."""
    repository = hub / "models--acme--llm"
    for folder in ("refs", "snapshots"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    (repository / "snapshots" / ("c" * 40)).symlink_to(pretrained)
    expected, found = load_llm(pretrained), load_llm("acme/llm")
    assert found.model.state_dict().keys() == expected.model.state_dict().keys()
    assert found.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
