"""Official: a checkpoint of princetonvisualai/merv -> a run's folder, as if merv-train had written it.

Comes in: CHECKPOINT.pt ({"model": state dicts by part, ...}), the config.json beside it, and the LLM it was trained
from, for its tokenizer and sizes. Goes out: a run that holds all of its weights, with `imported.json` for where they
come from. The file is a pickle made elsewhere: only tensors and plain containers are read from it (weights_only), so
no code in it can run, and it is mapped, not copied. Encoders are frozen there: it holds none of their weights.

A run knows the identities of its tokens; a checkpoint does not. With a store the import is bound to the identities in
it; without one the run takes tokens of the right sizes from any store, and it is the user's word that they fit.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featurestore import FeatureStore
from mervcache.errors import UserError
from trainer.config import CONFIG_FILE, TrainConfig, used_encoders
from trainer.data.tokens import StoreTokens, TokenShape
from trainer.give.official_config import OfficialConfig, parse_settings, read_settings, run_config
from trainer.give.official_names import (
    HEAD_LAYERS,
    Weights,
    check_shapes,
    fusion_rules,
    llm_rules,
    our_weights,
    projector_rules,
    split_parts,
)
from trainer.model.build import build, count_parameters
from trainer.model.llm import LoadedLLM, save_shape, where_to_look
from trainer.runs import checkpoint
from trainer.runs.files import file_sha256, whole_folder
from trainer.runs.record import LLM_FOLDER, UNBOUND, RunRecord, software_versions

IMPORT_FILE = "imported.json"
SOURCE = "princetonvisualai/merv"


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Everything that is written."""

    config: TrainConfig
    record: RunRecord
    llm: LoadedLLM  # without weights, on torch's meta device
    weights: Weights
    origin: Mapping[str, Any]


def import_official(
    checkpoint_file: Path, config_file: Path, *, llm: str, out: Path, store: str | None = None
) -> dict[str, Any]:
    """Make the run `out`, whole or not at all; with `store`, bound to the identities it holds."""
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    settings = read_settings(config_file)
    imported = _convert(read_checkpoint(checkpoint_file), parse_settings(settings), settings, llm, store)
    origin = {
        "source": SOURCE,
        "file": Path(checkpoint_file).name,
        "sha256": file_sha256(checkpoint_file),
        "config": settings,
        **imported.origin,
    }
    _write(out, imported, origin)
    record = imported.record
    return {
        "run": str(out),
        "step": record.num_steps,
        "encoders": {encoder: shape.identity for encoder, shape in record.shapes.items()},
        "parameters": record.parameters,
        "left_out": origin["left_out"],
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The file's tensors in plain dicts, mapped and not copied; whatever else it holds is refused, not run."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(
            f"checkpoint {path} is refused, and nothing in it was run: {_reason(error)}; only tensors in plain"
            " containers are read, as torch.save writes them since version 1.6"
        ) from error
    model = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(model, dict) or not all(_is_state_dict(weights) for weights in model.values()):
        raise UserError(f'checkpoint {path} holds no {{"model": {{PART: {{NAME: tensor}}}}}} as {SOURCE} writes it')
    return saved


def _reason(error: Exception) -> str:
    """What is wrong, without torch's advice to load the file with code and all."""
    if not isinstance(error, pickle.UnpicklingError):
        return str(error).strip().partition("\n")[0]
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it asks for {named[1]}" if named else "it is no plain data"


def _is_state_dict(weights: Any) -> bool:
    return isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        for name, tensor in weights.items()
    )


def _convert(
    saved: Mapping[str, Any],
    official: OfficialConfig,
    settings: Mapping[str, Any],
    llm_name: str,
    store: str | None,
) -> Imported:
    """The run's values; all names and sizes have been compared with the model that its config builds."""
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
    weights = our_weights(parts, rules)
    shapes, facts = _token_shapes(official, config, weights, store)
    with torch.device("meta"):
        model = build(config, shapes, llm).model
    check_shapes(weights, {name: tensor.shape for name, tensor in model.state_dict().items()})
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
    )
    dead = [f"{part}.{name}" for part, known in rules.items() for name, takes in known.items() if not takes]
    return Imported(config=config, record=record, llm=llm, weights=weights, origin={"left_out": sorted(dead)})


def empty_llm(name: str, saved: Weights) -> LoadedLLM:
    """Tokenizer and sizes of `name`, without weights, as wide a vocabulary as `saved` has rows.

    The reference adds a token <PAD> and fills the embeddings up to a multiple of 64 rows (LLaMA-2: 32,000 -> 32,064).
    No text holds these tokens, but their scores are in every softmax, so the rows are kept.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # takes seconds

    where = where_to_look(name)
    try:
        tokenizer, sizes = AutoTokenizer.from_pretrained(name, **where), AutoConfig.from_pretrained(name, **where)
    except (OSError, ValueError) as error:
        raise UserError(
            f"LLM {name!r} cannot be loaded: {str(error).splitlines()[0]}; give the Hub id or folder of the LLM that"
            " the checkpoint was trained from"
        ) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes)
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
        model = AutoModelForCausalLM.from_config(sizes, dtype=found.dtype)
    return LoadedLLM(model=model, tokenizer=tokenizer, is_fresh=True)  # its weights are nowhere but in this run


def _token_shapes(
    official: OfficialConfig, config: TrainConfig, weights: Weights, store: str | None
) -> tuple[dict[str, TokenShape], dict[str, Any]]:
    """What the run reads, in the order of its encoders, and what is known of it."""
    if store is not None:
        opened = FeatureStore.open(store)
        source = StoreTokens(opened, used_encoders(config, list(opened.encoders)))
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


def _write(out: Path, imported: Imported, origin: Mapping[str, Any]) -> None:
    """The run's folder, whole or not at all."""
    with whole_folder(out) as folder:
        save_shape(imported.llm, folder / LLM_FOLDER)
        imported.record.write(folder)
        (folder / CONFIG_FILE).write_text(imported.config.to_yaml())
        (folder / IMPORT_FILE).write_text(json.dumps(origin, indent=1) + "\n")
        checkpoint.save(
            folder,
            step=imported.record.num_steps,
            weights=imported.weights,
            optimizer={},
            data_digest=imported.record.data_digest,
            identities={encoder: shape.identity for encoder, shape in imported.record.shapes.items()},
            keep=1,
        )
