"""Imports a checkpoint of princetonvisualai/merv as a run's folder, as if merv-train had written it.

The file is a pickle made elsewhere: only tensors in plain containers are read from it (`weights_only`), so no code in
it can run. Every name of the checkpoint must be used or known to change no output, and every name of `VideoLLM` must be
found. A checkpoint does not record what made its tokens: with a store the run is bound to the identities in it, without
one it takes tokens of the right sizes from any store.

Names in the checkpoint (training/strategies/fsdp.py splits the state dict of models/vidlms/merv.py by its first name;
modules are those of util/nn_utils.py; llm_backbone holds its transformers model as `llm`):

    projectors      {i}.projector.projector.{weight,bias}       i: place in video_backbone_ids; linear head
                    {i}.projector.projector.{0,2}.{weight,bias} gelu-mlp; {0,2,4} for fused-gelu-mlp
    feature_fusion  Q, attention.{q,k,v}_proj_weight, attention.in_proj_bias, attention.out_proj.{weight,bias}
                    attention.in_proj_weight, of q, k and v together, where the LLM is as wide as the query
                    projector.{weight,bias}                     concat_channel
                    0.{weight,bias}, 1.projector.{weight,bias}  concat_channel_ln
                    scalar                                      scalar
    llm_backbone    llm.{name in transformers}
    projector, adapter   what older releases call a single encoder's projectors.0 and feature_fusion
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featurestore import FeatureStore
from mervcache.errors import UserError, unknown_name
from mervcache.files import atomic_directory, file_sha256
from trainer.config import CONFIG_FILE, TrainConfig
from trainer.data.tokens import StoreTokens, TokenShape
from trainer.data.wanted_tokens import made_otherwise
from trainer.model.llm import LoadedLLM, hub_options, reason_not_loaded, save_shape
from trainer.model.video_llm import build, count_parameters
from trainer.official_config import HEAD_LAYERS, OfficialConfig, parse_settings, read_settings, run_config
from trainer.runs import checkpoint
from trainer.runs.run_record import IMPORT_FILE, UNBOUND, RunRecord, software_versions
from trainer.runs.stage_folders import LLM_FOLDER

SOURCE = "princetonvisualai/merv"
PARTS = ("projectors", "feature_fusion", "llm_backbone")
OLD_PARTS = {"projector": "projectors", "adapter": "feature_fusion"}
FUSION_TENSORS: dict[
    str, dict[str, str]
] = {  # our fusion -> official name -> our name; cross-attention has its own rule
    "concat_sequence": {},
    "concat_channel": {"projector.weight": "fusion.linear.weight", "projector.bias": "fusion.linear.bias"},
    "concat_channel_ln": {
        "0.weight": "fusion.norm.weight",
        "0.bias": "fusion.norm.bias",
        "1.projector.weight": "fusion.linear.weight",
        "1.projector.bias": "fusion.linear.bias",
    },
    "learnable_weights": {"scalar": "fusion.scores_E"},
    "first": {},
}
MAX_LISTED = 20  # names in an error; a wrong --llm makes hundreds

Weights = Mapping[str, Tensor]
# Official name -> our tensors, each with the function that cuts it out; none: the tensor cannot change any output.
Rules = dict[str, dict[str, Callable[[Tensor], Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Everything that an import writes."""

    config: TrainConfig
    record: RunRecord
    llm: LoadedLLM  # without weights, on torch's meta device
    weights: Weights
    left_out: list[str]  # official names of tensors that cannot change any output


