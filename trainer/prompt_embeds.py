"""Exports the prompts of questions as embeddings, for servers that take `prompt_embeds`, such as vLLM.

    OUT/prompt_embeds.json      run, step, LLM, width, dtype, snapshot, numbers of prompts and of questions left out
    OUT/prompts.jsonl           a line per prompt: name, file, question, clip, tokens, place of the visual tokens
    OUT/prompts-NNNNN.safetensors   name -> embeddings [S, M], text and fused visual tokens in the order of the prompt

The files hold no pickle. vLLM's HTTP API takes a tensor as `torch.save` writes it, in base64: docs/evaluation.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from featurestore.clips import Sample, without_outer_placeholders
from mervcache.errors import UserError
from mervcache.files import atomic_directory
from trainer.data.batches import make_batch
from trainer.data.prompts import Rendered
from trainer.data.tokens import TokenSource
from trainer.evaluate import EvaluationRequest, default_device, questions_place
from trainer.model import letters, multiple_choice, open_ended
from trainer.model.letters import Template
from trainer.model.video_llm import Built, shown_to
from trainer.runs.load import LoadedRun, load_run
from trainer.runs.stage_folders import last_stage
from trainer.sources import opened_for

RECORD_FILE, PROMPTS_FILE = "prompt_embeds.json", "prompts.jsonl"
MAX_FILE_BYTES = 512 << 20
BATCH_SIZE = 16
FORMAT = 1


def export_prompt_embeds(
    run: Path,
    out: Path,
    *,
    store: str | None = None,
    split: str = "heldout",
    limit: int | None = None,
    best: bool = False,
) -> dict[str, Any]:
    """Write the prompts of the questions of a split to the folder `out`, whole or not at all; returns its record.

    Questions are those that `merv-eval run` scores. With options they are asked by letters, where the run is scored so.
    The embeddings are those of the run's LLM in its dtype: the server must run the same LLM, with trained weights the
    one of `merv-eval export`.

    Raises
    ------
    UserError
        For a text-only run, a folder that exists, and a split without questions or with questions that do not fit.
    """
    run, out = last_stage(Path(run)), Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    loaded = load_run(run, best=best)
    built = loaded.built
    if not built.model.has_visual:
        raise UserError(f"{run} is a text-only run: it has no visual tokens, so send its prompts as text")
    request, device = EvaluationRequest(store=store, split=split, limit=limit, best=best), default_device()
    place = questions_place(run, loaded, request)
    with opened_for(loaded, place, (), device) as (held, source), atomic_directory(out) as folder:
        found = multiple_choice.questions(held, source, split=split, has_visual=True, is_asked=_is_asked)
        samples, template = found[:limit], _template(loaded)
        multiple_choice.check_whole(built, [sample for sample in samples if sample.options], template)
        open_ended.check_fits(built, [sample for sample in samples if not sample.options])
        files = _write(folder, built, samples, source, template, device)
        record = {
            "format": FORMAT,
            "run": run.name,
            "step": loaded.step,
            "llm": _name_of(built.config.llm),
            "llm_is_trained": built.config.train_llm != "none",
            "width": built.llm.model.get_input_embeddings().weight.shape[1],
            "dtype": str(built.llm.model.get_input_embeddings().weight.dtype).removeprefix("torch."),
            "snapshot": source.snapshot,
            "split": split,
            "prompts": len(samples),
            "without_tokens": sum(s.split == split and _is_asked(s) for s in held) - len(found),
            "files": files,
        }
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
    return {"out": str(out), **record, "bytes": sum(path.stat().st_size for path in out.iterdir())}


def _name_of(llm: str) -> str:
    """A Hub id as it is, of a folder its name: what is exported names no path of this machine."""
    return Path(llm).name if Path(llm).is_dir() else llm


def _is_asked(sample: Sample) -> bool:
    return bool(sample.options) or open_ended.is_open_question(sample)


def _template(run: LoadedRun) -> Template | None:
    """The prompt of multiple choice by letters; None where the run is scored by likelihood, without listed options."""
    config = run.built.config
    is_lettered = multiple_choice.default_protocol(config) == "letters"
    return Template.read(config.letters_template) if is_lettered else None


def _render(built: Built, sample: Sample, template: Template | None) -> Rendered:
    if sample.options and template is not None:
        return letters.render(built, sample, template)
    return built.renderer.question(sample.turns, has_clip=sample.clip_id is not None)


def _write(
    folder: Path,
    built: Built,
    samples: Sequence[Sample],
    source: TokenSource,
    template: Template | None,
    device: str,
) -> list[str]:
    """The tensors and their lines; returns the names of the files with tensors."""
    pending: dict[str, Tensor] = {}
    files: list[str] = []

    def flush() -> None:
        save_file(pending, folder / files[-1], metadata={"format": "pt"})
        pending.clear()

    with open(folder / PROMPTS_FILE, "w", encoding="utf-8") as lines:
        for number, (sample, facts, embeds_SM) in enumerate(_prompts(built, samples, source, template, device)):
            if not pending:
                files.append(f"prompts-{len(files):05d}.safetensors")
            name = f"prompt-{number:06d}"
            pending[name] = embeds_SM
            question = without_outer_placeholders(sample.turns[-2].text)
            line = {"name": name, "file": files[-1], "sample_id": sample.sample_id, "clip_id": sample.clip_id}
            line |= {"question": question, "options": list(sample.options), **facts}
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            if sum(tensor.nbytes for tensor in pending.values()) >= MAX_FILE_BYTES:
                flush()
    if pending:
        flush()
    return files


@torch.no_grad()
def _prompts(
    built: Built, samples: Sequence[Sample], source: TokenSource, template: Template | None, device: str
) -> Iterator[tuple[Sample, dict[str, int], Tensor]]:
    """Each sample with the numbers of its tokens and its embeddings [S, M] on the CPU."""
    model = built.model.to(device).eval()
    num_visual = model.num_visual_tokens_at(built.tokens_per_frame)
    for start in range(0, len(samples), BATCH_SIZE):
        part = samples[start : start + BATCH_SIZE]
        source.expect(sample.clip_id for sample in part if sample.clip_id is not None)
        rendered = [_render(built, sample, template) for sample in part]
        clip_ids = [sample.clip_id for sample in part]
        batch = make_batch(rendered, clip_ids, source, num_visual, model.context, **shown_to(built, len(part)))
        with built.autocast(device):
            embeds_BSM = model.splice(batch.to(device))
        lengths = batch.attention_mask_BS.sum(1).tolist()
        for sample, text, row_SM, length in zip(part, rendered, embeds_BSM.cpu(), lengths, strict=True):
            facts = {"tokens": length, "visual_at": text.visual_at, "visual_tokens": length - len(text.input_ids)}
            yield sample, facts, row_SM[:length].clone()
