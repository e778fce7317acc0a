"""A real S3 server for tests: moto's, over HTTP, in a process of its own.

    python s3_server.py PORT [LATENCY_S]    # each answer waits so long, like one from afar

moto looks and then writes, while S3's conditional puts are atomic: requests are let in one at a time.
`counts(ENDPOINT)` gives the requests and the bytes of their answers since the last call.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress

import pytest

COUNTS = "/request-counts"
KEYS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_REGION": "us-east-1",
}


def free_port() -> int:
    """Below the ports that the system gives to outgoing connections, so that none takes it before its server does."""
    for port in range(15_000 + os.getpid() % 4000, 20_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def wait_for(address: str, process: subprocess.Popen, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the S3 server ended before it answered"
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"{address} did not answer within {seconds:.0f} s")


def put_bucket(endpoint: str, bucket: str) -> None:
    request = urllib.request.Request(
        f"{endpoint}/{bucket}",
        method="PUT",
        headers={"Authorization": "AWS4-HMAC-SHA256 Credential=tests/x/us-east-1/s3/x"},
    )
    urllib.request.urlopen(request, timeout=10).close()


def counts(endpoint: str) -> dict[str, list[int]]:
    """Kind of request (GET, HEAD, PUT, LIST, ...) -> [requests, bytes of the answers] since the last call."""
    with urllib.request.urlopen(f"{endpoint}{COUNTS}", timeout=10) as answer:
        return json.load(answer)


@pytest.fixture(scope="session")
def s3_endpoint():
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    process = subprocess.Popen(
        [sys.executable, __file__, str(port)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{endpoint}/moto-api/", process)
        yield endpoint
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def s3(s3_endpoint, monkeypatch, request) -> str:
    """A URL of an empty bucket; the environment says how to reach it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3_endpoint}.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{time.monotonic_ns()}"
    put_bucket(s3_endpoint, bucket)
    return f"s3://{bucket}/stores/one.zarr"


def serve(port: int, latency_s: float = 0.0) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    app, turn = DomainDispatcherApplication(create_backend_app), threading.Lock()
    seen: dict[str, list[int]] = {}

    def one_at_a_time(environ, start_response):
        if environ["PATH_INFO"] == COUNTS:
            body = json.dumps(seen).encode()
            seen.clear()
            start_response("200 OK", [("Content-Type", "application/json")])
            return [body]
        time.sleep(latency_s)
        with turn:
            body = b"".join(app(environ, start_response))
            method = environ["REQUEST_METHOD"]
            kind = "LIST" if method == "GET" and "list-type" in environ["QUERY_STRING"] else method
            count = seen.setdefault(kind, [0, 0])
            count[0] += 1
            count[1] += len(body)
            return [body]

    run_simple("127.0.0.1", port, one_at_a_time, threaded=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), *map(float, sys.argv[2:]))
