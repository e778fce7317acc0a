"""The encoders by name: those of this project in MERV's order, then plug-ins.

A plug-in is an installed distribution with an entry point in the group `merv.encoders` whose value is an EncoderSpec:

    [project.entry-points."merv.encoders"]
    my_vit = "my_package.my_vit:SPEC"

Listing names imports no plug-in; only the plug-in that is asked for is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points

from mervcache.errors import UserError, unknown_name
from pipeline.encoders.base import EncoderSpec
from pipeline.encoders.published import CLIP, DINOV2, LANGUAGEBIND, SIGLIP, VIDEOMAE, VIVIT

ENTRY_POINT_GROUP = "merv.encoders"
MERV_ENCODERS = ("languagebind", "dinov2", "vivit", "siglip")  # in the order of princetonvisualai/merv


class EncoderTable(Mapping[str, EncoderSpec]):
    """A read-only dict of specs; names of plug-ins are found on first use."""

    def __init__(self, built_in: tuple[EncoderSpec, ...]) -> None:
        self._built_in = {spec.name: spec for spec in built_in}

    @cached_property
    def _plug_ins(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: (entry.name, entry.value)):
            if entry not in found.setdefault(entry.name, []):
                found[entry.name].append(entry)
        return found

    def __getitem__(self, name: str) -> EncoderSpec:
        entries = self._plug_ins.get(name, []) if isinstance(name, str) else []
        if len(entries) + (name in self._built_in) > 1:
            raise UserError(f"encoder {name!r} is defined more than once: {_origins(name, self._built_in, entries)}")
        return _load_plug_in(entries[0]) if entries else self._built_in[name]

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self._plug_ins

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._built_in, *self._plug_ins]))

    def __len__(self) -> int:
        return len(list(iter(self)))


ENCODERS = EncoderTable((LANGUAGEBIND, DINOV2, VIVIT, SIGLIP, CLIP, VIDEOMAE))


def encoder_spec(name: str, encoders: Mapping[str, EncoderSpec] = ENCODERS) -> EncoderSpec:
    """The spec of a name that a person gave."""
    if name not in encoders:
        raise UserError(unknown_name("encoder", name, encoders))
    return encoders[name]


def _origins(name: str, built_in: Mapping[str, EncoderSpec], entries: list[EntryPoint]) -> str:
    ours = ["built in"] if name in built_in else []
    return ", ".join(ours + [entry.value for entry in entries]) + "; uninstall or rename all but one"


def _load_plug_in(entry: EntryPoint) -> EncoderSpec:
    """Import a plug-in; whatever it raises becomes a message that names it."""
    try:
        spec = entry.load()
    except Exception as error:
        raise UserError(f"encoder plug-in {entry.name} = {entry.value} cannot be loaded: {error}") from error
    if not isinstance(spec, EncoderSpec) or spec.name != entry.name:
        raise UserError(
            f"encoder plug-in {entry.name} = {entry.value} must be an EncoderSpec named {entry.name!r}, got {spec!r}"
        )
    return spec
