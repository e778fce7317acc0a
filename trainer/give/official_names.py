"""Official names: tensors of a released princetonvisualai/merv checkpoint -> tensors of our model, by exact rules.

Comes in: the state dicts of a checkpoint by part. Goes out: our names with the tensors, and what was left out because
it cannot change any output. Every name of the checkpoint must be used or be known to be dead, and every name of our
model must be found: whatever is left over on either side is an error that lists it.

Names as princetonvisualai/merv writes them (training/strategies/fsdp.py splits the state dict of models/vidlms/merv.py
by its first name; modules are those of util/nn_utils.py; llm_backbone holds its transformers model as `llm`):

    projectors      {i}.projector.projector.{weight,bias}       i: place in video_backbone_ids; linear head
                    {i}.projector.projector.{0,2}.{weight,bias} gelu-mlp; {0,2,4} for fused-gelu-mlp
    feature_fusion  Q, attention.{q,k,v}_proj_weight, attention.in_proj_bias, attention.out_proj.{weight,bias}
                    attention.in_proj_weight, of q, k and v together, where the LLM is as wide as the query
                    projector.{weight,bias}                     concat_channel
                    0.{weight,bias}, 1.projector.{weight,bias}  concat_channel_ln
                    scalar                                      scalar
    llm_backbone    llm.{name in transformers}
    projector, adapter   what older releases call a single encoder's projectors.0 and feature_fusion

B batch, E query width, M LLM width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mervcache.errors import UserError
from trainer.config import FusionName, HeadName

Weights = Mapping[str, Tensor]
PARTS = ("projectors", "feature_fusion", "llm_backbone")
OLD_PARTS = {"projector": "projectors", "adapter": "feature_fusion"}
HEAD_LAYERS: dict[HeadName, tuple[str, ...]] = {
    "linear": ("",),
    "gelu-mlp": ("0.", "2."),
    "fused-gelu-mlp": ("0.", "2.", "4."),
}
MAX_LISTED = 20  # names in an error; a wrong --llm makes hundreds


@dataclass(frozen=True, kw_only=True)
class Take:
    """One of our tensors and how it is cut from an official one."""

    name: str
    cut: Callable[[Tensor], Tensor] = lambda tensor: tensor


Rules = dict[str, tuple[Take, ...]]  # official name -> our tensors; none: it cannot change any output


def split_parts(model: Mapping[str, Weights]) -> dict[str, Weights]:
    """State dicts by the present names of the parts, without empty ones; an error names those that are not known."""
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


def our_weights(parts: Mapping[str, Weights], rules: Mapping[str, Rules]) -> dict[str, Tensor]:
    """Our names with their tensors, after every official name has been accounted for."""
    for part, weights in parts.items():
        check_names(f"checkpoint part {part!r}", set(weights), set(rules.get(part, {})))
    if missing := [part for part, known in rules.items() if known and part not in parts]:
        raise UserError(f"the checkpoint holds no {', '.join(missing)}; an import needs projectors, fusion and LLM")
    return {
        take.name: take.cut(weights[name])
        for part, weights in parts.items()
        for name, takes in rules[part].items()
        for take in takes
    }


def check_names(what: str, found: set[str], wanted: set[str]) -> None:
    """Both sets must be equal; an error lists what is missing and what is unknown."""
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    if missing or unknown:
        told = [f"{label}: {_listed(names)}" for label, names in (("missing", missing), ("unknown", unknown)) if names]
        raise UserError(f"{what} does not fit the config and the LLM; {'; '.join(told)}")


def projector_rules(num_encoders: int, num_used: int, head: HeadName) -> Rules:
    """Averages hold no weights, so a projector is its head; those that the fusion never reads are left out."""
    return {
        f"{index}.projector.projector.{layer}{kind}": (
            (Take(name=f"projectors.{index}.head.{layer}{kind}"),) if index < num_used else ()
        )
        for index in range(num_encoders)
        for layer in HEAD_LAYERS[head]
        for kind in ("weight", "bias")
    }


def llm_rules(names: Iterable[str], found: Iterable[str]) -> Rules:
    """transformers' names, unchanged; `inv_freq` is a constant of the position code that old versions saved."""
    constants = {name: () for name in found if name.endswith("rotary_emb.inv_freq")}
    return {**{f"llm.{name}": (Take(name=f"llm.{name}"),) for name in names}, **constants}


def fusion_rules(fusion: FusionName, found: Weights) -> Rules:
    """The rules of one fusion; `found` decides how a MultiheadAttention holds its projections."""
    return FUSION_RULES[fusion](found)


def _cross_attention(found: Weights) -> Rules:
    """Of the MultiheadAttention only the weights of its softmax are used, and of these only what they depend on.

    score_e = (W_q Q + b_q) . (W_k xbar_e + b_k) / sqrt(E). The bias of the keys adds (W_q Q + b_q) . b_k, the same for
    every encoder e, and a softmax does not see what is added to all its scores. The value projection, its bias and the
    output projection make the attention's output, which the reference computes and throws away: it mixes the encoders'
    own tokens by the weights. So these four are left out, and the fused tokens stay equal up to rounding.
    """
    width = found["Q"].shape[-1] if "Q" in found else 0

    def rows(start: int, stop: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor[start * width : stop * width]

    query, keys = "fusion.query_projection", "fusion.key_projection.weight"
    rules: Rules = {
        "Q": (Take(name="fusion.query_Q", cut=lambda tensor: tensor[0]),),  # [1, E]
        "attention.in_proj_bias": (Take(name=f"{query}.bias", cut=rows(0, 1)),),  # [3E]: queries, keys, values
        "attention.out_proj.weight": (),
        "attention.out_proj.bias": (),
    }
    if "attention.in_proj_weight" in found:  # torch keeps one [3E, E] where keys and values are as wide as the query
        takes = (Take(name=f"{query}.weight", cut=rows(0, 1)), Take(name=keys, cut=rows(1, 2)))
        return {**rules, "attention.in_proj_weight": takes}
    return {
        **rules,
        "attention.q_proj_weight": (Take(name=f"{query}.weight"),),
        "attention.k_proj_weight": (Take(name=keys),),
        "attention.v_proj_weight": (),
    }


def _concat_channel(found: Weights) -> Rules:
    return {f"projector.{kind}": (Take(name=f"fusion.linear.{kind}"),) for kind in ("weight", "bias")}


def _concat_channel_ln(found: Weights) -> Rules:
    norm = {f"0.{kind}": (Take(name=f"fusion.norm.{kind}"),) for kind in ("weight", "bias")}
    return norm | {f"1.{name}": takes for name, takes in _concat_channel(found).items()}


FUSION_RULES: dict[FusionName, Callable[[Weights], Rules]] = {
    "cross_attention_released": _cross_attention,
    "concat_sequence": lambda found: {},
    "concat_channel": _concat_channel,
    "concat_channel_ln": _concat_channel_ln,
    "learnable_weights": lambda found: {"scalar": (Take(name="fusion.scores_E"),)},
    "first": lambda found: {},
}


def check_shapes(weights: Weights, wanted: Mapping[str, torch.Size]) -> None:
    """Names and sizes must be those of the model that the config builds."""
    check_names("the checkpoint", set(weights), set(wanted))
    odd = [
        f"{name} is {list(tensor.shape)}, should be {list(wanted[name])}"
        for name, tensor in weights.items()
        if tensor.shape != wanted[name]
    ]
    if odd:
        raise UserError(f"the checkpoint does not fit the config and the LLM in size: {_listed(odd)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
