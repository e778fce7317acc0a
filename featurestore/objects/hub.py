"""A dataset repository of the Hub as objects to push to: puts are gathered into commits, in their order.

A snapshot that is put last is therefore never visible before what it names. Shards are uploaded by the thread that puts
them and leave the memory; an upload whose commit never came is found again by its sha256 (LFS). Each commit names its
parent, so it is refused if another client committed in between: the first writer wins.
"""
# The token comes from HF_TOKEN or the stored login. The repository's history keeps what was replaced or deleted. Tested
# against a server of our own that speaks the protocol (without Xet), not against the Hub itself.

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featurestore.layout import shard_place
from featurestore.objects.base import Buffer, Objects, check_key
from featurestore.objects.hub_client import check_token, hub_api, hub_faults
from featurestore.objects.hub_place import HubPlace
from featurestore.objects.remote import RemoteObject, RemoteObjects, join
from mervcache.errors import AlreadyExistsError, UserError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

MAX_FILES = 100  # of one commit, as the Hub advises; it also limits commits per hour, so fewer would be slow
MAX_PENDING_BYTES = 256 << 20  # of what is in memory


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A committed file."""

    size: int
    sha256: str | None  # of large files


class HubObjects(Objects):
    """`hf://datasets/USER/REPO[@BRANCH][/FOLDER]`, opened to push. One at a time; threads may share it."""

    parallel_reads = 16
    defers_visibility = True

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        self._place = place = HubPlace.of(self.root)
        self._repo, self._branch, self._folder = place.repo, place.revision, place.folder
        check_token(self.root)
        self._api = hub_api()
        self._lock = threading.RLock()
        self._pending: dict[str, CommitOperationAdd | CommitOperationDelete] = {}
        self._head: str | None = None  # the commit that `_committed` lists
        self._committed = self._list_head()
        self._reader = self._reader_at_head()

    def put_exclusive(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        self._refuse_existing(key)
        addition = self._addition(key, join(data))
        with self._lock:
            self._refuse_existing(key)
            self._add(key, addition)

    def replace(self, key: str, data: bytes) -> None:
        addition = self._addition(key, data)
        with self._lock:
            self._add(key, addition)

    def compare_and_swap(self, key: str, old: bytes, new: bytes) -> bool:
        with self._lock:
            if self.get(key) != old:
                return False
            self.replace(key, new)
        return True

    def delete(self, key: str) -> None:
        from huggingface_hub import CommitOperationDelete

        with self._lock:
            self._pending.pop(key, None)
            if key in self._committed:
                self._add(key, CommitOperationDelete(self._path(key)))

    def get(self, key: str, *, max_bytes: int | None = None, sha256: str | None = None) -> bytes:
        with self._lock:
            data = getattr(self._pending.get(key), "path_or_fileobj", b"")
        return data or self._reader_of(key).get(key, max_bytes=max_bytes)

    def open(self, key: str) -> RemoteObject:
        return self._reader_of(key).open(key)

    def size(self, key: str) -> int:
        return self._stat(key).size

    def known_sha256(self, key: str) -> str | None:
        return self._stat(key).sha256

    def list_names(self, prefix: str) -> list[str]:
        start = len(prefix) + 1 if prefix else 0
        return sorted({key[start:].partition("/")[0] for key in self.list_tree(prefix)})

    def list_tree(self, prefix: str = "") -> dict[str, int]:
        start = f"{check_key(prefix)}/" if prefix else ""
        with self._lock:
            keys = [key for key in {**self._committed, **self._pending} if key.startswith(start) and self.exists(key)]
            return {key: self.size(key) for key in keys}

    def flush(self) -> None:
        with self._lock:
            if not self._pending:
                return
            with self._faults("commit"):
                commit = self._api.create_commit(
                    self._repo,
                    self._pending.values(),
                    commit_message=f"merv-pipeline push: {len(self._pending)} files",
                    repo_type="dataset",
                    revision=self._branch,
                    parent_commit=self._head,
                )
            for key in self._pending:
                if self.exists(key):
                    self._committed[key] = self._stat(key)
                else:
                    del self._committed[key]
            self._head = commit.oid
            self._pending = {}
            self._reader = self._reader_at_head()

    @property
    def is_whole_repository(self) -> bool:
        """Whether the store is the repository, not a folder in it."""
        return not self._folder

    def tag_revision(self, name: str, *, moved: bool) -> bool:
        """Have a tag of the repository name the commit of the last `flush`.

        Returns False where one of that name is there, which stays unless `moved`.
        """
        with self._lock, self._faults(f"tag {name}"):
            refs = self._api.list_repo_refs(self._repo, repo_type="dataset")
            is_there = any(tag.name == name for tag in refs.tags)
            if is_there and not moved:
                return False
            if is_there:
                self._api.delete_tag(self._repo, tag=name, repo_type="dataset")
            self._api.create_tag(self._repo, tag=name, revision=self._head, repo_type="dataset")
            return True

    def _list_head(self) -> dict[str, RemoteFile]:
        """The files below the folder at the head of the branch, which is the first commit's parent."""
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import EntryNotFoundError

        with self._faults("list the store"):
            self._head = self._api.repo_info(self._repo, repo_type="dataset", revision=self._branch).sha
            if self._api.get_paths_info(self._repo, [".gitignore"], repo_type="dataset", revision=self._head):
                raise UserError(f"{self._repo} has a .gitignore, by which the Hub leaves files out: delete it there")
            try:
                tree = self._api.list_repo_tree(
                    self._repo, self._folder or None, recursive=True, repo_type="dataset", revision=self._head
                )
                entries = list(tree)
            except EntryNotFoundError:
                entries = []
        start = len(self._path(""))
        return {
            entry.path[start:]: RemoteFile(size=entry.size, sha256=entry.lfs.sha256 if entry.lfs else None)
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def _addition(self, key: str, body: bytes) -> CommitOperationAdd:
        """The operation of a put; a shard is uploaded now, unless the Hub wants it in the commit itself."""
        from huggingface_hub import CommitOperationAdd

        addition = CommitOperationAdd(self._path(check_key(key)), body)
        if shard_place(key) is not None:
            with self._faults(f"write {key}"):
                self._api.preupload_lfs_files(self._repo, [addition], repo_type="dataset", revision=self._branch)
        return addition

    def _add(self, key: str, operation: CommitOperationAdd | CommitOperationDelete) -> None:
        self._pending[key] = operation
        in_memory = sum(len(getattr(pending, "path_or_fileobj", b"")) for pending in self._pending.values())
        if len(self._pending) >= MAX_FILES or in_memory >= MAX_PENDING_BYTES:
            self.flush()

    def _stat(self, key: str) -> RemoteFile:
        from huggingface_hub import CommitOperationAdd

        with self._lock:
            pending = self._pending.get(key)
            if isinstance(pending, CommitOperationAdd):
                return RemoteFile(size=pending.upload_info.size, sha256=pending.upload_info.sha256.hex())
            if pending is None and key in self._committed:
                return self._committed[key]
        raise FileNotFoundError(f"{key} is not at {self.root}")

    def _reader_of(self, key: str) -> RemoteObjects:
        """What reads an object, which is committed now if it is pending."""
        with self._lock:
            self._stat(key)
            if key in self._pending:
                self.flush()
            return self._reader

    def _reader_at_head(self) -> RemoteObjects:
        folder = f"/{self._folder}" if self._folder else ""
        return RemoteObjects(f"hf://datasets/{self._repo}@{self._head or self._branch}{folder}")

    def _refuse_existing(self, key: str) -> None:
        if self.exists(key):
            raise AlreadyExistsError(f"{key} exists already at {self.root}: read what is there")

    def _path(self, key: str) -> str:
        return self._place.path(key)

    def _faults(self, what: str) -> AbstractContextManager[None]:
        return hub_faults(what, self.root)
