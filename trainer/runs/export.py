"""Exports a run as a folder that can be published; `trainer/runs/load.py` reads it.

    OUT/README.md                 model card
    OUT/config.yaml, run.json     settings and record of the run
    OUT/encoders.json             identity of every encoder's tokens: weights, layer, preprocessing, grid
    OUT/projectors.safetensors    and fusion.safetensors (trained_encoders.safetensors, where some were trained)
    OUT/llm/                      tokenizer; all of the LLM, in shards, where this run has changed it or on request
    OUT/adapter/                  LoRA weights as peft reads them, where they are not merged
    OUT/export.json               step, data digest, sha256 of every file that loading reads, and of itself

A frozen LLM is named and not copied: its licence may not allow passing its weights on.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mervcache.errors import UserError
from mervcache.files import atomic_directory, file_sha256
from trainer.config import CONFIG_FILE
from trainer.model.causal_lm import CausalLM
from trainer.model.llm import is_adapter, keep_bars_to_terminals
from trainer.model.video_llm import Built
from trainer.paths import recorded_path
from trainer.runs import checkpoint
from trainer.runs.integrity import seal
from trainer.runs.load import (
    ADAPTER_FILE,
    ADAPTER_FOLDER,
    ADAPTER_PREFIX,
    FORMAT,
    LLM_NOTES,
    LOCAL_LLM_NOTES,
    ExportRecord,
    LLMWeights,
    LoadedRun,
    export_files,
    load_run,
)
from trainer.runs.model_card import UNKNOWN_LICENSE, CardFacts, model_card
from trainer.runs.run_record import (
    IMPORT_FILE,
    read_metrics,
    read_open_scores,
    read_scores,
    software_versions,
)
from trainer.runs.stage_folders import EXPORT_FILE, LLM_FOLDER, has_local_llm, last_stage
from trainer.runs.weight_names import to_file_names

CARD_FILE, ENCODERS_FILE = "README.md", "encoders.json"
MAX_SHARD = "5GB"
NUM_LOSSES = 50  # steps whose mean loss is on the card


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
    """Write a checkpoint of `run` to the folder `out`, whole or not at all.

    Parameters
    ----------
    name, license
        Title and licence of the model card.
    with_llm
        Copy a frozen LLM's weights too, instead of naming the LLM.
    merge_lora
        Add LoRA adapters to the LLM's weights, instead of a peft folder.
    best
        The best checkpoint by validation instead of the newest.

    Returns
    -------
    dict
        The folder, step, where the LLM's weights are, size in bytes and the files.

    Raises
    ------
    UserError
        `out` exists, or the options do not fit the run.
    """
    run, out = last_stage(Path(run)), Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    loaded = load_run(run, best=best)
    llm = loaded.built.llm.model
    kind = _llm_weights(loaded.built, with_llm=with_llm, merge_lora=merge_lora)
    dtype = str(llm.dtype).removeprefix("torch.")
    with atomic_directory(out) as folder:
        _write_weights(folder, loaded.built, kind, merge_lora=merge_lora)
        is_local = has_local_llm(run)
        published = _without_paths(loaded, kind, out, is_local=is_local)
        _write_facts(folder, run, published)
        record = ExportRecord(
            format=FORMAT,
            step=loaded.step,
            data_digest=loaded.record.data_digest,
            llm=kind,
            llm_dtype=dtype,
            is_merged=merge_lora,
            llm_revision=getattr(llm.config, "_commit_hash", None),
            sha256={name: file_sha256(folder / name) for name in export_files(folder)},
        )
        (folder / EXPORT_FILE).write_text(seal(asdict(record)))
        facts = _card_facts(run, published, record, name=name or out.name, license=license, is_local=is_local)
        (folder / CARD_FILE).write_text(model_card(facts))
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    size = sum((out / file).stat().st_size for file in files)
    result = {"out": str(out), "step": record.step, "llm": kind, "bytes": size, "files": files}
    if kind != "whole" and Path(llm_path := loaded.built.config.llm).is_dir():
        note = (
            f"config.yaml names the folder of the LLM on this machine, {llm_path}: add --with-llm before you share it"
        )
        result["notes"] = [note]
    return result


def _llm_weights(built: Built, *, with_llm: bool, merge_lora: bool) -> LLMWeights:
    """Where the LLM's weights will be; UserError for options that do not fit the run."""
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
    llm = built.llm.model
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in built.model.state_dict().items():
        if not name.startswith("llm."):
            parts[name.partition(".")[0]][name] = value.detach().cpu().contiguous()
    for part, weights in parts.items():
        named = to_file_names(weights, built.model.encoders)
        save_file(named, out / f"{part}.safetensors", metadata={"format": "pt"})
    built.llm.tokenizer.save_pretrained(out / LLM_FOLDER)
    if kind == "adapter":
        # As peft's own folder, which `PeftModel.from_pretrained(BASE, FOLDER)` reads. peft's `save_pretrained` takes a
        # PeftModel around the LLM; here the adapters are injected into it.
        settings = llm.peft_config["default"]
        settings.base_model_name_or_path = built.config.llm
        settings.task_type, settings.inference_mode = "CAUSAL_LM", True
        settings.save_pretrained(out / ADAPTER_FOLDER)
        weights = {
            ADAPTER_PREFIX + name.replace(".default.", "."): value.detach().cpu().contiguous()
            for name, value in llm.state_dict().items()
            if is_adapter(name)
        }
        save_file(weights, out / ADAPTER_FOLDER / ADAPTER_FILE, metadata={"format": "pt"})
    elif kind == "whole":
        if merge_lora:
            _merge_adapters(llm)
        keep_bars_to_terminals()
        llm.save_pretrained(out / LLM_FOLDER, max_shard_size=MAX_SHARD)


