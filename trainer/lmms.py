"""The model `merv` of lmms-eval: `lmms-eval --model merv --model_args checkpoint=RUN,store=STORE`.

The only module that imports lmms-eval, which finds it by the entry point `lmms_eval.models`. lmms-eval reads the entry
points of all models whenever it starts, so torch and the run are loaded with the model.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]: installed by hand
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]: installed by hand
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]: installed by hand

from mervcache.console import echo, log_to_stderr
from mervcache.errors import UserError

if TYPE_CHECKING:
    from trainer.lmms_requests import Requests

MANIFEST = ModelManifest(model_id="merv", simple_class_path="trainer.lmms.MERV")


class MERV(lmms):
    """A run, or an export of one, in one process."""

    is_simple = True

    def __init__(
        self,
        checkpoint: str,
        store: str | None = None,  # where tokens are read; by default the store that the run was trained on
        root: str | None = None,  # folder of relative paths, and of paths whose files are not there
        weights: str = "",  # SPEC or NAME=SPEC, several with ';': where the weights of encoders that run now are
        best: bool = False,  # the best checkpoint by validation, instead of the newest
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # lmms-eval's bound of batch_size auto
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("merv runs in one process; start lmms-eval without torchrun or accelerate launch")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size must be a number of requests, got {batch_size!r}")
        log_to_stderr()
        self._options: dict[str, Any] = {
            "checkpoint": str(checkpoint),
            "store": None if store is None else str(store),
            "root": None if root is None else str(root),
            "weights": [spec for spec in str(weights).split(";") if spec],
            "best": best,
            "device": device,
            "batch_size": int(batch_size),
        }
        self._opened: Requests | None = None
        self._open()

    def generate_until(self, requests: list[Any]) -> list[str]:
        return self._open().generate_until([request.args for request in requests], self.task_dict)

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        return self._open().generate_until_multi_round([request.args for request in requests], self.task_dict)

    def loglikelihood(self, requests: list[Any]) -> list[GenerationResult]:
        """Pairs of a number and a bool, wrapped: the evaluator of lmms-eval 0.7.3 turns bare ones into text."""
        found = self._open().loglikelihood([request.args for request in requests], self.task_dict)
        return [GenerationResult(text=pair) for pair in found]

    def clean(self) -> None:
        """Release the run and the encoders after the last request, and print where tokens came from."""
        if self._opened is not None:
            echo(f"merv: {self._opened.summary()}")
            self._opened.close()
            self._opened = None
        super().clean()

    def _open(self) -> Requests:
        if self._opened is None:
            from trainer.lmms_requests import Requests

            self._opened = Requests(**self._options)
        return self._opened
