"""The contract of `Objects`, for a folder, memory, and a bucket of a real S3 server over HTTP."""

from __future__ import annotations

import http.server
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from featurestore.lease import StoreLease
from featurestore.locate import place_of
from featurestore.objects.base import listing_bytes, put_if_absent
from featurestore.objects.hub_place import HubPlace
from featurestore.objects.local import LocalObjects
from featurestore.objects.open import open_objects
from featurestore.objects.remote import RemoteObjects, WebObjects
from featurestore.store import FeatureStore
from mervcache.errors import AlreadyExistsError, RunStoppedError, StoreFormatError, StoreNotFoundError, UserError


@pytest.fixture(params=["folder", "memory", "s3"])
def objects(request, tmp_path):
    if request.param == "folder":
        return LocalObjects(tmp_path)
    if request.param == "memory":
        from obstore.store import MemoryStore

        return RemoteObjects(f"memory://{tmp_path}", MemoryStore())
    return open_objects(request.getfixturevalue("s3"))


def test_a_new_object_holds_its_pieces(objects):
    objects.put_exclusive("a/b/c", [b"one ", memoryview(b"two"), bytearray(b" three")])
    assert objects.get("a/b/c") == b"one two three"
    assert objects.size("a/b/c") == 13


def test_the_first_put_of_a_name_wins(objects):
    objects.put_exclusive("key", b"first")
    with pytest.raises(AlreadyExistsError, match="another process was first"):
        objects.put_exclusive("key", b"second")
    assert objects.get("key") == b"first"


def race(objects, name: str, number: int) -> bool:
    return put_if_absent(objects, name, b"%d" % number)


def test_of_many_racing_puts_exactly_one_wins(objects):
    for name in ("one", "two", "three"):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(partial(race, objects, name), range(8)))
        assert sum(won) == 1
        assert objects.get(name) == b"%d" % won.index(True)


def test_a_swap_needs_the_old_bytes(objects):
    objects.put_exclusive("key", b"old")
    assert not objects.compare_and_swap("key", b"other", b"new")
    assert objects.get("key") == b"old"
    assert objects.compare_and_swap("key", b"old", b"new")
    assert objects.get("key") == b"new"


def test_of_many_racing_swaps_none_is_lost(objects):
    objects.put_exclusive("count", b"0")

    def count_up(_):
        while True:
            before = objects.get("count")
            if objects.compare_and_swap("count", before, b"%d" % (int(before) + 1)):
                return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count_up, range(12)))
    assert objects.get("count") == b"12"


def test_ranged_reads_fill_several_buffers_and_stop_at_the_end(objects):
    objects.put_exclusive("key", bytes(range(100)))
    opened = objects.open("key")
    first, second = bytearray(3), bytearray(4)
    assert opened.size == 100
    assert opened.read_into(10, [memoryview(first), memoryview(second)]) == 7
    assert (bytes(first), bytes(second)) == (bytes(range(10, 13)), bytes(range(13, 17)))
    assert opened.read_into(98, [memoryview(first)]) == 2
    assert bytes(first[:2]) == bytes([98, 99])
    assert opened.read_into(100, [memoryview(first)]) == 0
    opened.close()


def test_names_are_listed_a_level_at_a_time_and_as_a_tree(objects):
    for key in ("top", "a/one", "a/two", "a/deep/three", "ab/four"):
        objects.put_exclusive(key, b"12345")
    assert objects.list_names("a") == ["deep", "one", "two"]
    assert [name for name in objects.list_names("") if name != "tmp"] == ["a", "ab", "top"]
    assert objects.list_names("nowhere") == []
    assert objects.list_tree("a") == {"a/one": 5, "a/two": 5, "a/deep/three": 5}


def test_more_names_than_one_answer_holds_are_all_listed(objects):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: objects.put_exclusive(f"many/{number:05d}", b""), range(1010)))
    assert objects.list_names("many") == [f"{number:05d}" for number in range(1010)]


def test_what_is_missing_is_missing(objects):
    assert not objects.exists("nowhere")
    for read in (objects.get, objects.open, objects.size):
        with pytest.raises(FileNotFoundError):
            read("nowhere")


def test_a_deleted_object_is_gone_and_its_name_free(objects):
    objects.put_exclusive("key", b"one")
    objects.delete("key")
    assert not objects.exists("key")
    objects.put_exclusive("key", b"two")
    assert objects.get("key") == b"two"


@pytest.mark.parametrize("key", ["../out", "/etc/passwd", "a/../../out", "a//b", "", "a/./b", "a\0b"])
def test_keys_that_are_not_plain_relative_paths_are_refused(objects, key):
    with pytest.raises(StoreFormatError, match="refused"):
        objects.get(key)


def test_a_put_whose_answer_was_lost_knows_its_own_mark(s3, monkeypatch):
    import obstore

    objects, put = open_objects(s3), obstore.put
    objects.put_exclusive("before", b"")  # the server's proof is done

    def repeated(*arguments, **options):
        put(*arguments, **options)
        return put(*arguments, **options)

    monkeypatch.setattr(obstore, "put", repeated)
    objects.put_exclusive("key", b"ours")
    monkeypatch.undo()
    assert objects.get("key") == b"ours"


def test_a_server_that_ignores_the_condition_is_refused(s3, monkeypatch):
    import obstore

    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda *a, **o: put(*a, **{**o, "mode": "overwrite"}))
    with pytest.raises(UserError, match="ignores conditional puts"):
        open_objects(s3).put_exclusive("key", b"data")
    monkeypatch.setattr(obstore, "put", put)
    assert open_objects(s3).list_tree() == {}


