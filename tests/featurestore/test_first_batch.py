"""Requests to an S3 server before a process reads its first row: few, the same at any size, no listing."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from featurestore.clips import Sample, Turn
from featurestore.layout import shard_place
from featurestore.store import FeatureStore
from featurestore.transfer.sync import push
from trainer.config import OptimizerConfig, TrainConfig
from trainer.data.batches import select
from trainer.sources import open_store

MAX_REQUESTS = 10
ENCODERS = ("dinov2", "siglip", "vivit", "xclip")


class _Proxy(BaseHTTPRequestHandler):
    """Passes requests on to the server behind it and keeps their lines."""

    protocol_version = "HTTP/1.1"
    target = ""
    lines: list[str]

    def _forward(self) -> None:
        self.lines.append(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length) if length else None
        try:
            answer = urlopen(Request(self.target + self.path, body, dict(self.headers), method=self.command))
        except HTTPError as error:
            answer = error
        with answer:
            data = answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in ("transfer-encoding", "connection"):
                    self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _forward

    def log_message(self, *arguments: object) -> None:
        """Nothing to the terminal."""


@pytest.fixture
def requests(s3_endpoint, monkeypatch) -> Iterator[list[str]]:
    """Lines of the requests that reach the S3 server from here on."""
    lines: list[str] = []
    handler = type("Proxy", (_Proxy,), {"target": s3_endpoint, "lines": lines})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield lines
    server.shutdown()
    server.server_close()


@pytest.fixture(params=[4, 40], ids=["1 part", "10 parts"])
def far(request, kit, make, s3):
    """The URL of a store of four encoders, its clips added in parts of four, and two sets of samples."""
    for first in range(0, request.param, 4):
        kit.writer().add_clips([make.video(n) for n in range(first, first + 4)])
        for encoder in ENCODERS:
            kit.fill(make.identity(encoder=encoder))
    turns = (Turn(role="human", text="<video>\nwhat?"), Turn(role="gpt", text="that"))
    ids = kit.open().clips["clip_id"].to_pylist()
    kit.writer().add_samples(
        "talk", [Sample(sample_id=c, clip_id=c, turns=turns, stage="finetune", source="x") for c in ids]
    )
    kit.writer().publish_snapshot()
    push(kit.path, s3)
    return s3


def before_rows(lines: list[str]) -> list[str]:
    """Requests before the first one of a shard."""
    keys = [line.split("?")[0].partition(".zarr/")[2] for line in lines]
    return lines[: next(n for n, key in enumerate(keys) if shard_place(key))]


def is_listing(line: str) -> bool:
    return "list-type" in line or "prefix=" in line


@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "uncached"])
def test_a_store_and_a_loader_worker(far, requests, tmp_path, is_cached):
    store = FeatureStore.open(far, cache=tmp_path / "cache" if is_cached else False)
    ids = store.committed["clip_id"].to_pylist()
    for encoder in ENCODERS:
        store.read(ids, encoder=encoder)
    opened = before_rows(requests)
    requests.clear()
    worker = pickle.loads(pickle.dumps(store))
    worker.read(ids, encoder=ENCODERS[0])
    for lines in (opened, before_rows(requests)):
        assert 0 < len(lines) <= MAX_REQUESTS
        assert not any(map(is_listing, lines)), lines


def test_a_training_run(far, requests, tmp_path, monkeypatch):
    monkeypatch.setenv("MERV_CACHE_DIR", str(tmp_path / "cache"))
    rates = OptimizerConfig(projector_lr=1e-4, fusion_lr=1e-4, llm_lr=1e-4)
    config = TrainConfig(llm="fresh:tiny", train_llm="full", optimizer=rates, max_steps=1)
    samples, source = open_store(far, config)
    data = select(samples, source, config)
    source.fetch([sample.clip_id for sample in data.samples][:4])
    metadata = [line for line in requests if not shard_place(line.split("?")[0].partition(".zarr/")[2])]
    assert 0 < len(metadata) <= MAX_REQUESTS, metadata
    assert not any(map(is_listing, requests)), requests
