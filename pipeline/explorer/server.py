"""The explorer's page over HTTP on this machine, and as files in a folder.

The server listens on the loopback address only, answers GET and HEAD, and writes nothing. It refuses requests that
name another host, so that a page elsewhere cannot read from it through a browser (DNS rebinding).
"""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from mervcache.console import ProgressLine
from mervcache.errors import MervCacheError, UserError
from pipeline.explorer.content import Explorer, Response
from pipeline.media import Source

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
COPY_BYTES = 1 << 18
# Scripts and pictures of this page alone; Bokeh sets styles of its own elements.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; media-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Accept-Ranges": "bytes",
}
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class ExplorerServer(ThreadingHTTPServer):
    """Serves one explorer on the loopback address; port 0 takes a free one."""

    daemon_threads = True

    def __init__(self, explorer: Explorer, port: int = 0) -> None:
        self.explorer = explorer
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UserError(
                f"{HOST}:{port} cannot be served: {error.strerror}; give another --port, or 0 for a free one"
            ) from error

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: ExplorerServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: object) -> None:
        """Nothing: the terminal shows the address alone."""

    def _answer(self, *, with_body: bool) -> None:
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._refuse(HTTPStatus.FORBIDDEN)
            return
        path = unquote(urlsplit(self.path).path).lstrip("/") or "index.html"
        try:
            response = self.server.explorer.respond(path)
        except MervCacheError as error:
            log.warning("%s: %s", path, error)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        if response is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        try:
            self._send(response, with_body=with_body)
        except ConnectionError:  # the browser has moved on, as it does when a video is moved forward
            self.close_connection = True

    def _send(self, response: Response, *, with_body: bool) -> None:
        size = response.body.num_bytes if isinstance(response.body, Source) else len(response.body)
        span = _span(self.headers.get("Range"), size)
        if span is None:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
            self._end(0)
            return
        first, last, is_part = span
        self.send_response(HTTPStatus.PARTIAL_CONTENT if is_part else HTTPStatus.OK)
        self.send_header("Content-Type", response.type)
        if is_part:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self._end(last - first + 1)
        if with_body:
            with _opened(response) as file:
                file.seek(first)
                left = last - first + 1
                while left and (data := file.read(min(COPY_BYTES, left))):
                    self.wfile.write(data)
                    left -= len(data)
                if left:  # the file has become shorter: the length that was promised cannot be kept
                    self.close_connection = True

    def _refuse(self, status: HTTPStatus) -> None:
        self.send_response(status)
        self._end(0)

    def _end(self, length: int) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def serve(explorer: Explorer, port: int = 0) -> ExplorerServer:
    """A server of an `explorer` on 127.0.0.1 that is ready: call `serve_forever()`, and `server_close()` afterwards.

    `port` 0 takes any free one.
    """
    return ExplorerServer(explorer, port)


def write_site(explorer: Explorer, out: Path, *, quiet: bool = False) -> Path:
    """Write the page of an `explorer` as files into a new folder `out`; returns its index.html, which needs no server.

    Media of types that browsers play are copied with it, unless the explorer was made without `plays_media`. `quiet`
    shows no progress.
    """
    check_new_folder(out)
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    paths = list(explorer.paths())
    try:
        with ProgressLine("write", unit="files", total=len(paths), quiet=quiet) as progress:
            for path in paths:
                if (response := explorer.respond(path)) is not None:
                    target = temporary / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with _opened(response) as file, open(target, "wb") as copy:
                        shutil.copyfileobj(file, copy, COPY_BYTES)
                progress.advance(1)
        if out.exists():
            out.rmdir()
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; give another --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out / "index.html"


def check_new_folder(out: Path) -> None:
    """UserError if `out` holds anything."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give --out a new folder")


@contextmanager
def _opened(response: Response) -> Iterator[BinaryIO]:
    if isinstance(response.body, Source):
        with response.body.open() as file:
            yield file
    else:
        yield io.BytesIO(response.body)


def _span(header: str | None, size: int) -> tuple[int, int, bool] | None:
    """(first byte, last byte, whether it is a part) of a Range header; None where nothing of it is there.

    What is no single range of bytes is answered with the whole file, as RFC 9110 allows.
    """
    match = RANGE.fullmatch(header or "")
    if match is None or match[1] == match[2] == "":
        return 0, size - 1, False
    if not match[1]:
        first, last = max(0, size - int(match[2])), size - 1
    else:
        first, last = int(match[1]), min(int(match[2]) if match[2] else size - 1, size - 1)
    return (first, last, True) if first <= last and size else None