def test_a_pickled_place_opens_the_same_bucket(s3):
    objects = open_objects(s3)
    objects.put_exclusive("key", b"data")
    assert pickle.loads(pickle.dumps(objects)).get("key") == b"data"


def test_a_bucket_that_is_not_there_is_told_by_name(s3):
    url = s3.replace("bucket-", "absent-")
    with pytest.raises(UserError, match=r"there is no bucket 'absent-.*AWS_ENDPOINT_URL"):
        open_objects(url)
    with pytest.raises(UserError, match="there is no bucket 'absent-"):
        FeatureStore.open(url)
    with pytest.raises(StoreNotFoundError, match="no feature store at s3://"):
        FeatureStore.open(s3)


def test_without_credentials_the_variables_to_set_are_named(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match=r"no credentials for s3://.*AWS_ACCESS_KEY_ID.*AWS_SKIP_SIGNATURE"):
        open_objects(s3)


def test_a_server_that_does_not_answer_is_told_with_its_endpoint(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(RunStoppedError, match=r"no answer from s3://.*AWS_ENDPOINT_URL"):
        open_objects(s3)


ANSWERS = {  # answer of S3 -> our message
    "expired": (400, "ExpiredToken", "may have expired.*nothing was quarantined"),
    "denied": (403, "AccessDenied", "lack the right"),
    "bad-key": (403, "InvalidAccessKeyId", "renew AWS_ACCESS_KEY_ID"),
}


class Answering(http.server.BaseHTTPRequestHandler):
    """An S3 server in trouble: the name of the bucket selects its answer."""

    failures = 0

    def answer(self):
        name = self.path.split("/")[1].split("?")[0]
        if name == "flaky":
            type(self).failures += 1
            status, code = (503, "SlowDown") if type(self).failures % 3 else (404, "NoSuchKey")
        else:
            status, code, _ = ANSWERS[name]
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def troubled(s3, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("bucket", ANSWERS)
def test_refused_credentials_stop_the_run(troubled, bucket):
    with pytest.raises(RunStoppedError, match=ANSWERS[bucket][2]):
        RemoteObjects(f"s3://{bucket}/store").get("key")


def test_answers_that_ask_to_try_again_are_tried_again(troubled):
    assert not RemoteObjects("s3://flaky/store").exists("key")
    assert Answering.failures >= 3


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/store", "unknown kind of URL 'ftp'.*known: s3"),
        ("s3:///store", "names no bucket"),
        ("hf://models/a/b", "hf://datasets/USER/REPO"),
    ],
)
def test_urls_that_mean_nothing_are_refused(url, message):
    with pytest.raises(UserError, match=message):
        open_objects(url)


def test_a_file_url_is_a_folder(tmp_path):
    assert place_of(f"file://{tmp_path}/a%20b") == Path(tmp_path) / "a b"
    open_objects(f"file://{tmp_path}").put_exclusive("key", b"data")
    assert (tmp_path / "key").read_bytes() == b"data"


def test_addresses_on_the_hub(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    for url, address in (
        ("datasets/lab/feats", "datasets/lab/feats/resolve/main"),
        ("datasets/lab/feats@v1/a.zarr", "datasets/lab/feats/resolve/v1/a.zarr"),
        ("buckets/lab/feats", "buckets/lab/feats/resolve"),
        ("buckets/lab/feats/a.zarr", "buckets/lab/feats/resolve/a.zarr"),
    ):
        assert HubPlace.of(f"hf://{url}").address == f"https://huggingface.co/{address}"
    for url in ("datasets/lab", "models/lab/feats", "buckets/lab/feats@v1"):
        with pytest.raises(UserError, match="stores on the Hub are"):
            HubPlace.of(f"hf://{url}")


def test_a_web_server_is_read_by_the_listing_and_never_written(web):
    (web.folder / "a").mkdir()
    (web.folder / "a" / "one").write_bytes(b"12345")
    (web.folder / "listing.json").write_bytes(listing_bytes({"a/one": 5, "top": 1}))
    objects = open_objects(web.url)
    assert (objects.list_names(""), objects.list_names("a")) == (["a", "top"], ["one"])
    assert objects.get("a/one") == b"12345"
    for write in (
        lambda: objects.put_exclusive("b", b""),
        lambda: objects.replace("b", b""),
        lambda: objects.delete("b"),
    ):
        with pytest.raises(UserError, match="can only be read"):
            write()


def test_a_web_server_without_a_listing_says_how_to_get_one(web):
    with pytest.raises(UserError, match=r"has no listing.json.*merv-pipeline push"):
        open_objects(web.url).list_names("")


@pytest.mark.parametrize("sizes", [{"../out": 1}, {"/etc/passwd": 1}, {"a": -1}, {"a": "1"}])
def test_a_listing_with_names_or_sizes_that_cannot_be_is_refused(web, sizes):
    (web.folder / "listing.json").write_bytes(listing_bytes(sizes))
    with pytest.raises(StoreFormatError, match=r"listing.json"):
        WebObjects(web.url).list_names("")


def test_a_second_driver_on_a_bucket_is_told_who_works(s3):
    with StoreLease(s3, "run-1") as first:
        assert first.holder()["run"] == "run-1"
        with pytest.raises(UserError, match=f"run-1 on .*, process {os.getpid()}"), StoreLease(s3, "run-2"):
            pass
    assert first.holder() is None
    with StoreLease(s3, "run-2") as second:
        assert second.holder()["run"] == "run-2"


def test_the_lease_of_a_dead_process_on_a_bucket_is_taken_over(s3):
    take = f"from featurestore.lease import StoreLease; StoreLease({s3!r}, 'killed').__enter__()"
    program = f"import os; {take}; os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program], check=False)
    with StoreLease(s3, "next") as lease:
        assert lease.holder()["run"] == "next"
