"""Push: a store to a place where others find it, with a card for people and a listing for web servers."""

from __future__ import annotations

from typing import Any

from featurestore.find import Place, place_of
from featurestore.layout import CARD, LISTING, TEMPORARY
from featurestore.places.by_url import open_hub, open_objects
from featurestore.places.listing import listing_bytes
from featurestore.places.objects import Objects, put_if_absent
from featurestore.share.card import write_card
from featurestore.share.transfer import Transferred, transfer
from featurestore.snapshots import newest_snapshot_id
from featurestore.store import FeatureStore


def push(source: Place, destination: Place, *, license: str | None = None, **options: Any) -> Transferred:
    """`transfer`, then the card and the listing, which describe what is at the destination now."""
    hub = open_hub(destination)
    done = transfer(source, destination, target=hub, **options)
    objects = open_objects(destination) if hub is None else hub
    newest = newest_snapshot_id(objects) or done.snapshot
    store = FeatureStore(str(place_of(destination)), newest, objects=objects)
    done.card = write_card(objects, store, place=str(destination), license=license)
    write_listing(objects)
    objects.flush()
    return done


def write_listing(objects: Objects) -> None:
    """Put `listing.json`, if it says anything new."""
    own = (LISTING, CARD)
    sizes = {
        key: size
        for key, size in objects.list_tree().items()
        if key not in own and not key.startswith((f"{TEMPORARY}/", "."))
    }
    data = listing_bytes(sizes)
    if not put_if_absent(objects, LISTING, data) and objects.get(LISTING) != data:
        objects.replace(LISTING, data)
