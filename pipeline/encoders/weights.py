"""Weights of an encoder: where they come from, the digest that identifies them, and a cache of those digests.

`hub` is the spec's published checkpoint, a path is a folder of the same layout (config.json and model.safetensors or
pytorch_model.bin), `random:SEED` fills the right architecture from a seed. Pickles are read with weights_only. All are
held in float32 and hashed there, under the names of the published checkpoint, over the weights that are used: the same
numbers have the same digest, whatever file, dtype on disk or library version they came through.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import pickle
import re
import uuid
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mervcache.errors import UserError
from mervcache.files import record_digest, user_cache
from pipeline.encoders.base import EncoderSpec

if TYPE_CHECKING:
    import torch

    from pipeline.encoders.network import EncoderNetwork

THREE_CHOICES = "weights are `hub`, a folder with config.json and model.safetensors, or `random:SEED`"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference
HUB_TIMEOUT_S = 10.0  # of the first request to the Hub
EMBEDDING_STD = 0.1  # of random class, register, position and time embeddings; patches have about 1
LOADER_VERSION = 1  # counts changes of what is hashed: `weights.py`, `network.py` and the families
LIBRARIES = ("merv-pipeline", "torch", "transformers", "timm", "numpy")


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """A parsed weights argument."""

    kind: Literal["hub", "folder", "random"]
    folder: Path | None = None
    seed: int | None = None

    @property
    def label(self) -> str:
        """How runs are marked everywhere: random weights never pass for trained ones."""
        return f"random:{self.seed}" if self.kind == "random" else "pretrained"


def parse_weights(text: str) -> WeightSource:
    """`hub`, a folder that exists, or `random:SEED`."""
    if text == "hub":
        return WeightSource(kind="hub")
    if text == "random" or text.startswith("random:"):
        if not re.fullmatch(r"random:\d{1,18}", text):
            raise UserError(f"random weights are random:SEED with a whole number >= 0, got {text!r}, e.g. random:0")
        return WeightSource(kind="random", seed=int(text.removeprefix("random:")))
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise UserError(f"no folder of weights at {text!r}; {THREE_CHOICES}")
    return WeightSource(kind="folder", folder=folder)


def weights_by_encoder(specs: tuple[str, ...]) -> dict[str, str]:
    """`("random:0", "dinov2=weights/dino")` -> encoder -> SPEC, with "" for all the others."""
    pairs = [spec.split("=", 1) if "=" in spec else ["", spec] for spec in specs]
    return {name.strip(): spec.strip() for name, spec in pairs}


def check_weights_spec(text: str) -> None:
    """Refuse what is no spec on any machine, before anything is loaded; a folder may be there on workers alone."""
    if text == "random" or ":" in text.partition("/")[0]:
        if not text.startswith("random"):
            raise UserError(f"{text!r} is no spec of weights: {THREE_CHOICES}")
        parse_weights(text)


def fill_weights(network: EncoderNetwork, source: WeightSource) -> None:
    """Give every parameter of a freshly built network its float32 values."""
    spec = network.spec
    if source.seed is not None:
        fill_random(network, source.seed)
        return
    folder = source.folder or download(spec)
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise UserError(f"{folder} holds none of {', '.join(WEIGHT_FILES)} for {spec.name}; {THREE_CHOICES}")
    from safetensors import SafetensorError

    try:
        network.load_published(folder)
    except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"weights of {spec.name} in {folder} cannot be loaded: {error}") from error
    # both readers map the file: were it replaced or truncated later, a running worker would change or die
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()


def download(spec: EncoderSpec) -> Path:
    """The folder of the Hub's cache that holds the published checkpoint; downloads config and one weights file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    is_cache_only = not _hub_responds(spec.hub_id)

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(spec.hub_id, name, local_files_only=is_cache_only))

    try:
        folder = fetch("config.json").parent
        try:
            fetch(WEIGHT_FILES[0])
        except EntryNotFoundError:  # LocalEntryNotFoundError too: an offline cache may hold the .bin only
            fetch(WEIGHT_FILES[1])
    except (LocalEntryNotFoundError, EntryNotFoundError, OSError) as error:
        why = "which does not respond" if is_cache_only else str(error).splitlines()[0]
        accept = f"Its licence is accepted at https://huggingface.co/{spec.hub_id}, then `hf auth login` gives access. "
        raise UserError(
            f"cannot get {spec.hub_id} for {spec.name} from the Hugging Face Hub ({why}), nor from its cache. "
            f"{accept if spec.gated else ''}Instead name a local folder or random weights: {THREE_CHOICES}; to try it "
            "without any, --weights random:0, or in a checkout the toy encoders of --config pipeline/demo.yaml"
        ) from error
    return folder


def _hub_responds(hub_id: str) -> bool:
    """One request with a short timeout: by itself the Hub's client retries six times for every file, half a minute."""
    from huggingface_hub import model_info
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]: httpx's or httpx2's
    )

    try:
        model_info(hub_id, timeout=HUB_TIMEOUT_S)
    except (HfHubHTTPError, ValueError):
        return True  # it responds with an error: downloading reports what is wrong
    except (OSError, HTTPError):
        return False  # no network, or offline mode
    return True


