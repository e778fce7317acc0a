"""A dataset repository of the Hub as a place to push to: puts are gathered into commits.

A put waits for a commit, and commits hold the puts in their order, so whatever is put last (a snapshot) is never there
before what it names. Shards are uploaded at once, by the thread that puts them, and leave the memory: killed before its
commit, an upload is found again by its sha256, as the LFS protocol has it. Each commit names the one before it and is
refused if somebody else's came between. What the repository holds is listed once, at that first commit, with sizes and,
for large files, sha256. What is waiting is read from memory; what has left it is committed first.

huggingface_hub does the talking. The token comes from HF_TOKEN or the stored login. History keeps what was replaced or
deleted. Tested against a server of our own that speaks the protocol (without Xet), not against the Hub itself.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featurestore.layout import shard_place
from featurestore.objects.base import Buffer, hub_faults
from featurestore.objects.remote import RemoteObject, RemoteObjects, checked, hub_endpoint, hub_parts, hub_token, whole
from mervcache.errors import AlreadyExistsError, UserError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

MAX_FILES = 100  # of one commit, as the Hub advises; the Hub also bounds commits per hour, so fewer would be slow
MAX_WAITING_BYTES = 256 << 20  # of what is in memory


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file that is committed."""

    size: int
    sha256: str | None  # of large files


