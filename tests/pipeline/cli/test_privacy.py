"""What is written about a run and what is given away: no credentials anywhere, no host or path in what is pushed."""

from __future__ import annotations

import base64
import http.server
import io
import json
import re
import socket
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from featurestore.store import FeatureStore
from featurestore.transfer.export import export
from featurestore.transfer.merge import StoreCells
from pipeline.cli.extract import main

USER, PASSWORD, SIGNATURE = "alice-of-the-lab", "correct-horse-battery", "0fa3c1signature"


def shard(lab) -> bytes:
    """A tar of two videos, of which one is damaged, and a file that is none."""
    data = io.BytesIO()
    good = (lab.root / "valley/v5.mp4").read_bytes()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in {"a.mp4": good, "a.txt": b"A block.", "b.mp4": good[: len(good) // 3]}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


@pytest.fixture
def server(lab) -> Iterator[str]:
    """HOST:PORT of a web server that wants the password and the signature."""
    data = shard(lab)
    expected = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith("/x.tar"):
                self.send_error(404)
                return
            is_allowed = self.headers.get("Authorization") == expected and SIGNATURE in self.path
            part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, stop = (int(part[1]), min(int(part[2]) + 1, len(data))) if part else (0, len(data))
            self.send_response((206 if part else 200) if is_allowed else 403)
            self.send_header("Content-Length", str(stop - start if is_allowed else 0))
            if part:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.end_headers()
            if is_allowed and self.command == "GET":
                self.wfile.write(data[start:stop])

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{web.server_port}"
        web.shutdown()


def run(*words: object) -> tuple[int, str]:
    """Exit code, and everything that was printed."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def texts(folder: Path, needles: list[str]) -> list[str]:
    """`file: needle` wherever a file under the folder, or its name, holds one."""
    found = []
    for path in sorted(folder.rglob("*")):
        data = (path.read_bytes() if path.is_file() else b"") + str(path.relative_to(folder)).encode()
        found += [f"{path.relative_to(folder)}: {needle}" for needle in needles if needle.encode() in data]
    return found


@pytest.mark.slow
def test_credentials_of_addresses_are_written_nowhere_and_a_retry_still_works(lab, server, tmp_path):
    root, store, pushed = tmp_path / "media-of-the-lab", tmp_path / "store.zarr", tmp_path / "pushed"
    root.mkdir()
    address = f"http://{USER}:{PASSWORD}@{server}/x.tar?X-Amz-Signature={SIGNATURE}"
    settings = lab.settings(encoders=["languagebind"], store=store, root=str(root)) | {"dataset": "webdataset"}
    (tmp_path / "extract.yaml").write_text(yaml.safe_dump(settings | {"options": {"shards": address, "spool_gb": 1}}))
    secrets = [USER, PASSWORD, SIGNATURE]
    personal = [*secrets, str(root), str(tmp_path), root.name, socket.gethostname()]

    printed = ""
    for words in (("extract",), ("extract", "--print-config"), ("plan", "--probe", "0"), ("extract", "--json")):
        code, output = run(*words, "--config", tmp_path / "extract.yaml")
        assert code in (0, 3), output
        printed += output
    assert not any(secret in printed for secret in secrets), printed
    assert FeatureStore.open(store).quarantine.num_rows == 1
    assert "http://***@" in (next((store / "journal").glob("*-driver.json"))).read_text()
    assert texts(store, secrets) == []

    assert run("push", store, pushed)[0] == 0
    assert texts(pushed, personal) == []
    assert not list(pushed.glob("journal/*"))
    export(StoreCells(store), tmp_path / "exported", format="webdataset")
    assert texts(tmp_path / "exported", personal) == []
    assert run("push", store, tmp_path / "with-journal", "--journal")[0] == 0
    assert list((tmp_path / "with-journal").glob("journal/*-driver.json"))
    assert texts(tmp_path / "with-journal", secrets) == []

    code, output = run("quarantine", "retry", store)
    assert code == 1
    assert "was recorded without its credentials" in output
    code, output = run("quarantine", "retry", store, "--option", f"shards={address}")
    assert code in (0, 3), output
    assert not any(secret in output for secret in secrets), output
    assert texts(store, secrets) == []


@pytest.mark.slow
def test_what_fails_on_the_way_to_a_shard_names_no_credentials(lab, server, tmp_path):
    root = tmp_path / "media"
    root.mkdir()
    for address in (
        f"http://{USER}:{PASSWORD}x@{server}/x.tar?X-Amz-Signature={SIGNATURE}",  # refused
        f"http://{USER}:{PASSWORD}@127.0.0.1:9/x.tar?X-Amz-Signature={SIGNATURE}",  # nobody there
        f"http://{USER}:{PASSWORD}@{server}/x.zip?X-Amz-Signature={SIGNATURE}",  # no tar
        f"nonsense://{USER}:{PASSWORD}@{server}/x.tar?X-Amz-Signature={SIGNATURE}",
    ):
        settings = lab.settings(encoders=["languagebind"], store=tmp_path / "s.zarr", root=str(root))
        settings |= {"dataset": "webdataset", "options": {"shards": address, "spool_gb": 1}}
        (tmp_path / "extract.yaml").write_text(yaml.safe_dump(settings))
        code, output = run("extract", "--config", tmp_path / "extract.yaml")
        assert code == 1, output
        assert "Error: " in output
        assert not re.search(f"{USER}|{PASSWORD}|{SIGNATURE}", output), output


def test_an_older_journal_with_credentials_is_pushed_without_them(extracted, tmp_path):
    from featurestore.objects.open import open_objects
    from featurestore.records import journal_bytes

    objects, record = open_objects(extracted.store), {"config": {"reuse": f"https://{USER}:{PASSWORD}@h/s?{SIGNATURE}"}}
    objects.put_exclusive("journal/old-driver.json", journal_bytes(record))  # as earlier versions wrote it
    try:
        assert run("push", extracted.store, tmp_path / "there", "--journal")[0] == 0
        sent = json.loads((tmp_path / "there/journal/old-driver.json").read_text())
        assert sent["record"] == {"config": {"reuse": "https://***@h/s?***"}}
        assert run("push", extracted.store, tmp_path / "there")[1].count("journals of runs from an earlier push") == 1
    finally:
        objects.delete("journal/old-driver.json")
