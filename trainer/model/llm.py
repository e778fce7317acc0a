"""The LLM: any Hugging Face causal LM with its tokenizer, or a small one with fresh weights.

Comes in: a Hub id, a local folder, or `fresh:NAME`. Goes out: model and tokenizer. A fresh LLM is a Llama of a size
in `FRESH_LLMS` whose words are those of the training samples: enough to see a whole run work, and honest about what it
cannot do (it knows no word it was not trained on). transformers is imported inside: it takes seconds.

Adapt: what is done to an LLM between loading and training.

Comes in: the LLM as it was loaded. Goes out: the same module, changed in place: which of its weights want a gradient,
LoRA adapters in its linear layers, layers that forget their activations. The adapters are put into the LLM instead of
around it: it stays a causal LM with its own `generate` and its own parameter names.

Quantise: the weights of an LLM that is not trained itself, in 8 or 4 bits (bitsandbytes).

Untested: it needs CUDA, and no machine that had it was at hand. What can be said without one is checked here, before
gigabytes are loaded.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mervcache.errors import UserError, unknown_name
from trainer.config import LoraConfig, TrainConfig


def quantised_loading(name: str) -> dict[str, Any]:
    """Options of transformers' `from_pretrained` that quantise while loading, onto this process's GPU."""
    if name not in QUANTISATIONS:
        raise UserError(unknown_name("llm_quant", name, list(QUANTISATIONS)))
    if find_spec("bitsandbytes") is None:
        raise UserError(f"llm_quant {name} needs bitsandbytes: pip install 'merv-pipeline[quant]' (untested here)")
    if not torch.cuda.is_available():
        raise UserError(f"llm_quant {name} needs a CUDA device and none is visible; without one leave llm_quant out")
    return {"quantization_config": QUANTISATIONS[name](), "device_map": {"": int(os.environ.get("LOCAL_RANK", 0))}}


def _int8() -> Any:
    """LLM.int8(), arXiv 2208.07339."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _nf4() -> Any:
    """4-bit NormalFloat with quantised constants, arXiv 2305.14314; kept as bfloat16, which FSDP can shard."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )


QUANTISATIONS: dict[str, Callable[[], Any]] = {"int8": _int8, "nf4": _nf4}

FRESH_PREFIX = "fresh:"
HUB_TIMEOUT_S = 10.0  # of one question to the Hub
SPECIAL_WORDS = ("<unk>", "<s>", "</s>")


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

    model: nn.Module
    tokenizer: Any
    is_fresh: bool  # its weights are nowhere but in this run


def load_llm(
    name: str, *, texts: Iterable[str] = (), dtype: torch.dtype = torch.float32, quant: str | None = None
) -> LoadedLLM:
    """Load `name`, its weights as `dtype` or quantised.

    `texts` is what a fresh tokenizer learns its words from; fresh weights are fp32 and follow torch's seed.
    """
    if name.startswith(FRESH_PREFIX):
        size = name.removeprefix(FRESH_PREFIX)
        if size not in FRESH_LLMS:
            raise UserError(unknown_name("fresh LLM", size, list(FRESH_LLMS)))
        tokenizer = word_tokenizer(texts)
        return LoadedLLM(model=_fresh_llama(FRESH_LLMS[size], len(tokenizer)), tokenizer=tokenizer, is_fresh=True)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = where_to_look(name)
    options = quantised_loading(quant) if quant is not None else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, adapter_kwargs=where, **options, **where
        )
    except (OSError, ValueError) as error:
        raise UserError(_no_llm(name, error)) from error
    return LoadedLLM(model=model, tokenizer=tokenizer, is_fresh=False)


def where_to_look(name: str) -> dict[str, bool]:
    """Options of `from_pretrained`: the Hub's cache alone where the Hub does not answer, an error where that has none.

    Left to itself the Hub's client asks again and again for every file, also for some that the cache may do without:
    half a minute for an LLM that is there, and as long for one that is not. Offline mode (HF_HUB_OFFLINE) is no answer.
    """
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if Path(name).is_dir():
        return {}
    if name.startswith(("/", ".", "~")):  # no id of the Hub does
        raise UserError(_no_llm(name, "there is no such folder"))
    try:
        model_info(name, timeout=HUB_TIMEOUT_S)
    except (HfHubHTTPError, ValueError):
        return {}  # the Hub's own word on it, or no Hub id at all: transformers tells what is wrong
    except (OSError, HTTPError) as error:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            reason = f"it is not in the Hub's cache, and the Hub does not answer ({error})"
            raise UserError(_no_llm(name, reason)) from error
        return {"local_files_only": True}
    return {}


def _no_llm(name: str, reason: object) -> str:
    """The message for an LLM that cannot be had, and what can."""
    return (
        f"LLM {name!r} cannot be loaded: {str(reason).splitlines()[0]}; give a Hub id, a local folder of a causal LM"
        f" with safetensors (`make smollm2` makes one without the Hub), or {FRESH_PREFIX}NAME with NAME one of"
        f" {', '.join(FRESH_LLMS)}"
    )


def holds_shape(folder: Path) -> bool:
    """Whether `save_shape` has written the sizes of an LLM there, besides its tokenizer."""
    return (folder / "config.json").is_file()


def load_saved_shape(folder: Path, dtype: torch.dtype = torch.float32) -> LoadedLLM:
    """An LLM of which only a run has the weights: tokenizer and sizes; its weights come from the checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    return LoadedLLM(model=model, tokenizer=tokenizer, is_fresh=True)