def read_checkpoint(folder: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Those of the named tensors that a checkpoint holds, mapped from the file; nothing else of it is read."""
    wanted = set(names)
    if (path := folder / WEIGHT_FILES[0]).is_file():
        from safetensors import safe_open

        with safe_open(path, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in wanted.intersection(tensors.keys())}
    import torch

    path = folder / WEIGHT_FILES[1]
    is_mappable = zipfile.is_zipfile(path)  # files of torch before 1.6 are not
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mappable)
    return {name: tensors[name] for name in wanted.intersection(tensors)}


def fill_random(network: EncoderNetwork, seed: int) -> None:
    """Seeded weights that keep activations of order one at any width, the same on every machine.

    Each tensor has its own stream, keyed by seed and published name, so that a cut block, an added one or a thread
    count changes nothing else. Values are uniform: integers scaled by one multiplication, hence exact everywhere,
    which Gaussian kernels are not. Matrices have variance 1 / fan-in; norms and layer scales are 1, biases 0.
    """
    import torch
    from torch import nn

    for module_name, module in network.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full_name = network.weight_name(f"{module_name}.{name}")
            shape = tuple(parameter.shape)
            is_scale = name.startswith(("lambda", "gamma")) or (name == "weight" and parameter.ndim == 1)  # norms, too
            if isinstance(module, nn.LayerNorm) or name == "bias" or is_scale:
                values = torch.full(shape, 0.0 if name == "bias" else 1.0)
            else:
                is_matrix = isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
                std = math.prod(shape[1:]) ** -0.5 if is_matrix else EMBEDDING_STD
                values = _uniform(shape, std, f"{seed}/{full_name}")
            setattr(module, name, nn.Parameter(values, requires_grad=False))


def _uniform(shape: tuple[int, ...], std: float, key: str) -> torch.Tensor:
    import numpy as np
    import torch

    count = math.prod(shape)
    stream = np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little"))
    bits = stream.random_raw((count + 1) // 2).view(np.int32)[:count] >> 8  # -2**23 .. 2**23 - 1
    return torch.from_numpy(bits.astype(np.float32) * np.float32(std * 3**0.5 / 2**23)).reshape(shape)


def weights_sha256(weights: Mapping[str, torch.Tensor]) -> str:
    """64 hex digits over names, dtypes, shapes and little-endian bytes, in order of names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_fingerprint(spec: EncoderSpec, weights: str) -> str | None:
    """Identifies what loading would read, without reading it; None where that is not on this machine.

    Of a folder's files by path, size and times, of seeded weights by their seed; of both by the architecture and the
    versions of what loads them.
    """
    try:
        source = parse_weights(weights)
    except UserError:
        return None  # a folder that only workers see
    if source.kind == "random":
        origin: Any = {"seed": source.seed}
    else:
        folder = source.folder
        if source.kind == "hub":  # the folder of the Hub's cache, without a request
            from huggingface_hub import try_to_load_from_cache  # a third of a second

            config = try_to_load_from_cache(spec.hub_id, "config.json")
            folder = Path(config).parent if isinstance(config, str) else None
        origin = folder and _files(folder)
    if not origin:
        return None
    network = [spec.model, dict(spec.architecture), spec.temporal_reach, spec.prefix_tokens, spec.skipped_blocks]
    try:  # size and time of the module that builds the network: a plug-in may change without a new version
        module = importlib.util.find_spec(spec.builder.partition(":")[0])
        status = os.stat(module.origin) if module and module.origin else None
    except (ImportError, ValueError, OSError):
        status = None
    builder_file = status and [status.st_size, status.st_mtime_ns]
    loader = [LOADER_VERSION, spec.builder, builder_file, _versions()]
    return record_digest({"weights": origin, "network": [*network, spec.final_norm], "loader": loader})


def cached_weights_digest(fingerprint: str | None) -> str | None:
    """The sha256 that loading gave under this fingerprint, on this machine and for this user; None if unknown.

    A shortcut for callers that need the digest but not the weights; loading them replaces it by the real one.
    """
    try:
        record = json.loads(_digest_file(fingerprint).read_text()) if fingerprint else {}
    except (OSError, ValueError):
        return None
    sha256 = record.get("sha256") if isinstance(record, dict) else None
    return sha256 if isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256) else None


def cache_weights_digest(fingerprint: str | None, sha256: str) -> bool:
    """Save what loading gave; True if another digest was saved before and is replaced."""
    if fingerprint is None or (before := cached_weights_digest(fingerprint)) == sha256:
        return False
    file = _digest_file(fingerprint)
    temporary = file.with_name(f"{fingerprint}.{uuid.uuid4().hex}.tmp")
    with suppress(OSError):  # a home that may not be written to costs time, nothing else
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"sha256": sha256}))
        os.replace(temporary, file)
    return before is not None


def _digest_file(fingerprint: str) -> Path:
    return user_cache() / "merv-pipeline" / "weights" / f"{fingerprint}.json"


def _files(folder: Path) -> list[list[Any]] | None:
    """Path, size and times of every file of a checkpoint; the change time reveals a file that replaced another."""
    try:
        with os.scandir(folder) as entries:
            found = [(os.path.realpath(entry), entry.name, entry.stat()) for entry in entries if entry.is_file()]
    except OSError:
        return None
    return sorted([real, name, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for real, name, s in found)


@cache
def _versions() -> list[str]:
    versions = []
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} absent")
    return versions
