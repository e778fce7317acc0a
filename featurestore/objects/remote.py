"""An object store as a place to keep bytes: put-if-absent is the commit, as an exclusive link is in a folder.

A put is one request and atomic: there are no temporary objects, nothing to sweep and nothing half-written. Whoever puts
a name first has it; a put whose answer was lost and that was repeated by the library finds its own mark on the object
and knows that it was first. Metadata that grows is replaced only if nobody changed it meanwhile. obstore's runtime does
not survive a fork: open stores where they are used, in processes started by spawn or forkserver.

URL -> a connection of obstore: which services are known, and with which patience.

Endpoint, region and credentials come from the environment, as obstore reads it: AWS_ENDPOINT_URL, AWS_REGION,
AWS_ACCESS_KEY_ID, ...; GOOGLE_...; AZURE_...; HF_TOKEN and HF_ENDPOINT for the Hub. Tested against an S3 server, a
plain HTTP server, Azurite where it is installed, and two servers of our own that answer as the documentation of Google
Cloud Storage and as the Hub do (emulators of the former that can be installed lack its conditional put). None was tried
against the service itself.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from featurestore.layout import LISTING, TEMPORARY
from featurestore.objects.base import Buffer, check_credentials, parse_listing, remote_faults, scatter
from mervcache.errors import AlreadyExistsError, RunStoppedError, StoreFormatError, UserError, unknown_name

if TYPE_CHECKING:
    from obstore import ObjectMeta
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


MAX_PUT_BYTES = 5 << 30  # of one request, by S3's rule; a conditional put cannot be split
_MARK = "mervput"  # metadata of an object: who put it (no dashes: Azure allows none)
_proven: set[str] = set()  # URLs whose server was seen to refuse a second put, in this process


class RemoteObjects:
    """A folder of a bucket."""

    parallel_reads = 16  # requests in flight: one waits 10-50 ms for its first byte
    defers_visibility = False

    def __init__(self, url: str, store: ObjectStore | None = None) -> None:
        self.root = url.rstrip("/")
        self._store = connect(self.root) if store is None else store

    def __reduce__(self) -> tuple:
        return (type(self), (self.root,))

    def ping(self) -> None:
        """Ask for anything, with little patience: a wrong address or key is told in seconds, not in minutes."""
        import obstore

        hurried = connect(self.root, max_retries=2)
        with remote_faults("reach the store", self.root), suppress(FileNotFoundError):
            obstore.head(hurried, "zarr.json")
            return
        self._look_for_bucket(hurried)

    def put_exclusive(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        self._prove_exclusive()
        self._create(key, whole(data))

    def replace(self, key: str, data: bytes) -> None:
        self._put(key, data, mode="overwrite")

    def compare_and_swap(self, key: str, old: bytes, new: bytes) -> bool:
        from obstore.exceptions import PreconditionError

        with remote_faults(f"read {key}", self.root):
            found = self._get(key)
            if found.bytes().to_bytes() != old:
                return False
        version = {name: found.meta[name] for name in ("e_tag", "version") if found.meta.get(name)}
        try:
            self._put(key, new, mode=version)
        except PreconditionError:
            return False
        return True

    def get(self, key: str) -> bytes:
        with remote_faults(f"read {key}", self.root):
            return self._get(key).bytes().to_bytes()

    def get_range(self, key: str, offset: int, length: int) -> memoryview:
        """Bytes of an object that is long enough."""
        import obstore

        with remote_faults(f"read {key}", self.root):
            return memoryview(obstore.get_range(self._store, checked(key), start=offset, length=length)).cast("B")

    def open(self, key: str) -> RemoteObject:
        meta = self._head(key)
        return RemoteObject(self, key, meta["size"], f"{meta.get('e_tag')} {meta['size']}")

    def size(self, key: str) -> int:
        return self._head(key)["size"]

    def modified(self, key: str) -> datetime:
        """When an object was last put, by the server's clock."""
        return self._head(key)["last_modified"]

    def exists(self, key: str) -> bool:
        try:
            self._head(key)
        except FileNotFoundError:
            return False
        return True

    def list_names(self, prefix: str) -> list[str]:
        import obstore

        with remote_faults(f"list {prefix or 'the store'}", self.root):
            found = obstore.list_with_delimiter(self._store, checked(prefix) if prefix else None)
        paths = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        return sorted({path.rstrip("/").rpartition("/")[2] for path in paths})

    def list_tree(self, prefix: str = "") -> dict[str, int]:
        import obstore

        sizes: dict[str, int] = {}
        with remote_faults(f"list {prefix or 'the store'}", self.root):
            for metas in obstore.list(self._store, checked(prefix) if prefix else None, chunk_size=1000):
                sizes.update((meta["path"], meta["size"]) for meta in metas)
        return sizes

    def delete(self, key: str) -> None:
        import obstore

        with remote_faults(f"delete {key}", self.root):
            obstore.delete(self._store, checked(key))

    def cleanup_tmp(self) -> None:
        """Nothing is ever half-written here."""

    def abandoned(self) -> list[str]:
        return []

    def flush(self) -> None:
        """A put is there at once."""

    def known_sha256(self, key: str) -> str | None:
        return None

    def as_zarr(self) -> Any:
        """For zarr-python, where an array has codecs of somebody else's."""
        from zarr.storage import ObjectStore as ZarrObjectStore

        return ZarrObjectStore(self._store, read_only=True)

    def _look_for_bucket(self, store: ObjectStore) -> None:
        """A missing object and a missing bucket look alike until something is listed."""
        import obstore

        with remote_faults("list the store", self.root):
            obstore.list_with_delimiter(store, TEMPORARY)

    def _prove_exclusive(self) -> None:
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
            with remote_faults(f"read {key}", self.root):
                attributes = self._get(key, head=True).attributes
            if attributes.get(_MARK) != mark:
                raise AlreadyExistsError(
                    f"{key} exists already: another process was first, read what it wrote"
                ) from None

    def _put(self, key: str, body: bytes, **options: Any) -> None:
        import obstore

        if len(body) > MAX_PUT_BYTES:
            raise RunStoppedError(f"{key} has {len(body)} bytes, more than one put takes: choose smaller block rows")
        with remote_faults(f"write {key}", self.root):
            obstore.put(self._store, checked(key), body, use_multipart=False, **options)

    def _get(self, key: str, *, head: bool = False) -> Any:
        import obstore

        return obstore.get(self._store, checked(key), options={"head": True} if head else None)

    def _head(self, key: str) -> ObjectMeta:
        import obstore

        with remote_faults(f"read {key}", self.root):
            return obstore.head(self._store, checked(key))


