"""Export: a run -> a folder that can be given away, and that folder -> the run's model again.

    OUT/README.md                 model card
    OUT/config.yaml, run.json     settings and record of the run
    OUT/encoders.json             identity of every encoder's tokens: weights, layer, preprocessing, grid
    OUT/projectors.safetensors    and fusion.safetensors (trained_encoders.safetensors, where some were trained)
    OUT/llm/                      tokenizer; all of the LLM, in shards, where this run has changed it or is asked to
    OUT/adapter/                  LoRA weights as peft reads them, where they are not merged
    OUT/export.json               step, data digest, sha256 of every file of weights

A frozen LLM is named and not copied: its weights are its publisher's to give. Nothing in the folder is a pickle, and
every weight is compared with its digest before use.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featurestore.errors import StoreDamagedError, UserError
from trainer import checkpoint
from trainer.adapt import is_adapter
from trainer.build import (
    EXPORT_FILE,
    LLM_FOLDER,
    Built,
    LoadedRun,
    RunRecord,
    load_run,
    new_llm,
    rebuild,
    software_versions,
)
from trainer.config import CONFIG_FILE, TrainConfig, read_config
from trainer.llm import LoadedLLM, load_llm
from trainer.model_card import UNKNOWN_LICENSE, CardFacts, model_card
from trainer.official import IMPORT_FILE
from trainer.progress import METRICS_FILE, read_metrics
from trainer.scores import read_scores
from trainer.stages import last_stage

FORMAT = 1
CARD_FILE, ENCODERS_FILE, ADAPTER_FOLDER = "README.md", "encoders.json", "adapter"
ADAPTER_FILE, ADAPTER_PREFIX = "adapter_model.safetensors", "base_model.model."  # peft's names
MAX_SHARD = "5GB"
LLMWeights = Literal["named", "whole", "adapter"]
WORDS: dict[LLMWeights, str] = {
    "named": "The LLM was frozen; its weights are not in this folder and are loaded from where they are published.",
    "whole": "The LLM's weights are in `llm/`.",
    "adapter": "The LLM's LoRA adapters are in `adapter/`; the weights they change are loaded from where they are"
    " published.",
}


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """What an exported folder says about itself."""

    format: int
    step: int
    data_digest: str
    llm: LLMWeights
    llm_dtype: str
    is_merged: bool  # LoRA adapters were added to the weights
    llm_revision: str | None  # commit of the Hub's LLM
    sha256: Mapping[str, str]  # file of weights -> digest


def export_run(
    run: Path,
    out: Path,
    *,
    name: str | None = None,
    with_llm: bool = False,
    merge_lora: bool = False,
    best: bool = False,
    license: str = UNKNOWN_LICENSE,
) -> dict[str, Any]:
    """Write the newest (or best) checkpoint of `run` to the folder `out`, whole or not at all."""
    run, out = last_stage(Path(run)), Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    loaded = load_run(run, best=best)
    kind = _llm_weights(loaded.built, with_llm=with_llm, merge_lora=merge_lora)
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        dtype = str(loaded.built.llm.model.dtype).removeprefix("torch.")
        revision = getattr(loaded.built.llm.model.config, "_commit_hash", None)
        _write_weights(temporary, loaded.built, kind, merge_lora=merge_lora)
        _write_facts(temporary, run, loaded)
        record = ExportRecord(
            format=FORMAT,
            step=loaded.step,
            data_digest=loaded.record.data_digest,
            llm=kind,
            llm_dtype=dtype,
            is_merged=merge_lora,
            llm_revision=revision,
            sha256=_digests(temporary),
        )
        (temporary / EXPORT_FILE).write_text(json.dumps(asdict(record), indent=1) + "\n")
        facts = card_facts(run, loaded, record, name=name or out.name, license=license)
        (temporary / CARD_FILE).write_text(model_card(facts))
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    size = sum((out / file).stat().st_size for file in files)
    return {"out": str(out), "step": record.step, "llm": kind, "bytes": size, "files": files}


def load_export(folder: str | Path) -> LoadedRun:
    """The model in an exported folder, in evaluation mode: what `load_run` gives for the run it was made from."""
    folder = Path(folder)
    record = _read_record(folder)
    if _digests(folder) != dict(record.sha256):
        odd = {file for file, _ in _digests(folder).items() ^ record.sha256.items()}
        raise StoreDamagedError(
            f"weights in {folder} differ from their digests: {', '.join(sorted(odd))}; copy it again"
        )
    config, run_record = read_config(folder), RunRecord.read(folder)
    # Adapters that were merged are part of a whole LLM; to build it as LoRA would put fresh ones beside them.
    built_as = replace(config, train_llm="full") if record.is_merged else config
    built = rebuild(built_as, run_record, _load_llm(folder, record, config))
    files = sorted(folder.glob("*.safetensors"))
    weights = {name: tensor for path in files for name, tensor in load_file(path).items()}
    if record.llm == "adapter":
        weights |= read_adapter(folder / ADAPTER_FOLDER)
    expected = {name for name in built.model.state_dict() if not name.startswith("llm.") or is_adapter(name)}
    if set(weights) != expected:
        odd = sorted(set(weights) ^ expected)
        raise UserError(f"{folder} holds another model than its config builds; differing tensors: {', '.join(odd[:5])}")
    built.model.load_state_dict(weights, strict=False)
    built.model.eval()
    return LoadedRun(built=built, record=run_record, step=record.step)


def card_facts(run: Path, loaded: LoadedRun, record: ExportRecord, *, name: str, license: str) -> CardFacts:
    """What the run's folder says about itself; what an imported or older run does not hold is left out."""
    metrics = read_metrics(run) if (run / METRICS_FILE).is_file() else []
    at_step = [row for row in metrics if row["step"] == loaded.step - 1]
    return CardFacts(
        name=name,
        config=loaded.built.config,
        record=loaded.record,
        step=loaded.step,
        llm_weights=WORDS[record.llm],
        llm_revision=record.llm_revision,
        license=license,
        scores=read_scores(run),
        metrics=at_step[-1] if at_step else None,
        validation=_validation(run, loaded.step),
        origin=json.loads((run / IMPORT_FILE).read_text()) if (run / IMPORT_FILE).is_file() else None,
        software=software_versions(),
    )


