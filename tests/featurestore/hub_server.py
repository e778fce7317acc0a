"""A server that speaks the Hub's protocol as huggingface_hub calls it, in memory: commits, LFS, trees, files.

Our reading of the library's source, and no independent witness. What it shows is what is sent, in which order, and what
becomes of it when a push is stopped or overtaken. `python -m pytest` finds it as the fixture `hub`.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

REPO, WRITER, READER = "lab/feats", "secret", "may-only-read"
PAGE = 7  # files in one answer of a listing
LFS_BYTES = 512  # from here on; the Hub's own bound is 10 MB, or a binary sample


class Hub:
    """One dataset repository: commits, each a whole tree, and the large files by sha256."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.trees: dict[str, dict[str, bytes]] = {}
        self.heads: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.large: dict[str, bytes] = {}
        self.uploads: list[str] = []  # sha256 of each large file that was sent
        self.lfs_paths: dict[str, set[str]] = {}  # commit -> paths of large files
        self.commits: list[list[str]] = []  # the paths of each
        self.hold_at: int | None = None  # the commit that is not answered
        self.applies_held = False
        self.held, self.released = threading.Event(), threading.Event()
        self.commit({".gitattributes": b"*.parquet filter=lfs"}, set())

    def commit(self, changes: dict[str, bytes | None], large: set[str]) -> str:
        old = self.heads.get("main", "")
        tree = {path: data for path, data in {**self.trees.get(old, {}), **changes}.items() if data is not None}
        sha = hashlib.sha1(f"{len(self.trees)} {old}".encode()).hexdigest()
        self.trees[sha] = tree
        self.lfs_paths[sha] = (self.lfs_paths.get(old, set()) - set(changes)) | large
        self.heads["main"] = sha
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        return self.trees[self.heads["main"]]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet: the second would wait 40 ms for the first one's receipt
    disable_nagle_algorithm = True

    def route(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = urlsplit(self.path)
        path, hub = unquote(parts.path), self.server.hub
        if found := re.fullmatch(r"/large/([0-9a-f]{64})", path):
            return self.store(hub, found[1]) if self.command == "PUT" else self.give(hub.large[found[1]])
        if path in ("/verify", "/api/validate-yaml"):
            return self.reply(200, {"errors": [], "warnings": []})
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in (WRITER, READER):
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if token == READER and self.command == "POST" and "paths-info" not in path:
            return self.refuse(403, "", "you may only read")
        if path == f"/api/datasets/{REPO}/refs":
            return self.refs(hub)
        if found := re.fullmatch(rf"/api/datasets/{REPO}/tag/([^/]+)", path):
            return self.tag(hub, found[1])
        found = re.fullmatch(rf"/(?:api/)?datasets/{REPO}(?:\.git)?/(\w+[-\w]*)/([^/]+)/?(.*)", path)
        if not found:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        with hub.lock:
            revision = hub.heads.get(found[2]) or hub.tags.get(found[2], found[2])
            if revision not in hub.trees and found[1] != "info":
                return self.refuse(404, "RevisionNotFound", "no such revision")
        return getattr(self, found[1].replace("-", "_"))(hub, revision, found[3])

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = route

    def refs(self, hub: Hub) -> None:
        listed = {
            kind: [{"name": name, "ref": f"refs/{place}/{name}", "targetCommit": sha} for name, sha in names.items()]
            for kind, place, names in (("branches", "heads", hub.heads), ("tags", "tags", hub.tags))
        }
        self.reply(200, {**listed, "converts": [], "pullRequests": []})

    def tag(self, hub: Hub, named: str) -> None:
        """Make a tag of the commit named, or delete the tag named."""
        with hub.lock:
            if self.command == "DELETE":
                del hub.tags[named]
                return self.reply(200, {})
            name = json.loads(self.body)["tag"]
            if name in hub.tags:
                return self.refuse(409, "", "the tag exists")
            hub.tags[name] = named
        return self.reply(200, {})

    def revision(self, hub: Hub, revision: str, _: str) -> None:
        self.reply(200, {"id": REPO, "sha": revision, "private": True, "tags": [], "siblings": []})

    def paths_info(self, hub: Hub, revision: str, _: str) -> None:
        asked = parse_qs(self.body.decode())["paths"]
        self.reply(200, [self.entry(hub, revision, path) for path in asked if path in hub.trees[revision]])

    def tree(self, hub: Hub, revision: str, folder: str) -> None:
        paths = sorted(path for path in hub.trees[revision] if not folder or path.startswith(f"{folder}/"))
        if not paths:
            return self.refuse(404, "EntryNotFound", "no such folder")
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(paths):
            address = f"{self.server.url}{urlsplit(self.path).path}?recursive=true&cursor={start + PAGE}"
            headers["link"] = f'<{address}>; rel="next"'
        return self.reply(200, [self.entry(hub, revision, path) for path in paths[start : start + PAGE]], headers)

    def entry(self, hub: Hub, revision: str, path: str) -> dict:
        data = hub.trees[revision][path]
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if path in hub.lfs_paths[revision]:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def preupload(self, hub: Hub, revision: str, _: str) -> None:
        answers = []
        for file in json.loads(self.body)["files"]:
            is_large = file["size"] >= LFS_BYTES or file["path"].endswith(".parquet")
            answers.append(
                {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            )
        self.reply(200, {"files": answers})

    def info(self, hub: Hub, _: str, rest: str) -> None:
        assert rest == "objects/batch"
        asked, answers = json.loads(self.body)["objects"], []
        for item in asked:
            address = {"href": f"{self.server.url}/large/{item['oid']}"}
            actions = {"upload": address, "verify": {"href": f"{self.server.url}/verify"}}
            answers.append(item if item["oid"] in hub.large else {**item, "actions": actions})
        self.reply(200, {"transfer": "basic", "objects": answers})

    def store(self, hub: Hub, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        with hub.lock:
            hub.large[oid] = self.body
            hub.uploads.append(oid)
        self.reply(200, {})

    def commit(self, hub: Hub, revision: str, _: str) -> None:
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        with hub.lock:
            is_held = hub.hold_at == len(hub.commits)
            if is_held and not hub.applies_held:
                hub.hold_at = None
            elif header["value"].get("parentCommit", revision) != hub.heads["main"]:
                return self.refuse(412, "", "A commit has happened since. Please refresh and try again.")
            else:
                sha = self.apply(hub, lines)
        if is_held:
            hub.hold_at = None
            hub.held.set()
            hub.released.wait(60)
            self.close_connection = True
            return None
        return self.reply(200, {"commitUrl": f"{self.server.url}/c/{sha}", "commitOid": sha, "success": True})

    def apply(self, hub: Hub, lines: list[dict]) -> str:
        changes: dict[str, bytes | None] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = hub.large[value["oid"]]
            else:
                changes[value["path"]] = None
        hub.commits.append(list(changes))
        return hub.commit(changes, {line["value"]["path"] for line in lines if line["key"] == "lfsFile"})

    def resolve(self, hub: Hub, revision: str, path: str) -> None:
        data = hub.trees[revision].get(path)
        if data is None:
            self.refuse(404, "EntryNotFound", "no such file")
        elif path in hub.lfs_paths[revision]:  # as the Hub sends readers of large files elsewhere
            self.reply(302, {}, {"location": f"{self.server.url}/large/{hashlib.sha256(data).hexdigest()}"})
        else:
            self.give(data)

    def give(self, data: bytes) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        start, stop = (int(found[1]), int(found[2] or len(data) - 1) + 1) if found else (0, len(data))
        headers = {"etag": f'"{git_oid(data)}"'}
        if found:
            headers["content-range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
        self.reply(206 if found else 200, data[start:stop], headers)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.reply(status, {"error": message}, {"x-error-message": message} | ({"x-error-code": code} if code else {}))

    def reply(self, status: int, answer: object, headers: dict[str, str] | None = None) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve(hub: Hub, handler: type[Handler], monkeypatch: pytest.MonkeyPatch, *, disable_xet: bool) -> Iterator[Hub]:
    """The server of a hub, with a token that may write to it in the environment."""
    from huggingface_hub import constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.hub, server.url = hub, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()  # seconds until it sees its end
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", str(int(disable_xet)))  # of processes that a test starts, at the import
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", disable_xet)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield hub
    hub.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(monkeypatch):
    """An empty repository, `hf://datasets/lab/feats`, and a token that may write to it; large files without Xet."""
    with serve(Hub(), Handler, monkeypatch, disable_xet=True) as hub:
        yield hub
