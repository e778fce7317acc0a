"""Models of timm by name: `timm:NAME` gives the spec, preprocessing and features that timm declares for it.

Features are what `forward_features` returns, without class and register tokens: a grid of tokens, or the feature map of
a convolutional network. timm's own data config gives size, mean, std, filter and crop. Names, sizes and the layout of
the tokens come from the installed timm, so looking a name up imports torch and builds the model without storage.

B batch, T frames, H W rows and columns of tokens, N all tokens, K prefix tokens, D width.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from mervcache.errors import UserError, unknown_name
from pipeline.encoders.base import EncoderSpec
from pipeline.views import ResizeRule

PREFIX = "timm."  # of the names of these encoders in identities and stores; a command line may have `timm:` instead
INSTALL = "pip install timm, or `pip install --no-deps timm` for a torch that no torchvision is built for"
FILTERS = ("bicubic", "bilinear")
FITS: dict[str, Any] = {"center": "centre-crop", "squash": "squash"}  # timm's crop mode -> ours
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError, ImportError)
_lock = threading.Lock()


def import_timm() -> ModuleType:
    """The library; where torchvision is not installed, its models without its image transforms."""
    with _lock:
        if importlib.util.find_spec("timm") is None:
            raise UserError(f"timm:NAME needs the library timm: {INSTALL}")
        try:
            if "timm" not in sys.modules and importlib.util.find_spec("torchvision") is None:
                with _without_torchvision():
                    return importlib.import_module("timm")
            return importlib.import_module("timm")
        except FAILURES as error:  # a torchvision of another torch build raises RuntimeError
            raise UserError(f"timm cannot be imported here: {str(error).splitlines()[0]}; {INSTALL}") from error


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """Import timm's models alone.

    Its `timm.data` imports torchvision for transforms and data sets, of which the models take constants only: the
    package is made here without running its `__init__`. Two modules name a norm layer of torchvision, to compare types
    with. Nothing is left under torchvision's name afterwards.
    """
    import torch

    class FrozenBatchNorm2d(torch.nn.Module):
        def __init__(self, *_arguments: Any, **_options: Any) -> None:
            raise ImportError("a model with FrozenBatchNorm2d needs torchvision: pip install torchvision")

    names = ("torchvision", "torchvision.ops", "torchvision.ops.misc")
    for name in names:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = []
    sys.modules[names[-1]].FrozenBatchNorm2d = FrozenBatchNorm2d  # type: ignore[attr-defined]
    found = importlib.util.find_spec("timm")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "data"
    data = ModuleType("timm.data")
    data.__path__ = [str(folder)]
    spec = importlib.util.spec_from_file_location("timm.data.constants", folder / "constants.py")
    assert spec is not None
    assert spec.loader is not None
    constants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(constants)
    vars(data).update({name: value for name, value in vars(constants).items() if name.isupper()})
    sys.modules |= {"timm.data": data, "timm.data.constants": constants}
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model's features come out of `forward_features`, measured at its own image size."""

    side: int  # rows and columns of the grid
    width: int  # D
    prefix_tokens: int  # K
    num_blocks: int | None  # whose outputs are tokens like the features; None: the model has no such list
    has_norm: bool  # whether a norm follows the last block
    has_positions: bool  # whether position embeddings have to be resampled for other image sizes


