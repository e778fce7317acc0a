"""Distortion as people read it: tables and notes: on the console, in the report and on the card."""

from __future__ import annotations

from featurestore.distortion import REFERENCES, STORED, LossRecord, TokenRecord

SEEDED = "Tokens of seeded random weights, not trained ones"
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # columns, and rows of texts


def token_table(record: TokenRecord) -> Table:
    """One line per encoder, kind and dtype."""
    columns = ("encoder", "clips", "dtype", "bytes/clip", "clips/s", "MB/s", "of raw read")
    columns += ("max abs error", "relative RMS", "min cosine")
    rows = []
    for row in record.rows:
        label = f"{row.clips} {row.kind}" + (f", {row.refused} overflow" if row.refused else "")
        dtype = f"{row.dtype} (stored)" if row.is_stored else row.dtype
        rows.append(
            (
                row.encoder,
                label,
                dtype,
                _number(row.bytes_per_clip, ",.0f"),
                _number(row.clips_s, ",.0f"),
                _number(row.mb_s, ",.0f"),
                _number(row.of_raw, ".2f"),
                _number(row.max_abs, ".3g"),
                _number(row.relative_rms, ".2e"),
                _number(row.cosine_min, ".6f"),
            )
        )
    return columns, rows


def loss_table(record: LossRecord) -> Table:
    """One line per dtype, with the change from what is stored."""
    names = list(dict.fromkeys(name for row in record.rows for name in row.by_modality))
    own = next((row.loss for row in record.rows if row.dtype == STORED), None)
    rows = []
    for row in record.rows:
        change = None if row.loss is None or own is None else row.loss - own
        texts = (_number(row.loss, ".5f"), _number(change, "+.5f"))
        rows.append((row.dtype, *texts, *(_number(row.by_modality.get(name), ".5f") for name in names)))
    return ("dtype", "loss", "change", *names), rows


def token_notes(record: TokenRecord) -> list[str]:
    """What the table is of, in sentences."""
    seeded = sorted({row.weights for row in record.rows if row.weights.startswith("random")})
    label = f" {SEEDED} ({', '.join(seeded)}): errors of trained encoders differ." if seeded else ""
    return [
        f"Measured {record.time} at snapshot {record.snapshot}, on at most {record.sample} clips of each encoder and "
        f"kind (seed {record.seed}), read from files in the page cache; rates are of the machine that measured.{label}",
        REFERENCES[record.reference],
    ]


def loss_notes(record: LossRecord) -> list[str]:
    """What the losses are of, in a sentence."""
    label = f" {SEEDED} ({record.weights})." if "random" in record.weights else ""
    return [
        f"Measured {record.time} with the run {record.run} at step {record.step}, on {record.samples} samples of split "
        f"{record.split} of snapshot {record.snapshot}.{label}"
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
