"""What only a GPU can show, in one go and under ten minutes: a table on stdout and every figure in a JSON file.

    python benchmarks/gpu_check.py                            # seeded weights of the real sizes
    python benchmarks/gpu_check.py --weights dinov2=FOLDER    # published weights, where you have them
    python benchmarks/gpu_check.py --device cpu --toy         # the whole script at toy size: shows that it runs

1. neighbours: a clip's tokens have equal bits alone in a zero-padded batch and in a full one; a store relies on it.
2. float16: largest value of the tokens, shares above 65504 and below the normal range.
3. frozen step: projectors and fusion under a frozen LLM of LLaMA-2-7B's shapes, with and without checkpointing.
4. extraction: pipeline time over bare decode + forward, and over the bare forward alone (extraction.py).
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import click

from pipeline.config import ExtractConfig, read_config
from pipeline.encoders import MERV_ENCODERS
from pipeline.encoders.weights import weights_by_encoder

NO_GPU = 2  # exit code
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "av")


@click.command(context_settings={"show_default": True})
@click.option("--device", default="cuda", help="Device to check.")
@click.option("--toy", is_flag=True, help="Toy sizes: to see the script run, not to measure.")
@click.option("--encoders", default=",".join(MERV_ENCODERS), help="Encoders, comma separated.")
@click.option("--weights", multiple=True, default=["random:0"], help="hub, a folder, random:SEED; NAME=SPEC for one.")
@click.option("--clips", type=click.IntRange(min=2), help="Clips of the extraction.  [default: 48, toy 4]")
@click.option("--micro-batch", type=click.IntRange(min=1), default=4, help="Samples of the frozen step.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, help="Frozen steps that are timed.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("gpu_check.json"), help="JSON file to write.")
def main(
    device: str,
    toy: bool,
    encoders: str,
    weights: tuple[str, ...],
    clips: int | None,
    micro_batch: int,
    repeats: int,
    out: Path,
) -> None:
    """Check a GPU: bits, ranges, a 7B-shape step, the extraction's ratio."""
    refuse_without_gpu(device, toy)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        config = extraction_config(folder, device, toy, encoders, weights, clips or (4 if toy else 48))
        checks: dict[str, Callable[[], Any]] = {
            "encoders": lambda: check_encoders(config),
            "frozen step": lambda: check_frozen_step(device, toy, micro_batch, repeats),
            "extraction": lambda: check_extraction(config),
        }
        result: dict[str, Any] = {"machine": machine(device), "is_toy": toy}
        for name, check in checks.items():
            click.echo(f"{name} ...", err=True)
            began = time.perf_counter()
            result[name] = check() | {"seconds of this check": time.perf_counter() - began}
            out.write_text(json.dumps(result, indent=1) + "\n")  # a later check may fail: what is known is kept
    click.echo(table(result))
    click.echo(f"all figures: {out}", err=True)
    bits = result["encoders"]["neighbours"].values()
    sys.exit(0 if all(row["is equal"] for row in bits) else 1)


def refuse_without_gpu(device: str, toy: bool) -> None:
    """Full sizes on a CPU take hours and say nothing about a GPU."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        problem = f"torch {torch.__version__} sees no CUDA device"
    elif not device.startswith("cuda") and not toy:
        problem = f"full sizes on {device!r} take hours and say nothing about a GPU"
    else:
        return
    click.echo(f"{problem}: nothing was measured. To see the script run: --device cpu --toy", err=True)
    sys.exit(NO_GPU)


def extraction_config(
    folder: str, device: str, toy: bool, encoders: str, weights: tuple[str, ...], clips: int
) -> ExtractConfig:
    """The demo's clips, drawn into `folder`, through the encoders asked for."""
    overrides = {
        "dataset": "demo",
        "root": f"{folder}/media",
        "options": {"train": clips, "heldout": 0},
        "kind": "video",
        "encoders": encoders,
        "weights": weights_by_encoder(weights),
        "device": device,
    }
    return read_config(str(files("pipeline") / "demo.yaml") if toy else None, overrides)


