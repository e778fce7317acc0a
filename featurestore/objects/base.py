"""Named bytes in a folder, a bucket or a repository: the `Objects` protocol, its helpers, and what errors mean.

Every failure of the machine or of a service (disk full, share unmounted, credentials expired) becomes a
`RunStoppedError` that names the next step, so that no caller mistakes it for a broken clip.
"""

from __future__ import annotations

import errno
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from featurestore.clips import check_relative_path
from featurestore.layout import LISTING
from mervcache.errors import AlreadyExistsError, RunStoppedError, StoreFormatError, UserError
from mervcache.files import canonical_json, is_json_object, load_json, sha256_hex

Buffer = bytes | bytearray | memoryview


class OpenObject(Protocol):
    """An object opened for many ranged reads."""

    size: int  # bytes

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers one after another from `offset`; returns the bytes read, fewer at the end of the object."""
        ...

    def close(self) -> None: ...


class Objects(Protocol):
    """Named bytes, each object put whole. Keys are relative POSIX paths; a key that leaves the root is refused.

    Implemented by `LocalObjects` (a folder), `RemoteObjects` (a bucket) and `HubObjects` (a repository, to push to).
    Reading a missing key raises FileNotFoundError.
    """

    root: str
    parallel_reads: int  # requests worth having in flight at once
    defers_visibility: bool = False  # True: other clients see a put only after `flush`
    keeps_newest: bool = False  # True: an object names what is newest, since listing costs requests: see newest.py

    def put_exclusive(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        """Put the pieces durably under a new key; AlreadyExistsError if the key exists, whatever its bytes."""
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Put over what is there: metadata that grows, and what `repair` and `tombstone` replace."""
        ...

    def compare_and_swap(self, key: str, old: bytes, new: bytes) -> bool:
        """Replace the object only if it still is `old`; returns whether it was."""
        ...

    def get(self, key: str, *, max_bytes: int | None = None, sha256: str | None = None) -> bytes:
        """All bytes; StoreFormatError before reading more than `max_bytes`.

        `sha256` is theirs, where the caller knows and checks it: a cache then need not find out which version is there.
        """
        ...

    def open(self, key: str) -> OpenObject: ...

    def size(self, key: str) -> int: ...

    def list_names(self, prefix: str) -> list[str]:
        """Direct children of a prefix ("" is the root), sorted; [] if there are none."""
        ...

    def list_tree(self, prefix: str = "") -> dict[str, int]:
        """Key -> bytes of everything below a prefix."""
        ...

    def delete(self, key: str) -> None:
        """Delete an object; a missing key is no error."""
        ...

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except FileNotFoundError:
            return False
        return True

    def flush(self) -> None:
        """Make all puts visible to other clients. Only the Hub defers them: there a flush is a commit."""

    def known_sha256(self, key: str) -> str | None:
        """The object's sha256 where the service stores it (an ETag is none), else None."""
        return None

    def cleanup_tmp(self, *, dry_run: bool = False) -> list[str]:
        """Remove what killed processes left in `tmp/`, or with `dry_run` list it only; returns the keys."""
        return []

    def non_regular_files(self) -> list[str]:
        """Keys of links, pipes and devices, which a store never holds."""
        return []


def check_key(key: str) -> str:
    """The key, unless it could name something outside the root."""
    if any(part in ("", ".", "..") or "\0" in part for part in key.split("/")):
        raise StoreFormatError(f"object key {key!r} is refused: it must be a plain relative path")
    return key


def scatter(data: memoryview, buffers: Sequence[memoryview]) -> None:
    """Spread bytes over buffers, one after another, until they are used up."""
    done = 0
    for buffer in buffers:
        part = data[done : done + len(buffer)]
        buffer[: len(part)] = part
        done += len(part)


def put_if_absent(objects: Objects, key: str, data: Buffer | Sequence[Buffer]) -> bool:
    """Put unless the key exists; returns whether this call put it."""
    try:
        objects.put_exclusive(key, data)
    except AlreadyExistsError:
        return False
    return True


def digest_of(objects: Objects, key: str) -> str:
    """The sha256 of an object, which is read unless the service stores it."""
    return objects.known_sha256(key) or sha256_hex(objects.get(key))


