"""Tar shards in a bucket of the S3 server and behind a web server."""

import http.server
import io
import json
import os
import re
import tarfile
import threading
from pathlib import Path
from typing import ClassVar

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.objects.remote import connect
from mervcache.errors import MediaError, RunStoppedError, UserError
from pipeline.datasets import load_dataset
from pipeline.media import Source, resolve_media
from pipeline.media_cache import MediaCache
from pipeline.remote_shards import RemoteRoot, connection, parse_sidecar
from tests.featurestore.gcs_server import gcs
from tests.featurestore.s3_server import counts
from tests.pipeline.datasets.conftest import add_to_tar

__all__ = ["gcs"]  # a fixture
ALIGN = "webdataset-align"
VIDEO_BYTES = 300_000  # far enough apart that no read of headers goes through one


def shard(*keys: str, size: int = VIDEO_BYTES) -> bytes:
    """A shard of media that begin with their key, each with a caption."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key in keys:
            add_to_tar(tar, f"{key}.mp4", content(key, size))
            add_to_tar(tar, f"{key}.txt", f"caption of {key}".encode())
    return buffer.getvalue()


def content(key: str, size: int = VIDEO_BYTES) -> bytes:
    return key.encode().ljust(size, b"m")


def sidecar(archive: bytes) -> bytes:
    """The index that DALI's wds2idx writes: a line for each sample."""
    lines: dict[str, list[str]] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            lines.setdefault(key, []).append(f"{extension} {member.offset_data} {member.size} {member.name}")
    return "\n".join([f"v1.2 {len(lines)}", *map(" ".join, lines.values())]).encode() + b"\n"


class Bucket:
    def __init__(self, url: str, endpoint: str) -> None:
        self.url, self.endpoint = url, endpoint
        self._store = connect(url)
        connection.cache_clear()  # of another server

    def put(self, key: str, data: bytes) -> bytes:
        obstore.put(self._store, key, data)
        return data

    def delete(self, key: str) -> None:
        obstore.delete(self._store, key)

    def counts(self) -> dict[str, list[int]]:
        return counts(self.endpoint)


@pytest.fixture
def bucket(s3, s3_endpoint, tmp_path, monkeypatch) -> Bucket:
    monkeypatch.setenv("MERV_CACHE_DIR", str(tmp_path / "cache"))
    return Bucket(f"{s3.rpartition('/stores')[0]}", s3_endpoint)


def other_host(monkeypatch, tmp_path: Path) -> None:
    """A host that has indexed nothing."""
    monkeypatch.setenv("MERV_CACHE_DIR", str(tmp_path / "other"))


def data_of(root, path: str) -> bytes:
    with Source.find(root, path).fetched() as source, source.open() as file:
        return file.read()


def test_a_bucket_is_a_root_whose_clips_have_the_ids_of_the_same_folder(bucket, tmp_path):
    (tmp_path / "local/a").mkdir(parents=True)
    for name, keys in (("a/0.tar", ("x", "y")), ("1.tar", ("z",))):
        data = bucket.put(f"data/{name}", shard(*keys))
        (tmp_path / "local" / name).write_bytes(data)
    bucket.put("data/note.txt", b"")
    here, there = load_dataset("webdataset", tmp_path / "local"), load_dataset("webdataset", f"{bucket.url}/data/")
    assert there.clips == here.clips
    assert there.samples == here.samples
    assert str(there.root) == f"{bucket.url}/data"
    for clip in there.clips:
        key = clip.path.rpartition("/")[2].removesuffix(".mp4")
        assert data_of(there.root, clip.path) == content(key)


def test_shards_named_by_address_need_no_root_and_are_known_by_their_key_in_the_bucket(bucket):
    for number in range(3):
        bucket.put(f"data/{number}.tar", shard(str(number)))
    listing = load_dataset("webdataset", None, shards=f"{bucket.url}/data/{{0..3}}.tar")
    assert [clip.path for clip in listing.clips] == [f"data/{n}.tar/{n}.mp4" for n in range(3)]
    assert listing.missing == {"data": 1}
    below = load_dataset("webdataset", f"{bucket.url}/data", shards=["0.tar", f"{bucket.url}/data/1.tar"])
    assert [clip.path for clip in below.clips] == ["0.tar/0.mp4", "1.tar/1.mp4"]


def test_listing_reads_headers_and_captions_and_only_once(bucket):
    keys = [f"k{n}" for n in range(8)]
    data = bucket.put("data/0.tar", shard(*keys))
    bucket.counts()
    first = load_dataset("webdataset", f"{bucket.url}/data")
    assert [sample.turns[1].text for sample in first.samples[ALIGN]] == [f"caption of {key}" for key in keys]
    seen = bucket.counts()
    requests, num_bytes = seen["GET"]
    assert requests == 1 + len(keys) + 1  # for an index file, for each video, and from the last caption to the end
    assert num_bytes < len(data) / 5
    assert load_dataset("webdataset", f"{bucket.url}/data") == first
    assert list(bucket.counts()) == ["LIST"]


