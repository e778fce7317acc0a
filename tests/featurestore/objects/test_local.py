"""Bytes are put once, whole, and only inside the root."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from featurestore.objects.base import put_if_absent
from featurestore.objects.local import LocalObjects
from mervcache.errors import AlreadyExistsError, RunStoppedError, StoreFormatError


@pytest.fixture
def objects(tmp_path):
    return LocalObjects(tmp_path)


def test_a_new_object_holds_its_pieces_and_leaves_no_temporary_file(objects, tmp_path):
    objects.put_exclusive("a/b/c", [b"one ", memoryview(b"two"), bytearray(b" three")])
    assert objects.get("a/b/c") == b"one two three"
    assert [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()] == []


def test_the_first_put_of_a_name_wins(objects):
    objects.put_exclusive("key", b"first")
    with pytest.raises(AlreadyExistsError, match="another process was first"):
        objects.put_exclusive("key", b"second")
    assert objects.get("key") == b"first"


def test_of_many_racing_puts_exactly_one_wins(tmp_path):
    racers = [LocalObjects(tmp_path) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda pair: put_if_absent(pair[1], "key", b"%d" % pair[0]), enumerate(racers)))
    assert sum(won) == 1
    assert racers[0].get("key") == b"%d" % won.index(True)


def test_a_link_that_succeeded_but_was_reported_as_existing_is_a_success(objects, monkeypatch):
    link = os.link

    def retransmitted(source, target):
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", retransmitted)
    objects.put_exclusive("key", b"ours")
    assert objects.get("key") == b"ours"


def test_where_links_are_not_supported_a_rename_is_as_exclusive(objects, monkeypatch):
    def unsupported(source, target):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    objects.put_exclusive("key", b"first")
    assert not put_if_absent(objects, "key", b"second")
    assert objects.get("key") == b"first"


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "ESTALE", "EROFS", "EACCES"])
def test_a_fault_of_the_machine_stops_the_run_and_names_the_next_step(objects, monkeypatch, code):
    def fail(handle):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunStoppedError, match=r"cannot write key: .*(run the same command|fix the owner|remount)"):
        objects.put_exclusive("key", b"data")
    monkeypatch.undo()
    assert not objects.exists("key")


@pytest.mark.parametrize("key", ["../out", "/etc/passwd", "a/../../out", "a//b", "", "a/./b", "a\0b"])
def test_keys_that_are_not_plain_relative_paths_are_refused(objects, key):
    with pytest.raises(StoreFormatError, match="refused"):
        objects.get(key)


def test_a_link_out_of_the_store_is_not_followed(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "file").symlink_to(tmp_path / "secret")
    (tmp_path / "store" / "folder").symlink_to(tmp_path)
    objects = LocalObjects(tmp_path / "store")
    for key in ("file", "folder/secret"):
        with pytest.raises(StoreFormatError, match="leads out of the store"):
            objects.get(key)
    with pytest.raises(StoreFormatError, match="leads out of the store"):
        objects.put_exclusive("folder/new", b"x")


def test_ranged_reads_fill_several_buffers_and_stop_at_the_end(objects):
    objects.put_exclusive("key", bytes(range(100)))
    opened = objects.open("key")
    first, second = bytearray(3), bytearray(4)
    assert opened.read_into(10, [memoryview(first), memoryview(second)]) == 7
    assert (bytes(first), bytes(second)) == (bytes(range(10, 13)), bytes(range(13, 17)))
    assert opened.read_into(98, [memoryview(first)]) == 2
    opened.close()


def test_listing_a_folder_that_is_not_there_is_empty(objects):
    assert objects.list_names("nowhere") == []


def test_temporary_folders_of_dead_processes_are_swept_and_those_of_living_ones_stay(tmp_path):
    own = LocalObjects(tmp_path)
    own.put_exclusive("key", b"data")
    program = (
        "import os, signal; from featurestore.objects.local import LocalObjects;"
        f"place = LocalObjects({str(tmp_path)!r}); place.put_exclusive('other', b'data');"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    assert len(os.listdir(tmp_path / "tmp")) == 2
    other = LocalObjects(tmp_path)
    assert len(other.cleanup_tmp(dry_run=True)) == 1
    assert len(other.cleanup_tmp()) == 1
    assert len(os.listdir(tmp_path / "tmp")) == 1
    del own, other
    assert os.listdir(tmp_path / "tmp") == []


def test_a_pickled_place_opens_the_same_root(objects):
    objects.put_exclusive("key", b"data")
    assert pickle.loads(pickle.dumps(objects)).get("key") == b"data"
