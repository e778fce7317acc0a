"""What the Hub's errors mean to a person: token, repository, branch, another's commit; each with the next step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from featurestore.errors import RunStoppedError, UserError

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
        raise RunStoppedError(_explained(what, url, error)) from error


def _explained(what: str, url: str, error: Exception) -> str:
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