def save_shape(llm: LoadedLLM, folder: Path) -> None:
    """Write the tokenizer, and the sizes of a fresh LLM, without weights."""
    llm.tokenizer.save_pretrained(folder)
    if llm.is_fresh:
        llm.model.config.save_pretrained(folder)


def word_tokenizer(texts: Iterable[str]) -> Any:
    """One id per word or run of punctuation, in alphabetical order; begins text with `<s>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)} - set(SPECIAL_WORDS))
    vocabulary = {word: index for index, word in enumerate([*SPECIAL_WORDS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # cuts as the expression above does
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _fresh_llama(size: FreshLLM, vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=size.hidden_size,
            intermediate_size=3 * size.hidden_size,
            num_hidden_layers=size.num_layers,
            num_attention_heads=size.num_heads,
            max_position_embeddings=size.context,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            tie_word_embeddings=False,
        )
    )


def adapt(llm: nn.Module, config: TrainConfig) -> None:
    """Make the LLM what the config says; fresh adapters follow torch's seed."""
    llm.requires_grad_(config.train_llm == "full")
    if config.train_llm == "lora":
        add_adapters(llm, config.lora)
    if config.activation_checkpointing:
        checkpoint_layers(llm)


def add_adapters(llm: nn.Module, config: LoraConfig) -> None:
    """Adapters in fp32 beside linear layers whose own weights keep their type and stay as they are."""
    from peft import LoraConfig as PeftLoraConfig  # seconds, and most runs have no adapters
    from peft import inject_adapter_in_model

    check_targets(llm, config.targets)
    settings = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets) or "all-linear",  # its words for all but the output layer
    )
    inject_adapter_in_model(settings, llm)
    for name, parameter in llm.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_" in name


def check_targets(llm: nn.Module, targets: Sequence[str]) -> None:
    """Every target must be the name, or the end of the name, of a layer that can be adapted."""
    linear = [name for name, module in llm.named_modules() if _is_linear(module)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            short = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(unknown_name("linear layer in lora.targets", target, short))


def checkpoint_layers(llm: nn.Module) -> None:
    """Let every decoder layer keep only its input and compute the rest again in the backward pass.

    transformers' own switch does nothing in evaluation mode, and that is where a frozen LLM is. Here the layer's
    `forward` is replaced: hooks around the layer (FSDP gathers weights in one) run once, and no input needs a gradient.
    """
    layers = decoder_layers(llm)
    if not layers:
        raise UserError(f"activation_checkpointing: {type(llm).__name__} names no layers for it; turn it off")
    for layer in layers:
        layer.forward = _forgetful(layer.forward)


def decoder_layers(llm: nn.Module) -> list[nn.Module]:
    """The layers that an LLM of transformers is a stack of."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in llm.modules() if isinstance(module, GradientCheckpointingLayer)]


def _forgetful(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapped


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's transposed one
