"""The encoders by name: the built-in ones in MERV's order, then plug-ins.

A plug-in is an installed distribution with an entry point in the group `merv.encoders` whose value is an EncoderSpec:

    [project.entry-points."merv.encoders"]
    my_vit = "my_package.my_vit:SPEC"

Listing names imports no plug-in; a plug-in is imported when its spec is looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points

from mervcache.errors import UserError, unknown_name
from pipeline.encoders.base import EncoderSpec
from pipeline.encoders.published import PUBLISHED

ENTRY_POINT_GROUP = "merv.encoders"
MERV_ENCODERS = ("languagebind", "dinov2", "vivit", "siglip")  # in the order of princetonvisualai/merv


class EncoderTable(Mapping[str, EncoderSpec]):
    """A read-only dict of specs; names of plug-ins are found on first use."""

    def __init__(self, built_in: Mapping[str, EncoderSpec]) -> None:
        self._built_in = built_in

    @cached_property
    def _plug_ins(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: (entry.name, entry.value)):
            if entry not in found.setdefault(entry.name, []):
                found[entry.name].append(entry)
        return found

    def __getitem__(self, name: str) -> EncoderSpec:
        entries = self._plug_ins.get(name, []) if isinstance(name, str) else []
        if not entries:
            return self._built_in[name]
        origins = ["built in"] * (name in self._built_in) + [entry.value for entry in entries]
        if len(origins) > 1:
            raise UserError(
                f"encoder {name!r} is defined more than once: {', '.join(origins)}; uninstall or rename all but one"
            )
        plug_in = f"encoder plug-in {name} = {entries[0].value}"
        try:
            spec = entries[0].load()
        except Exception as error:  # of any kind: it is third-party code
            raise UserError(f"{plug_in} cannot be loaded: {error}") from error
        if not isinstance(spec, EncoderSpec) or spec.name != name:
            raise UserError(f"{plug_in} must be an EncoderSpec named {name!r}, got {spec!r}")
        return spec

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self._plug_ins

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._built_in, *self._plug_ins]))

    def __len__(self) -> int:
        return len(list(iter(self)))


ENCODERS = EncoderTable(PUBLISHED)


def encoder_spec(name: str, encoders: Mapping[str, EncoderSpec] = ENCODERS) -> EncoderSpec:
    """The spec of that name; `UserError` names the nearest known one."""
    if name not in encoders:
        raise UserError(unknown_name("encoder", name, encoders))
    return encoders[name]
