"""What is stored: clips, samples, tokens, and the record that they are committed.

`FeatureStore` reads, `StoreWriter` writes. Both are loaded on first use, so that `import featurestore` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurestore.clips import Clip, Sample
    from featurestore.dataset import FeatureDataset
    from featurestore.identity import FeatureIdentity
    from featurestore.maintenance.verify import verify_store
    from featurestore.store import FeatureStore
    from featurestore.writer import StoreWriter

_LAZY_IMPORTS = {
    "Clip": "featurestore.clips",
    "FeatureDataset": "featurestore.dataset",
    "FeatureIdentity": "featurestore.identity",
    "FeatureStore": "featurestore.store",
    "Sample": "featurestore.clips",
    "StoreWriter": "featurestore.writer",
    "verify_store": "featurestore.maintenance.verify",
}
__all__ = [
    "Clip",
    "FeatureDataset",
    "FeatureIdentity",
    "FeatureStore",
    "Sample",
    "StoreWriter",
    "verify_store",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'featurestore' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY_IMPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
