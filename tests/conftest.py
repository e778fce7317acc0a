"""Fixtures of all rooms: servers that stand in for places far away."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from hypothesis import settings

# The same cases every time: a test fails because of what was changed. New cases are benchmarks/fuzz.py's to find.
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")


def _load(name: str) -> ModuleType:
    """A fixture module by its file: test folders are not packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "featurestore" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_s3, _web = _load("s3_server"), _load("web_server")
s3, s3_endpoint, web = _s3.s3, _s3.s3_endpoint, _web.web
