"""One line for a value in a notebook or a log, without credentials and control characters."""

from __future__ import annotations

import dataclasses
from typing import Any

from mervcache.text import one_line, redact


def brief(value: object, text: str) -> str:
    """`<Class text>`, for values whose fields would fill a page."""
    return one_line(redact(f"<{type(value).__name__} {text}>"))


def changed_fields(self: Any) -> str:
    """`Class(field=value, ...)` with the fields of a dataclass that differ from their defaults, nested ones alike.

    A class that wants it sets `__repr__ = changed_fields`.
    """
    shown = [
        f"{field.name}={_shown(current)}"
        for field in dataclasses.fields(self)
        if field.repr and (current := getattr(self, field.name)) != _default(field)
    ]
    return one_line(redact(f"{type(self).__name__}({', '.join(shown)})"))


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(value: Any) -> str:
    is_value = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return changed_fields(value) if is_value else repr(value)
