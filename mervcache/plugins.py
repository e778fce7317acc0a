"""Tables of choices by name: built-in ones, then plug-ins of installed distributions.

A plug-in is an entry point in the table's group. Listing names imports no plug-in; it is imported when its value is
looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from mervcache.errors import UserError

PLUGIN_API = 1  # grows when a plug-in has to be changed; docs/extending.md lists what it covers
Value = TypeVar("Value")


class PlugInTable(Mapping[str, Value]):
    """A read-only dict; names of plug-ins are found on first use.

    Parameters
    ----------
    built_in
        Values by name.
    group
        Entry points that add to them, such as `merv.encoders`.
    what
        What one of them is, in messages.
    kind
        Type of the values, whose attribute `name` is the entry point's; None: values are `module:attribute` texts,
        which their user imports.
    """

    def __init__(self, built_in: Mapping[str, Value], *, group: str, what: str, kind: type | None) -> None:
        self._built_in, self._group, self._what, self._kind = built_in, group, what, kind

    @cached_property
    def _plug_ins(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for entry in sorted(entry_points(group=self._group), key=lambda entry: (entry.name, entry.value)):
            if entry not in found.setdefault(entry.name, []):
                found[entry.name].append(entry)
        return found

    def __getitem__(self, name: str) -> Value:
        entries = self._plug_ins.get(name, [])
        if not entries:
            return self._built_in[name]
        origins = ["built in"] * (name in self._built_in) + [entry.value for entry in entries]
        if len(origins) > 1:
            raise UserError(
                f"{self._what} {name!r} is defined more than once: {', '.join(origins)}; uninstall or rename all but"
                " one"
            )
        return self._load(entries[0])

    def usable(self, on_broken: Callable[[str], object]) -> list[Value]:
        """The values in order, without those of broken plug-ins: `on_broken` is called with the reason of each."""
        values: list[Value] = []
        for name in self:
            try:
                values.append(self[name])
            except UserError as error:
                on_broken(str(error))
        return values

    def _load(self, entry: EntryPoint) -> Any:
        if self._kind is None:
            return entry.value
        plug_in = f"{self._what} plug-in {entry.name} = {entry.value}"
        try:
            value = entry.load()
        except Exception as error:  # of any kind: it is third-party code
            raise UserError(f"{plug_in} cannot be loaded: {error}") from error
        if not isinstance(value, self._kind) or getattr(value, "name", None) != entry.name:
            raise UserError(f"{plug_in} must be {self._kind.__name__}(name={entry.name!r}, ...), got {value!r}")
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self._plug_ins

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._built_in, *self._plug_ins]))

    def __len__(self) -> int:
        return len({*self._built_in, *self._plug_ins})