def import_official(
    checkpoint_file: Path, config_file: Path, *, llm: str, out: Path, store: str | None = None
) -> dict[str, Any]:
    """Make the run `out`, whole or not at all; with `store`, bound to the identities it holds.

    `llm` is the LLM that the checkpoint was trained from, for its tokenizer and sizes. Returns the run, its step,
    encoders with identities, parameters, the tensors left out, and what the checkpoint is bound to. Raises UserError
    for what cannot be imported.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    settings = read_settings(config_file)
    official = parse_settings(settings)
    imported = convert(read_checkpoint(checkpoint_file), official, settings, llm, store)
    record = imported.record
    origin = {
        "source": SOURCE,
        "file": Path(checkpoint_file).name,
        "sha256": file_sha256(checkpoint_file),
        "config": settings,
        "left_out": imported.left_out,
        "bound_to": _bound_to(imported, official, store),
    }
    with atomic_directory(out) as folder:
        save_shape(imported.llm, folder / LLM_FOLDER, with_sizes=True)
        record.located(out).write(folder)
        (folder / CONFIG_FILE).write_text(imported.config.recorded_yaml(out))
        (folder / IMPORT_FILE).write_text(json.dumps(origin, indent=1) + "\n")
        checkpoint.save(
            folder,
            step=record.num_steps,
            weights=imported.weights,
            optimizer={},
            data_digest=record.data_digest,
            identities={encoder: shape.identity for encoder, shape in record.shapes.items()},
            keep=1,
        )
    return {
        "run": str(out),
        "step": record.num_steps,
        "encoders": {encoder: shape.identity for encoder, shape in record.shapes.items()},
        "parameters": record.parameters,
        "left_out": imported.left_out,
        "bound_to": origin["bound_to"],
    }


def _bound_to(imported: Imported, official: OfficialConfig, store: str | None) -> dict[str, Any]:
    """What the checkpoint was trained with and no weight shows."""
    return {
        "prompt": imported.config.prompt,
        "image_resize_strategy": official.image_resize_strategy,
        "frame_rules": {encoder: wanted["frame_rule"] for encoder, wanted in imported.record.wanted.items()},
        "fusion": imported.config.fusion.name,
        "store": None if store is None else Path(store).name,
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The file's tensors in plain dicts, memory-mapped; UserError for a file that holds anything else, and runs it not.

    The layout is {"model": {part: state dict}, ...}.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        # Without torch's advice to load the file with all its code.
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"it imports {named[1]}" if named else "it is no plain data"
        raise UserError(
            f"checkpoint {path} is refused, and nothing in it was run: {reason}; only tensors in plain containers are"
            " read, as torch.save writes them since version 1.6"
        ) from error
    model = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(model, dict) or not all(_is_state_dict(weights) for weights in model.values()):
        raise UserError(f'checkpoint {path} holds no {{"model": {{PART: {{NAME: tensor}}}}}} as {SOURCE} writes it')
    return saved


def _is_state_dict(weights: Any) -> bool:
    return isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        for name, tensor in weights.items()
    )


def convert(
    saved: Mapping[str, Any], official: OfficialConfig, settings: Mapping[str, Any], llm_name: str, store: str | None
) -> Imported:
    """The run of a checkpoint; UserError unless all names and sizes are those of the model that its config builds."""
    parts = split_parts(saved["model"])
    fusion, llm_part = parts.get("feature_fusion", {}), parts.get("llm_backbone", {})
    query_width = fusion["Q"].shape[-1] if "Q" in fusion else None
    config = run_config(official, settings, llm=llm_name, query_width=query_width)
    llm = empty_llm(llm_name, llm_part)
    rules = {
        "projectors": projector_rules(len(official.encoders), official.num_used, official.head),
        "feature_fusion": fusion_rules(official.fusion, fusion),
        "llm_backbone": llm_rules(llm.model.state_dict(), llm_part),
    }
    for part, tensors in parts.items():
        check_names(f"checkpoint part {part!r}", set(tensors), set(rules[part]))
    if missing := [part for part, rule in rules.items() if rule and part not in parts]:
        raise UserError(f"the checkpoint holds no {', '.join(missing)}; an import needs projectors, fusion and LLM")
    weights = {
        name: cut(tensors[official_name])
        for part, tensors in parts.items()
        for official_name, cuts in rules[part].items()
        for name, cut in cuts.items()
    }
    shapes, facts = _token_shapes(official, config, weights, store)
    with torch.device("meta"):
        model = build(config, shapes, llm).model
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_names("the checkpoint", set(weights), set(wanted))
    differing = [
        f"{name} is {list(tensor.shape)}, should be {list(wanted[name])}"
        for name, tensor in weights.items()
        if tensor.shape != wanted[name]
    ]
    if differing:
        raise UserError(f"the checkpoint does not fit the config and the LLM in size: {_listed(differing)}")
    step = saved.get("step", 0)
    record = RunRecord(
        store=store or "",
        data_digest=f"not known, trained by {SOURCE}",
        num_samples=0,
        dropped={},
        shapes=shapes,
        parameters=count_parameters(model),
        num_visual_tokens=model.num_visual_tokens,
        num_steps=step if isinstance(step, int) else 0,
        encoders=facts,
        software=software_versions(),
        encoder_order=config.encoders,
        wanted={encoder: official.wanted(index) for index, encoder in enumerate(config.encoders)},
    )
    left_out = sorted(f"{part}.{name}" for part, rule in rules.items() for name, cuts in rule.items() if not cuts)
    return Imported(config=config, record=record, llm=llm, weights=weights, left_out=left_out)


def split_parts(model: Mapping[str, Weights]) -> dict[str, Weights]:
    """State dicts by the present names of the parts, without empty ones; UserError for unknown parts."""
    parts = {name: weights for name, weights in model.items() if weights}
    for old, new in OLD_PARTS.items():
        if old in parts:
            if new in parts:
                raise UserError(f"the checkpoint holds both {old!r} and {new!r}, of which one is the old name")
            prefix = "0." if old == "projector" else ""  # it was one module, not a list
            parts[new] = {f"{prefix}{name}": tensor for name, tensor in parts.pop(old).items()}
    if unknown := sorted(set(parts) - set(PARTS)):
        raise UserError(f"the checkpoint holds unknown parts {', '.join(unknown)}; known: {', '.join(PARTS)}")
    return parts


def check_names(what: str, found: set[str], wanted: set[str]) -> None:
    """Both sets must be equal; UserError lists what is missing and what is unknown."""
    differences = {"missing": sorted(wanted - found), "unknown": sorted(found - wanted)}
    if listed := [f"{label}: {_listed(names)}" for label, names in differences.items() if names]:
        raise UserError(f"{what} does not fit the config and the LLM; {'; '.join(listed)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def projector_rules(num_encoders: int, num_used: int, head: str) -> Rules:
    """Averages hold no weights, so a projector is its head; those that the fusion never reads are left out."""
    return {
        f"{index}.projector.projector.{layer}{kind}": (
            {f"projectors.{index}.head.{layer}{kind}": _whole} if index < num_used else {}
        )
        for index in range(num_encoders)
        for layer in HEAD_LAYERS[head]
        for kind in ("weight", "bias")
    }


def llm_rules(names: Iterable[str], found: Iterable[str]) -> Rules:
    """transformers' names, unchanged; `inv_freq` is a constant of the position code that old versions saved."""
    constants: Rules = {name: {} for name in found if name.endswith("rotary_emb.inv_freq")}
    return {**{f"llm.{name}": {f"llm.{name}": _whole} for name in names}, **constants}