def get_bounded(objects: Objects, key: str, max_bytes: int, *, sha256: str | None = None) -> bytes:
    """The bytes of an untrusted object; one that is larger than such a file can be is refused before it is read."""
    return objects.get(key, max_bytes=max_bytes, sha256=sha256)


def check_size(key: str, size: int, max_bytes: int | None) -> None:
    """StoreFormatError where an object is larger than such a file can be."""
    if max_bytes is not None and size > max_bytes:
        raise StoreFormatError(f"{key} has {size} bytes, more than the {max_bytes} that such a file can need")


_LISTING_FORMAT = 1


def listing_bytes(sizes: Mapping[str, int]) -> bytes:
    """`listing.json`: key -> bytes of a store, for web servers and the Hub, which cannot list.

    It is a hint only: every object that is read by it has a digest of its own.
    """
    return (canonical_json({"format": _LISTING_FORMAT, "objects": dict(sizes)}) + "\n").encode()


def parse_listing(data: bytes) -> dict[str, int]:
    """Key -> bytes of an untrusted `listing.json`, every name and size checked."""
    document = load_json(data, LISTING)
    sizes = document.get("objects") if is_json_object(document) and document.get("format") == _LISTING_FORMAT else None
    if not is_json_object(sizes):
        raise StoreFormatError(f"{LISTING} is not a listing of this version: push the store again")
    try:
        for key, size in sizes.items():
            check_relative_path(key)
            if type(size) is not int or size < 0:
                raise StoreFormatError(f"{LISTING} gives {key!r} the size {size!r}")
    except UserError as error:
        raise StoreFormatError(f"{LISTING} holds a name that no store has: {error}") from error
    return sizes


_RERUN = "then run the same command again"
_MACHINE_FAULTS = {  # errno -> next step
    "ENOSPC": "the disk is full: free space and run the same command again, committed blocks are kept",
    "EFBIG": "a limit refuses files that large: choose another --store, or smaller block_rows for a new one",
    "EDQUOT": "the disk quota is used up: raise it or free space and run the same command again",
    "EIO": f"the disk or share reports an I/O error: check it, {_RERUN}",
    "ESTALE": f"the share was unmounted or replaced: mount it again, {_RERUN}",
    "EROFS": "the file system is read-only: remount it writable or choose another --store",
    "EACCES": "permission denied: fix the owner or mode of the folder or choose another --store",
    "EPERM": "operation not permitted: fix the owner or mode of the folder or choose another --store",
    "ENOTCONN": f"the share is not connected: mount it again, {_RERUN}",
    "EHOSTDOWN": f"the file server does not answer: wait for it, {_RERUN}",
    "ETIMEDOUT": f"the file server does not answer: wait for it, {_RERUN}",
}
_NEXT_STEP = {getattr(errno, name): step for name, step in _MACHINE_FAULTS.items() if hasattr(errno, name)}
# What only a crafted store causes: loops of links, names longer than a store has, sockets.
_CRAFTED = {errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EINVAL}