def test_small_members_are_read_through_instead_of_one_by_one(bucket):
    data = bucket.put("data/0.tar", shard(*(f"k{n}" for n in range(100)), size=20_000))
    bucket.counts()
    assert len(load_dataset("webdataset", f"{bucket.url}/data").clips) == 100
    requests, num_bytes = bucket.counts()["GET"]
    assert requests < 10
    assert num_bytes < 1.1 * len(data)


def test_a_member_is_one_ranged_request_and_stays_in_the_spool(bucket, tmp_path):
    bucket.put("data/0.tar", shard("a", "b"))
    root = load_dataset("webdataset", f"{bucket.url}/data").root
    bucket.counts()
    assert data_of(root, "0.tar/b.mp4") == content("b")
    assert bucket.counts() == {"GET": [1, VIDEO_BYTES + 512]}
    assert data_of(root, "0.tar/b.mp4") == content("b")
    assert bucket.counts() == {}
    assert sum(path.stat().st_size for path in (tmp_path / "cache/spool").glob("*-*")) == VIDEO_BYTES


def test_spool_gb_is_the_most_that_copies_take_and_must_hold_the_largest_medium(bucket, tmp_path):
    bucket.put("data/0.tar", shard(*"abcdef"))
    options = {"spool_gb": 2.5 * VIDEO_BYTES / 1e9, "spool_dir": str(tmp_path / "spool")}
    listing = load_dataset("webdataset", f"{bucket.url}/data", **options)
    for clip in listing.clips:
        assert data_of(listing.root, clip.path)
        assert len(list((tmp_path / "spool").glob("*-*"))) <= 2
    with pytest.raises(UserError, match=r"0\.tar/a\.mp4 has 0\.0 GB, spool_gb allows 0\.0001: raise it"):
        load_dataset("webdataset", f"{bucket.url}/data", spool_gb=0.0001)


def test_an_index_file_of_dali_saves_the_walk_through_the_headers(bucket, monkeypatch, tmp_path):
    data = bucket.put("data/0.tar", shard(*"abcdef"))
    walked = load_dataset("webdataset", f"{bucket.url}/data")
    bucket.put("data/0.idx", sidecar(data))
    other_host(monkeypatch, tmp_path)
    bucket.counts()
    listing = load_dataset("webdataset", f"{bucket.url}/data", stage=None, kind="video", limit=3)
    assert listing.clips == walked.clips[:3]
    assert data_of(listing.root, "0.tar/f.mp4") == content("f")
    bucket.counts()
    other_host(monkeypatch, tmp_path / "again")
    assert resolve_media(f"{bucket.url}/data", "0.tar/c.mp4").offset == resolve_media(walked.root, "0.tar/c.mp4").offset
    seen = bucket.counts()
    assert seen["GET"][0] == 2  # the index file, and the last header with the end of the archive


@pytest.mark.parametrize(
    "fault", ["too short", "with a gap", "shifted", "of a larger shard", "of another version", "with a space"]
)
def test_an_index_file_that_does_not_fit_its_shard_is_not_believed(bucket, fault):
    data = bucket.put("data/0.tar", shard("a", "b", "c"))
    index = {
        "too short": sidecar(data).replace(b"v1.2 3", b"v1.2 2").rpartition(b"mp4")[0].strip() + b"\n",
        "with a gap": sidecar(data).replace(sidecar(data).splitlines(True)[2], b"").replace(b"v1.2 3", b"v1.2 2"),
        "shifted": sidecar(data).replace(b"mp4 ", b"mp4 1"),
        "of a larger shard": sidecar(shard("a", "b", "c", "d")),
        "of another version": sidecar(data).replace(b"v1.2", b"v9"),
        "with a space": sidecar(data).replace(b"a.mp4", b"a b.mp4"),
    }[fault]
    bucket.put("data/0.idx", index)
    listing = load_dataset("webdataset", f"{bucket.url}/data")
    assert [clip.path for clip in listing.clips] == ["0.tar/a.mp4", "0.tar/b.mp4", "0.tar/c.mp4"]


def test_an_index_file_that_names_other_places_gives_an_error_and_no_bytes(bucket):
    data = bucket.put("data/0.tar", shard("a", "b", "c"))
    places = dict(parse_sidecar(sidecar(data), len(data)))
    offset, size = places["a.mp4"]
    wrong = sidecar(data).replace(f"mp4 {offset} {size}".encode(), f"mp4 {offset} {size - 9}".encode())
    bucket.put("data/0.idx", wrong)
    listing = load_dataset("webdataset", f"{bucket.url}/data")
    with pytest.raises(MediaError, match="index is wrong"):
        data_of(listing.root, "0.tar/a.mp4")
    assert data_of(listing.root, "0.tar/b.mp4") == content("b")