@cache
def timm_spec(name: str) -> EncoderSpec:
    """The spec of `timm.MODEL` or `timm.MODEL.TAG`, as timm describes it.

    Errors: `UserError` for an unknown model, one that does not take square RGB images, and features on no square grid.
    """
    timm, model_name = import_timm(), name.removeprefix(PREFIX)
    architecture, _, tag = model_name.partition(".")
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), n=5)
        advice = f"; near it: {', '.join(near)}" if near else ""
        raise UserError(f"timm {timm.__version__} has no model {architecture!r}{advice}; timm.list_models() lists all")
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UserError(unknown_name(f"weights of timm model {architecture}", tag, tags))
    data = timm.get_pretrained_cfg(model_name)
    channels, height, image_size = data.input_size
    if channels != 3 or height != image_size:
        raise UserError(f"{name} takes {channels} x {height} x {image_size} inputs, encoders see square RGB frames")
    if data.interpolation not in FILTERS:
        raise UserError(f"{name} is resized by {data.interpolation}, known are {', '.join(FILTERS)}")
    if data.crop_mode not in FITS:
        raise UserError(f"{name} is cropped by {data.crop_mode!r}, known are {', '.join(FITS)}")
    layout = _measure(model_name, image_size)
    if image_size % layout.side:
        raise UserError(
            f"{name} makes {layout.side} x {layout.side} places of {image_size} x {image_size} pixels, which is not a "
            "whole number of pixels per place"
        )
    patch = image_size // layout.side
    sizes = {"image_size": image_size, "patch_size": patch, "num_frames": 16, "tubelet_frames": 1}
    sizes |= {"hidden_size": layout.width}
    sizes |= {"num_layers": layout.num_blocks} if layout.num_blocks else {}
    sizes |= {"position_grid": layout.side} if layout.has_positions else {}
    return EncoderSpec(
        name=name,
        summary=f"{model_name} of timm",
        model=f"timm/{architecture}",
        hub_id=data.hf_hub_id or f"timm/{model_name}",
        builder="pipeline.encoders.timm_network:TimmNetwork",
        architecture=sizes,
        temporal_reach="frame",
        resize=ResizeRule(filter=data.interpolation, fit=FITS[data.crop_mode], crop_pct=float(data.crop_pct or 1.0)),
        mean=tuple(data.mean),
        std=tuple(data.std),
        prefix_tokens=layout.prefix_tokens,
        final_norm=layout.has_norm,
        licence=data.license or "not stated by timm",
    )


def _measure(model_name: str, image_size: int) -> Layout:
    """Build the model without storage and follow the shapes of one forward."""
    import torch

    timm, shapes = import_timm(), {}

    def record(place: str) -> Any:
        return lambda _module, _inputs, output: shapes.update({place: getattr(output, "shape", None)})

    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.inference_mode():
            model = timm.create_model(model_name, num_classes=0).eval()
            blocks, norm = getattr(model, "blocks", None), getattr(model, "norm", None)
            if isinstance(blocks, torch.nn.Sequential | torch.nn.ModuleList) and len(blocks) > 1:
                for place, block in (("first", blocks[0]), ("last", blocks[-1])):
                    block.register_forward_hook(record(place))
            if isinstance(norm, torch.nn.Module):
                norm.register_forward_hook(record("norm"))
            features = model.forward_features(torch.empty(1, 3, image_size, image_size))
        shape = tuple(features.shape)
    except FAILURES as error:
        raise UserError(f"timm:{model_name} cannot be used as an encoder of frames: {error}") from error
    is_list = len(shape) == 3 and all(shapes.get(place) == shape for place in ("first", "last", "norm"))
    prefix = getattr(model, "num_prefix_tokens", 0) if len(shape) == 3 else 0
    sides = _map_axes(model, shape) if len(shape) == 4 else [math.isqrt(max(shape[1] - prefix, 0))] * 2
    if len(shape) not in (3, 4) or sides[0] != sides[1] or (len(shape) == 3 and sides[0] ** 2 + prefix != shape[1]):
        raise UserError(f"timm:{model_name} gives features {list(shape)}, which are no square grid of tokens")
    return Layout(
        side=sides[0],
        width=shape[2] if len(shape) == 3 else model.num_features,
        prefix_tokens=prefix,
        num_blocks=len(cast("list[Any]", blocks)) if is_list else None,
        has_norm=is_list and not isinstance(norm, torch.nn.Identity),
        has_positions=hasattr(model, "set_input_size"),
    )


def _map_axes(model: Any, shape: tuple[int, ...]) -> list[int]:
    """Rows and columns of a feature map; [0, 1], no grid, where its channels are not `num_features`."""
    is_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    channels, sides = (shape[3], shape[1:3]) if is_last else (shape[1], shape[2:])
    return list(sides) if channels == model.num_features else [0, 1]


def published_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint of timm; empty where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
