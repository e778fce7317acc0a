"""Samples that were tokenised before, in the user's cache."""

import sqlite3
from dataclasses import replace

import pytest

from featurestore.clips import Turn
from mervcache.files import RENDERED_FOLDER
from trainer.data.prompts import Renderer
from trainer.data.rendered_cache import RenderedCache, renderer_key
from trainer.loop.train import train
from trainer.model.llm import word_tokenizer

TURNS = (Turn(role="human", text="<video>\nWhat colour is it?"), Turn(role="gpt", text="red green"))
TEXTS = ["In: What colour is it? Out: red green"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / RENDERED_FOLDER


def renderer(texts=TEXTS, **options):
    return Renderer("pure", word_tokenizer(texts), **options)


class Counting(Renderer):
    count = 0

    def __call__(self, turns, *, has_clip=True):
        self.count += 1
        return super().__call__(turns, has_clip=has_clip)


def cached(**options):
    made = Counting("pure", word_tokenizer(TEXTS), **options)
    return RenderedCache(made, renderer_key(made), writes=True), made


def test_a_sample_is_rendered_once_and_read_as_it_was():
    first, made = cached()
    wanted = [renderer()(TURNS), renderer()(TURNS, has_clip=False)]
    assert [first(TURNS), first(TURNS, has_clip=False)] == wanted
    first.flush()
    second, made_again = cached()
    assert [second(TURNS), second(TURNS, has_clip=False)] == wanted
    assert (made.count, made_again.count) == (2, 0)


def test_whatever_changes_ids_has_a_key_of_its_own():
    keys = [
        renderer_key(made)
        for made in (
            renderer(),
            renderer([*TEXTS, "blue"]),
            renderer(max_tokens=5),
            renderer(position="first"),
            renderer(end_ids=[1]),
            renderer(placeholder="as_released"),
            Renderer("vicuna", word_tokenizer(TEXTS)),
        )
    ]
    assert len(set(keys)) == len(keys)
    assert renderer_key(renderer()) == keys[0]


def test_a_changed_row_is_rendered_again(cache):
    first, _ = cached()
    wanted = first(TURNS)
    first.flush()
    (path,) = cache.iterdir()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE rendered SET ids = zeroblob(length(ids))")
    second, made = cached()
    assert second(TURNS) == wanted
    assert made.count == 1


def test_a_damaged_file_and_a_folder_that_cannot_be_made_are_named_and_nothing_is_lost(cache, caplog):
    first, _ = cached()
    wanted = first(TURNS)
    first.flush()
    (path,) = cache.iterdir()
    path.write_bytes(b"no database" * 1000)
    second, made = cached()
    assert second(TURNS) == wanted
    second.flush()
    assert made.count == 1
    assert str(path) in caplog.text
    path.unlink()
    cache.rmdir()
    cache.write_text("a file where the folder would be")
    third, _ = cached()
    assert third(TURNS) == wanted


def test_runs_of_a_published_llm_share_what_they_rendered(tmp_path, config, samples, tokens, pretrained, cache):
    config = replace(config, llm=pretrained, train_llm="lora", max_steps=2)
    losses = []
    for name in ("one", "two"):
        losses.append(train(config, samples, tokens, tmp_path / name, quiet=True).loss)
    assert losses[0] == losses[1]
    (path,) = cache.iterdir()
    with sqlite3.connect(path) as database:
        (count,) = database.execute("SELECT count(*) FROM rendered").fetchone()
    assert 0 < count <= len(samples)


def test_a_fresh_llm_keeps_none(tmp_path, config, samples, tokens, cache):
    train(replace(config, max_steps=1), samples, tokens, tmp_path / "run", quiet=True)
    assert not cache.exists()
