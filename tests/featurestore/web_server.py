"""A plain web server with ranges over a folder, as a fixture: `web.folder`, `web.url`, `web.tokens` it was shown."""

from __future__ import annotations

import http.server
import re
import threading
from functools import partial

import pytest


class _Ranged(http.server.SimpleHTTPRequestHandler):
    """The standard library's server, taught to answer ranges."""

    def do_GET(self):
        self.note()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        path = self.translate_path(self.path)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:
            self.send_error(404)
            return
        start, stop = (int(found[1]), int(found[2] or len(data) - 1) + 1) if found else (0, len(data))
        part = data[start:stop]
        self.send_response(206 if found else 200)
        self.send_header("content-length", str(len(part)))
        self.send_header("etag", '"one"')
        if found:
            self.send_header("content-range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)

    def note(self):
        if token := self.headers.get("authorization"):
            self.server.tokens.add(token)

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path):
    class Web:
        folder = tmp_path / "served"

    Web.folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Ranged, directory=str(Web.folder)))
    server.tokens = Web.tokens = set()
    Web.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Web
    server.shutdown()
    server.server_close()
