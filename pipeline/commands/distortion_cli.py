"""The command that measures storage dtypes on a store's own tokens. Thin: parse, call one library function, print."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from featurestore.locate import Place
from mervcache.console import tell_kept
from pipeline.commands.options import AS_JSON, DEVICE, ROOT, WEIGHTS, takes_store
from pipeline.commands.show import progress, says_errors, show_result


@click.command()
@says_errors
@takes_store
@click.option("--sample", type=click.IntRange(1), default=64, help="Clips of each encoder and kind, at most.")
@click.option("--seed", type=int, default=0, help="Chooses the clips.")
@click.option(
    "--scratch",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    show_default="the system's",
    help="Folder for temporary stores: one encoder and dtype at a time; reading speed is that of its disk.",
)
@click.option(
    "--reference",
    type=click.Choice(["store", "encoders"]),
    default="store",
    help="What errors are against: the stored tokens, or the encoders' float32, computed again from the media.",
)
@ROOT
@WEIGHTS
@DEVICE
@AS_JSON
def distortion(
    place: Place,
    reference: str,
    root: str | None,
    weights: tuple[str, ...],
    device: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what each storage dtype takes and loses.

    Bytes, reading speed and error, on the store's own tokens: a sample is written in float16, bfloat16 and uint8 into
    temporary stores and read back. The result is kept in the store's journal, for `report` and the card; `merv-eval
    distortion` adds what a trained run makes of each dtype.
    """
    from featurestore.quality import distortion_record, keep_record
    from pipeline.certify.distortion import measure_distortion
    from pipeline.commands import store_tables

    with ExitStack() as stack:
        if reference == "encoders":
            from pipeline.certify.distortion_again import encoded_again
            from pipeline.encoders.weights import weights_by_encoder

            made_of = {"root": root, "weights": weights_by_encoder(weights), "device": device}
            options["again"] = stack.enter_context(encoded_again(place, **made_of))
        shown = stack.enter_context(progress("distortion", "measurements"))
        measured = measure_distortion(place, **options, progress=shown)
    record = distortion_record(measured)
    tell_kept(lambda: keep_record(place, record))
    show_result(record, as_json, lambda: store_tables.distortion(measured))
