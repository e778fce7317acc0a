"""The encoders by name: the built-in ones in MERV's order, then plug-ins.

A plug-in is an installed distribution with an entry point in the group `merv.encoders` whose value is an EncoderSpec:

    [project.entry-points."merv.encoders"]
    my_vit = "my_package.my_vit:SPEC"
"""

from __future__ import annotations

from collections.abc import Mapping

from mervcache.errors import UserError, unknown_name
from mervcache.plugins import PlugInTable
from pipeline.encoders.base import EncoderSpec
from pipeline.encoders.published import PUBLISHED

MERV_ENCODERS = ("languagebind", "dinov2", "vivit", "siglip")  # in the order of princetonvisualai/merv


def encoder_table(built_in: Mapping[str, EncoderSpec]) -> PlugInTable[EncoderSpec]:
    """These encoders and the plug-ins."""
    return PlugInTable(built_in, group="merv.encoders", what="encoder", kind=EncoderSpec)


ENCODERS = encoder_table(PUBLISHED)


def encoder_spec(name: str, encoders: Mapping[str, EncoderSpec] = ENCODERS) -> EncoderSpec:
    """The spec of that name; `UserError` names the nearest known one."""
    if name not in encoders:
        raise UserError(unknown_name("encoder", name, encoders))
    return encoders[name]
