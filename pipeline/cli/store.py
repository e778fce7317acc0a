"""Commands that check and change a store: verify, repair, quarantine, tag, tombstone, distortion."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featurestore.locate import Place, find_store, names_of, store_first
from mervcache.completion import complete_encoders, complete_store
from mervcache.console import ProgressLine, echo, examples, report_saved
from pipeline.cli.options import (
    AS_JSON,
    DATASET_OPTION,
    DEVICE,
    ROOT,
    STORE_OPTION,
    WEIGHTS,
    exit_with_failures,
    given_options,
    handle_cli_errors,
    print_result,
    takes_store,
)
from pipeline.config import ExtractConfig

if TYPE_CHECKING:
    from pipeline.recompute import MediaLevel


@click.command(
    epilog=examples("merv-pipeline verify features/lab.zarr --full", "merv-pipeline verify features/lab.zarr --parity")
)
@handle_cli_errors
@takes_store
@click.option("--full", is_flag=True, help="Read every byte; quick checks names, sizes and digests of metadata.")
@click.option(
    "--media",
    type=click.Choice(["quick", "full"]),
    show_default="not checked",
    help="Look for media that changed: quick hashes those modified since their tokens were made, full hashes all.",
)
@click.option(
    "--parity",
    is_flag=True,
    help="Encode the store's reference clips again on this machine and compare; needs the weights.",
)
@click.option(
    "--clips",
    type=click.Path(exists=True, dir_okay=False),
    show_default="the reference clips",
    help="With --parity: file of clip ids, one per line, whose media are encoded again instead.",
)
@click.option(
    "--encoders",
    metavar="LIST",
    shell_complete=complete_encoders,
    show_default="all",
    help="With --parity: only these, comma separated.",
)
@click.option(
    "--weights", metavar="SPEC", multiple=True, show_default="as at extraction", help="With --parity. Repeatable."
)
@click.option("--device", show_default="cuda if available, else cpu", help="With --parity: cpu, cuda, ...")
@ROOT
@click.option("--workers", type=click.IntRange(1), default=2, help="Blocks, or media, checked at once.")
@AS_JSON
def verify(
    place: Place,
    full: bool,
    media: MediaLevel | None,
    root: str | None,
    workers: int,
    parity: bool,
    as_json: bool,
    **parity_options: Any,
) -> None:
    """Check that a store is sound. Exit code 1 if anything is damaged, 0 if there are only orphaned files.

    With --parity, also whether this machine's libraries, decoder and encoders reproduce the stored tokens: exit code 1
    if they are outside the tolerance. The result is saved in the store's journal.
    """
    from featurestore.maintenance.findings import is_damaged
    from featurestore.maintenance.verify import verify_store
    from pipeline.cli import render

    if not parity and any(parity_options.values()):
        raise click.UsageError("--clips, --encoders, --weights and --device are options of --parity: add --parity")
    with ProgressLine("verify", unit="blocks") as progress:
        findings = verify_store(place, "full" if full else "quick", workers=workers, progress=progress)
    if media:
        from pipeline.recompute import verify_media

        with ProgressLine("media", unit="clips") as progress:
            findings += verify_media(place, media, root=root, workers=workers, progress=progress)
    checked = _check_parity(place, root=root, **parity_options) if parity else None
    result = {"store": str(place), "mode": "full" if full else "quick", "media": media}
    result |= {"findings": [vars(finding) for finding in findings], "parity": checked and asdict(checked)}

    def show() -> None:
        render.findings(findings, full, media)
        if checked is not None:
            render.parity(checked)

    print_result(result, as_json, show)
    is_outside = checked is not None and any(row.verdict == "outside" for row in checked.rows)
    if is_damaged(findings) or is_outside:
        click.get_current_context().exit(1)


def _check_parity(place: Place, *, encoders: str | None, weights: tuple[str, ...], **options: Any) -> Any:
    """The parity check, saved in the journal where the store can be written."""
    from featurestore.quality import keep_record
    from pipeline.encoders.weights import weights_by_encoder
    from pipeline.parity import check_parity

    chosen = names_of(encoders) if encoders else None
    record = check_parity(place, encoders=chosen, weights=weights_by_encoder(weights), **options)
    report_saved(lambda: keep_record(place, record))
    return record


@click.command(
    epilog=examples(
        "merv-pipeline repair features/lab.zarr --from s3://BUCKET/lab.zarr",
        "merv-pipeline repair features/lab.zarr --recompute --root MY_VIDEOS",
    )
)
@handle_cli_errors
@takes_store
@click.option(
    "--from",
    "other",
    type=click.Path(),
    shell_complete=complete_store,
    help="Another copy of the store: a folder or URL.",
)
@click.option("--recompute", is_flag=True, help="Recompute from the media what no copy has.")
@ROOT
@WEIGHTS
@click.option("--device", show_default="as at extraction", help="cpu, cuda, cuda:1, ...")
@click.option(
    "--new-bytes", is_flag=True, help="Accept recomputed tokens whose bytes differ; the receipt gets a number."
)
@AS_JSON
def repair(
    place: Place,
    other: str | None,
    recompute: bool,
    root: str | None,
    weights: tuple[str, ...],
    device: str | None,
    new_bytes: bool,
    as_json: bool,
) -> None:
    """Repair what `verify --full` finds damaged. Nothing else is changed; exit code 1 if damage remains."""
    from featurestore.maintenance.repair import repair_store
    from pipeline.cli import render
    from pipeline.encoders.weights import weights_by_encoder

    again = None
    if recompute or root or new_bytes:
        from pipeline.recompute import Recompute

        again = Recompute(place, root=root, weights=weights_by_encoder(weights), device=device)
    with ProgressLine("verify", unit="blocks") as progress:
        done = repair_store(
            place,
            other=find_store(other) if other else None,
            recompute=again,
            make_reference_clips=again.canaries if again else None,
            new_bytes=new_bytes,
            on_repaired=lambda each: echo(f"{each.key}: {each.done}"),
            progress=progress,
        )
    result = {"store": str(place), "from": other, "recompute": again is not None, "new_bytes": new_bytes}
    result["repaired"] = [vars(each) for each in done]
    print_result(result, as_json, lambda: render.repaired(done))
    if not all(each.is_mended for each in done):
        click.get_current_context().exit(1)


class _QuarantineGroup(click.Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not ctx.resilient_parsing:
            words = " ".join(args)
            ctx.fail(f"No such command {args[0]!r}; a command comes before the store: {ctx.command_path} list {words}")
        return super().resolve_command(ctx, args)


@click.group(cls=_QuarantineGroup, epilog=examples("merv-pipeline quarantine list features/lab.zarr"))
def quarantine() -> None:
    """List clips that failed, or retry them."""


_ENCODER = click.option(
    "--encoder", shell_complete=complete_encoders, show_default="all", help="Failures of this encoder only."
)
_REASON = click.option("--reason", metavar="TEXT", show_default="any", help="Failures whose reason contains this text.")


@quarantine.command("list", epilog=examples("merv-pipeline quarantine list features/lab.zarr --reason audio"))
@handle_cli_errors
@takes_store
@_ENCODER
@_REASON
@AS_JSON
def list_quarantine(place: Place, encoder: str | None, reason: str | None, as_json: bool) -> None:
    """List what failed: clip, encoder and reason."""
    from pipeline.cli import render
    from pipeline.quarantine import quarantined

    rows = quarantined(place, encoder=encoder, reason=reason)
    print_result(rows, as_json, lambda: render.quarantined(rows))


@quarantine.command(epilog=examples("merv-pipeline quarantine retry features/lab.zarr --encoder dinov2"))
@handle_cli_errors
@takes_store
@_ENCODER
@_REASON
@click.option("--decoder", show_default="as at extraction", help="Another decoder: another identity of the features.")
@click.option("--accept-damaged", is_flag=True, default=None, help="Use the decodable frames of damaged files.")
@click.option("--new-identity", is_flag=True, default=None, help="Store changed features alongside the existing ones.")
@ROOT
@click.option("--device", show_default="as at extraction", help="cpu, cuda, cuda:1, ...")
@click.option("--scheduler", show_default=ExtractConfig.scheduler, help="As for extract.")
@DATASET_OPTION
@AS_JSON
def retry(place: Place, encoder: str | None, reason: str | None, as_json: bool, **overrides: Any) -> None:
    """Extract quarantined clips again, with the settings in the store's journal. Exit codes are those of extract."""
    from pipeline.cli import render
    from pipeline.quarantine import retry as retry_quarantine

    summaries = retry_quarantine(place, encoder=encoder, reason=reason, overrides=given_options(overrides))
    print_result(
        [summary.to_dict() for summary in summaries], as_json, lambda: [render.summary(each) for each in summaries]
    )
    exit_with_failures(summaries)


