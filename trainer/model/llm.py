"""The LLM: loading any Hugging Face causal LM with its tokenizer, or a small one with fresh weights, and adapting it.

A fresh LLM is a Llama of a size in `FRESH_LLMS` whose words are those of the training samples: enough to see a run
work. LoRA adapters are injected into the LLM, not wrapped around it: it keeps its own `generate` and parameter names.
transformers and peft are imported inside functions, since they take seconds to load.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mervcache.errors import UserError, unknown_name
from trainer.config import CHECKPOINTING_PARAMETERS, Attention, LoraConfig, TrainConfig
from trainer.data.prompts import beyond_embeddings
from trainer.model.causal_lm import CausalLM

FRESH_PREFIX = "fresh:"
HUB_TIMEOUT_S = 10.0  # of one request to the Hub
GENERATION_FILE = "generation_config.json"  # transformers' name
PLAIN_FORWARD = "plain_forward"  # attribute of a checkpointed `forward`: the layer's own
SPECIAL_WORDS = ("<unk>", "<s>", "</s>")
QUANTISATIONS: dict[str, dict[str, Any]] = {  # options of transformers' BitsAndBytesConfig
    "int8": {"load_in_8bit": True},  # LLM.int8(), arXiv 2208.07339
    "nf4": {  # 4-bit NormalFloat with quantised constants, arXiv 2305.14314; stored as bfloat16, which FSDP can shard
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
}


@dataclass(frozen=True, kw_only=True)
class FreshLLM:
    """Size of a Llama with fresh weights."""

    hidden_size: int
    num_layers: int
    num_heads: int
    context: int  # tokens


FRESH_LLMS: dict[str, FreshLLM] = {
    "tiny": FreshLLM(hidden_size=128, num_layers=2, num_heads=4, context=2048),
    "small": FreshLLM(hidden_size=192, num_layers=4, num_heads=6, context=4096),
}


@dataclass(frozen=True, kw_only=True)
class LoadedLLM:
    """A causal LM with its tokenizer."""

    model: CausalLM
    tokenizer: Any
    is_fresh: bool  # its weights are nowhere but in this run


def load_llm(
    name: str,
    *,
    texts: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
    quant: str | None = None,
    attention: Attention | None = None,
    device: torch.device | None = None,
) -> LoadedLLM:
    """Load a Hub id, a local folder or `fresh:NAME`, its weights as `dtype` or quantised.

    `texts` is what a fresh tokenizer learns its words from; fresh weights are fp32, follow torch's seed and are on the
    CPU. Others are read straight onto `device`, without a copy in the host's memory. Raises UserError for an LLM that
    cannot be loaded.
    """
    if name.startswith(FRESH_PREFIX):
        return _fresh_llm(name.removeprefix(FRESH_PREFIX), texts, attention)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    keep_bars_to_terminals()
    where = hub_options(name)
    options = quantised_loading(quant) if quant is not None else {}
    if quant is None and device is not None and device.type != "cpu":
        options = {"device_map": {"": device}}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            adapter_kwargs=where,
            trust_remote_code=False,
            attn_implementation=attention,
            **options,
            **where,
        )
    except ImportError as error:  # a kernel of `attention` that is not installed
        raise UserError(no_attention(attention, error)) from error
    except (OSError, ValueError) as error:
        raise UserError(_no_llm(name, reason_not_loaded(error))) from error
    llm = cast("CausalLM", model)
    check_vocabulary(name, tokenizer, llm)
    return LoadedLLM(model=llm, tokenizer=tokenizer, is_fresh=False)


def keep_bars_to_terminals() -> None:
    """Let transformers draw its bars only where a person looks: in a log every update is a line."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def no_attention(attention: str | None, error: Exception) -> str:
    """That an implementation of attention is not there."""
    return f"attn_implementation {attention}: {str(error).strip().splitlines()[0]}; install it, or leave it out"


def reason_not_loaded(error: Exception) -> str:
    """The first line of an error of `from_pretrained`, without its advice to run code that a folder brings along."""
    if "trust_remote_code" in str(error):
        return "its folder brings Python code of its own, which is never run; an LLM of transformers' own classes works"
    return str(error).strip().partition("\n")[0]


def num_embeddings(model: CausalLM) -> int:
    """Token ids that the model can read and predict."""
    rows = model.get_input_embeddings().weight.shape[0]
    return min(rows, getattr(model.get_output_embeddings(), "out_features", rows))


