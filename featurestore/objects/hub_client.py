"""The Hub through huggingface_hub: whole shards over Xet where hf_xet is installed, and buckets to push to.

Ranges are read over HTTP, as from any web server: the Hub answers them for files in Xet too.
"""
# Tested with hf_xet's own local content store behind a server of our own, not against the Hub itself.

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from featurestore.layout import shard_place
from featurestore.objects.base import Buffer, Objects, check_key, service_faults
from featurestore.objects.hub_place import HubPlace, hub_endpoint, hub_token
from featurestore.objects.remote import RemoteObject, RemoteObjects, WebObjects, join
from mervcache.errors import AlreadyExistsError, UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def hub_api() -> HfApi:
    """The client of the Hub; without a token it reads what is public."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # `push` and `pull` have their own
    return HfApi(endpoint=hub_endpoint(), token=hub_token() or False, library_name="merv-pipeline")


def check_token(url: str) -> None:
    """UserError before a push without a token."""
    if not hub_token():
        raise UserError(f"no token to write to {url} with: set HF_TOKEN, or run `hf auth login` once")


def uses_xet() -> bool:
    """Whether huggingface_hub sends and fetches large files over Xet."""
    if find_spec("huggingface_hub") is None or find_spec("hf_xet") is None:
        return False
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET


def hub_faults(what: str, url: str) -> AbstractContextManager[None]:
    """Turn errors of huggingface_hub and hf_xet into errors that name the next step."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]: httpx's or httpx2's

    place = HubPlace.of(url)
    errors = (HTTPError, OSError, RuntimeError, ValueError)
    return service_faults(what, url, errors, repo=place.repo, branch=place.revision)


class HubReader(WebObjects):
    """A store on the Hub, read only: whole shards by huggingface_hub over Xet, everything else over HTTP."""

    def get(self, key: str, *, max_bytes: int | None = None, sha256: str | None = None) -> bytes:
        if shard_place(key) is None or max_bytes is not None or not uses_xet():
            return super().get(key, max_bytes=max_bytes)
        with TemporaryDirectory(prefix="merv-hub-") as folder:
            with hub_faults(f"read {key}", self.root):
                file = _download(HubPlace.of(self.root), check_key(key), folder)
            if file is not None:
                return file.read_bytes()
        return super().get(key, max_bytes=max_bytes)


def _download(place: HubPlace, key: str, folder: str) -> Path | None:
    """The file of a key, fetched into a folder; None where there is none, or the server is a plain web server."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        if place.kind == "buckets":
            file = Path(folder) / "shard"
            hub_api().download_bucket_files(place.repo, [(place.path(key), file)], raise_on_missing_files=True)
            return file
        where = {"repo_type": "dataset", "revision": place.revision, "local_dir": folder}
        api: Any = hub_api()  # its download has a type of tqdm, which has none
        return Path(api.hf_hub_download(place.repo, place.path(key), **where))
    except EntryNotFoundError:
        return None


class BucketObjects(Objects):
    """`hf://buckets/USER/BUCKET[/FOLDER]`, opened to push. Threads may share it.

    A bucket takes whatever is put last, and the Hub has no conditional put for it: what is there is listed once, so two
    pushes into one bucket at the same time cannot detect each other. Every put is a request of its own, in order.
    """

    parallel_reads = 16

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        check_token(self.root)
        if not hasattr(hub_api(), "batch_bucket_files"):
            raise UserError(f"{self.root}: this huggingface_hub knows no buckets: pip install -U huggingface_hub")
        if not uses_xet():
            raise UserError(f"{self.root}: buckets need Xet: pip install hf_xet, and unset HF_HUB_DISABLE_XET")
        self._place, self._api = HubPlace.of(self.root), hub_api()
        self._sizes = self._list()
        self._reader = RemoteObjects(self.root)

    def put_exclusive(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        if self.exists(key):
            raise AlreadyExistsError(f"{key} exists already at {self.root}: read what is there")
        self._put(key, join(data))

    def replace(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def compare_and_swap(self, key: str, old: bytes, new: bytes) -> bool:
        if self.get(key) != old:
            return False
        self._put(key, new)
        return True

    def delete(self, key: str) -> None:
        if self._sizes.pop(check_key(key), None) is not None:
            with hub_faults(f"delete {key}", self.root):
                self._api.batch_bucket_files(self._place.repo, delete=[self._place.path(key)])

    def get(self, key: str, *, max_bytes: int | None = None, sha256: str | None = None) -> bytes:
        self.size(key)
        return self._reader.get(key, max_bytes=max_bytes)

    def open(self, key: str) -> RemoteObject:
        self.size(key)
        return self._reader.open(key)

    def size(self, key: str) -> int:
        if key not in self._sizes:
            raise FileNotFoundError(f"{key} is not at {self.root}")
        return self._sizes[key]

    def list_names(self, prefix: str) -> list[str]:
        start = len(prefix) + 1 if prefix else 0
        return sorted({key[start:].partition("/")[0] for key in self.list_tree(prefix)})

    def list_tree(self, prefix: str = "") -> dict[str, int]:
        start = f"{check_key(prefix)}/" if prefix else ""
        return {key: size for key, size in list(self._sizes.items()) if key.startswith(start)}

    def _put(self, key: str, data: bytes) -> None:
        with hub_faults(f"write {key}", self.root):
            self._api.batch_bucket_files(self._place.repo, add=[(data, self._place.path(check_key(key)))])
        self._sizes[key] = len(data)

    def _list(self) -> dict[str, int]:
        start = len(self._place.path(""))
        with hub_faults("list the store", self.root):
            entries = self._api.list_bucket_tree(self._place.repo, self._place.folder or None, recursive=True)
            return {entry.path[start:]: entry.size for entry in entries if entry.type == "file"}
