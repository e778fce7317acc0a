"""Write `format1.tar.xz` and `expected.json`: a store and training runs as commit d9c6eea writes them.

    git worktree add /tmp/at-format1 d9c6eea
    cd /tmp/at-format1
    PYTHONPATH=$PWD python REPOSITORY/tests/format1/make_format1.py --out REPOSITORY/tests/format1

Run it with the code of that commit only: what later code writes is not what these files are for. Everything is made by
the programs' own commands. Two things are patched to keep the files small and free of the machine that made them: the
sizes of `fresh:tiny` and the host name.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import lzma
import os
import shutil
import socket
import tarfile
import tempfile
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

STORE, MEDIA = "store.zarr", "media"
HALF, ALL = 6, 12  # steps of a run: where its checkpoint is, and where it ends
MERV = ["dinov2", "siglip", "vivit", "languagebind"]
SIZES = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_size": 32}
EXTRACT = {  # a user's configuration file of format 1
    "dataset": "demo",
    "options": {"train": 20, "heldout": 10, "size": 32, "num_frames": 8},
    "weights": "random:0",
    "compute_dtype": "float32",
    "grid": [4, 2, 2],
    "prefix_tokens": True,
    "block_rows": {"video": 8, "image": 2},
    "batch": {"video": 2, "image": 2},
    "threads": 1,
    "architecture": {
        "languagebind": SIZES,
        "dinov2": SIZES | {"patch_size": 8, "position_grid": 4},
        "vivit": SIZES,
        "siglip": SIZES,
        "clip": SIZES | {"num_frames": 8},
        "videomae": SIZES,
    },
}
TRAIN = {  # settings of every run, over its recipe
    "batch_size": 8,
    "micro_batch_size": 4,
    "max_steps": ALL,
    "checkpoint_every": HALF,
    "log_every": 1,
    "precision": "fp32",
}
FRESH = ("--recipe", "demo")
RATES = {"projector_lr": 0.05, "fusion_lr": 0.05}  # high: lost weights or moments show in the losses
FROZEN = {  # the same LLM in every run: it is packed once
    "train_llm": "none",
    "allow_fresh_frozen": True,
    "optimizer": RATES,
}
PAIR = {"encoders": ["dinov2", "vivit"]}
RAW = {"encoders": ["clip", "videomae"]}  # stored as the encoders give them, for trained resamplers


def projector(**settings: Any) -> dict[str, Any]:
    return {"projector": {"grid": None, "standardise": False, **settings}}


# name -> (options, settings of its own): every fusion, resampler and head, and every way to train the LLM
RUNS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "demo": (
        FRESH,
        {
            "encoders": MERV,
            "projector": {"grid": [4, 2, 2], "standardise": True},
            "eval_every": HALF,
            "eval_limit": 16,
        },
    ),
    "text-only": ((*FRESH, "--mode", "text-only"), {}),
    "lora": (FRESH, {**PAIR, **projector(), "llm": "llm", "train_llm": "lora", "lora": {"rank": 2}}),
    "cross-attention-released": (
        (*FRESH, "--projector", "2d-attention", "--head", "gelu-mlp"),
        {
            **RAW,
            **FROZEN,
            **projector(grid=[8, 1, 1]),
            "fusion": {"name": "cross_attention_released", "query_width": 16},
        },
    ),
    "concat-sequence": (
        (*FRESH, "--projector", "2d-convolution", "--head", "fused-gelu-mlp"),
        {**RAW, **FROZEN, **projector(grid=[8, 1, 1]), "fusion": {"name": "concat_sequence"}},
    ),
    "concat-channel": (
        (*FRESH, "--projector", "3d-average"),
        {**PAIR, **FROZEN, **projector(pre_layer_norm=True), "fusion": {"name": "concat_channel"}},
    ),
    "concat-channel-ln": (
        (*FRESH, "--projector", "3d-convolution"),
        {**RAW, **FROZEN, **projector(grid=[4, 1, 1]), "fusion": {"name": "concat_channel_ln"}},
    ),
    "learnable-weights": (
        (*FRESH, "--projector", "class-token"),
        {**PAIR, **FROZEN, **projector(), "fusion": {"name": "learnable_weights"}},
    ),
    "equal-mix": (
        (*FRESH, "--projector", "all-tokens"),
        {"encoders": ["clip"], **FROZEN, **projector(), "fusion": {"name": "equal_mix"}},
    ),
    "first": (
        (*FRESH, "--projector", "2d-average"),
        {"encoders": ["dinov2"], **FROZEN, **projector(grid=[2, 2, 2]), "fusion": {"name": "first"}},
    ),
    "chain": (
        ("--recipe", "merv-full", "--llm", "fresh:tiny"),
        {**PAIR, **projector(), "optimizer": RATES | {"llm_lr": 0.002}},
    ),
    "end-to-end": (FRESH, {"encoders": ["siglip", "dinov2"], **FROZEN, **projector(), "train_encoders": ["siglip"]}),
}
EVALUATED = ("demo", "lora")  # runs that are scored and exported


def command(name: str, *arguments: str) -> str:
    """Standard output of one of the programs in pyproject.toml."""
    module, _, attribute = tomllib.loads(Path("pyproject.toml").read_text())["project"]["scripts"][name].partition(":")
    main = getattr(importlib.import_module(module), attribute)
    os.chdir(WORK)
    try:
        result = CliRunner().invoke(main, list(arguments))
    finally:
        os.chdir(HERE)
    if result.exit_code:
        raise SystemExit(f"{name} {' '.join(arguments)}\n{result.output}\n{result.exception!r}")
    print(name, " ".join(arguments), flush=True)
    return result.stdout


def merv_pipeline(*arguments: str) -> str:
    return command("merv-pipeline", *arguments)


def make_store() -> None:
    """Two blocks and more of every kind of group, a quarantined clip, a retried, a refreshed and two removed ones."""
    (WORK / "extract.yaml").write_text(yaml.safe_dump(EXTRACT, sort_keys=False))
    base = ("--config", "extract.yaml", "--root", MEDIA, "--store", STORE)

    def extract(encoders: str, *more: str) -> None:
        merv_pipeline("extract", *base, "--encoders", encoders, *more)

    extract("dinov2,siglip", "--limit", "2")  # renders every clip
    damaged = {name: (WORK / MEDIA / name).read_bytes() for name in ("train/00003.mp4", "train/00005.mp4")}
    for name, data in damaged.items():
        (WORK / MEDIA / name).write_bytes(data[: len(data) // 3])
    plan = merv_pipeline("plan", *base, "--encoders", "dinov2,siglip", "--json")
    (WORK / "plan.json").write_text(plan)
    extract("dinov2,siglip", "--forecast", "plan.json")
    extract("vivit", "--storage-dtype", "uint8")
    extract("languagebind", "--storage-dtype", "bfloat16")
    (WORK / MEDIA / "train/00005.mp4").write_bytes(damaged["train/00005.mp4"])
    merv_pipeline("quarantine", "retry", STORE, "--json")
    (WORK / MEDIA / "train/00006.mp4").write_bytes((WORK / MEDIA / "train/00004.mp4").read_bytes())
    extract("dinov2,siglip", "--refresh")
    extract("clip,videomae", "--grid", "raw", "--limit", "9")
    merv_pipeline("distortion", STORE, "--sample", "4")
    merv_pipeline("verify", STORE, "--parity")
    removed = ("demo/train/00010.mp4", "demo/heldout/00002.mp4")
    merv_pipeline("tombstone", STORE, *removed, "--reason", "consent withdrawn", "--only-these")


def make_runs() -> dict[str, Any]:
    """Runs to their end; then everything behind the first checkpoint is taken away, as a killed run leaves it."""
    patched_llm()
    expected = {}
    for name, (options, settings) in RUNS.items():
        path = WORK / f"train-{name}.yaml"
        path.write_text(yaml.safe_dump(TRAIN | settings, sort_keys=False))
        place = ("--from-cache", STORE)
        if name == "end-to-end":
            place = ("--end-to-end", "--extract-config", "extract.yaml", "--root", MEDIA)
        command("merv-train", *place, *options, "--config", path.name, "--out", f"runs/{name}")
        path.unlink()
        expected[name] = cut_off(WORK / "runs" / name)
        if name == "demo":
            make_llm()
    return expected


def patched_llm() -> None:
    """A Llama of 9,000 parameters under the name of one of 440,000: a run keeps its own sizes in llm/config.json."""
    from trainer.model import llm

    llm.FRESH_LLMS["tiny"] = llm.FreshLLM(hidden_size=16, num_layers=2, num_heads=2, context=2048)


def make_llm() -> None:
    """A folder `llm/` that stands for a published LLM, with the sizes and words of the first run's."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(WORK / "runs/demo/llm", WORK / "llm")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(WORK / "llm")).save_pretrained(WORK / "llm")


