"""Keys of a store's encoders, such as `dinov2`, `dinov2@16x8x8` or `dinov2@7930cd`, and what a user's text stands for.

A key may change its form when identities are added to a store, so a text is matched with every form: it never stands
for another identity than before, but may fit several and is refused then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from featurestore.identity import FeatureIdentity
from mervcache.errors import StoreFormatError, UserError, unknown_name

ID_DIGITS = 6  # of an identity, in a key


def encoder_keys(identities: Iterable[FeatureIdentity]) -> dict[str, FeatureIdentity]:
    """Identities by key: the encoder's name where it has one, else with the grid where all differ in it, else the id.

    StoreFormatError where two identities share the digits of the id that a key has.
    """
    by_encoder: dict[str, dict[str, FeatureIdentity]] = {}
    for identity in sorted(identities, key=lambda identity: identity.group_name):
        by_encoder.setdefault(identity.encoder, {})[identity.id] = identity
    keys: dict[str, FeatureIdentity] = {}
    for encoder, by_id in by_encoder.items():
        grids = {identity.grid for identity in by_id.values()}
        for identity in by_id.values():
            suffix = grid_text(identity) if len(grids) == len(by_id) else identity.id[:ID_DIGITS]
            key = encoder if len(by_id) == 1 else f"{encoder}@{suffix}"
            if key in keys:
                raise StoreFormatError(
                    "two identities of one encoder share their first six digits; keep one of them per store"
                )
            keys[key] = identity
    return keys


def grid_text(identity: FeatureIdentity) -> str:
    """`16x8x8`: the stored T, H, W of a video."""
    return "x".join(map(str, identity.grid))


def keys_of(encoder: str, keys: Mapping[str, FeatureIdentity]) -> list[str]:
    """The keys that a text stands for: a name alone, with a grid, or with at least six digits of the id."""
    name, _, suffix = encoder.partition("@")

    def fits(identity: FeatureIdentity) -> bool:
        is_id = len(suffix) >= ID_DIGITS and identity.id.startswith(suffix)
        return identity.encoder == name and (encoder == name or is_id or suffix == grid_text(identity))

    return [key for key, identity in keys.items() if fits(identity)]


def chosen_keys(encoders: Iterable[str], keys: Mapping[str, FeatureIdentity]) -> list[str]:
    """The keys that texts stand for, each once and in their order; UserError for one that stands for none."""
    chosen: dict[str, None] = {}
    for encoder in encoders:
        if not (found := keys_of(encoder, keys)):
            raise UserError(unknown_name("encoder", encoder, keys))
        chosen |= dict.fromkeys(found)
    return list(chosen)


def find_key(encoder: str, keys: Mapping[str, FeatureIdentity]) -> str:
    """The one key that a text stands for; UserError lists the choices where it fits several or none."""
    found = keys_of(encoder, keys)
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"encoder {encoder!r} is stored under several identities; name one of: {', '.join(found)}, whose grids and "
            "layers `merv-pipeline status` lists"
        )
    raise UserError(f"encoder {encoder!r} is not in this store; it has: {', '.join(keys) or 'none'}")
