"""Which run made a group, by the journal, which may be untrusted."""

from __future__ import annotations

import pytest

from featurestore.records import maker_of
from featurestore.writer import StoreWriter
from mervcache.errors import UserError

GROUP = "dinov2-0123456789ab"


@pytest.fixture
def store(tmp_path):
    return StoreWriter.open_or_create(tmp_path / "store.zarr")


def note(store: StoreWriter, name: str, started: float, group: str = GROUP, **entry) -> None:
    """The record of a run of one encoder."""
    summary = {"run": name, "clips": 1, "failed": 0, "bytes": 1, "elapsed_s": 1.0, "stage_s": {}}
    record = {"root": "media", "config": {"dataset": "demo"}, "summary": summary, "started": started}
    store.journal(f"{name}-driver", record | {"encoders": {"dino": {"group": group, **entry}}})


def test_the_newest_run_that_wrote_to_a_group_made_it(store):
    note(store, "late", 300.0, group="siglip-0123456789ab", threads=3)
    note(store, "newest", 200.0, threads=2)
    note(store, "first", 100.0, threads=1)
    maker = maker_of(store.objects, GROUP)
    assert (maker.run["started"], maker.encoder, maker.threads) == (200.0, "dino", 2)
    assert maker_of(store.objects, "vivit-0123456789ab") is None


def test_a_run_that_does_not_tell_its_threads_made_it_all_the_same(store):
    note(store, "old", 100.0)
    assert maker_of(store.objects, GROUP).threads is None


@pytest.mark.parametrize("threads", [0, -1, True, "8", 1.5, [1], 257, 10**6])
def test_threads_that_this_machine_cannot_start_are_refused_with_the_next_step(store, monkeypatch, threads):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    note(store, "one", 100.0, threads=threads)
    with pytest.raises(UserError) as refused:
        maker_of(store.objects, GROUP)
    assert f"{GROUP} was computed with {threads!r} threads, this machine starts 1 to 256" in str(refused.value)
    assert "repair --from OTHER_STORE" in str(refused.value)


def test_threads_of_a_large_server_are_taken_on_a_small_machine_and_more_of_them_on_a_larger_one(store, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    note(store, "server", 100.0, threads=256)
    assert maker_of(store.objects, GROUP).threads == 256
    monkeypatch.setattr("os.cpu_count", lambda: 100)
    note(store, "larger", 200.0, threads=400)
    assert maker_of(store.objects, GROUP).threads == 400
