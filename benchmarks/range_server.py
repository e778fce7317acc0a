"""An S3 server that only reads: buckets are the folders of one folder, and every answer waits.

    python benchmarks/range_server.py FOLDER PORT LATENCY_S

It answers what readers send: GET with ranges, HEAD and listings (version 2). A range is sent from the file by the
kernel, without reading the whole object as moto does. Signatures are not checked.
"""

from __future__ import annotations

import os
import re
import sys
import time
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE_KEYS = 1000


class Handler(BaseHTTPRequestHandler):
    """One connection, which stays open between requests."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    folder: ClassVar[Path]
    latency_s: ClassVar[float]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def _answer(self, *, with_body: bool) -> None:
        time.sleep(self.latency_s)
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).strip("/").partition("/")
        root = self.folder / bucket
        if not key:
            self._send(HTTPStatus.OK, listing(root, bucket, parse_qs(url.query)) if bucket else b"")
            return
        file = (root / key).resolve()
        if not (file.is_relative_to(root.resolve()) and file.is_file()):
            missing = f"<Error><Code>NoSuchKey</Code><Key>{escape(key)}</Key></Error>".encode()
            self._send(HTTPStatus.NOT_FOUND, missing if with_body else b"")
            return
        self._send_file(file, with_body=with_body)

    def _send(self, status: HTTPStatus, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, file: Path, *, with_body: bool) -> None:
        about = file.stat()
        start, stop = byte_range(self.headers.get("Range"), about.st_size)
        if start >= stop and about.st_size:
            self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"")
            return
        is_part = "Range" in self.headers
        self.send_response(HTTPStatus.PARTIAL_CONTENT if is_part else HTTPStatus.OK)
        if is_part:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{about.st_size}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{about.st_mtime_ns:x}-{about.st_size:x}"')
        self.send_header("Last-Modified", formatdate(about.st_mtime, usegmt=True))
        self.end_headers()
        self.wfile.flush()
        if with_body:
            with file.open("rb") as source:
                while start < stop:
                    start += os.sendfile(self.connection.fileno(), source.fileno(), start, stop - start)


def byte_range(header: str | None, size: int) -> tuple[int, int]:
    """First byte and the one after the last of a Range header; the whole file without one."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if found is None:
        return 0, size
    first, last = found.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1 if last else size)


def listing(root: Path, bucket: str, query: dict[str, list[str]]) -> bytes:
    """ListObjectsV2 of a bucket: keys by prefix, folded at the delimiter, a page at a time."""
    prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
    after = query.get("continuation-token", query.get("start-after", [""]))[0]
    limit = int(query.get("max-keys", [str(PAGE_KEYS)])[0])
    files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    entries: dict[str, Path | None] = {}  # key -> file; a folded prefix has none
    for key in sorted(files):
        inside = key.removeprefix(prefix)
        if not key.startswith(prefix):
            continue
        if delimiter and delimiter in inside:
            entries[prefix + inside.split(delimiter)[0] + delimiter] = None
        else:
            entries[key] = files[key]
    wanted = [key for key in entries if key > after]
    page, rest = wanted[:limit], wanted[limit:]
    parts = [f"<Name>{escape(bucket)}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"]
    parts.append(f"<MaxKeys>{limit}</MaxKeys><IsTruncated>{str(bool(rest)).lower()}</IsTruncated>")
    if rest:
        parts.append(f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>")
    for key in page:
        file = entries[key]
        if file is None:
            parts.append(f"<CommonPrefixes><Prefix>{escape(key)}</Prefix></CommonPrefixes>")
            continue
        about = file.stat()
        modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(about.st_mtime))
        parts.append(
            f"<Contents><Key>{escape(key)}</Key><LastModified>{modified}</LastModified>"
            f"<ETag>&quot;{about.st_mtime_ns:x}-{about.st_size:x}&quot;</ETag><Size>{about.st_size}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    return f'<?xml version="1.0"?><ListBucketResult xmlns="{space}">{"".join(parts)}</ListBucketResult>'.encode()


def main() -> None:
    folder, port, latency_s = sys.argv[1:]
    Handler.folder, Handler.latency_s = Path(folder), float(latency_s)
    server = ThreadingHTTPServer(("127.0.0.1", int(port)), Handler)
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    main()