def cut_off(run: Path) -> dict[str, Any]:
    """Leave a run as a kill two steps behind its first checkpoint would have; returns its curve."""
    stages = [run / "align", run / "finetune"] if (run / "stages.yaml").is_file() else [run]
    for stage in stages[:-1]:
        shutil.rmtree(stage / "checkpoints" / f"step-{HALF:08d}")  # finished: its last one is enough
    metrics = stages[-1] / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    if run.name in EVALUATED:
        command("merv-eval", "run", "--checkpoint", f"runs/{run.name}", "--store", STORE)
        command("merv-eval", "export", "--checkpoint", f"runs/{run.name}", "--out", f"exports/{run.name}")
    if run.name == "demo":
        command("merv-eval", "distortion", "--checkpoint", "runs/demo", "--limit", "8")
    shutil.rmtree(stages[-1] / "checkpoints" / f"step-{ALL:08d}")
    half_a_line = lines[HALF + 2][:20] if run.name == "first" else ""  # as a kill during a write leaves it
    metrics.write_text("".join(f"{line}\n" for line in lines[: HALF + 2]) + half_a_line)
    record = json.loads((stages[-1] / "run.json").read_text())
    rows = [json.loads(line) for line in lines]
    found = {"folder": stages[-1].relative_to(WORK).as_posix(), "steps": ALL, "resumed_at": HALF}
    found |= {"loss": [row["loss"] for row in rows], "data_digest": record["data_digest"]}
    if "val_loss" in rows[-1]:
        found["val_loss"] = rows[-1]["val_loss"]
    return found


