"""TLS for the clusters that this project starts: a client of a Dask scheduler can run code as its owner.

Every cluster gets a certificate of its own that is its own authority, so that only holders of its key can connect. It
is kept in memory, or in a folder that only the user may read where a job script starts the parts of a cluster:

    python -m jobs.security FOLDER        # writes FOLDER/tls.pem and prints the lines that Dask's programs need
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.settings import dask_environment
from mervcache.errors import ClusterError

if TYPE_CHECKING:
    from distributed import Security

LOOPBACK = "127.0.0.1"
_CREDENTIALS = "tls.pem"


def temporary_security() -> Security:
    """A certificate and key in memory, for a year."""
    from distributed import Security

    try:
        return Security.temporary()
    except ImportError as error:
        raise ClusterError(f"a cluster's connections are encrypted with cryptography: {error}") from error


@contextmanager
def private_folder(parent: Path) -> Iterator[Path]:
    """A folder in `parent` that only the user may enter; it is removed at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tls-", dir=parent) as folder:  # its mode is 0700
        yield Path(folder)


def security_in(folder: Path) -> Security:
    """A certificate and key in a file of `folder`, which job scripts name; Dask would make files that outlive it."""
    from distributed import Security

    path = _write_certificate(folder)
    files = {f"tls_{role}_{kind}": path for role in ("scheduler", "worker", "client") for kind in ("cert", "key")}
    return Security(require_encryption=True, tls_ca_file=path, **files)


def write_credentials(folder: Path) -> dict[str, Any]:
    """Write a new certificate with its key into `folder`, mode 0700; returns the settings of Dask that use it."""
    path = _write_certificate(folder)
    names = ["ca-file", *(f"{role}.cert" for role in ("scheduler", "worker", "client"))]
    return {"distributed.comm.require-encryption": True} | {f"distributed.comm.tls.{name}": path for name in names}


def _write_certificate(folder: Path) -> str:
    """Path of a new file that holds the certificate and its key."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    path, security = folder.absolute() / _CREDENTIALS, temporary_security()
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(security.tls_scheduler_cert + security.tls_scheduler_key)
    return str(path)


def main() -> None:
    """Print what a shell evaluates before it starts Dask's programs."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m jobs.security FOLDER")
    for name, value in dask_environment(write_credentials(Path(sys.argv[1]))).items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