def test_a_shard_that_changes_after_listing_fails_its_clips_on_every_host(bucket, monkeypatch, tmp_path):
    bucket.put("data/0.tar", shard("a", "b"))
    listing = load_dataset("webdataset", f"{bucket.url}/data")
    bucket.put("data/0.tar", shard("b", "a"))
    with pytest.raises(MediaError, match="shard changed after it was listed"):
        data_of(listing.root, "0.tar/a.mp4")
    other_host(monkeypatch, tmp_path)
    with pytest.raises(MediaError, match="shard changed after it was listed"):
        data_of(listing.root, "0.tar/a.mp4")
    listed_again = load_dataset("webdataset", f"{bucket.url}/data")
    assert data_of(listed_again.root, "0.tar/a.mp4") == content("a")


def test_a_shard_that_is_deleted_after_listing_stops_the_run(bucket):
    bucket.put("data/0.tar", shard("a"))
    listing = load_dataset("webdataset", f"{bucket.url}/data")
    bucket.delete("data/0.tar")
    with pytest.raises(RunStoppedError, match=r"0\.tar is gone since it was listed"):
        data_of(listing.root, "0.tar/a.mp4")


def test_a_truncated_shard_and_what_is_no_tar_are_counted_and_the_others_are_listed(bucket):
    bucket.put("data/0.tar", shard("a", "b")[: VIDEO_BYTES + 4096])
    bucket.put("data/1.tar", b"not a tar" * 1000)
    bucket.put("data/2.tar", shard("c"))
    bucket.put("data/x.tar/3.tar", shard("d"))
    bucket.put("data/4.tar.gz", b"x")
    listing = load_dataset("webdataset", f"{bucket.url}/data")
    assert [clip.path for clip in listing.clips] == ["0.tar/a.mp4", "2.tar/c.mp4"]
    assert {reason: found.examples for reason, found in listing.rejected.items()} == {
        "tar archive is damaged, its end is not listed": ("0.tar",),
        "tar archive is not a plain, readable tar": ("1.tar",),
        "shard is not called NAME.tar, or is below a folder that is": ("x.tar/3.tar",),
        "tar shard is compressed, and members of a compressed tar cannot be read in place": ("4.tar.gz",),
    }


def test_captions_come_from_the_table_beside_a_shard_where_its_members_have_none(bucket):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        add_to_tar(tar, "1.mp4", b"m")
        add_to_tar(tar, "2.mp4", b"m")
        add_to_tar(tar, "2.json", json.dumps({"caption": "from json"}).encode())
    bucket.put("data/0.tar", buffer.getvalue())
    table = io.BytesIO()
    pq.write_table(pa.table({"key": ["1", "2"], "caption": ["from parquet", "no"]}), table)
    bucket.put("data/0.parquet", table.getvalue())
    listing = load_dataset("webdataset", f"{bucket.url}/data")
    assert [sample.turns[1].text for sample in listing.samples[ALIGN]] == ["from parquet", "from json"]


def test_digests_of_remote_media_are_known_until_the_shard_changes(bucket, tmp_path):
    bucket.put("data/0.tar", shard("a", "b"))
    root = load_dataset("webdataset", f"{bucket.url}/data").root
    with MediaCache(tmp_path / "digests") as cache:
        digest = cache.sha256(Source.find(root, "0.tar/a.mp4"))
    with MediaCache(tmp_path / "digests") as cache:
        assert cache.known(Source.find(root, "0.tar/a.mp4")) == digest
        bucket.put("data/0.tar", shard("a", "c"))
        root = load_dataset("webdataset", f"{bucket.url}/data").root
        assert cache.known(Source.find(root, "0.tar/a.mp4")) is None


