"""The one door to bytes: named objects that are put once, whole and durably.

`Objects` is what the store asks of a place to keep bytes: `LocalObjects` is a folder, `RemoteObjects` a bucket, where
`put_exclusive` is one conditional put, and `HubObjects` a repository of the Hub, where puts are gathered into commits.
Every failure of the machine (disk full, share gone) becomes a `RunStoppedError` here, so that no caller mistakes it for
a broken clip.

What the Hub's errors mean to a person: token, repository, branch, another's commit; each with the next step.

What an object store's errors mean to a person: credentials, bucket, network; each with the next step.

All of them stop a run (`RunStoppedError`) and quarantine nothing: a clip is never to blame for a bucket. Requests that
may succeed if repeated (5xx, throttling, dropped connections) were repeated by obstore before they come here.

The listing: `listing.json`, what a store holds, for places that cannot be asked (web servers, the Hub).

Written by `push` after the snapshot. It is a hint and no promise: every byte that is read by it has its own digest.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol
from urllib.parse import urlsplit

from featurestore.clips import check_relative_path
from featurestore.layout import LISTING
from mervcache.errors import AlreadyExistsError, RunStoppedError, StoreFormatError, UserError
from mervcache.files import canonical_json, load_json, sha256_hex

Buffer = bytes | bytearray | memoryview

_MACHINE_FAULTS = {
    "ENOSPC": "the disk is full: free space and run the same command again, committed blocks are kept",
    "EFBIG": "a limit refuses files that large: choose another --store, or smaller block_rows for a new one",
    "EDQUOT": "the disk quota is used up: raise it or free space and run the same command again",
    "EIO": "the disk or share reports an I/O error: check it, then run the same command again",
    "ESTALE": "the share was unmounted or replaced: mount it again, then run the same command again",
    "EROFS": "the file system is read-only: remount it writable or choose another --store",
    "EACCES": "permission denied: fix the owner or mode of the folder or choose another --store",
    "EPERM": "operation not permitted: fix the owner or mode of the folder or choose another --store",
    "ENOTCONN": "the share is not connected: mount it again, then run the same command again",
    "EHOSTDOWN": "the file server does not answer: wait for it, then run the same command again",
    "ETIMEDOUT": "the file server does not answer: wait for it, then run the same command again",
}
# What only a crafted store does: loops of links, names longer than any of ours, sockets.
_CRAFTED = {errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EINVAL}
_NEXT_STEP = {getattr(errno, name): step for name, step in _MACHINE_FAULTS.items() if hasattr(errno, name)}


class OpenObject(Protocol):
    """An object opened for many ranged reads."""

    size: int  # bytes

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int: ...  # bytes read

    def close(self) -> None: ...


class Objects(Protocol):
    """Named bytes. Keys are relative POSIX paths; a missing key raises FileNotFoundError."""

    parallel_reads: int  # requests that are worth having in flight at once
    defers_visibility: bool  # others see a put after `flush` only

    def put_exclusive(self, key: str, data: Buffer | Sequence[Buffer]) -> None: ...  # AlreadyExistsError if taken

    def replace(self, key: str, data: bytes) -> None: ...  # metadata that grows; and `repair` and `tombstone`

    def compare_and_swap(self, key: str, old: bytes, new: bytes) -> bool: ...  # False if it is no longer `old`

    def get(self, key: str) -> bytes: ...

    def open(self, key: str) -> OpenObject: ...

    def size(self, key: str) -> int: ...

    def exists(self, key: str) -> bool: ...

    def list_names(self, prefix: str) -> list[str]: ...  # direct children, sorted; [] if there is none

    def list_tree(self, prefix: str = "") -> dict[str, int]: ...  # key -> bytes of everything below

    def delete(self, key: str) -> None: ...  # a missing key is no error

    def abandoned(self) -> list[str]: ...  # temporary folders that no living process owns

    def cleanup_tmp(self) -> None: ...  # remove them

    def flush(self) -> None: ...  # what was put until now is there for others; nothing to do unless the place gathers

    def known_sha256(self, key: str) -> str | None: ...  # None where it takes reading the object to know


def scatter(data: memoryview, buffers: Sequence[memoryview]) -> None:
    """Spread bytes over buffers, one after the other, until they are used up."""
    done = 0
    for buffer in buffers:
        part = data[done : done + len(buffer)]
        buffer[: len(part)] = part
        done += len(part)


def put_if_absent(objects: Objects, key: str, data: Buffer | Sequence[Buffer]) -> bool:
    """Put unless the name is taken; False if somebody was first, whose bytes then stand."""
    try:
        objects.put_exclusive(key, data)
    except AlreadyExistsError:
        return False
    return True


def digest_of(objects: Objects, key: str) -> str:
    """The sha256 of an object, which is read unless the place tells it."""
    return objects.known_sha256(key) or sha256_hex(objects.get(key))


def get_bounded(objects: Objects, key: str, max_bytes: int) -> bytes:
    """The bytes of an object that may be a stranger's: what claims to be larger than it can be is not loaded."""
    size = objects.size(key)
    if size > max_bytes:
        raise StoreFormatError(f"{key} has {size} bytes, more than the {max_bytes} that such a file can need")
    return objects.get(key)