def machine(device: str) -> dict[str, Any]:
    """What the figures belong to."""
    import torch

    is_gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else f"{platform.machine()} CPU",
        "is_gpu": is_gpu,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if is_gpu else None,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def driver() -> str | None:
    """Version of the GPU's driver, by its own program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()[0].strip()


def check_encoders(config: ExtractConfig) -> dict[str, Any]:
    """Bits and ranges of every encoder, on as many of the demo's clips as a batch holds."""
    from encoder_checks import float16_fit, neighbours
    from extraction import decode_all

    from pipeline.datasets import load_dataset
    from pipeline.views import distinct_views
    from pipeline.worker.engine import engine_for

    engine = engine_for(config.engine_settings)
    batch = config.batch.get("video") or engine.batch_of("video")
    options = {"train": 2 * batch, "heldout": 0}  # some of them are stills
    listing = load_dataset("demo", f"{config.root}-batch", kind="video", limit=batch, **options)
    views = distinct_views(run.view for run in engine.encoders.values())
    decoded = [frames for frames in decode_all(listing, views) if frames is not None]
    found: dict[str, Any] = {"neighbours": {}, "float16": {}}
    for name, run in engine.encoders.items():
        clips = [frames[run.view] for frames in decoded]
        found["neighbours"][name] = neighbours(run, clips)
        found["float16"][name] = float16_fit(run, clips)
    return found


def check_frozen_step(device: str, toy: bool, micro_batch: int, repeats: int) -> dict[str, Any]:
    """With and without activation checkpointing."""
    from frozen_step import LLAMA2_7B, TOY, frozen_step

    size = TOY if toy else LLAMA2_7B
    runs = [
        frozen_step(size, device, micro_batch=micro_batch, checkpointing=checkpointing, repeats=repeats)
        for checkpointing in (False, True)
    ]
    return {"runs": runs}


def check_extraction(config: ExtractConfig) -> dict[str, Any]:
    """One round of extraction.py, the engine already loaded."""
    from extraction import one_round

    from pipeline.datasets import load_dataset
    from pipeline.worker.engine import close_engines

    listing = load_dataset(config.dataset, config.root, kind=config.kind, **config.options)
    figures = one_round(config, listing)
    close_engines()
    forward_s = sum(figures["bare forward"].values())
    return {"clips": len(listing.clips), **figures, "ratio to the forward alone": figures["pipeline"] / forward_s}


def table(result: Mapping[str, Any]) -> str:
    """The figures that matter, in markdown."""
    about = result["machine"]
    size = "toy sizes: these figures say only that the script runs" if result["is_toy"] else "real sizes"
    lines = [f"{about['device']}, torch {about['torch']}, {size}", "", "| check | of | figure |", "|---|---|---|"]
    for name, row in result["encoders"]["neighbours"].items():
        figure = f"{row['clips with equal bits']} of {row['batch']} clips equal alone and in a full batch"
        lines.append(f"| neighbours | {name} | {figure} |")
    for name, row in result["encoders"]["float16"].items():
        shares = f"{row['share above 65504']:.2e} above 65504, {row['share subnormal']:.2e} subnormal"
        lines.append(f"| float16 | {name}, {row['weights']} | largest {row['largest']:.4g}; {shares} |")
    lines += [f"| frozen step | {_step_name(row)} | {_step_figure(row)} |" for row in result["frozen step"]["runs"]]
    found = result["extraction"]
    ratios = f"{found['ratio']:.2f} x (decode + forward), {found['ratio to the forward alone']:.2f} x forward"
    lines.append(f"| extraction | {found['clips']} demo clips | {found['clips/s']:.2f} clips/s; {ratios} |")
    return "\n".join(lines)


def _step_name(row: Mapping[str, Any]) -> str:
    return f"{row['micro batch']} samples, {'with' if row['activation checkpointing'] else 'without'} checkpointing"


def _step_figure(row: Mapping[str, Any]) -> str:
    if "out of memory" in row:
        return "out of memory"
    peak = f"{row['peak memory (GB)']:.1f} GB" if row["peak memory (GB)"] is not None else "peak memory not measured"
    return f"{row['seconds per step']:.3f} s, {row['visual tokens']} visual tokens, {peak}"


if __name__ == "__main__":
    main()