def make_copies() -> None:
    """What other commands write of a store, and what was added to it after the runs began."""
    base = ("--config", "extract.yaml", "--root", MEDIA, "--store", STORE)
    merv_pipeline("extract", *base, "--encoders", "siglip", "--grid", "raw", "--new-identity", "--limit", "4")
    merv_pipeline("push", STORE, "pushed.zarr", "--license", "cc0-1.0")
    merv_pipeline("subset", STORE, "subset.zarr", "--kind", "image")
    merv_pipeline("export", STORE, "exported-tars", "--encoders", "vivit,languagebind,dinov2")
    merv_pipeline("export", STORE, "exported-safetensors", "--format", "safetensors", "--encoders", "clip")


def keep_settings() -> None:
    """Every setting with its default, as the programs print them for a configuration file."""
    (WORK / "settings").mkdir()
    printed = {"extract": merv_pipeline("extract", "--dataset", "demo", "--print-config")}
    for recipe in ("merv-frozen", "merv-frozen-released", "merv-full", "demo"):
        printed[recipe] = command("merv-train", "--recipe", recipe, "--print-config")
    for name, text in printed.items():
        (WORK / "settings" / f"{name}.yaml").write_text(text)


def describe_store() -> dict[str, Any]:
    """What a reader sees, values as digests of the decoded float arrays."""
    from featurestore import FeatureStore

    store = FeatureStore.open(WORK / STORE)
    found: dict[str, Any] = {
        "snapshot": store.snapshot,
        "clips": store.clips.to_pylist(),
        "encoders": {key: plain(asdict(identity)) for key, identity in store.encoders.items()},
        "groups": {key: identity.group_name for key, identity in store.encoders.items()},
        "quarantine": store.quarantine.to_pylist(),
        "samples": {name: records_digest(store.samples(name)) for name in store.sample_names},
        "tokens": {},
    }
    kinds = dict(zip(*(store.clips[name].to_pylist() for name in ("clip_id", "kind")), strict=True))
    for key, identity in store.encoders.items():
        for kind in ("video", "image"):
            flags = zip(store.clips["clip_id"].to_pylist(), store.clips[key].to_pylist(), strict=True)
            ids = [clip for clip, has in flags if has and kinds[clip] == kind]
            if not ids:
                continue
            entry = {"clips": ids, "tokens": digest(store.read(ids, encoder=key))}
            if identity.prefix_tokens:
                entry["prefix"] = digest(store.read_prefix(ids, encoder=key))
            found["tokens"][f"{kind}/{key}"] = entry
    return found


def plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))


def records_digest(samples: Any) -> list[Any]:
    """How many, and the sha256 of their fields."""
    text = json.dumps([asdict(sample) for sample in samples], sort_keys=True)
    return [len(samples), hashlib.sha256(text.encode()).hexdigest()]


def digest(array: Any) -> str:
    """sha256 over dtype, shape and little-endian bytes of an array."""
    items = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(f"{array.dtype.name} {array.shape}\n".encode() + items.tobytes()).hexdigest()


def evaluations() -> dict[str, Any]:
    """Scores of the exported runs, each option's likelihood."""
    found = {}
    for name in EVALUATED:
        text = command("merv-eval", "run", "--checkpoint", f"exports/{name}", "--store", STORE, "--json")
        answers = json.loads(text)["answers"]
        found[name] = {answer["sample_id"]: answer["scores"] for answer in answers}
    return found


def pack(out: Path) -> None:
    """One solid archive with the modification times and nobody's name."""

    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    names = sorted(path.relative_to(WORK).as_posix() for path in WORK.rglob("*") if path.is_file())
    names.sort(key=lambda name: (Path(name).suffix, Path(name).name, name))  # alike beside alike: they pack better
    with (
        lzma.open(out / "format1.tar.xz", "wb", preset=9 | lzma.PRESET_EXTREME) as file,
        tarfile.open(fileobj=file, mode="w") as tar,
    ):
        for name in names:
            tar.add(WORK / name, name, filter=anonymous)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out.resolve()
    HERE, WORK = Path.cwd(), Path(tempfile.gettempdir()) / "format1"
    WORK.mkdir()  # must not exist
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    socket.gethostname = lambda: "host"
    make_store()
    losses = make_runs()
    make_copies()
    keep_settings()
    expected = {"store": describe_store(), "runs": losses, "evaluations": evaluations()}
    for folder in WORK.glob("*.zarr/tmp"):
        shutil.rmtree(folder)
    pack(out)
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
