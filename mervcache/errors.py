"""The error tree: every error that a caller can act on, by what to do about it.

    MervCacheError
    ├── UserError              the request is invalid: change the command, config or path
    ├── ClusterError           the cluster cannot be started or reached: change its settings, or start it
    ├── StoreError             a problem with one store
    │   ├── StoreNotFoundError     no store at that path: extract one, or fix the path
    │   ├── StoreFormatError       not a store that this version reads: newer, foreign or hostile metadata
    │   ├── StoreDamagedError      bytes differ from their digest: verify, then repair
    │   ├── IdentityConflictError  the encoder is stored under another identity: explain, --new-identity
    │   ├── ClipUnavailableError   the clip has no committed tokens of that encoder
    │   └── AlreadyExistsError     an exclusive put came second: read what the first writer wrote
    ├── MediaError             one clip cannot be decoded: quarantine it and continue
    ├── NonFiniteError         numbers became infinite or NaN: lower learning rates, or look at the samples
    └── RunStoppedError        the machine, not the clip: disk full, share gone, credentials expired

Command lines print the message of a ``MervCacheError`` without a traceback; any other error is a bug.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

EXTRA_OF = {  # module that an extra brings -> the extras that have it
    **dict.fromkeys(("torch", "transformers", "accelerate", "safetensors", "PIL"), "extract,train"),
    **dict.fromkeys(("dask", "distributed", "cryptography"), "extract,train"),
    **dict.fromkeys(("av", "webdataset"), "extract"),
    **dict.fromkeys(("huggingface_hub", "obstore"), "remote"),
    "peft": "train",
    "bokeh": "view",
    "pandas": "pandas",
    "matplotlib": "plot",
    "timm": "timm",
}
EXIT_WITH_FAILURES = 3  # exit code of a command that finished and left something out, such as clips that failed


class MervCacheError(Exception):
    """Root of the tree; the message gives what is wrong, the values and what to do next."""


class UserError(MervCacheError):
    """The request is invalid."""


class ClusterError(MervCacheError):
    """The requested cluster cannot be started or reached."""


class StoreError(MervCacheError):
    """A problem with one feature store."""


class StoreNotFoundError(StoreError):
    """No feature store exists at that path."""


class StoreFormatError(StoreError):
    """The data is not a feature store that this version can read."""


class StoreDamagedError(StoreError):
    """Bytes in the store differ from the digest that covers them."""


class IdentityConflictError(StoreError):
    """The store holds this encoder under another identity."""


class ClipUnavailableError(StoreError):
    """A clip has no committed tokens of the requested encoder."""


class AlreadyExistsError(StoreError):
    """An exclusive put found other bytes under that name."""


class MediaError(MervCacheError):
    """One clip cannot be decoded.

    ``str(error)`` is the reason that is stored in the receipt: it holds no measured values, hosts or absolute
    paths, so that the same broken file gives the same bytes on every machine.
    """


class NonFiniteError(MervCacheError):
    """Losses, gradients, weights or scores are infinite or NaN, so nothing can be made of them."""


class RunStoppedError(MervCacheError):
    """The environment failed, not a clip: stop the run and quarantine nothing."""


def nearest_name(name: object, known: Iterable[str]) -> str:
    """The known name that is most like `name`; "" where none is."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)), "")


def unknown_name(what: str, name: object, known: Iterable[object], *, nearest: str | None = None) -> str:
    """The message for an unknown name: the nearest known one, then all of them.

    >>> unknown_name("dataset", "videolava", ["demo", "videollava"])
    "unknown dataset 'videolava', the nearest known one is 'videollava'; known: demo, videollava"
    """
    listed = [str(entry) for entry in known]
    nearest = nearest_name(name, listed) if nearest is None else nearest
    hint = f", the nearest known one is {nearest!r}" if nearest else ""
    return f"unknown {what} {name!r}{hint}; known: {', '.join(listed) or 'none'}"


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """The message for a module that an extra brings; None for any other module, which is a bug.

    >>> missing_extra(ModuleNotFoundError(name="torch.nn"))
    "torch is not installed: pip install 'merv-pipeline[extract,train]'"
    """
    module = (error.name or "").partition(".")[0]
    return f"{module} is not installed: pip install 'merv-pipeline[{EXTRA_OF[module]}]'" if module in EXTRA_OF else None


def import_with_extra(module: str) -> ModuleType:
    """The `module`, imported; a ModuleNotFoundError for one that an extra brings names the extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (message := missing_extra(error)) is None:
            raise
        raise ModuleNotFoundError(message, name=error.name) from error


def no_file(path: object) -> str:
    """The message for a media file that does not exist."""
    return f"there is no file {path}; give a video or an image that exists"
