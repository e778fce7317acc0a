"""The encoders by name: the built-in ones in MERV's order, then plug-ins; and any model of timm as `timm:NAME`.

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
from pipeline.encoders.timm_models import PREFIX, timm_spec

MERV_ENCODERS = ("languagebind", "dinov2", "vivit", "siglip")  # in the order of princetonvisualai/merv


class EncoderTable(PlugInTable[EncoderSpec]):
    """Encoders by name; models of timm are found by `timm.NAME` and not listed: there are over a thousand."""

    def __init__(self, built_in: Mapping[str, EncoderSpec]) -> None:
        super().__init__(built_in, group="merv.encoders", what="encoder", kind=EncoderSpec)

    def __getitem__(self, name: str) -> EncoderSpec:
        return timm_spec(name) if name.startswith(PREFIX) else super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith(PREFIX))


ENCODERS = EncoderTable(PUBLISHED)


def encoder_name(text: str) -> str:
    """An encoder's name as identities and stores have it: `timm:NAME` is `timm.NAME` there, others are as given."""
    return PREFIX + text.removeprefix("timm:") if text.startswith("timm:") else text


def encoder_spec(name: str, encoders: Mapping[str, EncoderSpec] = ENCODERS) -> EncoderSpec:
    """The spec of that name; `UserError` names the nearest known one."""
    if name not in encoders:
        raise UserError(unknown_name("encoder", name, encoders))
    return encoders[name]
