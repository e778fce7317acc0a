"""The Python API of MERV Cache, and the base package that featurestore, jobs, pipeline and trainer share.

    import mervcache

    mervcache.extract(mervcache.ExtractConfig(dataset="demo"))       # encode clips into features/demo.zarr
    store = mervcache.open_store("features/demo.zarr")
    mervcache.train(mervcache.get_stages("demo"), "features/demo.zarr", "runs/demo")
    print(mervcache.ask("runs/demo", "What colour is the shape?", video="clip.mp4"))

docs/python.md has an example for every task. Names are imported when they are first used: `import mervcache` loads
neither torch nor pyarrow. `__init__.pyi` next to this file gives them to editors and type checkers.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from mervcache.errors import import_with_extra

_API = {  # public name -> where it is defined
    "Asker": "trainer.ask:Asker",
    "Clip": "featurestore.clips:Clip",
    "ClusterRequest": "jobs.settings:ClusterRequest",
    "EvaluationRequest": "trainer.evaluate:EvaluationRequest",
    "Explorer": "pipeline.explorer.content:Explorer",
    "ExtractConfig": "pipeline.config:ExtractConfig",
    "FeatureDataset": "featurestore.dataset:FeatureDataset",
    "FeatureIdentity": "featurestore.identity:FeatureIdentity",
    "FeatureStore": "featurestore.store:FeatureStore",
    "MervCacheError": "mervcache.errors:MervCacheError",
    "Sample": "featurestore.clips:Sample",
    "SweepConfig": "trainer.ablation.sweep:SweepConfig",
    "TrainConfig": "trainer.config:TrainConfig",
    "ask": "trainer.ask:ask",
    "duplicates": "pipeline.duplicates:find_duplicates",
    "evaluate": "trainer.evaluate:evaluate_run",
    "export_run": "trainer.runs.export:export_run",
    "extract": "pipeline.extract:extract",
    "forecast": "pipeline.forecast:forecast",
    "get_stages": "trainer.recipes:get_stages",
    "load_run": "trainer.runs.load:load_run",
    "open_store": "featurestore.store:FeatureStore.open",
    "pool_clips": "pipeline.vectors:pool_clips",
    "probe": "trainer.ablation.probe:probe",
    "pull": "featurestore.transfer.sync:transfer",
    "push": "featurestore.transfer.sync:push",
    "read_extract_config": "pipeline.config:read_config",
    "serve_explorer": "pipeline.explorer.server:serve",
    "sweep": "trainer.ablation.execute:train_sweep",
    "train": "trainer.loop.stages:train_in_stages",
    "vectors": "pipeline.vectors:pool_store",
    "verify_store": "featurestore.maintenance.verify:verify_store",
    "write_explorer": "pipeline.explorer.server:write_site",
    "write_fiftyone": "pipeline.fiftyone:write_fiftyone",
    "write_vectors": "pipeline.vectors:write_vectors",
}
__all__ = [*_API]  # pyright: ignore[reportUnsupportedDunderAll]: names are loaded on first use


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'mervcache' has no attribute {name!r}")
    _check_nothing_hides_our_packages()
    module, _, path = _API[name].partition(":")
    value: Any = import_with_extra(module)
    for part in path.split("."):
        value = getattr(value, part)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names alone: completion lists no module of this package and no import of this file."""
    return sorted(__all__)


def _check_nothing_hides_our_packages() -> None:
    """Raise ImportError where a user's file, such as a `trainer.py` next to a notebook, hides one of our packages."""
    home = Path(__file__).resolve().parents[1]
    for package in ("featurestore", "jobs", "pipeline", "trainer"):
        spec = importlib.util.find_spec(package)
        expected = home / package / "__init__.py"
        if spec is None or not spec.origin or not expected.is_file() or Path(spec.origin).resolve() == expected:
            continue
        raise ImportError(
            f"{spec.origin} hides the package {package!r} of MERV Cache: rename it, or start Python in another folder"
        )