@torch.no_grad()
def _merge_adapters(llm: CausalLM) -> None:
    """Add every adapter to the weights of its layer, in their dtype, and remove it from the LLM."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # seconds, and most runs have no adapters

    for name, module in list(llm.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)  # refuses to merge what is not finite
            parent, _, child = name.rpartition(".")
            setattr(llm.get_submodule(parent), child, module.get_base_layer())
    del llm.peft_config


def _without_paths(loaded: LoadedRun, kind: LLMWeights, out: Path, *, is_local: bool) -> LoadedRun:
    """Settings and record with paths cut to their names, so that no folder of this machine is published.

    The one that stays, relative to the export where it was given so, is that of a local LLM whose weights are not in
    the export, which could not be loaded without it.
    """
    config, record = loaded.built.config, loaded.record
    settings = {name: getattr(config, name) for name in ("init", "letters_template")}
    paths = {name: Path(path).name for name, path in settings.items() if path is not None}
    if is_local:
        paths["llm"] = Path(config.llm).name if kind == "whole" else recorded_path(config.llm, out)
    encoders = {encoder: dict(facts) for encoder, facts in record.encoders.items()}
    for facts in encoders.values():
        source = facts.get("weights_from")
        if source and Path(source).exists():
            facts["weights_from"] = Path(source).name
    started_from = record.started_from.replace(f"{Path(config.init).parent}/", "") if config.init else ""
    return replace(
        loaded,
        built=replace(loaded.built, config=replace(config, **paths)),
        record=replace(record, store=Path(record.store).name, encoders=encoders, live=None, started_from=started_from),
    )


def _write_facts(out: Path, run: Path, published: LoadedRun) -> None:
    """Settings, record and identities."""
    record = published.record
    (out / CONFIG_FILE).write_text(published.built.config.to_yaml())
    record.write(out)
    encoders = {
        encoder: {"identity_id": shape.identity, **record.encoders.get(encoder, {})}
        for encoder, shape in record.shapes.items()
    }
    (out / ENCODERS_FILE).write_text(json.dumps(encoders, indent=1) + "\n")
    if (run / IMPORT_FILE).is_file():
        shutil.copyfile(run / IMPORT_FILE, out / IMPORT_FILE)


def _card_facts(
    run: Path, loaded: LoadedRun, record: ExportRecord, *, name: str, license: str, is_local: bool
) -> CardFacts:
    """What the run's folder records; an imported or older run may lack some of it."""
    metrics = read_metrics(run)
    losses = [row["loss"] for row in metrics if row["step"] < loaded.step]
    losses = [loss for loss in losses if loss is not None and isfinite(loss)]
    states = [checkpoint.read_state(folder) for folder in checkpoint.checkpoints(run)]
    state = next((state for state in states if state.step == loaded.step), None)
    return CardFacts(
        name=name,
        config=loaded.built.config,
        record=loaded.record,
        step=loaded.step,
        llm_weights=LLM_NOTES[record.llm] if record.llm == "whole" or not is_local else LOCAL_LLM_NOTES[record.llm],
        is_local_llm=is_local,
        llm_revision=record.llm_revision,
        license=license,
        scores=read_scores(run),
        open_scores=read_open_scores(run),
        losses=losses[-NUM_LOSSES:],
        steps_trained=metrics[-1]["step"] + 1 if metrics else None,
        validation=state.validation if state else None,
        skipped=state.skipped if state else 0,
        origin=json.loads((run / IMPORT_FILE).read_text()) if (run / IMPORT_FILE).is_file() else None,
        software=software_versions(),
    )
