import json
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from mervcache.errors import MediaError, RunStoppedError
from trainer import media_check
from trainer.media_check import MediaCheck

CLIPS = ["set/a", "set/b", "set/c"]


def decode(clip_id):
    """`set/b` is broken, the share is gone under `set/gone`, the rest has a digest."""
    future = Future()
    if clip_id == "set/b":
        future.set_exception(MediaError("container is damaged"))
    elif clip_id == "set/gone":
        future.set_exception(RunStoppedError("the share is gone"))
    else:
        future.set_result(SimpleNamespace(media_sha256=clip_id * 2))
    return future


def refuse(clip_id):
    raise AssertionError(f"{clip_id} was looked at again")


def test_every_clip_is_known_after_the_look():
    check = MediaCheck(None)
    check.scan(CLIPS, decode, limit=2)
    assert check.media_sha256 == {"set/a": "set/aset/a", "set/c": "set/cset/c"}
    assert check.broken == {"set/b": "container is damaged"}


def test_what_was_found_is_kept_and_only_new_clips_are_looked_at(tmp_path):
    path = tmp_path / "run" / "media.jsonl"
    MediaCheck(path).scan(CLIPS, decode, limit=2)
    again = MediaCheck(path)
    again.scan(CLIPS, refuse, limit=2)
    assert again.broken == {"set/b": "container is damaged"}
    again.scan([*CLIPS, "set/d"], lambda clip_id: decode(clip_id) if clip_id == "set/d" else refuse(clip_id), limit=2)
    assert len([line for line in path.read_text().splitlines() if line]) == 4


def test_a_look_that_was_killed_in_the_middle_of_a_line_goes_on(tmp_path):
    path = tmp_path / "media.jsonl"
    first = json.dumps({"clip_id": "set/a", "media_sha256": "x"})
    path.write_text(f'\n{first}\n{{"clip_id": "set/b", "rea')
    check = MediaCheck(path)
    check.scan(CLIPS, decode, limit=2)
    assert check.media_sha256["set/a"] == "x"  # not looked at again
    again = MediaCheck(path)
    again.scan(CLIPS, refuse, limit=2)
    assert again.broken == {"set/b": "container is damaged"}


def test_a_machine_that_fails_breaks_no_clip(tmp_path):
    check = MediaCheck(tmp_path / "media.jsonl")
    with pytest.raises(RunStoppedError, match="the share is gone"):
        check.scan(["set/a", "set/gone"], decode, limit=1)
    assert check.broken == {}


def test_other_ranks_wait_for_what_the_first_one_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(media_check, "POLL_S", 0.01)
    path = tmp_path / "media.jsonl"
    second = MediaCheck(path, is_first_rank=False)
    waiting = threading.Thread(target=second.scan, args=(CLIPS, refuse), kwargs={"limit": 1}, daemon=True)
    waiting.start()
    MediaCheck(path).scan(CLIPS, decode, limit=1)
    waiting.join(timeout=10)
    assert not waiting.is_alive()
    assert (set(second.media_sha256), set(second.broken)) == ({"set/a", "set/c"}, {"set/b"})