@click.command(
    epilog=examples("merv-pipeline tombstone features/lab.zarr v1.mp4 --reason 'consent withdrawn' --all-copies")
)
@handle_cli_errors
@click.argument("clips", nargs=-1, required=True, shell_complete=complete_store, metavar="[STORE] CLIP...")
@click.option("--reason", required=True, help="Why, for later readers of the store: a licence, a consent withdrawn.")
@click.option(
    "--all-copies/--exact-ids",
    default=None,
    show_default="required where there are any",
    help="Whether other clips made from the same media, of any dataset and span, are removed as well.",
)
@STORE_OPTION
@AS_JSON
def tombstone(
    clips: tuple[str, ...], reason: str, all_copies: bool | None, store_option: str | None, as_json: bool
) -> None:
    """Delete clips with their tokens and conversations.

    Give a clip id or a unique ending of one. Its tokens and conversations are erased from the files;
    its id stays, in the clip parts and in the tombstone, so that it is never computed again. Other copies of the store
    apply the removal when they are pushed to or pull from it. Copies in spools and caches of this machine are
    removed as well, and the result names the copies that the command cannot reach. Where the same video has other ids
    (of another dataset, another span), they are listed: remove them with --all-copies, or keep them with --exact-ids.
    """
    from pipeline.cli import render
    from pipeline.removal import remove_clips

    place, names = store_first(clips, store_option)
    with ProgressLine("erase", unit="blocks") as progress:
        result = remove_clips(place, names, reason=reason, all_copies=all_copies, progress=progress)
    print_result(result, as_json, lambda: render.details(result))