def _validation(run: Path, step: int) -> Mapping[str, float] | None:
    """What the checkpoint of that step says; its weights are not read for it."""
    states = [json.loads((folder / checkpoint.STATE_FILE).read_text()) for folder in checkpoint.checkpoints(run)]
    return next((state.get("validation") for state in states if state["step"] == step), None)


def _llm_weights(built: Built, *, with_llm: bool, merge_lora: bool) -> LLMWeights:
    """Where the LLM's weights will be; an error for what cannot be asked of this run."""
    config = built.config
    if merge_lora and config.train_llm != "lora":
        raise UserError(f"--merge-lora: the run has train_llm {config.train_llm}, so there are no adapters to merge")
    if config.llm_quant and (merge_lora or with_llm):
        raise UserError(
            f"the LLM was loaded as {config.llm_quant}, whose weights cannot be exported; leave out --merge-lora and"
            " --with-llm: the LLM is then named, and its adapters are saved"
        )
    if config.train_llm == "lora" and not merge_lora:
        if with_llm or built.saves_llm:
            raise UserError("the LLM of a LoRA run is whole only with its adapters merged; add --merge-lora")
        return "adapter"
    return "whole" if with_llm or merge_lora or built.saves_llm else "named"


def _write_weights(out: Path, built: Built, kind: LLMWeights, *, merge_lora: bool) -> None:
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in built.model.state_dict().items():
        if not name.startswith("llm."):
            parts[name.partition(".")[0]][name] = value.detach().cpu().contiguous()
    for part, weights in parts.items():
        save_file(weights, out / f"{part}.safetensors", metadata={"format": "pt"})
    built.llm.tokenizer.save_pretrained(out / LLM_FOLDER)
    if kind == "adapter":
        write_adapter(out / ADAPTER_FOLDER, built.llm.model, built.config.llm)
    if kind == "whole":
        if merge_lora:
            merge_adapters(built.llm.model)
        built.llm.model.save_pretrained(out / LLM_FOLDER, max_shard_size=MAX_SHARD)


