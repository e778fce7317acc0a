"""Azurite, the stand-in for Azure's blob storage, for tests, where it is installed.

It comes from npm with 457 packages (365 MB, 2 minutes), too much for every run of the suite: whoever changes places
installs it (`npm install --prefix FOLDER azurite@3.37.0`) and says MERV_AZURITE=FOLDER/node_modules/azurite.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import subprocess
import time
import urllib.request
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.featurestore.s3_server import free_port, wait_for

ACCOUNT = "devstoreaccount1"  # Azurite's own, with its published key
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
PROGRAM = Path(os.environ.get("MERV_AZURITE", "nowhere")) / "dist/src/blob/main.js"
ADVICE = "Azurite is not here: npm install --prefix FOLDER azurite; MERV_AZURITE=FOLDER/node_modules/azurite"
IS_INSTALLED = PROGRAM.is_file() and shutil.which("node") is not None


def put_container(endpoint: str, container: str) -> None:
    """One request, signed with the shared key as Azure's documentation has it."""
    date, version = formatdate(usegmt=True), "2021-08-06"
    text = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n/{ACCOUNT}/{ACCOUNT}/{container}\n"
    digest = hmac.new(base64.b64decode(KEY), f"{text}restype:container".encode(), hashlib.sha256).digest()
    headers = {"x-ms-date": date, "x-ms-version": version, "content-length": "0"}
    headers["authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    request = urllib.request.Request(f"{endpoint}/{container}?restype=container", method="PUT", headers=headers)
    urllib.request.urlopen(request, timeout=10).close()


@pytest.fixture(scope="session")
def azure_endpoint():
    port = free_port()
    options = ["--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    process = subprocess.Popen(
        ["node", str(PROGRAM), *options, "--blobHost", "127.0.0.1", "--blobPort", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/", process)
        yield f"http://127.0.0.1:{port}/{ACCOUNT}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def azure(azure_endpoint, monkeypatch) -> str:
    """A URL of an empty container; the environment says how to reach it."""
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azure_endpoint)
    container = f"bucket-{time.monotonic_ns()}"
    put_container(azure_endpoint, container)
    return f"az://{container}/stores/one.zarr"