@contextmanager
def machine_faults(what: str) -> Generator[None]:
    """Turn errors of the machine into RunStoppedError with a next step; let the others pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _CRAFTED:
            raise StoreFormatError(f"cannot {what}: {error.strerror}; a feature store has no such file") from error
        step = _NEXT_STEP.get(error.errno or 0)
        if step is None:
            raise
        raise RunStoppedError(f"cannot {what}: {step} ({error.strerror})") from error


CREDENTIALS = {  # scheme -> the environment variables that obstore and huggingface_hub read
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for temporary ones, AWS_SESSION_TOKEN",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT_KEY",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_KEY",
    "hf": "HF_TOKEN (or `hf auth login`)",
}
_ENDPOINT = {
    "s3": "AWS_ENDPOINT_URL and AWS_REGION",
    "gs": "the network",
    "az": "AZURE_STORAGE_ACCOUNT_NAME (or AZURE_STORAGE_ENDPOINT)",
    "hf": "HF_ENDPOINT",
}


@dataclass(frozen=True)
class _ServiceFault:
    """One row of the fault table: what identifies an answer of a service, and what the user reads."""

    error: type[Exception]
    message: str
    classes: tuple[str, ...] = ()  # names of exception classes of obstore and huggingface_hub
    statuses: tuple[int, ...] = ()  # HTTP, of the Hub
    words: tuple[str, ...] = ()  # in obstore's text, which holds the service's error code


_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
_SERVICE_FAULTS = (  # the first that matches; the last matches all
    _ServiceFault(
        UserError,
        "there is no bucket {repo} on the Hub that this token can see; `push` creates none: `hf buckets create {repo}`",
        classes=("BucketNotFoundError",),
    ),
    _ServiceFault(
        UserError,
        "there is no dataset {repo} on the Hub that this token can see; `push` creates none: create it with the owner "
        "and visibility you want, `hf repos create {repo} --repo-type dataset --private`",
        classes=("RepositoryNotFoundError",),
    ),
    _ServiceFault(
        UserError,
        "{repo} has no branch {branch!r}: `hf repos branch create {repo} {branch} --repo-type dataset`",
        classes=("RevisionNotFoundError",),
    ),
    _ServiceFault(UserError, "{url} names no repository: {detail}", classes=("HFValidationError",)),
    _ServiceFault(
        RunStoppedError,
        "cannot {what}: another client committed to {url} in the meantime; run the same command again: its commit is "
        "not overwritten, and what is there is not sent again",
        statuses=(409, 412),
    ),
    _ServiceFault(
        RunStoppedError,
        "cannot {what}: the Hub limits the rate of commits and requests ({detail}); wait, then run the same command "
        "again: what is there is not sent again",
        statuses=(429,),
    ),
    _ServiceFault(
        RunStoppedError,
        "cannot {what}: {url} refused these credentials ({detail}); they may have expired or lack the right: renew "
        "{credentials} and run the same command again; what was committed is kept, nothing was quarantined",
        classes=("PermissionDeniedError", "UnauthenticatedError"),
        statuses=(401, 403),
        words=("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed"),
    ),
    _ServiceFault(
        UserError,
        "there is no bucket {bucket!r} for {url}: check its name and {endpoint}, or create it",
        words=_NO_BUCKET,
    ),
    _ServiceFault(
        RunStoppedError,
        "cannot {what}: no answer from {url}, after repeated tries; check the network and {endpoint}, then run the "
        "same command again ({detail})",
        words=("error sending request", "dns error", "ConnectError", "tcp connect", "timed out", "TimedOut"),
    ),
    _ServiceFault(
        RunStoppedError,
        "cannot {what}: {url} answered with an error, also after repeated tries; check the network and {endpoint}, and "
        "where it says 400, credentials may have expired: renew them; then run the same command again ({detail})",
        classes=("Exception",),
    ),
)


@contextmanager
def service_faults(what: str, url: str, errors: tuple[type[Exception], ...], **names: str) -> Generator[None]:
    """Turn a client library's `errors` into errors that name the next step; `names` are fields of the messages.

    A missing key stays FileNotFoundError, and a lost condition (AlreadyExistsError, PreconditionError of obstore) the
    library's. Whatever may succeed if repeated (5xx, throttling, dropped connections) was repeated by the library.
    """
    try:
        yield
    except (FileNotFoundError, *errors) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # of an upload thread
        text = str(cause)
        classes = {base.__name__ for base in type(cause).__mro__}
        if classes & {"AlreadyExistsError", "PreconditionError"}:
            raise
        if not isinstance(error, errors) and not any(word in text for word in _NO_BUCKET):  # a missing key
            raise FileNotFoundError(f"cannot {what}: it is not there") from error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        fault = next(  # the last one fits every error
            fault
            for fault in _SERVICE_FAULTS
            if classes & {*fault.classes} or status in fault.statuses or any(word in text for word in fault.words)
        )
        parts = urlsplit(url)
        message = fault.message.format(
            what=what,
            url=url,
            bucket=parts.netloc,
            detail=" ".join(text.partition("\n\nDebug source")[0].split())[:300],  # obstore dumps its structures
            credentials=CREDENTIALS.get(parts.scheme, "them"),
            endpoint=_ENDPOINT.get(parts.scheme, "the address"),
            **names,
        )
        raise fault.error(message) from error
