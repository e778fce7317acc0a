"""Servers that stand in for S3 and the Hub: those of the tests, loaded by path, each in a process of its own."""

from __future__ import annotations

import http.server
import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compare.sides import REPOSITORY

BUCKET = "stores"
S3_KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_REGION": "us-east-1"}
HUB_URL = "hf://datasets/lab/feats"
START_S = 60


def find_server(name: str) -> Path:
    """The file of a server, wherever the tests keep it."""
    found = sorted((REPOSITORY / "tests").rglob(name))
    if not found:
        raise FileNotFoundError(f"no {name} under {REPOSITORY / 'tests'}")
    return found[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def s3_server(port: int, out: Path) -> Iterator[dict[str, str]]:
    """Variables by which an empty S3 is reached; at the end its objects are written to `out`."""
    process = subprocess.Popen(
        [sys.executable, str(find_server("s3_server.py")), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process)
        client = _s3_client(port)
        client.create_bucket(Bucket=BUCKET)
        yield {**S3_KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
            for entry in page.get("Contents", []):
                _write(out / entry["Key"], client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read())
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def hub_server(port: int, out: Path) -> Iterator[dict[str, str]]:
    """Variables by which an empty dataset repository is reached; at the end its files are written to `out`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "compare.stand_ins", str(port), str(out)],
        cwd=REPOSITORY / "scripts",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        token = process.stdout.readline().strip()
        if not token:
            raise RuntimeError(f"the stand-in of the Hub ended with {process.wait()}")
        online = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        yield {**online, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_TOKEN": token}
        process.stdin.close()
        if process.wait(60):
            raise RuntimeError("the stand-in of the Hub could not write its files")
    finally:
        process.kill()
        process.wait(10)


def _s3_client(port: int):
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name=S3_KEYS["AWS_REGION"],
        aws_access_key_id=S3_KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=S3_KEYS["AWS_SECRET_ACCESS_KEY"],
    )


def _wait_for(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not answer within {START_S} s")


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def serve_hub(port: int, out: Path) -> None:
    """Serve until standard input ends, then write the repository's files and the paths of each commit."""
    spec = importlib.util.spec_from_file_location("hub_server_of_the_tests", find_server("hub_server.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), module.Handler)
    server.daemon_threads = True
    server.hub, server.url = module.Hub(), f"http://127.0.0.1:{port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(module.WRITER, flush=True)
    sys.stdin.read()
    server.shutdown()
    for path, data in server.hub.files.items():
        _write(out / "files" / path, data)
    commits = [sorted(paths) for paths in server.hub.commits]
    _write(out / "commits.json", json.dumps(commits, indent=1).encode())


if __name__ == "__main__":
    serve_hub(int(sys.argv[1]), Path(sys.argv[2]))