def fusion_rules(fusion: str, found: Weights) -> Rules:
    """Rules of a fusion; `found` decides how a MultiheadAttention holds its projections. E is the query's width.

    Of the MultiheadAttention only the weights of its softmax are used, and of these only what they depend on.

    score_e = (W_q Q + b_q) . (W_k xbar_e + b_k) / sqrt(E). The bias of the keys adds (W_q Q + b_q) . b_k, the same for
    every encoder e, and a softmax does not see what is added to all its scores. The value projection, its bias and the
    output projection make the attention's output, which the reference computes and throws away: it mixes the encoders'
    own tokens by the weights. So these four are left out, and the fused tokens stay equal up to rounding.
    """
    if fusion != "cross_attention_released":
        return {official: {name: _whole} for official, name in FUSION_TENSORS[fusion].items()}
    width = found["Q"].shape[-1] if "Q" in found else 0
    query, keys = "fusion.query_projection", "fusion.key_projection.weight"
    rules: Rules = {
        "Q": {"fusion.query_Q": lambda tensor: tensor[0]},  # [1, E]
        "attention.in_proj_bias": {f"{query}.bias": lambda tensor: tensor[:width]},  # [3E]: queries, keys, values
        "attention.out_proj.weight": {},
        "attention.out_proj.bias": {},
    }
    if "attention.in_proj_weight" in found:  # torch keeps one [3E, E] where keys and values are as wide as the query
        cuts = {f"{query}.weight": lambda tensor: tensor[:width], keys: lambda tensor: tensor[width : 2 * width]}
        return {**rules, "attention.in_proj_weight": cuts}
    return {
        **rules,
        "attention.q_proj_weight": {f"{query}.weight": _whole},
        "attention.k_proj_weight": {keys: _whole},
        "attention.v_proj_weight": {},
    }