@contextmanager
def machine_faults(what: str) -> Iterator[None]:
    """Turn errors of the machine into RunStoppedError with a next step; let the others pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _CRAFTED:
            raise StoreFormatError(f"cannot {what}: {error.strerror}; no store of ours holds such a file") from error
        step = _NEXT_STEP.get(error.errno or 0)
        if step is None:
            raise
        raise RunStoppedError(f"cannot {what}: {step} ({error.strerror})") from error


_REFUSED, _OVERTAKEN, _TOO_MANY = (401, 403), (409, 412), 429
_AGAIN = "run the same command again: what is there is not sent again"


@contextmanager
def hub_faults(what: str, url: str, repo: str, revision: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into ours."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no dataset {repo} on the Hub that this token may see; none is made by itself: who sees it, and "
            f"whose it is, is yours to say: `hf repos create {repo} --repo-type dataset --private`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{repo} has no branch {revision!r}: `hf repos branch create {repo} {revision} --repo-type dataset`"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{url} names no repository: {error}") from error
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise RunStoppedError(_explain_hub(what, url, error)) from error


def _explain_hub(what: str, url: str, error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # of an upload's thread
    status = getattr(getattr(cause, "response", None), "status_code", None)
    words = " ".join(str(cause).split())[:300]
    if status in _OVERTAKEN:
        return f"cannot {what}: somebody else committed to {url} meanwhile; {_AGAIN}, nothing of theirs is overwritten"
    if status in _REFUSED:
        return (
            f"cannot {what}: {url} refused this token ({words}); it may have expired or lack the right to write: renew "
            f"HF_TOKEN or `hf auth login`, then {_AGAIN}"
        )
    if status == _TOO_MANY:
        return f"cannot {what}: the Hub takes no more commits or requests for a while ({words}); wait, then {_AGAIN}"
    return f"cannot {what}: {url} gave no good answer; check the network and HF_ENDPOINT, then {_AGAIN} ({words})"


_CREDENTIALS = {  # scheme -> the environment variables that obstore reads
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for temporary ones, AWS_SESSION_TOKEN",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT_KEY",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_KEY",
    "hf": "HF_TOKEN, for private and gated repositories",
}
_ENDPOINT = {
    "s3": "AWS_ENDPOINT_URL and AWS_REGION",
    "gs": "the network",
    "az": "AZURE_STORAGE_ACCOUNT_NAME (or AZURE_STORAGE_ENDPOINT)",
    "hf": "HF_ENDPOINT",
}
_REFUSED_WORDS = ("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed")
_UNREACHABLE_WORDS = ("error sending request", "dns error", "ConnectError", "tcp connect", "timed out", "TimedOut")
_NO_BUCKET_WORDS = ("NoSuchBucket", "ContainerNotFound")
_S3_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_NO_ROLE = "AWS_EC2_METADATA_DISABLED"  # as the aws command understands it
_INSTANCE_METADATA = ("169.254.169.254", 80)  # where a cloud's machine is told its role


@contextmanager
def remote_faults(what: str, url: str) -> Iterator[None]:
    """Turn obstore's errors into ours; a missing key stays FileNotFoundError, a lost condition stays obstore's."""
    from obstore import exceptions

    try:
        yield
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
        raise
    except FileNotFoundError as error:
        if any(word in str(error) for word in _NO_BUCKET_WORDS):
            raise _no_bucket(url) from error
        raise FileNotFoundError(f"cannot {what}: it is not there") from error
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise RunStoppedError(_refused(what, url, error)) from error
    except exceptions.BaseError as error:
        raise _explain_remote(what, url, error) from error


def check_credentials(scheme: str) -> None:
    """Say at once that there are no credentials for a bucket, not after minutes of asking for a machine's role."""
    if scheme not in ("s3", "s3a") or any(name in os.environ for name in _S3_CREDENTIALS):
        return
    may_have_role = "AWS_SECRET_ACCESS_KEY" not in os.environ and os.environ.get(_NO_ROLE, "").lower() != "true"
    with suppress(OSError):
        if may_have_role:
            socket.create_connection(_INSTANCE_METADATA, timeout=1).close()
            return
    raise UserError(
        f"no credentials for {scheme}:// were found: set {_CREDENTIALS['s3']} (files of the aws command are not read: "
        '`eval "$(aws configure export-credentials --format env)"`), or AWS_SKIP_SIGNATURE=true for a public bucket; '
        "AWS_ENDPOINT_URL and AWS_REGION choose the server"
    )


