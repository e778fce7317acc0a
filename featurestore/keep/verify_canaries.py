"""The canaries of a store: each file is covered by its own digest, and by the newest snapshot once that names it."""

from __future__ import annotations

from collections.abc import Mapping

from featurestore.canaries import Canaries, max_canary_bytes
from featurestore.clips import KINDS
from featurestore.digests import sha256_hex
from featurestore.identity import FeatureIdentity
from featurestore.keep.findings import Findings
from featurestore.layout import CANARIES, canary_groups, canary_key
from featurestore.places.objects import Objects, get_bounded
from featurestore.snapshots import Snapshot


def check_canaries(
    findings: Findings,
    objects: Objects,
    identities: Mapping[tuple[str, str], FeatureIdentity],
    newest: Snapshot | None,
    *,
    is_full: bool,
) -> None:
    """Damaged or lost canaries of the store's groups; those of a group that it has not are told as strays elsewhere."""
    named = dict(newest.canaries) if newest else {}
    for kind in KINDS:
        for group in canary_groups(objects.list_names(f"{CANARIES}/{kind}")):
            sha256 = named.pop(f"{kind}/{group}", None)
            if identity := identities.get((kind, group)):
                _check(findings, objects, kind, identity, sha256, is_full)
    for name in named:
        findings.found(canary_key(*name.split("/")), "is missing though the newest snapshot names it")


def _check(
    findings: Findings, objects: Objects, kind: str, identity: FeatureIdentity, sha256: str | None, is_full: bool
) -> None:
    key = canary_key(kind, identity.group_name)
    with findings.reading(key):
        if not is_full:
            objects.size(key)
            return
        data = get_bounded(objects, key, max_canary_bytes(kind, identity))
        Canaries.parse(data, kind, identity)
        if sha256 is not None and sha256_hex(data) != sha256:
            findings.found(key, "does not match the digest that its snapshot holds")
