"""A bucket whose credentials expire in the middle of a run: a real S3 server, and a door before it that closes."""

from __future__ import annotations

import http.client
import http.server
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from featurestore import FeatureStore
from tests.featurestore import s3_server
from tests.stress.fault_lab import FILMS, STILLS, FaultLab, check

SERVER = Path(s3_server.__file__)
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_REGION": "us-east-1"}


class Door(http.server.ThreadingHTTPServer):
    """Passes requests on to the S3 server behind it; once it has let `lets_in` receipts through, it refuses all."""

    daemon_threads = True

    def __init__(self, behind: int) -> None:
        super().__init__(("127.0.0.1", 0), _Porter)
        self.behind, self.lets_in, self.receipts = behind, 2, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Porter(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.server.receipts >= self.server.lets_in:
            self._reply(400, [], EXPIRED)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        connection.request(self.command, self.path, body, dict(self.headers))
        reply = connection.getresponse()
        self.server.receipts += self.command == "PUT" and "/receipts/" in self.path
        self._reply(reply.status, reply.getheaders(), reply.read())
        connection.close()

    def _reply(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        kept = {name.lower(): value for name, value in headers}
        for name in ("connection", "date", "server", "transfer-encoding"):
            kept.pop(name, None)
        if self.command != "HEAD":
            kept["content-length"] = str(len(body))
        for name, value in kept.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        """Not on stderr."""


def credentials_expired(lab: FaultLab, rng: random.Random) -> str:
    """A store in a bucket that refuses us from the third receipt on; with new credentials the run goes on."""
    with bucket(lab) as (door, store, environment):
        lab.start(store, environment)
        code = lab.wait()
        check(code == 1 and "may have expired" in lab.output, f"{code}: {lab.output[-500:]}")
        door.lets_in = 1000
        lab.finish(store, environment)
        with mock.patch.dict(os.environ, environment):
            opened = FeatureStore.open(store, cache=False)
            clips, quarantined = opened.clips["tiny"].to_pylist(), opened.quarantine.num_rows
        check(all(clips) and len(clips) == STILLS + FILMS, f"{sum(clips)} of {len(clips)} clips have tokens")
        check(quarantined == 0, "expired credentials quarantined clips")
    return "stopped with the next step"


@contextmanager
def bucket(lab: FaultLab) -> Iterator[tuple[Door, str, dict[str, str]]]:
    """A door, the URL of a store behind it, and what the environment must say to reach it."""
    port = s3_server.free_port()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, str(SERVER), str(port)], **quiet)
    try:
        s3_server.wait_for(f"http://127.0.0.1:{port}/moto-api/", server)
        s3_server.put_bucket(f"http://127.0.0.1:{port}", "faults")
        door = Door(port)
        url = f"http://127.0.0.1:{door.server_port}"
        yield door, "s3://faults/features.zarr", {**KEYS, "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true"}
        door.shutdown()
    finally:
        server.kill()
        server.wait()
