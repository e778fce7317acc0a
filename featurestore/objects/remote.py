"""A bucket or web address as objects, through obstore: a conditional put is the commit, like a link locally.

A put is one atomic request, so there are no temporary objects and nothing half-written. A put whose answer was lost and
that was repeated by obstore finds its own mark on the object. Endpoint, region and credentials come from the
environment, as obstore reads it. obstore's runtime does not survive a fork: open stores in the process that uses them.
"""
# Tested against an S3 server, a plain HTTP server, Azurite where it is installed, and servers of our own that follow
# the documentation of Google Cloud Storage and the Hub (emulators of the former lack its conditional put), not against
# the services themselves.

from __future__ import annotations

import os
import socket
import uuid
from base64 import b64encode
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from featurestore.layout import LISTING, TEMPORARY
from featurestore.objects.base import (
    CREDENTIALS,
    Buffer,
    Objects,
    check_key,
    check_size,
    parse_listing,
    scatter,
    service_faults,
)
from featurestore.objects.hub_place import HubPlace, hub_token
from mervcache.errors import AlreadyExistsError, RunStoppedError, UserError, unknown_name

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

MAX_PUT_BYTES = 5 << 30  # of one request, by S3's rule; a conditional put cannot be split
_MARK = "mervput"  # metadata of an object: who put it (no dashes: Azure allows none)
_CLIENT: ClientConfig = {  # obstore's default ends any request after 30 s, also one that carries a whole shard
    "timeout": timedelta(minutes=15),
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=60),
    "user_agent": "merv-pipeline",
}
_ENDPOINTS = {  # scheme of a bucket -> variables that name its server
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "s3a": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    "abfs": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
READ_ONLY = ("http", "https", "hf")  # these cannot list or put conditionally; `push` has its own way to the Hub
SCHEMES = (*_ENDPOINTS, *READ_ONLY)
_proven: set[str] = set()  # URLs whose server was seen to refuse a second put, in this process


def connect(url: str, *, max_retries: int = 10) -> ObjectStore:
    """A connection to the folder that a URL names; nothing is sent yet."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise UserError(f"{url}: {unknown_name('kind of URL', parts.scheme, [*SCHEMES, 'file'])}")
    if not parts.netloc:
        raise UserError(f"{url} names no bucket or host; write {parts.scheme}://NAME/FOLDER")
    _check_credentials(parts.scheme)
    retry: RetryConfig = {"max_retries": max_retries, "retry_timeout": timedelta(minutes=3)}
    client: ClientConfig = {**_CLIENT}
    try:
        from obstore.store import HTTPStore, from_url

        if parts.scheme in READ_ONLY:
            client["allow_http"] = True
            if parts.scheme == "hf" and (token := hub_token()):
                client["default_headers"] = {"authorization": f"Bearer {token}"}
            address = HubPlace.of(url).address if parts.scheme == "hf" else url
            if "@" in parts.netloc:  # obstore sends no password that is part of an address
                login, _, host = parts.netloc.rpartition("@")
                client["default_headers"] = {"authorization": f"Basic {b64encode(unquote(login).encode()).decode()}"}
                address = parts._replace(netloc=host).geturl()
            return HTTPStore.from_url(address, client_options=client, retry_config=retry)
        endpoint = next(filter(None, map(os.environ.get, _ENDPOINTS[parts.scheme])), "")
        if endpoint.startswith("http://"):
            client["allow_http"] = True
        try:
            return from_url(url, client_options=client, retry_config=retry)
        except Exception as error:  # obstore's own errors of a setting, e.g. an unreadable key file
            raise ValueError(str(error).splitlines()[0]) from error
    except ImportError as error:
        raise UserError(f"{url}: install the library for object stores: pip install 'merv-pipeline[remote]'") from error
    except ValueError as error:
        raise UserError(f"{url} cannot be used for a store: {error}") from error


def _check_credentials(scheme: str) -> None:
    """Fail at once without credentials for S3; obstore would try to reach the instance metadata for minutes."""
    sources = (
        "AWS_ACCESS_KEY_ID",
        "AWS_SKIP_SIGNATURE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    )
    if scheme not in ("s3", "s3a") or any(name in os.environ for name in sources):
        return
    is_disabled = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
    if "AWS_SECRET_ACCESS_KEY" not in os.environ and not is_disabled:
        with suppress(OSError):
            socket.create_connection(("169.254.169.254", 80), timeout=1).close()  # an instance's role
            return
    raise UserError(
        f"no credentials for {scheme}:// were found: set {CREDENTIALS['s3']} (files of the aws command are not read: "
        '`eval "$(aws configure export-credentials --format env)"`), or AWS_SKIP_SIGNATURE=true for a public bucket; '
        "AWS_ENDPOINT_URL and AWS_REGION choose the server"
    )


def read_only_error(url: str) -> UserError:
    if urlsplit(url).scheme == "hf":
        return UserError(
            f"{url} takes whole commits and is not written in place: write to a folder, s3://, gs:// or az://, then "
            f"send that with `merv-pipeline push STORE {url}`"
        )
    return UserError(
        f"{url} can only be read here: write to a folder, s3://, gs:// or az://, or `merv-pipeline push` to hf://"
    )


class RemoteObjects(Objects):
    """A folder of a bucket."""

    parallel_reads = 16  # requests in flight: one waits 10-50 ms for its first byte
    keeps_newest = True

    def __init__(self, url: str, store: ObjectStore | None = None) -> None:
        self.root = url.rstrip("/")
        self._store = connect(self.root) if store is None else store

    def __reduce__(self) -> tuple[type[RemoteObjects], tuple[str]]:
        return (type(self), (self.root,))

    def ping(self) -> None:
        """Send one request with few retries, so that a wrong URL or credential fails fast."""
        import obstore

        store = connect(self.root, max_retries=2)
        with self._faults("reach the store"), suppress(FileNotFoundError):
            obstore.head(store, "zarr.json")
            return
        if urlsplit(self.root).scheme not in READ_ONLY:  # a missing bucket looks like a missing object until listed
            with self._faults("list the store"):
                obstore.list_with_delimiter(store, TEMPORARY)

    def put_exclusive(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        self._check_is_exclusive()
        self._create(key, join(data))

    def replace(self, key: str, data: bytes) -> None:
        self._put(key, data, mode="overwrite")

    def compare_and_swap(self, key: str, old: bytes, new: bytes) -> bool:
        from obstore.exceptions import PreconditionError

        with self._faults(f"read {key}"):
            current = self._get(key)
            if current.bytes().to_bytes() != old:
                return False
        version = {name: current.meta[name] for name in ("e_tag", "version") if current.meta.get(name)}
        try:
            self._put(key, new, mode=version)
        except PreconditionError:
            return False
        return True

    def get(self, key: str, *, max_bytes: int | None = None, sha256: str | None = None) -> bytes:
        with self._faults(f"read {key}"):
            answer = self._get(key)
            check_size(key, answer.meta["size"], max_bytes)  # before the body is received
            return answer.bytes().to_bytes()

    def get_range(self, key: str, offset: int, length: int) -> memoryview:
        """Bytes of an object that is long enough."""
        import obstore

        with self._faults(f"read {key}"):
            return memoryview(obstore.get_range(self._store, check_key(key), start=offset, length=length)).cast("B")

    def open(self, key: str) -> RemoteObject:
        meta = self._head(key)
        return RemoteObject(self, key, meta["size"], f"{meta.get('e_tag')} {meta['size']}")

    def size(self, key: str) -> int:
        return self._head(key)["size"]

    def modified_s(self, key: str) -> float:
        """Unix time of the last put, by the server's clock; for the lease."""
        return self._head(key)["last_modified"].timestamp()

    def list_names(self, prefix: str) -> list[str]:
        import obstore

        with self._faults(f"list {prefix or 'the store'}"):
            listed = obstore.list_with_delimiter(self._store, check_key(prefix) if prefix else None)
        paths = [*listed["common_prefixes"], *(meta["path"] for meta in listed["objects"])]
        return sorted({path.rstrip("/").rpartition("/")[2] for path in paths})

    def list_tree(self, prefix: str = "") -> dict[str, int]:
        import obstore

        sizes: dict[str, int] = {}
        with self._faults(f"list {prefix or 'the store'}"):
            for metas in obstore.list(self._store, check_key(prefix) if prefix else None, chunk_size=1000):
                sizes.update((meta["path"], meta["size"]) for meta in metas)
        return sizes

    def delete(self, key: str) -> None:
        import obstore

        with suppress(FileNotFoundError), self._faults(f"delete {key}"):
            obstore.delete(self._store, check_key(key))

    def _check_is_exclusive(self) -> None:
        """Old servers ignore the condition and let the second put win: no commit would be safe there."""
        if self.root in _proven:
            return
        key = f"{TEMPORARY}/probe-{uuid.uuid4().hex}"
        self._create(key, b"first")
        try:
            self._create(key, b"second")
        except AlreadyExistsError:
            _proven.add(self.root)
        else:
            raise UserError(
                f"the server of {self.root} ignores conditional puts (If-None-Match), so two writers could overwrite "
                "each other: use a newer version of the server, or extract into a folder and `merv-pipeline push` it"
            )
        finally:
            self.delete(key)

    def _create(self, key: str, body: bytes) -> None:
        from obstore import exceptions

        mark = uuid.uuid4().hex
        try:
            self._put(key, body, mode="create", attributes={_MARK: mark})
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            with self._faults(f"read {key}"):
                attributes = self._get(key, head=True).attributes
            if attributes.get(_MARK) != mark:
                raise AlreadyExistsError(
                    f"{key} exists already: another process was first, read what it wrote"
                ) from None

    def _put(self, key: str, body: bytes, **options: Any) -> None:
        import obstore

        if len(body) > MAX_PUT_BYTES:
            raise RunStoppedError(f"{key} has {len(body)} bytes, more than one put takes: choose smaller block rows")
        with self._faults(f"write {key}"):
            obstore.put(self._store, check_key(key), body, use_multipart=False, **options)

    def _get(self, key: str, *, head: bool = False) -> Any:
        import obstore

        return obstore.get(self._store, check_key(key), options={"head": True} if head else None)

    def _head(self, key: str) -> ObjectMeta:
        import obstore

        with self._faults(f"read {key}"):
            return obstore.head(self._store, check_key(key))

    def _faults(self, what: str) -> AbstractContextManager[None]:
        from obstore.exceptions import BaseError

        return service_faults(what, self.root, (BaseError,))


class WebObjects(RemoteObjects):
    """A store behind a web server or on the Hub: read only, its names known by the listing that `push` puts there."""

    keeps_newest = False  # the listing is one object, and names what is newest too

    def __init__(self, url: str, store: ObjectStore | None = None) -> None:
        super().__init__(url, store)
        self._sizes: dict[str, int] | None = None

    def list_names(self, prefix: str) -> list[str]:
        start = len(prefix) + 1 if prefix else 0
        return sorted({key[start:].partition("/")[0] for key in self.list_tree(prefix)})

    def list_tree(self, prefix: str = "") -> dict[str, int]:
        if self._sizes is None:
            try:
                self._sizes = parse_listing(self.get(LISTING))
            except FileNotFoundError:
                raise UserError(
                    f"{self.root} has no {LISTING}, and a web server cannot be listed: stores that were put there by "
                    "`merv-pipeline push` (to a folder or bucket that is then served) have one"
                ) from None
        start = f"{check_key(prefix)}/" if prefix else ""
        return {key: size for key, size in self._sizes.items() if key.startswith(start)}

    def put_exclusive(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        raise read_only_error(self.root)

    def replace(self, key: str, data: bytes) -> None:
        raise read_only_error(self.root)

    def compare_and_swap(self, key: str, old: bytes, new: bytes) -> bool:
        raise read_only_error(self.root)

    def delete(self, key: str) -> None:
        raise read_only_error(self.root)


class RemoteObject:
    """One object for ranged reads; holds nothing open."""

    def __init__(self, objects: RemoteObjects, key: str, size: int, version: str) -> None:
        self._objects, self._key = objects, key
        self.size = size
        self.version = version  # changes when the object does

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        wanted = min(sum(len(buffer) for buffer in buffers), self.size - offset)
        if wanted <= 0:
            return 0
        data = self._objects.get_range(self._key, offset, wanted)
        scatter(data, buffers)
        return len(data)

    def close(self) -> None:
        """Nothing to close."""


def join(data: Buffer | Sequence[Buffer]) -> bytes:
    return bytes(data) if isinstance(data, bytes | bytearray | memoryview) else b"".join(data)