def _write_facts(out: Path, run: Path, loaded: LoadedRun) -> None:
    """Settings and record; files by their names alone, where they lay is nobody else's business."""
    (out / CONFIG_FILE).write_text(loaded.built.config.to_yaml())
    known = {encoder: _without_paths(facts) for encoder, facts in loaded.record.encoders.items()}
    replace(loaded.record, store=Path(loaded.record.store).name, encoders=known, live=None).write(out)
    encoders = {
        encoder: {"identity_id": shape.identity, **known.get(encoder, {})}
        for encoder, shape in loaded.record.shapes.items()
    }
    (out / ENCODERS_FILE).write_text(json.dumps(encoders, indent=1) + "\n")
    if (run / IMPORT_FILE).is_file():
        shutil.copyfile(run / IMPORT_FILE, out / IMPORT_FILE)


def _without_paths(facts: Mapping[str, Any]) -> dict[str, Any]:
    source = facts.get("weights_from")
    return {**facts, "weights_from": Path(source).name} if source and Path(source).exists() else dict(facts)


def write_adapter(folder: Path, llm: nn.Module, base: str) -> None:
    """The adapters as peft's own folder: `PeftModel.from_pretrained(BASE, FOLDER)` reads it."""
    settings = llm.peft_config["default"]
    settings.base_model_name_or_path, settings.task_type, settings.inference_mode = base, "CAUSAL_LM", True
    settings.save_pretrained(folder)
    weights = {
        ADAPTER_PREFIX + name.replace(".default.", "."): value.detach().cpu().contiguous()
        for name, value in llm.state_dict().items()
        if is_adapter(name)
    }
    save_file(weights, folder / ADAPTER_FILE, metadata={"format": "pt"})


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The adapters under the names that our model has for them."""
    names = {}
    for name, value in load_file(folder / ADAPTER_FILE).items():
        stem, _, kind = name.removeprefix(ADAPTER_PREFIX).rpartition(".")
        names[f"llm.{stem}.default.{kind}"] = value
    return names


@torch.no_grad()
def merge_adapters(llm: nn.Module) -> None:
    """Add every adapter to the weights it stands beside, in their type, and take it out of the LLM."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # seconds, and most runs have no adapters

    for name, module in list(llm.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)  # refuses to merge what is not finite
            parent, _, child = name.rpartition(".")
            setattr(llm.get_submodule(parent), child, module.get_base_layer())
    del llm.peft_config


def _load_llm(folder: Path, record: ExportRecord, config: TrainConfig) -> LoadedLLM:
    if record.llm != "whole":
        return new_llm(config, ())
    llm = load_llm(str(folder / LLM_FOLDER), dtype=getattr(torch, record.llm_dtype))
    return replace(llm, is_fresh=True)  # what it was before is not known here: to export it again is to copy it


def _read_record(folder: Path) -> ExportRecord:
    try:
        record = ExportRecord(**json.loads((folder / EXPORT_FILE).read_text()))
        if (
            record.format != FORMAT
            or record.llm not in WORDS
            or record.llm_dtype not in ("float32", "bfloat16", "float16")
        ):
            raise ValueError(f"format {record.format}, llm {record.llm!r} of {record.llm_dtype!r}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is no export of this version: {error}; export the run again") from error
    return record


def _digests(folder: Path) -> dict[str, str]:
    """Every file of weights in the folder, by its path in it."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