@pytest.mark.parametrize(
    ("root", "options", "message"),
    [
        ("s3://{bucket}", {"spool_gb": "lots"}, "spool_gb must be a positive number of GB, got 'lots'"),
        ("s3://{bucket}", {"spool_gb": 0}, "spool_gb must be a positive number of GB, got 0"),
        ("s3://{bucket}", {"spool_dir": "here"}, "spool_dir must be an absolute folder"),
        ("s3://{bucket}/nothing", {}, r"no \*\.tar below s3://.*/nothing"),
        ("s3://no-such-bucket-here", {}, "there is no bucket 'no-such-bucket-here'"),
        ("nonsense://x", {}, "kind of URL"),
        ("s3://{bucket}", {"media_links": "/tmp"}, "media_links is about links in a folder"),
        ("s3://{bucket}/data", {"shards": "s3://{bucket}/other/0.tar"}, "is not below s3://.*/data"),
        (None, {"shards": ["s3://{bucket}/0.tar", "1.tar"]}, "in one folder, bucket or host"),
        (None, {"shards": "https://host/{{0..1}}.tar?***"}, "recorded without its credentials"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(bucket, root, options, message):
    name = bucket.url.removeprefix("s3://")

    def filled(value):
        if isinstance(value, list):
            return list(map(filled, value))
        return value.format(bucket=name) if isinstance(value, str) else value

    with pytest.raises(UserError, match=message):
        load_dataset("webdataset", filled(root), **{key: filled(value) for key, value in options.items()})


def test_other_datasets_say_that_they_read_folders(bucket):
    with pytest.raises(UserError, match="dataset folder reads a folder"):
        load_dataset("folder", bucket.url)


def test_shards_are_read_from_google_storage(gcs, tmp_path, monkeypatch):
    monkeypatch.setenv("MERV_CACHE_DIR", str(tmp_path / "cache"))
    connection.cache_clear()  # of another server
    url = f"{gcs.rpartition('/')[0]}/shards"
    obstore.put(connect(url), "0.tar", shard("a", "b"))
    listing = load_dataset("webdataset", url)
    assert [clip.path for clip in listing.clips] == ["0.tar/a.mp4", "0.tar/b.mp4"]
    assert data_of(listing.root, "0.tar/b.mp4") == content("b")


class PlainServer(http.server.BaseHTTPRequestHandler):
    """A web server as those in front of archives: HEAD, GET and ranges, without ETags; it wants a token."""

    files: ClassVar[dict[str, bytes]] = {}
    modified: ClassVar[str] = "Sun, 01 Nov 2026 00:00:00 GMT"
    token: ClassVar[str] = ""

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body):
        path, _, query = self.path.partition("?")
        data = self.files.get(path)
        if data is None or query != self.token:
            self.send_error(404 if query == self.token else 403)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = (int(wanted[1]), int(wanted[2] or len(data) - 1)) if wanted else (0, len(data) - 1)
        body = data[start : end + 1]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", self.modified)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments):
        """Silence."""


@pytest.fixture
def plain_web(tmp_path, monkeypatch):
    monkeypatch.setenv("MERV_CACHE_DIR", str(tmp_path / "cache"))
    PlainServer.files, PlainServer.token = {}, ""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), PlainServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", PlainServer
    server.shutdown()
    server.server_close()


def test_shards_are_read_over_http(plain_web, monkeypatch):
    address, server = plain_web
    server.files["/cc/0.tar"] = shard("a", "b")
    listing = load_dataset("webdataset", None, shards=f"{address}/cc/{{0..1}}.tar")
    assert [clip.path for clip in listing.clips] == ["cc/0.tar/a.mp4", "cc/0.tar/b.mp4"]
    assert listing.missing == {"cc": 1}
    assert data_of(listing.root, "cc/0.tar/b.mp4") == content("b")
    monkeypatch.setattr(server, "modified", "Mon, 02 Nov 2026 00:00:00 GMT")
    with pytest.raises(MediaError, match="changed after it was listed"):
        data_of(listing.root, "cc/0.tar/a.mp4")
    with pytest.raises(UserError, match="cannot be listed: name its shards"):
        load_dataset("webdataset", address)


def test_what_follows_a_question_mark_is_sent_and_never_written_down(plain_web, tmp_path):
    address, server = plain_web
    server.files["/0.tar"], server.token = shard("a"), "sig=secret"
    listing = load_dataset("webdataset", None, shards=f"{address}/0.tar?sig=secret")
    assert data_of(listing.root, "0.tar/a.mp4") == content("a")
    written = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert written
    assert not any(b"secret" in data for data in written)
    assert resolve_media(RemoteRoot(f"{address}?sig=secret"), "0.tar/a.mp4").size == VIDEO_BYTES


def test_region_endpoint_and_temporary_credentials_come_from_the_environment(plain_web, monkeypatch):
    address, server = plain_web
    seen = []
    monkeypatch.setattr(server, "_answer", lambda self, with_body: (seen.append(self.headers), self.send_error(403)))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_REGION": "eu-north-1",
        "AWS_ACCESS_KEY_ID": "who",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_SESSION_TOKEN": "for an hour",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunStoppedError, match=r"refused these credentials .* renew AWS_ACCESS_KEY_ID"):
        load_dataset("webdataset", "s3://some-bucket-of-ours/data")
    assert "Credential=who/" in seen[0]["authorization"]
    assert "/eu-north-1/s3/aws4_request" in seen[0]["authorization"]
    assert seen[0]["x-amz-security-token"] == "for an hour"