class WebObjects(RemoteObjects):
    """A store behind a web server or on the Hub: only read here, its names known by the listing that `push` leaves."""

    def __init__(self, url: str, store: ObjectStore | None = None) -> None:
        super().__init__(url, store)
        self._sizes: dict[str, int] | None = None

    def list_names(self, prefix: str) -> list[str]:
        start = f"{checked(prefix)}/" if prefix else ""
        return sorted({key[len(start) :].partition("/")[0] for key in self._listed() if key.startswith(start)})

    def list_tree(self, prefix: str = "") -> dict[str, int]:
        start = f"{checked(prefix)}/" if prefix else ""
        return {key: size for key, size in self._listed().items() if key.startswith(start)}

    def put_exclusive(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        raise read_only(self.root)

    def replace(self, key: str, data: bytes) -> None:
        raise read_only(self.root)

    def compare_and_swap(self, key: str, old: bytes, new: bytes) -> bool:
        raise read_only(self.root)

    def delete(self, key: str) -> None:
        raise read_only(self.root)

    def _look_for_bucket(self, store: ObjectStore) -> None:
        """Web servers have none."""

    def _listed(self) -> dict[str, int]:
        if self._sizes is None:
            try:
                self._sizes = parse_listing(self.get(LISTING))
            except FileNotFoundError:
                raise UserError(
                    f"{self.root} has no {LISTING}, and a web server does not tell what it holds: stores that were put "
                    "there by `merv-pipeline push` (to a folder or bucket that is then served) have one"
                ) from None
        return self._sizes


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


def open_remote(url: str) -> RemoteObjects:
    """The place behind a URL, after a first word with it."""
    place = (WebObjects if urlsplit(url).scheme in READ_ONLY else RemoteObjects)(url)
    place.ping()
    return place


def whole(data: Buffer | Sequence[Buffer]) -> bytes:
    return bytes(data) if isinstance(data, bytes | bytearray | memoryview) else b"".join(data)


def checked(key: str) -> str:
    if any(part in ("", ".", "..") or "\0" in part for part in key.split("/")):
        raise StoreFormatError(f"object key {key!r} is refused: it must be a plain relative path")
    return key
