"""What tolerances of `verify --parity` must allow for: the same encoder with other kernels, threads, batches or dtypes.

`encode OUT` encodes the reference videos with published architectures and seeded weights (frame-wise encoders with two
frames: the others change nothing), one file per encoder and dtype; `compare A B` measures two such folders, and within
the first bfloat16 beside float32. Another machine is imitated by the environment: ATEN_CPU_CAPABILITY=default
ONEDNN_MAX_CPU_ISA=AVX2 take other kernels.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import click

from featurestore.clips import Clip
from featurestore.identity import FeatureIdentity
from featurestore.reference_clips import ReferenceClips
from pipeline.config import EncoderSettings
from pipeline.parity import compare as figures
from pipeline.reference_clips import CLIPS, encode_reference_clips, media_bytes

FRAMES = {"dinov2": 2, "siglip": 2, "languagebind": 8, "vivit": 32}
STEPS = {"dinov2": 2, "siglip": 2, "languagebind": 8, "vivit": 16}


@click.group()
def main() -> None:
    """Measure how far the same encoder's tokens are apart."""


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--encoders", default=",".join(FRAMES), show_default=True)
@click.option("--dtypes", default="float32,bfloat16", show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--batch", type=int, default=2, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def encode(out: Path, encoders: str, dtypes: str, threads: int, batch: int, device: str) -> None:
    """Encode the reference videos into the folder OUT."""
    import torch

    from pipeline.worker.encode import TokenEncoder

    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    for name in encoders.split(","):
        for dtype in dtypes.split(","):
            settings = EncoderSettings(
                name=name,
                weights="random:0",
                architecture={"num_frames": FRAMES[name]},
                grid=(STEPS[name], 8, 8),
                compute_dtype=dtype,
            )
            run, started = TokenEncoder(settings, device), time.perf_counter()
            encoded = encode_reference_clips(run, "video", batch, _decoded(run))
            (out / f"{name}-{dtype}.safetensors").write_bytes(encoded.to_bytes())
            (out / f"{name}-{dtype}.json").write_text(json.dumps(run.identity.to_dict()))
            click.echo(f"{name} {dtype}: {time.perf_counter() - started:.1f} s")


def _decoded(run) -> dict:
    from pipeline.decode.decoders import decode_clip
    from pipeline.decode.sampling import DecodeJob

    with tempfile.TemporaryDirectory() as root:
        for name in CLIPS["video"]:
            (Path(root) / f"{name}.avi").write_bytes(media_bytes(name))
        clips = {name: Clip(dataset="canaries", path=f"{name}.avi", kind="video") for name in CLIPS["video"]}
        return {n: decode_clip(DecodeJob(root=root, clip=clip, views=(run.view,))) for n, clip in clips.items()}


@main.command()
@click.argument("one", type=click.Path(exists=True, path_type=Path))
@click.argument("other", type=click.Path(exists=True, path_type=Path))
def compare(one: Path, other: Path) -> None:
    """Print differences of what both folders have, and of the dtypes in the first."""
    for file in sorted(one.glob("*.safetensors")):
        if (twin := other / file.name).is_file():
            _print(file.stem, file, twin)
        if file.stem.endswith("-bfloat16"):
            _print(f"{file.stem} beside float32", file.with_name(file.name.replace("bfloat16", "float32")), file)


def _print(label: str, one: Path, other: Path) -> None:
    first, second = _read(one), _read(other)
    pairs = [(first.stored(clip.name), second.stored(clip.name)) for clip in first.clips]
    row = figures(one.stem, "video", first.identity, pairs)
    click.echo(f"{label}: relative {row.relative:.1e}, 1 - cosine {1 - row.cosine_min:.1e}, max abs {row.max_abs:.1e}")


def _read(file: Path) -> ReferenceClips:
    identity = FeatureIdentity.from_dict(json.loads(file.with_suffix(".json").read_text()))
    return ReferenceClips.parse(file.read_bytes(), "video", identity)


if __name__ == "__main__":
    main()