def end_ids(model: CausalLM) -> tuple[int, ...]:
    """Tokens that end a generation by the model's own settings: one, several or none."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)


def check_vocabulary(name: str, tokenizer: Any, model: CausalLM) -> None:
    """UserError where the tokenizer's own words, or its special roles, have ids that the model has no row for.

    Published tokenizers have added tokens beyond the model (CodeLlama's infilling, a padding token): these are refused
    where a text makes one, see `Renderer`. Rows beyond the tokenizer are padding.
    """
    rows = num_embeddings(model)
    roles = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    added = tokenizer.added_tokens_decoder.keys() - set(roles)
    beyond = {index: word for word, index in tokenizer.get_vocab().items() if index >= rows and index not in added}
    if beyond:
        raise UserError(f"LLM {name!r}: {beyond_embeddings(beyond, len(tokenizer), rows)}")


def _fresh_llm(size: str, texts: Iterable[str], attention: Attention | None) -> LoadedLLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    if size not in FRESH_LLMS:
        raise UserError(unknown_name("fresh LLM", size, list(FRESH_LLMS)))
    tokenizer, sizes = word_tokenizer(texts), FRESH_LLMS[size]
    options: dict[str, Any] = {"attn_implementation": attention}  # of every config, and in no signature
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        intermediate_size=3 * sizes.hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        max_position_embeddings=sizes.context,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
        **options,
    )
    try:
        model = LlamaForCausalLM(config)
    except ImportError as error:
        raise UserError(no_attention(attention, error)) from error
    return LoadedLLM(model=cast("CausalLM", model), tokenizer=tokenizer, is_fresh=True)


def word_tokenizer(texts: Iterable[str]) -> Any:
    """A tokenizer with one id per word or run of punctuation, in alphabetical order; begins text with `<s>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)} - set(SPECIAL_WORDS))
    vocabulary = {word: index for index, word in enumerate([*SPECIAL_WORDS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # splits as the expression above does
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def hub_options(name: str) -> dict[str, bool]:
    """Options of `from_pretrained`: only the Hub's cache where the Hub does not answer; UserError where that has none.

    By default the Hub's client retries for every file, also for optional ones that the cache does not need: half a
    minute for an LLM that is there, and as long for one that is not. Offline mode (HF_HUB_OFFLINE) is no answer.
    """
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]: httpx's or httpx2's
    )

    if Path(name).is_dir():
        return {}
    if name.startswith(("/", ".", "~")):  # no Hub id does
        raise UserError(_no_llm(name, "there is no such folder"))
    try:
        model_info(name, timeout=HUB_TIMEOUT_S)
    except (HfHubHTTPError, ValueError):
        return {}  # the Hub's own answer, or no Hub id at all: transformers reports what is wrong
    except (OSError, HTTPError) as error:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            reason = f"it is not in the Hub's cache, and the Hub does not answer ({error})"
            raise UserError(_no_llm(name, reason)) from error
        return {"local_files_only": True}
    return {}


def _no_llm(name: str, reason: object) -> str:
    return (
        f"LLM {name!r} cannot be loaded: {str(reason).splitlines()[0]}; give a Hub id, a local folder of a causal LM"
        " with safetensors (--llm FOLDER; one without the Hub: `make smollm2`, or docs/install.md in an environment of"
        f" your own), or {FRESH_PREFIX}NAME with NAME one of {', '.join(FRESH_LLMS)}"
    )


def quantised_loading(name: str) -> dict[str, Any]:
    """Options of `from_pretrained` that quantise an LLM, which is not trained itself, onto this process's GPU.

    Not tested on a GPU. Raises UserError before gigabytes are loaded where bitsandbytes or CUDA is missing.
    """
    if name not in QUANTISATIONS:
        raise UserError(unknown_name("llm_quant", name, list(QUANTISATIONS)))
    if find_spec("bitsandbytes") is None:
        raise UserError(f"llm_quant {name} needs bitsandbytes: pip install 'merv-pipeline[quant]' (untested here)")
    if not torch.cuda.is_available():
        raise UserError(f"llm_quant {name} needs a CUDA device and none is visible; without one leave llm_quant out")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**QUANTISATIONS[name])
    return {"quantization_config": config, "device_map": {"": int(os.environ.get("LOCAL_RANK", 0))}}


def holds_shape(folder: Path) -> bool:
    """Whether `save_shape` has written the sizes of an LLM to the folder, besides its tokenizer."""
    return (folder / "config.json").is_file()


def load_saved_shape(folder: Path, dtype: torch.dtype = torch.float32, attention: Attention | None = None) -> LoadedLLM:
    """Tokenizer and sizes of an LLM whose weights only a run has; they come from its checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        sizes = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(
            sizes, dtype=dtype, trust_remote_code=False, attn_implementation=attention
        )
        if (folder / GENERATION_FILE).is_file():
            model.generation_config.eos_token_id = GenerationConfig.from_pretrained(folder).eos_token_id
    except ImportError as error:
        raise UserError(no_attention(attention, error)) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"the LLM's sizes and tokenizer in {folder} cannot be read: {reason_not_loaded(error)}"
        ) from error
    check_vocabulary(str(folder), tokenizer, model)
    return LoadedLLM(model=cast("CausalLM", model), tokenizer=tokenizer, is_fresh=True)


def save_shape(llm: LoadedLLM, folder: Path, *, with_sizes: bool) -> None:
    """Write the tokenizer, and `with_sizes` the LLM's sizes and end tokens; no weights."""
    from transformers import GenerationConfig

    llm.tokenizer.save_pretrained(folder)
    if with_sizes:
        llm.model.config.save_pretrained(folder)
        if ends := end_ids(llm.model):  # alone: published settings of sampling are often such that they cannot be saved
            GenerationConfig(eos_token_id=list(ends)).save_pretrained(folder)


def adapt(llm: CausalLM, config: TrainConfig) -> None:
    """Freeze or unfreeze the LLM, add LoRA adapters and activation checkpointing, in place, as the config says.

    Fresh adapters follow torch's seed.
    """
    llm.requires_grad_(config.train_llm == "full")
    if config.train_llm == "lora":
        add_adapters(llm, config.lora)
    checkpoint_layers(llm, is_on=is_checkpointed(llm, config))


def add_adapters(llm: CausalLM, config: LoraConfig) -> None:
    """Inject fp32 LoRA adapters into linear layers, whose own weights keep their dtype and stay frozen.

    Every target must be the name, or the end of the name, of a linear layer; UserError names the known ones.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    linear = [
        name
        for name, module in llm.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's transposed one
    ]
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            short = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(unknown_name("linear layer in lora.targets", target, short))
    settings = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]: peft divides it by the rank
        lora_dropout=config.dropout,
        target_modules=list(config.targets) or "all-linear",  # all but the output layer
    )
    inject_adapter_in_model(settings, llm)
    for module in llm.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            # Autocast casts the adapters' small weights; peft would cast, and autograd keep, every activation in fp32.
            cast("Any", module).cast_input_dtype_enabled = False
    for name, parameter in llm.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to a LoRA adapter."""
    return ".lora_" in name


def is_checkpointed(llm: CausalLM, config: TrainConfig) -> bool:
    """Whether the config wants activation checkpointing; where it does not say so, the LLM's size decides."""
    if config.activation_checkpointing is not None:
        return config.activation_checkpointing
    return bool(decoder_layers(llm)) and llm.num_parameters() >= CHECKPOINTING_PARAMETERS


def checkpoint_layers(llm: CausalLM, *, is_on: bool = True) -> None:
    """Activation checkpointing: every decoder layer keeps only its input and is computed again in the backward pass.

    transformers' own switch does nothing in evaluation mode, which a frozen LLM is in. Here the layer's `forward` is
    replaced: hooks around the layer (FSDP gathers weights in one) run once, and no input needs a gradient. An LLM that
    serves several runs is switched for each of them.
    """
    layers = decoder_layers(llm)
    if is_on and not layers:
        raise UserError(f"activation_checkpointing: {type(llm).__name__} names no layers for it; turn it off")
    for layer in layers:
        plain = getattr(layer.forward, PLAIN_FORWARD, None)
        if is_on and plain is None:
            layer.forward = _checkpointed(layer.forward)
        elif not is_on and plain is not None:
            layer.forward = plain


def decoder_layers(llm: CausalLM) -> list[nn.Module]:
    """The decoder layers of an LLM of transformers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in llm.modules() if isinstance(module, GradientCheckpointingLayer)]


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    setattr(wrapped, PLAIN_FORWARD, forward)
    return wrapped
