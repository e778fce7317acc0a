"""A server that answers as the documentation of Google Cloud Storage's XML API says, in memory, as a fixture.

No emulator that installs from a package registry has that API's conditional put, which obstore uses: fake-gcs-server
1.x answers the put with 400, gcp-storage-emulator ignores the condition. So this is our reading of the documentation
and no independent witness; what it does show is what is sent: conditions by generation, metadata, ranges, pages.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import threading
import time
from email.utils import formatdate
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

PAGE = 100  # names in one answer


class Held:
    """One object."""

    def __init__(self, data: bytes, generation: int, meta: dict[str, str]) -> None:
        self.data, self.generation, self.meta, self.time = data, generation, meta, time.time()

    @property
    def headers(self) -> dict[str, str]:
        stamp = formatdate(self.time, usegmt=True)
        shown = {"etag": f'"{hashlib.md5(self.data).hexdigest()}"', "last-modified": stamp, **self.meta}
        return shown | {"x-goog-generation": str(self.generation), "content-type": "application/octet-stream"}


class Handler(http.server.BaseHTTPRequestHandler):
    """Requests are answered one at a time: a condition and its put are one step, as at Google's."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        with self.server.turn:
            if bucket not in self.server.buckets:
                self.reply(404, b"<Error><Code>NoSuchBucket</Code></Error>")
            elif self.command == "PUT":
                self.put(self.server.buckets[bucket], key, body)
            elif not key:
                self.listing(self.server.buckets[bucket], {name: v[0] for name, v in parse_qs(parts.query).items()})
            elif key not in self.server.buckets[bucket]:
                self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
            elif self.command == "DELETE":
                del self.server.buckets[bucket][key]
                self.reply(204)
            else:
                self.give(self.server.buckets[bucket][key])

    do_GET = do_PUT = do_HEAD = do_DELETE = answer

    def put(self, held: dict[str, Held], key: str, body: bytes) -> None:
        wanted, now = self.headers.get("x-goog-if-generation-match"), held.get(key)
        if wanted is not None and int(wanted) != (now.generation if now else 0):  # 0: must not exist
            self.reply(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            return
        meta = {name: value for name, value in self.headers.items() if name.lower().startswith("x-goog-meta-")}
        self.server.generation += 1
        held[key] = Held(body, self.server.generation, meta)
        self.reply(200, headers=held[key].headers)

    def give(self, held: Held) -> None:
        data, status, headers = held.data, 200, held.headers
        if asked := self.headers.get("range"):
            start, _, stop = asked.removeprefix("bytes=").partition("-")
            data = data[int(start) : int(stop) + 1 if stop else None]
            status, last = 206, int(start) + len(data) - 1
            headers |= {"content-range": f"bytes {start}-{last}/{len(held.data)}"}
        self.reply(status, data, headers)

    def listing(self, held: dict[str, Held], asked: dict[str, str]) -> None:
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter")
        found: dict[str, Held | None] = {}
        for key in sorted(name for name in held if name.startswith(prefix)):
            inner, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            found |= {f"{prefix}{inner}{cut}": None} if cut else {key: held[key]}
        names = [name for name in found if name > asked.get("continuation-token", "")]
        parts = [entry(name, found[name]) for name in names[:PAGE]]
        more = f"<NextContinuationToken>{escape(names[PAGE - 1])}</NextContinuationToken>" if names[PAGE:] else ""
        self.reply(200, f"<ListBucketResult>{''.join(parts)}{more}</ListBucketResult>".encode())

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def entry(name: str, held: Held | None) -> str:
    if held is None:
        return f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(held.time))
    fields = {"Key": escape(name), "Size": len(held.data), "LastModified": stamp, "ETag": held.headers["etag"]}
    return f"<Contents>{''.join(f'<{tag}>{value}</{tag}>' for tag, value in fields.items())}</Contents>"


@pytest.fixture
def gcs(monkeypatch):
    """A URL of an empty bucket; the environment says how to reach it, without credentials."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.turn, server.generation, server.buckets = threading.Lock(), 0, {"bucket": {}}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("GOOGLE_")]:
        monkeypatch.delenv(name)
    address = f"http://127.0.0.1:{server.server_port}"
    key = {"gcs_base_url": address, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(key))
    monkeypatch.setenv("GOOGLE_BASE_URL", address)
    yield "gs://bucket/stores/one.zarr"
    server.shutdown()
    server.server_close()
