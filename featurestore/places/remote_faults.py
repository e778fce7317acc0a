"""What an object store's errors mean to a person: credentials, bucket, network; each with the next step.

All of them stop a run (`RunStoppedError`) and quarantine nothing: a clip is never to blame for a bucket. Requests that
may succeed if repeated (5xx, throttling, dropped connections) were repeated by obstore before they come here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from featurestore.errors import RunStoppedError, UserError

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
        raise _explained(what, url, error) from error


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


def _explained(what: str, url: str, error: Exception) -> Exception:
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
