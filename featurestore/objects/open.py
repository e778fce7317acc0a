"""Open the objects of a store by its place: a folder, a bucket or a web address."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from featurestore.locate import Place, is_url, place_of
from featurestore.objects.base import Objects
from featurestore.objects.local import LocalObjects
from mervcache.text import check_not_redacted

if TYPE_CHECKING:
    from featurestore.objects.hub import HubObjects
    from featurestore.objects.hub_client import BucketObjects
    from featurestore.objects.remote import RemoteObjects


def open_objects(place: Place) -> LocalObjects | RemoteObjects:
    """A folder, or a URL after one request to its server, so that a wrong URL or credential fails fast."""
    place = place_of(place)
    check_not_redacted(str(place))
    if not is_url(place):
        return LocalObjects(place)
    from featurestore.objects.hub_client import HubReader  # needs obstore, which a folder does not
    from featurestore.objects.remote import READ_ONLY, RemoteObjects, WebObjects

    scheme = urlsplit(str(place)).scheme
    readers = {"hf": HubReader, **dict.fromkeys(set(READ_ONLY) - {"hf"}, WebObjects)}
    objects = readers.get(scheme, RemoteObjects)(str(place))
    objects.ping()
    return objects


def open_hub(place: Place) -> HubObjects | BucketObjects | None:
    """A repository or a bucket of the Hub, to push to; None for any other place."""
    place = place_of(place)
    if not is_url(place) or urlsplit(str(place)).scheme != "hf":
        return None
    from featurestore.objects.hub import HubObjects  # needs huggingface_hub
    from featurestore.objects.hub_client import BucketObjects
    from featurestore.objects.hub_place import HubPlace

    return (BucketObjects if HubPlace.of(str(place)).kind == "buckets" else HubObjects)(str(place))


def check_writable(place: Place) -> None:
    """Refuse the web and the Hub before a server is contacted or a store is read."""
    place = place_of(place)
    if is_url(place):
        from featurestore.objects.remote import READ_ONLY, read_only_error

        if urlsplit(str(place)).scheme in READ_ONLY:
            raise read_only_error(str(place))


def open_cached(place: Place, cache: Place | bool, cache_bytes: int | None) -> Objects:
    """Like `open_objects`; what is read from a URL is cached on this machine, unless `cache` is False."""
    objects = open_objects(place)
    if isinstance(objects, LocalObjects) or cache is False:
        return objects
    from featurestore.objects.cache import CachedObjects, cache_bound, cache_folder

    cached = CachedObjects(objects, cache_folder(None if cache is True else cache), cache_bound(cache_bytes))
    return cast("Objects", cached)  # by its __getattr__


def in_parallel(call: Callable[[Any], Any], items: Iterable[Any], width: int) -> list[Any]:
    """Results in the order of the items; with a width of 1 no thread is started."""
    items = list(items)
    if width == 1 or len(items) < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(min(width, len(items)), thread_name_prefix="store") as pool:
        return list(pool.map(call, items))