@click.command(
    epilog=examples(
        "merv-pipeline tag features/lab.zarr paper-v1",
        "merv-pipeline tag features/lab.zarr paper-v1 --snapshot 00000003-0123456789ab --force",
    )
)
@handle_cli_errors
@click.argument("names", nargs=-1, required=True, shell_complete=complete_store, metavar="[STORE] NAME")
@click.option("--snapshot", metavar="ID|TAG", show_default="the newest", help="Snapshot to name.")
@click.option("--force", is_flag=True, help="Move a tag that names another snapshot.")
@STORE_OPTION
@AS_JSON
def tag(names: tuple[str, ...], snapshot: str | None, force: bool, store_option: str | None, as_json: bool) -> None:
    """Give a snapshot a name that stays, such as paper-v1.

    The name can be given wherever a snapshot is: `merv-train --snapshot paper-v1`. `status` lists the tags; `push` and
    `pull` copy them with the snapshots that they name. A tag keeps no clip from being removed by `tombstone`.
    """
    from featurestore.tags import tag_snapshot
    from pipeline.cli import render

    *stores, name = names
    if len(stores) + (store_option is not None) > 1:
        raise click.UsageError(f"give a store and one tag, got {', '.join(names)}")
    place = find_store(stores[0] if stores else store_option)
    made = tag_snapshot(place, name, snapshot=snapshot, force=force)
    result = {"store": str(place), "tag": made.name, "snapshot": made.snapshot}
    print_result(result, as_json, lambda: render.details(result))


@click.command(epilog=examples("merv-pipeline distortion features/lab.zarr --sample 32"))
@handle_cli_errors
@takes_store
@click.option("--sample", type=click.IntRange(1), default=64, help="Clips of each encoder and kind, at most.")
@click.option("--seed", type=int, default=0, help="Seed of the sample.")
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
    help="What errors are relative to: the stored tokens, or the encoders' float32, computed from the media.",
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
    """Measure the size and error of each storage dtype.

    Bytes, reading speed and error, on the store's own tokens: a sample is written in every storage dtype into temporary
    stores and read back. The result is saved in the store's journal, for `report` and the card; `merv-eval
    distortion` adds the validation loss of a trained run with each dtype.
    """
    from featurestore.quality import keep_record, to_record
    from pipeline.cli import render
    from pipeline.distortion import measure_distortion

    with ExitStack() as stack:
        if reference == "encoders":
            from pipeline.distortion import encoded_again
            from pipeline.encoders.weights import weights_by_encoder

            again = encoded_again(place, root=root, weights=weights_by_encoder(weights), device=device)
            options["again"] = stack.enter_context(again)
        progress = stack.enter_context(ProgressLine("distortion", unit="measurements"))
        measured = measure_distortion(place, **options, progress=progress)
    record = to_record(measured)
    report_saved(lambda: keep_record(place, record))
    print_result(record, as_json, lambda: render.distortion(measured))


STORE_COMMANDS: tuple[click.Command, ...] = (verify, repair, quarantine, tag, tombstone, distortion)
