"""Checkpoints that are written while the run goes on, one at a time.

A step copies its tensors to the host's memory (`staged`); a thread writes, hashes, syncs and renames them. Until the
folder has its name the run's earlier checkpoints are all kept, so a kill at any time loses only what came after them.

Under FSDP every rank writes its own shards through torch.distributed.checkpoint, as safetensors, and the first one then
puts them together: the files are those of a run of one process. The threads of the ranks talk through a process group
of their own, so that their messages never mix with the training's.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONSOLIDATED = "model-00001-of-00001.safetensors"  # the name that torch.distributed.checkpoint gives


class BackgroundSaver:
    """Runs one `write` at a time in a thread; leaving the block waits for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, write: Callable[[], Any]) -> None:
        """Call `write` in a thread; the one before must have been waited for."""

        def run() -> None:
            try:
                write()
            except BaseException as error:  # raised by `wait`
                self._failure = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write that was started, if any, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
        self._thread, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None and not issubclass(kind, KeyboardInterrupt):
            self._thread.join()  # the exception that ends the run is the one to report


def staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the host's memory that later steps do not change; of a sharded tensor this rank's shard."""
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def write_shards(tensors: Mapping[str, Tensor], file: Path, group: Any, *, is_writer: bool) -> None:
    """Write tensors whose shards are spread over the ranks of `group` as one safetensors file of full tensors.

    Every rank calls it with the same names; the file is there when it returns. Raises OSError on every rank where one
    cannot write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    if not tensors:
        if is_writer:
            save_file({}, file)
        return
    folder = file.with_suffix(".shards")
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from error
    if is_writer:
        _write_scalars({name: value for name, value in tensors.items() if value.ndim == 0}, folder / CONSOLIDATED)
        (folder / CONSOLIDATED).rename(file)
        shutil.rmtree(folder)


def _write_scalars(scalars: Mapping[str, Tensor], file: Path) -> None:
    """Write the values of tensors without axes into a file that has their places: torch 2.13 leaves them zero.

    A safetensors file is the length of its header (8 bytes, little-endian), the header in JSON, the bytes of tensors.
    """
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        for name, value in scalars.items():
            opened.seek(8 + length + header[name]["data_offsets"][0])
            opened.write(value.reshape(1).view(torch.uint8).numpy().tobytes())