class HubObjects:
    """`hf://datasets/USER/REPO[@BRANCH][/FOLDER]`, opened to push. One at a time; threads may share it."""

    parallel_reads = 16
    defers_visibility = True

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        self._repo, self._branch, self._folder = hub_parts(self.root)
        self._api = _api(self.root)
        self._lock = threading.RLock()
        self._waiting: dict[str, CommitOperationAdd | CommitOperationDelete] = {}
        self._head: str | None = None  # the commit that `_held` is of
        self._held = self._look()
        self._reader = self._reader_at_head()

    def put_exclusive(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        self._refuse_taken(key)
        addition = self._prepare(key, whole(data))
        with self._lock:
            self._refuse_taken(key)
            self._gather(key, addition)

    def replace(self, key: str, data: bytes) -> None:
        addition = self._prepare(key, data)
        with self._lock:
            self._gather(key, addition)

    def compare_and_swap(self, key: str, old: bytes, new: bytes) -> bool:
        with self._lock:
            if self.get(key) != old:
                return False
            self.replace(key, new)
        return True

    def delete(self, key: str) -> None:
        from huggingface_hub import CommitOperationDelete

        with self._lock:
            self._waiting.pop(key, None)
            if key in self._held:
                self._gather(key, CommitOperationDelete(self._path(key)))

    def get(self, key: str) -> bytes:
        with self._lock:
            data = getattr(self._waiting.get(key), "path_or_fileobj", b"")
        return data or self._committed(key).get(key)

    def open(self, key: str) -> RemoteObject:
        return self._committed(key).open(key)

    def size(self, key: str) -> int:
        return self._find(key).size

    def known_sha256(self, key: str) -> str | None:
        return self._find(key).sha256

    def exists(self, key: str) -> bool:
        try:
            self._find(key)
        except FileNotFoundError:
            return False
        return True

    def list_names(self, prefix: str) -> list[str]:
        start = len(prefix) + 1 if prefix else 0
        return sorted({key[start:].partition("/")[0] for key in self.list_tree(prefix)})

    def list_tree(self, prefix: str = "") -> dict[str, int]:
        start = f"{checked(prefix)}/" if prefix else ""
        with self._lock:
            keys = [key for key in {**self._held, **self._waiting} if key.startswith(start) and self.exists(key)]
            return {key: self.size(key) for key in keys}

    def flush(self) -> None:
        """Commit what waits."""
        with self._lock:
            if not self._waiting:
                return
            message = f"merv-pipeline push: {len(self._waiting)} files"
            with hub_faults("commit", self.root, self._repo, self._branch):
                done = self._api.create_commit(
                    self._repo,
                    self._waiting.values(),
                    commit_message=message,
                    repo_type="dataset",
                    revision=self._branch,
                    parent_commit=self._head,
                )
            for key in self._waiting:
                if self.exists(key):
                    self._held[key] = self._find(key)
                else:
                    del self._held[key]
            self._head = done.oid
            self._waiting = {}
            self._reader = self._reader_at_head()

    def cleanup_tmp(self) -> None:
        """Nothing is ever half-written here."""

    def abandoned(self) -> list[str]:
        return []

    def _look(self) -> dict[str, RemoteFile]:
        """The files below the folder at the head of the branch, which becomes ours to go on from."""
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import EntryNotFoundError

        with hub_faults("list the store", self.root, self._repo, self._branch):
            self._head = self._api.repo_info(self._repo, repo_type="dataset", revision=self._branch).sha
            where = {"repo_type": "dataset", "revision": self._head}
            if self._api.get_paths_info(self._repo, [".gitignore"], **where):
                raise UserError(f"{self._repo} has a .gitignore, by which the Hub leaves files out: delete it there")
            try:
                found = list(self._api.list_repo_tree(self._repo, self._folder or None, recursive=True, **where))
            except EntryNotFoundError:
                found = []
        start = len(self._path(""))
        return {
            entry.path[start:]: RemoteFile(size=entry.size, sha256=entry.lfs.sha256 if entry.lfs else None)
            for entry in found
            if isinstance(entry, RepoFile)
        }

    def _prepare(self, key: str, body: bytes) -> CommitOperationAdd:
        """What to commit of a put; a shard is uploaded now, unless the Hub wants it in the commit itself."""
        from huggingface_hub import CommitOperationAdd

        addition = CommitOperationAdd(self._path(checked(key)), body)
        if shard_place(key) is not None:
            with hub_faults(f"write {key}", self.root, self._repo, self._branch):
                self._api.preupload_lfs_files(self._repo, [addition], repo_type="dataset", revision=self._branch)
        return addition

    def _gather(self, key: str, operation: CommitOperationAdd | CommitOperationDelete) -> None:
        self._waiting[key] = operation
        in_memory = sum(len(getattr(waiting, "path_or_fileobj", b"")) for waiting in self._waiting.values())
        if len(self._waiting) >= MAX_FILES or in_memory >= MAX_WAITING_BYTES:
            self.flush()

    def _find(self, key: str) -> RemoteFile:
        from huggingface_hub import CommitOperationAdd

        with self._lock:
            waiting = self._waiting.get(key)
            if isinstance(waiting, CommitOperationAdd):
                return RemoteFile(size=waiting.upload_info.size, sha256=waiting.upload_info.sha256.hex())
            if waiting is None and key in self._held:
                return self._held[key]
        raise FileNotFoundError(f"{key} is not at {self.root}")

    def _committed(self, key: str) -> RemoteObjects:
        """Where to read an object, committed now if it waited."""
        with self._lock:
            self._find(key)
            if key in self._waiting:
                self.flush()
            return self._reader

    def _reader_at_head(self) -> RemoteObjects:
        folder = f"/{self._folder}" if self._folder else ""
        return RemoteObjects(f"hf://datasets/{self._repo}@{self._head or self._branch}{folder}")

    def _refuse_taken(self, key: str) -> None:
        if self.exists(key):
            raise AlreadyExistsError(f"{key} exists already at {self.root}: read what is there")

    def _path(self, key: str) -> str:
        return f"{self._folder}/{key}" if self._folder else key


def _api(url: str) -> HfApi:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    token = hub_token()
    if not token:
        raise UserError(f"no token to write to {url} with: set HF_TOKEN, or run `hf auth login` once")
    disable_progress_bars()  # `push` tells its own progress
    return HfApi(endpoint=hub_endpoint(), token=token, library_name="merv-pipeline")
