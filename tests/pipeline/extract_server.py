"""A program for the fault tests: loads everything once, then runs `merv-pipeline` in a forked process per request.

It says "ready" once. A request is a line of JSON: the arguments of the command, a file for its output, and maybe
variables for its environment. Answers are a line with the id of the process when it starts, and a line with its exit
code (or minus the signal that killed it) when it has ended. Forking spares each run the ten seconds that importing the
models takes; the process is the command's own from its first line to its death.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

# Everything a run imports; nothing of it starts a thread before it is used.
import av  # noqa: F401
import distributed  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch
from transformers import Dinov2WithRegistersModel, SiglipVisionModel, VivitModel  # noqa: F401

import featurestore.store  # noqa: F401
from pipeline.cli.extract import main


def serve() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(json.loads(line))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(request: dict) -> None:
    """The command, with its output in a file."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ.update(request.get("environment", {}))
    code = 1
    try:
        main(request["arguments"], prog_name="merv-pipeline")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
