"""Places on the Hugging Face Hub: dataset repositories and buckets, their web addresses, and the token.

Importing this module needs neither obstore nor huggingface_hub.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from mervcache.errors import UserError

HUB = "https://huggingface.co"


@dataclass(frozen=True, kw_only=True)
class HubPlace:
    """A folder of a dataset repository at a revision, or of a bucket, which has no revisions."""

    kind: Literal["datasets", "buckets"]
    repo: str  # USER/NAME
    revision: str  # "" for a bucket
    folder: str  # "" for all of it

    @classmethod
    def of(cls, url: str) -> HubPlace:
        """`hf://datasets/USER/REPO[@REVISION][/FOLDER]` or `hf://buckets/USER/BUCKET[/FOLDER]`."""
        kind, _, rest = url.removeprefix("hf://").partition("/")
        user, _, rest = rest.partition("/")
        name, _, folder = rest.partition("/")
        name, at, revision = name.partition("@")
        is_bucket = kind == "buckets" and not at
        if not user or not name or not (kind == "datasets" or is_bucket):
            raise UserError(
                f"{url}: stores on the Hub are hf://datasets/USER/REPO, optionally with @REVISION and /FOLDER, or "
                "hf://buckets/USER/BUCKET, optionally with /FOLDER"
            )
        if is_bucket:
            return cls(kind="buckets", repo=f"{user}/{name}", revision="", folder=folder)
        return cls(kind="datasets", repo=f"{user}/{name}", revision=revision or "main", folder=folder)

    def path(self, key: str) -> str:
        """The path of a key in the repository or bucket."""
        return f"{self.folder}/{key}" if self.folder else key

    @property
    def address(self) -> str:
        """The web address of the folder, at which files are read."""
        revision = f"/{quote(self.revision, safe='')}" if self.revision else ""
        address = f"{hub_endpoint()}/{self.kind}/{self.repo}/resolve{revision}"
        return f"{address}/{self.folder}" if self.folder else address


def hub_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", HUB).rstrip("/")


def hub_token() -> str | None:
    """From HF_TOKEN, or stored by `hf auth login`."""
    if token := os.environ.get("HF_TOKEN"):
        return token
    from huggingface_hub import get_token

    return get_token()