def _no_bucket(url: str) -> UserError:
    bucket = urlsplit(url).netloc
    return UserError(f"there is no bucket {bucket!r} for {url}: check its name and {_endpoint(url)}, or create it")


def _refused(what: str, url: str, error: Exception) -> str:
    return (
        f"cannot {what}: {url} refused these credentials ({_first_words(error)}); they may have expired or lack the "
        f"right: renew {_credentials(url)} and run the same command again; what was committed is kept, nothing was "
        "quarantined"
    )


def _explain_remote(what: str, url: str, error: Exception) -> Exception:
    text = str(error)
    if any(word in text for word in _REFUSED_WORDS):
        return RunStoppedError(_refused(what, url, error))
    if any(word in text for word in _NO_BUCKET_WORDS):
        return _no_bucket(url)
    if any(word in text for word in _UNREACHABLE_WORDS):
        return RunStoppedError(
            f"cannot {what}: no answer from {url}, after repeated tries; check the network and {_endpoint(url)}, then "
            f"run the same command again ({_first_words(error)})"
        )
    return RunStoppedError(
        f"cannot {what}: {url} answered with an error, also after repeated tries; if it says 400, credentials may have "
        f"expired: renew them; then run the same command again ({_first_words(error)})"
    )


def _credentials(url: str) -> str:
    return _CREDENTIALS.get(urlsplit(url).scheme, "them")


def _endpoint(url: str) -> str:
    return _ENDPOINT.get(urlsplit(url).scheme, "the address")


def _first_words(error: Exception) -> str:
    """obstore's messages carry a debug dump after the first line."""
    return str(error).strip().splitlines()[0][:300]


_FORMAT = 1


def listing_bytes(sizes: Mapping[str, int]) -> bytes:
    """Key -> size in bytes, as canonical JSON."""
    return (canonical_json({"format": _FORMAT, "objects": dict(sizes)}) + "\n").encode()


def parse_listing(data: bytes) -> dict[str, int]:
    """The listing of a stranger, every name and size checked."""
    document = load_json(data, LISTING)
    sizes = document.get("objects") if isinstance(document, dict) and document.get("format") == _FORMAT else None
    if not isinstance(sizes, dict):
        raise StoreFormatError(f"{LISTING} is not a listing of this version: push the store again")
    try:
        for key, size in sizes.items():
            check_relative_path(key)
            if type(size) is not int or size < 0:
                raise StoreFormatError(f"{LISTING} gives {key!r} the size {size!r}")
    except UserError as error:
        raise StoreFormatError(f"{LISTING} holds a name that no store has: {error}") from error
    return sizes