def empty_llm(name: str, saved: Weights) -> LoadedLLM:
    """Tokenizer and sizes of `name`, without weights, with a vocabulary of as many rows as `saved` has.

    The reference adds a token <PAD> and fills the embeddings up to a multiple of 64 rows (LLaMA-2: 32,000 -> 32,064).
    No text holds these tokens, but their scores are in every softmax, so the rows are kept.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # takes seconds

    where = hub_options(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
        sizes = AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
    except (OSError, ValueError) as error:
        raise UserError(
            f"LLM {name!r} cannot be loaded: {reason_not_loaded(error)}; give the Hub id or folder of the LLM that"
            " the checkpoint was trained from"
        ) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes, trust_remote_code=False)
        embedding = model.get_input_embeddings().weight
        key = next(key for key, parameter in model.named_parameters() if parameter is embedding)
        found = saved.get(f"llm.{key}", embedding)
        if len(found) < len(tokenizer):
            raise UserError(
                f"the checkpoint's LLM knows {len(found)} tokens, the tokenizer of {name!r} has {len(tokenizer)}: give"
                " the LLM it was trained from"
            )
        if tokenizer.pad_token is None and len(found) > len(tokenizer):
            tokenizer.add_special_tokens({"pad_token": "<PAD>"})
        sizes.get_text_config().vocab_size = len(found)
        model = AutoModelForCausalLM.from_config(sizes, dtype=found.dtype, trust_remote_code=False)
    return LoadedLLM(model=model, tokenizer=tokenizer, is_fresh=True)  # its weights are nowhere but in this run


def _token_shapes(
    official: OfficialConfig, config: TrainConfig, weights: Weights, store: str | None
) -> tuple[dict[str, TokenShape], dict[str, Any]]:
    """The tokens that the run reads, in the order of its encoders, and what is known about them."""
    if store is not None:
        opened = FeatureStore.open(store)
        for encoder in config.encoders:
            if encoder not in opened.encoders:
                raise UserError(unknown_name("encoder", encoder, opened.encoders))
        source = StoreTokens(opened, config.encoders)
        for index, encoder in enumerate(config.encoders):
            if reason := made_otherwise(encoder, official.wanted(index), source.facts[encoder]["identity"]):
                raise UserError(reason)
        return dict(source.shapes), dict(source.facts)
    layer = HEAD_LAYERS[official.head][0]
    shapes = {
        encoder: TokenShape(
            grid=official.grid(index),
            width=weights[f"projectors.{index}.head.{layer}weight"].shape[1],
            is_pooled=True,
            identity=f"{UNBOUND}{official.video_backbone_ids[index]}",
        )
        for index, encoder in enumerate(config.encoders)
    }
    return shapes, {}
