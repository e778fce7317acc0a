"""az:// against Azurite: the contract of every place, and a store that goes there, is read there and comes back."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import numpy as np
import pytest

from featurestore.errors import RunStoppedError, UserError
from featurestore.keep.erase import tombstone
from featurestore.keep.verify import verify_store
from featurestore.places.by_url import open_objects
from featurestore.share.push import push
from featurestore.share.transfer import transfer
from featurestore.store import FeatureStore


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"azure_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_server = load(Path(__file__).parents[1] / "azure_server.py")
if not _server.IS_INSTALLED:
    pytest.skip(_server.ADVICE, allow_module_level=True)
azure_endpoint, azure = _server.azure_endpoint, _server.azure
_places = load(Path(__file__).with_name("test_remote_objects.py"))
CONTRACT = {
    name: test
    for name, test in vars(_places).items()
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["objects"]
}


@pytest.mark.parametrize("name", CONTRACT)
def test_the_contract_of_every_place_holds(azure, name):
    CONTRACT[name](open_objects(azure))


def test_the_contract_is_what_is_run():
    assert {"test_the_first_put_of_a_name_wins", "test_of_many_racing_puts_exactly_one_wins"} <= set(CONTRACT)
    assert len(CONTRACT) >= 9


def test_a_store_is_pushed_read_verified_and_pulled(azure, kit, make, tmp_path):
    kit.writer().add_clips([*(make.video(n) for n in range(6)), make.image(0)])
    kit.fill()
    pushed = push(kit.path, azure)
    assert push(kit.path, azure).sent_blocks == 0 < pushed.sent_blocks
    here, there = kit.open(), FeatureStore.open(azure, cache=False)
    ids = here.clips["clip_id"].to_pylist()
    assert np.array_equal(here.read(ids, encoder="dinov2"), there.read(ids, encoder="dinov2"))
    assert verify_store(azure, "full") == []
    transfer(azure, tmp_path / "back.zarr", check=True)
    assert verify_store(tmp_path / "back.zarr", "full") == []
    assert tombstone(azure, [ids[0]], reason="licence")["blocks rewritten"] == 1
    assert verify_store(azure, "full") == []


def test_a_store_is_extracted_straight_into_a_container(azure, make):
    writer = make.kit(azure).writer()
    rows = writer.add_clips([make.video(n) for n in range(3)])
    group = make.kit(azure).group(make.identity())
    make.fill_block(group.begin(0), dict(rows), make.identity()).commit()
    writer.publish_snapshot()
    assert len(FeatureStore.open(azure, cache=False)) == 3


def test_a_missing_container_and_a_wrong_key_are_told(azure, monkeypatch):
    with pytest.raises(UserError, match=r"there is no bucket 'absent'.*AZURE_STORAGE"):
        open_objects("az://absent/store")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
    with pytest.raises(RunStoppedError, match=r"refused these credentials.*AZURE_STORAGE_ACCOUNT_KEY"):
        open_objects(azure)
