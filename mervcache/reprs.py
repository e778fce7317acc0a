"""One line for a value in a notebook or a log, without credentials and control characters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

from mervcache.text import one_line, redact

MAX_SHOWN = 20  # entries of a list; of a longer one the number is shown


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


def shown(value: Any) -> str:
    """`repr` of a setting's value, and of a list of more than `MAX_SHOWN` values their number.

    >>> shown(("a", "b")), shown(tuple(range(21)))
    ("('a', 'b')", '21 values')
    """
    return f"{len(_list(value)):,} values" if len(_list(value)) > MAX_SHOWN else repr(value)


def was_and_is(name: str, before: Any, now: Any) -> str:
    """`name was BEFORE, is NOW`; of lists too long to show, also how many values are new and how many are gone.

    >>> was_and_is("limit", None, 8), was_and_is("exclude", tuple(range(21)), (1, 30))
    ('limit was None, is 8', 'exclude was 21 values, is (1, 30): 1 new, 20 gone')
    """
    text, old, new = f"{name} was {shown(before)}, is {shown(now)}", _list(before), _list(now)
    if max(len(old), len(new)) <= MAX_SHOWN:
        return text
    return f"{text}: {len(set(new) - set(old))} new, {len(set(old) - set(new))} gone"


def _list(value: Any) -> Sequence[Any]:
    """The values of a list; of anything else none."""
    return cast("Sequence[Any]", value) if isinstance(value, list | tuple) else ()


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(value: Any) -> str:
    is_value = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return changed_fields(value) if is_value else shown(value)
