"""gs:// and az:// keep the contract of `Objects`; a store is pushed there, read and pulled back.

Azure's part runs where Azurite is installed; Google's server is our own reading of its documentation.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from featurestore.maintenance.tombstone import tombstone
from featurestore.maintenance.verify import verify_store
from featurestore.objects.open import open_objects
from featurestore.store import FeatureStore
from featurestore.transfer.sync import push, transfer
from mervcache.errors import RunStoppedError, UserError
from tests.featurestore.azure_server import ADVICE, IS_INSTALLED
from tests.featurestore.objects import test_contract

pytestmark = pytest.mark.slow

PLACES = ["gcs", "azure"] if IS_INSTALLED else ["gcs"]
CONTRACT = {
    name: test
    for name, test in vars(test_contract).items()
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["objects"]
}


@pytest.fixture(params=PLACES)
def far(request) -> str:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", CONTRACT)
def test_the_contract_of_every_place_holds(far, name):
    CONTRACT[name](open_objects(far))


def test_the_contract_is_what_is_run():
    assert {"test_the_first_put_of_a_name_wins", "test_of_many_racing_puts_exactly_one_wins"} <= set(CONTRACT)
    assert len(CONTRACT) >= 9


def test_a_store_is_pushed_read_verified_and_pulled(far, kit, make, tmp_path):
    kit.writer().add_clips([*(make.video(n) for n in range(6)), make.image(0)])
    kit.fill()
    pushed = push(kit.path, far)
    assert push(kit.path, far).sent_blocks == 0 < pushed.sent_blocks
    here, there = kit.open(), FeatureStore.open(far, cache=False)
    ids = here.clips["clip_id"].to_pylist()
    assert np.array_equal(here.read(ids, encoder="dinov2"), there.read(ids, encoder="dinov2"))
    assert verify_store(far, "full") == []
    transfer(far, tmp_path / "back.zarr", check=True)
    assert verify_store(tmp_path / "back.zarr", "full") == []
    assert tombstone(far, [ids[0]], reason="licence")["blocks rewritten"] == 1
    assert verify_store(far, "full") == []


def test_a_block_is_committed_straight_into_a_bucket(far, make):
    rows = make.kit(far).writer().add_clips([make.video(n) for n in range(3)])
    group = make.kit(far).group(make.identity())
    make.fill_block(group.begin(0), dict(rows), make.identity()).commit()
    make.kit(far).writer().publish_snapshot()
    assert len(FeatureStore.open(far, cache=False)) == 3


def test_a_missing_bucket_is_told(far):
    scheme = far.partition(":")[0]
    with pytest.raises(UserError, match=r"there is no bucket 'absent' for (gs|az)://.*check its name"):
        open_objects(f"{scheme}://absent/store")


@pytest.mark.skipif(not IS_INSTALLED, reason=ADVICE)
def test_a_wrong_key_of_azure_is_told(azure, monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
    with pytest.raises(RunStoppedError, match=r"refused these credentials.*AZURE_STORAGE_ACCOUNT_KEY"):
        open_objects(azure)
