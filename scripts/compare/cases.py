"""The work that is done on both sides: command lines only, so that modules may be moved and renamed between them.

A case runs commands in the work folder and leaves what is to be compared in the folder of its own name. Every path is
relative to the work folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from compare import stand_ins
from compare.sides import CommandError, Side, link_tree

MERV = "languagebind,dinov2,vivit,siglip"
TOY_SIZES = {"image_size": 64, "patch_size": 16, "hidden_size": 64, "num_layers": 2, "num_heads": 4}
NUM_STEPS = 20
KILLED_AT = 5  # the step whose checkpoint is there when the training is killed
PRINTED = "printed"  # folder of what commands print as JSON
TRAINING = {  # over the demo recipe
    "max_steps": NUM_STEPS,
    "batch_size": 8,
    "micro_batch_size": 4,
    "log_every": 1,
    "checkpoint_every": KILLED_AT,
}
VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # name -> settings, options
    "text-only": ({}, ("--mode", "text-only")),
    "lora": ({"allow_fresh_frozen": True}, ("--train-llm", "lora")),
    "concat-sequence": ({}, ("--fusion", "concat_sequence")),
    "concat-channel-ln": ({}, ("--fusion", "concat_channel_ln", "--head", "gelu-mlp")),
    "cross-attention-released": ({}, ("--fusion", "cross_attention_released", "--head", "fused-gelu-mlp")),
    "learnable-weights": ({}, ("--fusion", "learnable_weights", "--projector", "3d-average")),
    "equal-mix": ({"sampler": "split_modality"}, ("--fusion", "equal_mix")),
    "first": ({"loss": "micro_batch_means"}, ("--fusion", "first", "--head", "gelu-mlp")),
    "from-another-run": ({"eval_every": 2}, ("--init", "train-cache/run", "--encoders", "siglip,dinov2")),
}
RAW_PROJECTORS = {  # those that read the encoders' own grids -> the grid that they make of them
    "2d-attention": (16, 4, 4),
    "2d-convolution": (16, 4, 4),
    "3d-convolution": (4, 4, 4),
    "all-tokens": None,
    "class-token": None,
}


@dataclass
class Bench:
    """What a case works with: a side whose work folder is active, and media that both sides read."""

    side: Side
    media_root: Path | None  # a small dataset in the layout of Video-LLaVA
    media: Path  # its copy, with three damaged files; made on first use
    ports: dict[str, int]
    case: str = ""
    done: dict[str, bool] = field(default_factory=dict)  # case -> whether it succeeded

    def run_case(self, name: str) -> None:
        """Run a case unless this side has it already."""
        if name in self.done:
            if not self.done[name]:
                raise CommandError(f"{self.side.name}: {name} failed before")
            return
        outer, self.case, self.done[name] = self.case, name, False
        try:
            (self.side.work / name).mkdir()
            CASES[name](self)
            self.done[name] = True
        finally:
            self.case = outer

    def run(self, *words: str | Path, codes: tuple[int, ...] = (0,)) -> str:
        if words[1:2] == ("extract",):
            codes = (*codes, 3)  # finished, though some media are broken; earlier commits say that with 0
        return self.side.run(*words, codes=codes)

    def record(self, name: str, *words: str | Path, codes: tuple[int, ...] = (0,)) -> None:
        """Run a command with --json and keep what it printed."""
        printed = self.run(*words, "--json", codes=codes)
        folder = self.side.work / self.case / PRINTED
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(printed)

    def settings(self, name: str, values: dict[str, Any]) -> str:
        """A YAML file of settings, beside the results."""
        file = Path("settings") / f"{self.case}-{name}.yaml"
        (self.side.work / file).parent.mkdir(exist_ok=True)
        (self.side.work / file).write_text(yaml.safe_dump(values))
        return str(file)

    def toy_encoders(self, name: str, **changes: Any) -> str:
        """Settings of an extraction: those of the demo, with changes."""
        patient = {"decode_timeout_s": 600.0}  # a busy machine must not quarantine a clip
        return self.settings(name, {**demo_settings(self.side.root), **patient, **changes})

    def damaged_media(self) -> Path:
        """The media of --media-root with two videos and one still cut short."""
        if self.media_root is None or not self.media_root.is_dir():
            raise CommandError(f"no media at {self.media_root}: give --media-root")
        if not self.media.is_dir():
            link_tree(self.media_root, self.media)
            for suffix in (".mp4", ".avi", ".jpg"):
                file = sorted(self.media.rglob(f"*{suffix}"))[-1]
                whole = file.read_bytes()
                file.unlink()  # it may be a link to the original
                file.write_bytes(whole[: len(whole) * 2 // 5])
        return self.media


def demo_settings(root: Path) -> dict[str, Any]:
    """The settings of `make demo`, wherever the checkout keeps them."""
    found = [path.relative_to(root) for path in root.rglob("demo.yaml")]
    found = [path for path in found if not path.parts[0].startswith((".", "build"))]
    return yaml.safe_load((root / min(found, key=lambda path: len(path.parts))).read_text())


def settings_in_force(bench: Bench) -> None:
    """Every setting and its default, as the commands print them."""
    folder = bench.side.work / bench.case / PRINTED
    folder.mkdir()
    printed = {"extract": bench.run("merv-pipeline", "extract", "--dataset", "demo", "--print-config")}
    for recipe in ("merv-frozen", "merv-full", "merv-frozen-released", "demo"):
        printed[recipe] = bench.run("merv-train", "--recipe", recipe, "--print-config")
    for name, text in printed.items():
        (folder / f"{name}.yaml").write_text(text)


def demo_store(bench: Bench) -> None:
    """Synthetic clips, the first of them, and then the rest in a second run."""
    store, media = f"{bench.case}/demo.zarr", f"{bench.case}/media"
    words = ["merv-pipeline", "extract", "--dataset", "demo", "--store", store, "--root", media]
    words += ["--config", bench.toy_encoders("demo"), "--option", "train=48", "--option", "heldout=16"]
    bench.record("first", *words, "--limit", "50")
    bench.record("rest", *words)
    bench.record("again", *words)
    raw = ["--grid", "raw", "--encoders", "dinov2,siglip", "--prefix-tokens", "--store", f"{bench.case}/raw.zarr"]
    bench.record("raw", *words, *raw)
    bench.record("status", "merv-pipeline", "status", store)
    bench.record("verify", "merv-pipeline", "verify", store, "--full")
    bench.record("video", "merv-pipeline", "inspect", store, "train/00000.mp4")
    bench.record("encoder", "merv-pipeline", "inspect", store, "dinov2")


def _extract_videollava(bench: Bench, name: str, *options: str, **changes: Any) -> str:
    store, media = f"{bench.case}/{name}.zarr", bench.damaged_media()
    words = ["merv-pipeline", "extract", "--dataset", "videollava", "--root", media, "--store", store]
    bench.record(name, *words, "--config", bench.toy_encoders(name, dataset="videollava", **changes), *options)
    return store


def videollava_store(bench: Bench) -> None:
    """Real media, videos and stills, some of them damaged; every storage dtype; class and register tokens."""
    sizes = {
        **demo_settings(bench.side.root)["architecture"],
        "clip": TOY_SIZES,
        "videomae": {**TOY_SIZES, "num_frames": 32},
    }
    store = _extract_videollava(
        bench, "float16", "--prefix-tokens", "--encoders", f"{MERV},clip,videomae", architecture=sizes
    )
    bench.record("quarantine", "merv-pipeline", "quarantine", "list", store)
    bench.record("status", "merv-pipeline", "status", store)
    bench.record("verify", "merv-pipeline", "verify", store, "--full", "--media", "full")
    bench.record(
        "eval",
        "merv-pipeline",
        "extract",
        "--dataset",
        "eval",
        "--root",
        bench.media / "eval",
        "--store",
        store,
        "--prefix-tokens",
        "--encoders",
        f"{MERV},clip,videomae",
        "--config",
        bench.toy_encoders("eval", architecture=sizes),
    )
    _extract_videollava(bench, "uint8", "--storage-dtype", "uint8")
    _extract_videollava(bench, "bfloat16", "--storage-dtype", "bfloat16", "--compute-dtype", "bfloat16")
    _extract_videollava(bench, "raw", "--grid", "raw", "--encoders", "dinov2,vivit", crop="squash")
    _extract_videollava(bench, "damaged-too", "--encoders", "siglip", "--accept-damaged")


def decoders(bench: Bench) -> None:
    """The decoders beside frames/1."""
    for name in ("decord", "ffmpeg"):
        _extract_videollava(bench, name, "--decoder", name, "--encoders", "siglip", "--kind", "video")


def _train(bench: Bench, name: str, *options: str, settings: dict[str, Any] | None = None) -> list[str | Path]:
    file = bench.settings(name, {**TRAINING, **(settings or {})})
    return ["merv-train", "--recipe", "demo", "--config", file, "--out", f"{bench.case}/{name}", *options]


def _from_cache(bench: Bench) -> tuple[str, ...]:
    bench.run_case("demo-store")
    return ("--from-cache", "demo-store/demo.zarr")


def train_cache(bench: Bench) -> None:
    """Training from a store, with validation."""
    cache = _from_cache(bench)
    bench.record("dry-run", *_train(bench, "run", *cache, "--dry-run"))
    bench.record("run", *_train(bench, "run", *cache, settings={"eval_every": 10}))


def train_end_to_end(bench: Bench) -> None:
    """Training that decodes and encodes, with a look at all media and without."""
    bench.run_case("demo-store")
    extraction = bench.toy_encoders("extraction", root="demo-store/media", options={"train": 48, "heldout": 16})
    live = ("--end-to-end", "--dataset", "demo", "--extract-config", extraction)
    bench.run(*_train(bench, "run", *live))
    bench.run(*_train(bench, "unchecked", *live, "--skip-media-check", "--encoders", "siglip,dinov2"))
    learning = {"train_encoders": ["siglip"]}
    bench.run(*_train(bench, "encoder-learns", *live, "--encoders", "siglip,dinov2", settings=learning))


def train_two_ranks(bench: Bench) -> None:
    """Two processes over gloo."""
    bench.run(*_train(bench, "run", *_from_cache(bench), "--launch", "ddp", "--processes", "2"))


def train_killed_resumed(bench: Bench) -> None:
    """A training that is killed behind a checkpoint and goes on with the same command."""
    words = _train(bench, "run", *_from_cache(bench), "--resume", "auto")
    checkpoint = bench.side.work / bench.case / "run" / "checkpoints" / f"step-{KILLED_AT:08}"
    process = bench.side.start(*words)
    while process.poll() is None and not checkpoint.is_dir():
        time.sleep(0.002)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise CommandError(f"{bench.side.name}: the training ended with {process.returncode} before it was killed")
    bench.run(*words)


def train_variants(bench: Bench) -> None:
    """Fusions, projectors, heads, samplers, LoRA, and a start from another run: five steps each."""
    cache = _from_cache(bench)
    bench.run_case("train-cache")
    for name, (settings, options) in VARIANTS.items():
        bench.run(*_train(bench, name, *cache, *options, settings={"max_steps": 5, **settings}))
    for name, grid in RAW_PROJECTORS.items():
        raw = ["--from-cache", "demo-store/raw.zarr", "--projector", name]
        raw += ["--encoders", "dinov2"] if grid is None else []
        settings = {"max_steps": 5, "batch_size": 4, **({"projector": {"grid": list(grid)}} if grid else {})}
        bench.run(*_train(bench, name, *raw, settings=settings))
    stages = bench.settings(
        "stages",
        {**TRAINING, "max_steps": 3, "llm": "fresh:tiny", "precision": "fp32", "projector": {"grid": [4, 4, 4]}},
    )
    words = ["merv-train", "--mode", "full", *cache, "--config", stages, "--out", f"{bench.case}/two-stages"]
    bench.run(*words)


def score(bench: Bench) -> None:
    """Multiple choice of a run beside a baseline, and an answer to a question."""
    bench.run_case("train-variants")
    baseline = ("--baseline", "train-variants/text-only")
    bench.record("score", "merv-eval", "run", "--checkpoint", "train-cache/run", *baseline)
    video = sorted((bench.side.work / "demo-store" / "media").rglob("*.mp4"))[0].relative_to(bench.side.work)
    words = ("--checkpoint", "train-cache/run", "--video", video)
    bench.record("answer", "merv-eval", "ask", *words, "What colour is the circle?")


def run_export(bench: Bench) -> None:
    """Runs as folders for others."""
    bench.run_case("train-cache")
    bench.run_case("train-variants")
    bench.record("run", "merv-eval", "export", "--checkpoint", "train-cache/run", "--out", f"{bench.case}/run")
    merged = ("--checkpoint", "train-variants/lora", "--with-llm", "--merge-lora")
    bench.record("merged", "merv-eval", "export", *merged, "--out", f"{bench.case}/merged")
    moved = ("--checkpoint", f"{bench.case}/run", "--store", "demo-store/demo.zarr", "--limit", "8")
    bench.record("score-of-export", "merv-eval", "run", *moved)


def push_pull(bench: Bench) -> None:
    """A store to a folder, to S3 and to the Hub and back; what the servers hold is compared too."""
    bench.run_case("demo-store")
    store, out = "demo-store/demo.zarr", bench.side.work / bench.case
    places = {
        "folder": (f"{bench.case}/folder/store.zarr", None),
        "s3": (f"s3://{stand_ins.BUCKET}/lab/store.zarr", stand_ins.s3_server),
        "hub": (stand_ins.HUB_URL, stand_ins.hub_server),
    }
    for name, (url, server) in places.items():
        if server is None:
            _push_and_pull(bench, store, url, name)
            continue
        with server(bench.ports[name], out / name) as environment:
            plain = bench.side
            bench.side = replace(plain, environment=environment)
            try:
                _push_and_pull(bench, store, url, name)
            finally:
                bench.side = plain


def _push_and_pull(bench: Bench, store: str, url: str, name: str) -> None:
    push = ("merv-pipeline", "push", store, url, "--no-journal", "--license", "cc-by-4.0")
    bench.record(f"push-{name}", *push)
    bench.record(f"push-{name}-again", *push)
    bench.record(f"pull-{name}", "merv-pipeline", "pull", url, f"{bench.case}/from-{name}.zarr", "--check")
    part = ("merv-pipeline", "pull", url, f"{bench.case}/part-from-{name}.zarr", "--encoders", "dinov2,siglip")
    bench.record(f"part-{name}", *part)
    bench.record(f"verify-{name}", "merv-pipeline", "verify", f"{bench.case}/from-{name}.zarr", "--full", codes=(0, 1))
    bench.record(f"status-{name}", "merv-pipeline", "status", url)


def union_subset(bench: Bench) -> None:
    """New stores of parts of one, of both together, and an extraction that copies from another store."""
    bench.run_case("demo-store")
    whole, case = "demo-store/demo.zarr", bench.case
    program = "merv-pipeline"
    bench.record("encoders", program, "subset", whole, f"{case}/encoders.zarr", "--encoders", "dinov2,siglip")
    bench.record("stills", program, "subset", whole, f"{case}/stills.zarr", "--kind", "image")
    bench.record("heldout", program, "subset", whole, f"{case}/heldout.zarr", "--split", "heldout")
    parts = [f"{case}/{name}.zarr" for name in ("encoders", "stills", "heldout")]
    bench.record("union", program, "union", *parts, f"{case}/union.zarr")
    words = [program, "extract", "--dataset", "demo", "--root", "demo-store/media", "--store", f"{case}/reused.zarr"]
    words += ["--config", bench.toy_encoders("demo", options={"train": 48, "heldout": 16})]
    bench.record("reused", *words, "--reuse", f"{case}/union.zarr")


def export(bench: Bench) -> None:
    """A store as plain files, and back."""
    bench.run_case("demo-store")
    for form in ("webdataset", "safetensors"):
        folder = f"{bench.case}/{form}"
        bench.record(form, "merv-pipeline", "export", "demo-store/demo.zarr", folder, "--format", form)
        bench.record(f"{form}-back", "merv-pipeline", "import", folder, f"{bench.case}/{form}.zarr")


def maintenance(bench: Bench) -> None:
    """Damage that is found and repaired from a copy and by computing again; a removed clip."""
    bench.run_case("demo-store")
    whole, case, program = "demo-store/demo.zarr", bench.case, "merv-pipeline"
    for name in ("from-copy", "recomputed", "removed"):
        shutil.copytree(bench.side.work / whole, bench.side.work / case / f"{name}.zarr")
    for name, how in {"from-copy": ("--from", whole), "recomputed": ("--recompute",)}.items():
        store = f"{case}/{name}.zarr"
        _damage(bench.side.work / store)
        bench.record(f"{name}-damaged", program, "verify", store, "--full", codes=(1,))
        bench.record(f"{name}-repaired", program, "repair", store, *how)
        bench.record(f"{name}-sound", program, "verify", store, "--full")
    store = f"{case}/removed.zarr"
    clips = ("demo/train/00001.mp4", "demo/heldout/00002.mp4")
    bench.record("removed", program, "tombstone", store, *clips, "--reason", "withdrawn", "--all-copies")
    bench.record("removed-sound", program, "verify", store, "--full")
    bench.record("removed-status", program, "status", store)


def _damage(store: Path) -> None:
    """Flip one bit of one shard, cut another, lose a third."""
    flipped, cut, lost = sorted(path for path in store.rglob("tokens/c/**/*") if path.is_file())[:3]
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 4
    flipped.unlink()
    flipped.write_bytes(data)
    whole = cut.read_bytes()
    cut.unlink()
    cut.write_bytes(whole[: len(whole) // 2])
    lost.unlink()


CASES: dict[str, Callable[[Bench], None]] = {
    "settings": settings_in_force,
    "demo-store": demo_store,
    "videollava-store": videollava_store,
    "decoders": decoders,
    "train-cache": train_cache,
    "train-end-to-end": train_end_to_end,
    "train-two-ranks": train_two_ranks,
    "train-killed-resumed": train_killed_resumed,
    "train-variants": train_variants,
    "score": score,
    "push-pull": push_pull,
    "union-subset": union_subset,
    "export": export,
    "run-export": run_export,
    "maintenance": maintenance,
}
