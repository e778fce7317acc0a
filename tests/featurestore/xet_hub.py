"""The Hub of `hub_server.py` with Xet, and a bucket: what huggingface_hub sends goes through the real hf_xet.

hf_xet keeps content in a folder when a server names one (`local://`), in the chunks and blocks that it would send.
The server finds a file by its sha256 in the lists that hf_xet wrote there. `python -m pytest` finds the fixture
`xet_hub`.
"""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.featurestore.hub_server import REPO, Handler, Hub, git_oid, serve

HEADER, ENTRY = 48, 48  # bytes, of hf_xet's lists
VERIFIED, WITH_SHA256 = 0x80000000, 0x40000000
END = b"\xff" * 32


class XetHub(Hub):
    """A dataset repository and a bucket `lab/feats`, over one content store."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.hashes: dict[str, str] = {}  # sha256 -> hash of Xet
        self.sizes: dict[str, int] = {}  # hash of Xet -> bytes
        self.bucket: dict[str, tuple[str, bytes]] = {}  # path -> hash of Xet, content
        self.batches: list[list[str]] = []  # paths of each request that changed the bucket
        self.plain: list[str] = []  # paths read over HTTP

    @property
    def endpoint(self) -> str:
        return f"local://{self.folder}"

    def content(self, xet_hash: str) -> bytes:
        """A file, put together again by hf_xet."""
        import hf_xet

        self._read_lists(xet_hash, self.sizes)
        out, expiry = self.folder / f"{xet_hash}.out", int(time.time()) + 3600
        options = {"endpoint": self.endpoint, "token": "t", "token_expiry_unix_secs": expiry}
        with hf_xet.XetSession().new_file_download_group(**options) as group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, self.sizes[xet_hash]), str(out))
        return out.read_bytes()

    def hash_of(self, sha256: str) -> str:
        self._read_lists(sha256, self.hashes)
        return self.hashes[sha256]

    def _read_lists(self, wanted: str, known: dict) -> None:
        """The lists of files that hf_xet has put into its store, where something is not known yet."""
        with self.lock:
            for path in [] if wanted in known else self.folder.glob("xet/xorbs/shards/*.mdb"):
                for xet_hash, size, sha256 in listed_files(path.read_bytes()):
                    self.sizes[xet_hash] = size
                    self.hashes |= {sha256: xet_hash} if sha256 else {}


def listed_files(data: bytes) -> Iterator[tuple[str, int, str | None]]:
    """(hash of Xet, bytes, sha256) of the files in one list."""
    at = HEADER
    while data[at : at + 32] != END:
        flags, entries = struct.unpack("<II", data[at + 32 : at + 40])
        parts = [at + ENTRY * number for number in range(1, entries + 1)]
        size = sum(struct.unpack("<I", data[part + 36 : part + 40])[0] for part in parts)
        xet_hash, sha256 = word_hex(data[at : at + 32]), None
        at += HEADER + ENTRY * entries * (2 if flags & VERIFIED else 1)
        if flags & WITH_SHA256:
            sha256 = word_hex(data[at : at + 32])
            at += ENTRY
        yield xet_hash, size, sha256


def word_hex(data: bytes) -> str:
    """Hex digits of four little-endian numbers, as hf_xet writes a hash."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


class XetHandler(Handler):
    def route(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.server.hub
        if re.fullmatch(rf"/api/(datasets|buckets)/{REPO}/xet-(read|write)-token(/[^/]+)?", path):
            return self.token(hub)
        if path.startswith("/large/") and self.command == "GET":
            hub.plain.append(path.removeprefix("/large/"))
        if found := re.fullmatch(rf"/(?:api/)?buckets/{REPO}/(\w+[-\w]*)/?(.*)", path):
            self.body = self.rfile.read(int(self.headers.get("content-length", 0)))
            return getattr(self, f"bucket_{found[1].replace('-', '_')}")(hub, found[2])
        return super().route()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = route

    def token(self, hub: XetHub) -> None:
        expiry = int(time.time()) + 3600
        headers = {"x-xet-cas-url": hub.endpoint, "x-xet-access-token": "t", "x-xet-token-expiration": str(expiry)}
        self.reply(200, {"casUrl": hub.endpoint, "accessToken": "t", "exp": expiry}, headers)

    def apply(self, hub: XetHub, lines: list[dict]) -> str:
        for line in lines:
            value = line["value"]
            if line["key"] == "lfsFile" and value["oid"] not in hub.large:
                hub.large[value["oid"]] = hub.content(hub.hash_of(value["oid"]))
        return super().apply(hub, lines)

    def resolve(self, hub: XetHub, revision: str, path: str) -> None:
        data = hub.trees[revision].get(path)
        if self.command != "HEAD" or data is None:
            return super().resolve(hub, revision, path)
        if path not in hub.lfs_paths[revision]:
            return self.reply(200, data, {"etag": f'"{git_oid(data)}"', "x-repo-commit": revision})
        sha256 = self.entry(hub, revision, path)["lfs"]["oid"]
        headers = self.xet_headers(hub.hash_of(sha256), f"datasets/{REPO}", f"/{revision}", len(hub.large[sha256]))
        headers |= {"x-linked-etag": f'"{sha256}"', "x-repo-commit": revision}
        elsewhere = self.server.url.replace("127.0.0.1", "localhost")  # another host, whose headers are not asked for
        return self.reply(302, {}, headers | {"location": f"{elsewhere}/large/{sha256}"})

    def xet_headers(self, xet_hash: str, where: str, revision: str, size: int) -> dict[str, str]:
        refresh = f"{self.server.url}/api/{where}/xet-read-token{revision}"
        return {"x-xet-hash": xet_hash, "link": f'<{refresh}>; rel="xet-auth"', "x-linked-size": str(size)}

    def bucket_tree(self, hub: XetHub, _: str) -> None:
        self.reply(200, [self.bucket_entry(hub, path) for path in sorted(hub.bucket)])

    def bucket_paths_info(self, hub: XetHub, _: str) -> None:
        paths = json.loads(self.body)["paths"]
        self.reply(200, [self.bucket_entry(hub, path) for path in paths if path in hub.bucket])

    def bucket_entry(self, hub: XetHub, path: str) -> dict:
        xet_hash, data = hub.bucket[path]
        return {"type": "file", "path": path, "size": len(data), "xetHash": xet_hash}

    def bucket_batch(self, hub: XetHub, _: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        with hub.lock:
            hub.batches.append([line["path"] for line in lines])
            for line in lines:
                if line["type"] == "deleteFile":
                    del hub.bucket[line["path"]]
                else:
                    hub.bucket[line["path"]] = (line["xetHash"], hub.content(line["xetHash"]))
        self.reply(200, {"failed": []})

    def bucket_resolve(self, hub: XetHub, path: str) -> None:
        if path not in hub.bucket:
            return self.refuse(404, "EntryNotFound", "no such file")
        xet_hash, data = hub.bucket[path]
        if self.command == "HEAD":
            headers = {"etag": f'"{git_oid(data)}"', **self.xet_headers(xet_hash, f"buckets/{REPO}", "", len(data))}
            return self.reply(200, data, headers)
        hub.plain.append(path)
        return self.give(data)


@pytest.fixture
def xet_hub(tmp_path, monkeypatch):
    """A repository `hf://datasets/lab/feats` and a bucket `hf://buckets/lab/feats`, both empty, with Xet."""
    pytest.importorskip("hf_xet")
    folder = tmp_path / "content"
    folder.mkdir()
    with serve(XetHub(folder), XetHandler, monkeypatch, disable_xet=False) as hub:
        yield hub
