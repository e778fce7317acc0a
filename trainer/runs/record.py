"""Record: what a run says about its data, its model and its software, beside its settings.

RUN/config.yaml   settings          RUN/run.json   this record
RUN/llm/          tokenizer, and sizes or all of an LLM that is nowhere else
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.config import RECORD_FILE
from trainer.data.tokens import TokenShape

LLM_FOLDER = "llm"
PACKAGES = ("merv-pipeline", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "peft")
UNBOUND = "unbound:"  # begins the identity in an imported run, whose weights do not say what made their tokens


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run says about its data and its size, beside its settings."""

    store: str  # where the tokens were read from
    data_digest: str
    num_samples: int
    dropped: Mapping[str, int]
    shapes: Mapping[str, TokenShape]  # of the encoders used
    parameters: Mapping[str, Mapping[str, int]]  # part -> total, trained
    num_visual_tokens: int
    num_steps: int
    snapshot: str = ""  # of that store: a resumed run reads the same one, whatever was added since
    started_from: str = ""  # with `init`: what was loaded of which run, and what was not
    encoders: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # identity fields and weights label
    software: Mapping[str, str] = field(default_factory=dict)  # package -> version the run was started with
    tokens: str = "from cache"  # or "end to end"
    live: Mapping[str, Any] | None = None  # of an end-to-end run: the extraction's settings, a resumed run reads them

    def write(self, run: Path) -> None:
        (run / RECORD_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, run: Path) -> RunRecord:
        record = json.loads((run / RECORD_FILE).read_text())
        shapes = {
            encoder: TokenShape(**{**shape, "grid": tuple(shape["grid"])})
            for encoder, shape in record["shapes"].items()
        }
        return cls(**{**record, "shapes": shapes})


def software_versions() -> dict[str, str]:
    """Installed versions of what computes, and of Python."""
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {"python": platform.python_version(), **{name: installed[name] for name in PACKAGES if name in installed}}
