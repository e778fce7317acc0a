"""The LLM: any Hugging Face causal LM with its tokenizer, or a small one with fresh weights.

Comes in: a Hub id, a local folder, or `fresh:NAME`. Goes out: model and tokenizer. A fresh LLM is a Llama of a size
in `FRESH_LLMS` whose words are those of the training samples: enough to see a whole run work, and honest about what it
cannot do (it knows no word it was not trained on). transformers is imported inside: it takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mervcache.errors import UserError, unknown_name
from trainer.model.quantise import quantised_loading

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
