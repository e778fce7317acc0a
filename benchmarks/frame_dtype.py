"""What rounding LanguageBind's frames to uint8 costs, against the reference's transform of the whole float tensor.

Frames of the videos given are decoded by PyAV and transformed as princetonvisualai/merv does (scale, normalise, short
side to 224 by torch's bilinear interpolation, centre crop, all in float32); tokens are those of the published
architecture with seeded weights, in float32 arithmetic. Relative is the root of summed squared differences over those
of the reference's tokens, of the worst clip.
"""

from __future__ import annotations

import math
from pathlib import Path

import av
import click
import numpy as np
import torch

from featurestore.clips import Clip
from pipeline.align import align
from pipeline.decode.decoders import decode_clip
from pipeline.decode.sampling import DecodeJob
from pipeline.encoders import ENCODERS, load_encoder
from pipeline.encoders.base import CLIP_MEAN, CLIP_STD

DTYPES = ("uint8", "float32")


@click.command()
@click.argument("videos", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--layers", type=int, default=24, show_default=True, help="Of LanguageBind; the last one is not run.")
def main(videos: tuple[Path, ...], threads: int, layers: int) -> None:
    """Print errors of pixels and tokens for uint8 and float32 frames of VIDEOS."""
    torch.set_num_threads(threads)
    spec = ENCODERS["languagebind"].with_architecture({"num_layers": layers})
    encoders = {dtype: load_encoder(spec.with_frame_dtype(dtype), "random:0") for dtype in DTYPES}
    worst = dict.fromkeys((*DTYPES, "float16", "levels uint8", "levels float32"), 0.0)
    for path in videos:
        reference_TCHW = reference_pixels(path, spec.num_frames, spec.resize.size)
        with torch.inference_mode():
            expected = align(encoders["uint8"].network(reference_TCHW[None])[0])
        worst["float16"] = max(worst["float16"], relative(expected.half().float(), expected))
        for dtype, encoder in encoders.items():
            view = encoder.spec.view
            clip = Clip(dataset="benchmark", path=path.name, kind="video")
            frames = decode_clip(DecodeJob(root=str(path.parent), clip=clip, views=(view,))).frames[view]
            pixels_TCHW = encoder._normalise(torch.from_numpy(frames)[None])[0]
            levels = (pixels_TCHW - reference_TCHW).abs().max().item() * 255 * min(CLIP_STD)
            worst[f"levels {dtype}"] = max(worst[f"levels {dtype}"], levels)
            tokens, _ = encoder.encode_tokens(frames[None])
            worst[dtype] = max(worst[dtype], relative(tokens, expected))
    for dtype in DTYPES:
        ratio = worst[dtype] / worst["float16"]
        click.echo(
            f"{dtype} frames: pixels within {worst[f'levels {dtype}']:.1e} grey levels, tokens"
            f" {worst[dtype]:.1e} relative, {ratio:.3g} times what float16 storage takes ({worst['float16']:.1e})"
        )


def reference_pixels(path: Path, num_frames: int, size: int) -> torch.Tensor:
    """Normalised float32 [T, C, size, size]."""
    with av.open(str(path)) as container:
        fps = float(container.streams.video[0].average_rate)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    last = min(len(frames) - 1, len(frames) / fps * fps - 1)
    indices = np.linspace(0, last, 32, dtype=int)[:: 32 // num_frames]
    video_CTHW = torch.from_numpy(np.stack([frames[i] for i in indices])).permute(3, 0, 1, 2) / 255.0
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    height, width = video_CTHW.shape[2:]
    scaled = (math.floor(height / width * size), size) if width < height else (size, math.floor(width / height * size))
    video_CTHW = torch.nn.functional.interpolate(
        (video_CTHW - mean) / std, scaled, mode="bilinear", align_corners=False
    )
    top, left = round((scaled[0] - size) / 2.0), round((scaled[1] - size) / 2.0)
    return video_CTHW[:, :, top : top + size, left : left + size].permute(1, 0, 2, 3)


def relative(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    return ((tokens - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    main()
