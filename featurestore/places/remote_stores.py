"""URL -> a connection of obstore: which services are known, and with which patience.

Endpoint, region and credentials come from the environment, as obstore reads it: AWS_ENDPOINT_URL, AWS_REGION,
AWS_ACCESS_KEY_ID, ...; GOOGLE_...; AZURE_...; HF_TOKEN and HF_ENDPOINT for the Hub. Tested against an S3 server, a
plain HTTP server, Azurite where it is installed, and two servers of our own that answer as the documentation of Google
Cloud Storage and as the Hub do (emulators of the former that can be installed lack its conditional put). None was tried
against the service itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from featurestore.errors import UserError, unknown_name
from featurestore.places.remote_faults import check_credentials

if TYPE_CHECKING:
    from obstore.store import ObjectStore

HUB = "https://huggingface.co"
MAX_RETRIES = 10
_CLIENT: dict[str, Any] = {  # obstore's default ends any request after 30 s, also one that carries a whole shard
    "timeout": timedelta(minutes=15),
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=60),
    "user_agent": "merv-pipeline",
}


_S3 = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_AZURE = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
_ENDPOINTS = {"s3": _S3, "s3a": _S3, "gs": ("GOOGLE_BASE_URL",), "az": _AZURE, "abfs": _AZURE}


def connect(url: str, *, max_retries: int = MAX_RETRIES) -> ObjectStore:
    """A connection to the folder that a URL names; nothing is sent yet."""
    parts = urlsplit(url)
    if parts.scheme not in STORES:
        raise UserError(f"{url}: {unknown_name('kind of URL', parts.scheme, [*STORES, 'file'])}")
    if not parts.netloc:
        raise UserError(f"{url} names no bucket or host; write {parts.scheme}://NAME/FOLDER")
    check_credentials(parts.scheme)
    retry = {"max_retries": max_retries, "retry_timeout": timedelta(minutes=3)}
    try:
        return STORES[parts.scheme](url, retry)
    except ImportError as error:
        raise UserError(f"{url}: install the library for object stores: pip install 'merv-pipeline[remote]'") from error
    except ValueError as error:
        raise UserError(f"{url} cannot be used as a place for a store: {error}") from error


def _bucket(url: str, retry: Mapping[str, Any]) -> ObjectStore:
    from obstore.store import from_url

    endpoint = next(filter(None, map(os.environ.get, _ENDPOINTS[urlsplit(url).scheme])), "")
    client = {**_CLIENT, "allow_http": True} if endpoint.startswith("http://") else _CLIENT
    try:
        return from_url(url, client_options=client, retry_config=retry)
    except Exception as error:  # obstore's own errors of a setting, e.g. an unreadable key file
        raise ValueError(str(error).splitlines()[0]) from error


def _web(url: str, retry: Mapping[str, Any]) -> ObjectStore:
    from obstore.store import HTTPStore

    return HTTPStore.from_url(url, client_options={**_CLIENT, "allow_http": True}, retry_config=retry)


def _hub(url: str, retry: Mapping[str, Any]) -> ObjectStore:
    from obstore.store import HTTPStore

    token = hub_token()
    headers = {"default_headers": {"authorization": f"Bearer {token}"}} if token else {}
    return HTTPStore.from_url(
        hub_address(url), client_options={**_CLIENT, "allow_http": True, **headers}, retry_config=retry
    )


def hub_address(url: str) -> str:
    """Where the Hub gives out the files of a place there."""
    repo, revision, folder = hub_parts(url)
    address = f"{hub_endpoint()}/datasets/{repo}/resolve/{quote(revision, safe='')}"
    return f"{address}/{folder}" if folder else address


def hub_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", HUB).rstrip("/")


def hub_parts(url: str) -> tuple[str, str, str]:
    """`hf://datasets/USER/REPO[@REVISION][/FOLDER]` -> (USER/REPO, revision, folder)."""
    kind, _, rest = url.removeprefix("hf://").partition("/")
    user, _, rest = rest.partition("/")
    repo, _, folder = rest.partition("/")
    name, _, revision = repo.partition("@")
    if kind != "datasets" or not user or not name:
        raise UserError(f"{url}: stores on the Hub are hf://datasets/USER/REPO, with @REVISION and /FOLDER if need be")
    return f"{user}/{name}", revision or "main", folder


def hub_token() -> str | None:
    """From HF_TOKEN, or what `hf auth login` left."""
    if token := os.environ.get("HF_TOKEN"):
        return token
    from huggingface_hub import get_token

    return get_token()


STORES: dict[str, Callable[[str, Mapping[str, Any]], Any]] = {
    "s3": _bucket,
    "s3a": _bucket,
    "gs": _bucket,
    "az": _bucket,
    "abfs": _bucket,
    "http": _web,
    "https": _web,
    "hf": _hub,
}
READ_ONLY = ("http", "https", "hf")  # no listing and no conditional put there; `push` has a way of its own to the Hub


def read_only(url: str) -> UserError:
    """The message for somebody who wants to write there."""
    if urlsplit(url).scheme == "hf":
        return UserError(
            f"{url} takes whole commits and is not written in place: write to a folder, s3://, gs:// or az://, then "
            f"send that with `merv-pipeline push STORE {url}`"
        )
    return UserError(
        f"{url} can only be read here: write to a folder, s3://, gs:// or az://, or `merv-pipeline push` to hf://"
    )
