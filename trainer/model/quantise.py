"""Quantise: the weights of an LLM that is not trained itself, in 8 or 4 bits (bitsandbytes).

Untested: it needs CUDA, and no machine that had it was at hand. What can be said without one is checked here, before
gigabytes are loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from mervcache.errors import UserError, unknown_name


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
