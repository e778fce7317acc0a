"""What a store refuses, told before anything is listed or loaded: loading four encoders takes a minute and more.

Comes in: an `ExtractConfig`. Goes out: nothing, or the error that the run would end with. The same questions are asked
again where something is written, for another driver may have been there meanwhile.
"""

from __future__ import annotations

from featurestore.layout import ROOT_METADATA
from featurestore.locate import Place, check_room_for_store
from featurestore.objects.open import check_writable, open_objects
from featurestore.writer import StoreWriter, check_holds_nothing_else
from jobs.clusters import check_scheduler
from pipeline.config import ExtractConfig


def check_request(config: ExtractConfig) -> None:
    """Raise what the place, or the store in it, has against the config, and what no cluster is called.

    Errors: `ClusterError` for an unknown scheduler; `UserError` for a place where no store can be and for other block
    rows; `IdentityConflictError` where an encoder is stored under other settings.
    """
    check_scheduler(config.scheduler)
    if not check_place(config.store_path):
        return
    store = StoreWriter.open(config.store_path)
    store.check_block_rows(config.block_rows)
    if not config.new_identity:
        _check_settings(store, config)


def check_place(place: Place) -> bool:
    """Raise `UserError` where no store can be, or where something else is; returns whether there is a store."""
    check_writable(place)
    check_room_for_store(place)
    objects = open_objects(place)
    is_there = objects.exists(ROOT_METADATA)
    if not is_there:
        check_holds_nothing_else(objects, place)
    return is_there


def _check_settings(store: StoreWriter, config: ExtractConfig) -> None:
    """All of an identity but what the weights hash to is known by now: as if they were the stored ones."""
    for settings in config.encoder_settings:
        stored = store.stored_identities(settings.name)
        asked = [settings.identity(known.weights_sha256) for known in stored]
        if stored and not {identity.id for identity in asked} & {known.id for known in stored}:
            store.check_identity(asked[0])
