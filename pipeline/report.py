"""One self-contained HTML page about a store: what each encoder sees, sizes, rates, failures.

Comes in: a store, and the media where they are at hand. Goes out: the path of a page without scripts or links, to be
mailed or put beside the store. Token maps are principal components of the stored tokens themselves.

Token maps: tokens as colours, so that a person sees what an encoder sees.

Comes in: tokens of some clips of one encoder. Goes out: a small RGB image per clip and time step. Colours are the first
three principal components over all the tokens given, so they can be compared between the clips of one call.
"""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from featurestore.clips import Clip
from featurestore.locate import Place, is_url, place_of
from featurestore.quality import (
    loss_notes,
    loss_table,
    parity_words,
    read_distortion,
    read_parity,
    token_notes,
    token_table,
)
from featurestore.store import FeatureStore
from mervcache.console import format_bytes, format_duration
from mervcache.errors import MervCacheError, UserError
from pipeline.status import store_status
from pipeline.summary import media_roots, prediction_text
from pipeline.worker.reports import DECODING

CLIPPED = (1.0, 99.0)  # percentiles that become black and full colour: outlier tokens must not grey out the rest


def principal_maps(tokens_BTHWD: np.ndarray) -> np.ndarray:
    """float tokens [B, T, H, W, D] -> uint8 RGB maps [B, T, H, W, 3]."""
    shape = tokens_BTHWD.shape[:-1]
    flat = tokens_BTHWD.reshape(-1, tokens_BTHWD.shape[-1]).astype(np.float32)
    flat = flat - flat.mean(axis=0)
    _, directions = np.linalg.eigh(flat.T @ flat)  # [D, D], ascending: D is small against the number of tokens
    strongest = directions[:, ::-1][:, : min(3, flat.shape[1])]
    strongest = strongest * np.where(strongest.sum(axis=0) < 0, -1, 1)  # a sign of its own would flip between runs
    components = flat @ strongest
    low, high = np.percentile(components, CLIPPED, axis=0)
    scaled = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
    maps = np.zeros((len(scaled), 3), np.uint8)
    maps[:, : scaled.shape[1]] = np.round(255 * scaled)
    return maps.reshape(*shape, 3)


STEPS = 8  # time steps pictured per clip
THUMBNAIL = 96  # pixels per side


def write_report(path: Place, *, out: str | Path | None = None, root: str | None = None, num_clips: int = 8) -> Path:
    """Write the page; media that cannot be read are left out of the pictures, never an error."""
    place = place_of(path)
    path = Path(str(place).rpartition("/")[2]) if is_url(place) else Path(place)  # beside the store, or here
    store = FeatureStore.open(place)
    status = store_status(place)
    runs = store.runs()
    busy = [run for run in runs if run["summary"]["clips"]]
    clips = _pictured(store, num_clips)
    page = Template((files("pipeline") / "report.html").read_text()).substitute(
        title=html.escape(f"MERV Cache: {path.name}"),
        subtitle=html.escape(f"snapshot {status['snapshot']} · datasets {', '.join(status['datasets'])}"),
        notice=_notice(status),
        cards=_cards(status),
        encoders=_encoder_table(store, status),
        distortion=_distortion_tables(store),
        clips=_clips_html(store, clips, media_roots(runs, root)),
        runs=_runs_table(busy),
        quarantine=_quarantine_table(store),
    )
    target = Path(out) if out else path.with_name(f"{path.name.removesuffix('.zarr')}-report.html")
    try:
        target.write_text(page)
    except OSError as error:
        raise UserError(f"the page cannot be written to {target}: {error.strerror}; give another --out") from error
    return target


def _pictured(store: FeatureStore, num_clips: int) -> list[dict[str, Any]]:
    """Clips committed for every encoder, spread evenly over the store."""
    rows = [row for row in store.clips.to_pylist() if all(row[key] for key in store.encoders)]
    rows.sort(key=lambda row: row["kind"] != "video")  # stills repeat themselves: videos first
    if len(rows) <= num_clips:
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, num_clips).astype(int)]


def _notice(status: dict[str, Any]) -> str:
    seeded = sorted({entry["encoder"] for entry in status["encoders"] if entry["weights"].startswith("random")})
    if not seeded:
        return ""
    return f"<p class='warn'>Seeded random weights, not trained ones: {html.escape(', '.join(seeded))}.</p>"


def _cards(status: dict[str, Any]) -> str:
    clips = sum(status["clips"].values())
    samples = sum(status["samples"].values())
    failed = sum(status["quarantine"].values())
    values = {
        "clips": f"{clips:,}",
        "samples": f"{samples:,}",
        "on disk": format_bytes(status["bytes"]),
        "per clip": format_bytes(status["bytes"] / clips) if clips else "-",
        "quarantined": f"{failed:,}",
    }
    return "".join(f"<div class='card'><b>{html.escape(v)}</b><span>{k}</span></div>" for k, v in values.items())


def _encoder_table(store: FeatureStore, status: dict[str, Any]) -> str:
    stored_bytes = {key: store.info()["groups"][i.group_name]["stored_bytes"] for key, i in store.encoders.items()}
    largest, checked = max(stored_bytes.values(), default=0) or 1, read_parity(store)
    rows = []
    for entry in status["encoders"]:
        stored = stored_bytes[entry["encoder"]]
        bar = f"<div class='bar'><i style='width:{100 * stored / largest:.0f}%'></i></div>"
        rows.append(
            [
                entry["encoder"],
                entry["identity"],
                entry["weights"],
                "x".join(map(str, [*entry["grid"], entry["width"]])),
                entry["storage"],
                entry["committed"],
                entry["failed"],
                entry["to_do"],
                parity_words(checked[entry["encoder"]]),
                format_bytes(stored),
                _Raw(bar),
            ]
        )
    columns = ("encoder", "identity", "weights", "tokens", "stored as", "committed", "failed", "to do")
    columns += ("parity", "bytes")
    return _table((*columns, "bytes beside the largest"), rows)


def _distortion_tables(store: FeatureStore) -> str:
    """What was measured of storage dtypes, or the command that measures it."""
    found, parts = read_distortion(store), []
    if found.tokens:
        parts += [_table(*token_table(found.tokens)), *map(_quiet, token_notes(found.tokens))]
    else:
        parts.append(_quiet(f"Bytes, speed and error not measured: run merv-pipeline distortion {store.path}"))
    if found.loss:
        parts += [_table(*loss_table(found.loss)), *map(_quiet, loss_notes(found.loss))]
    else:
        parts.append(_quiet(f"Loss not measured: run merv-eval distortion --checkpoint RUN --store {store.path}"))
    return "".join(parts)


def _quiet(text: str) -> str:
    return f"<p class='quiet'>{html.escape(text)}</p>"


def _clips_html(store: FeatureStore, clips: Sequence[dict], roots: dict[str, str]) -> str:
    if not clips:
        return "<p>No clip is committed for every encoder yet.</p>"
    ids = [clip["clip_id"] for clip in clips]
    maps = {key: principal_maps(store.read(ids, encoder=key)) for key in store.encoders}
    return "".join(
        _clip_html(clip, {key: maps[key][i] for key in maps}, _thumbnails(clip, roots)) for i, clip in enumerate(clips)
    )


def _clip_html(clip: dict, maps_THWC: dict[str, np.ndarray], thumbnails: np.ndarray | None) -> str:
    cells = []
    shown_steps = STEPS if clip["kind"] == "video" else 1  # a still's tokens repeat
    cells += ["<div></div>", *(f"<div class='t'>{number / STEPS:.0%}</div>" for number in range(shown_steps))]
    if thumbnails is not None:
        shown = thumbnails[:shown_steps]
        cells += ["<div>frames</div>", *(f"<img src='{_png(frame)}' alt='frame'>" for frame in shown)]
    for key, maps in maps_THWC.items():
        cells.append(f"<div>{html.escape(key)}</div>")
        at = [number * len(maps) // STEPS for number in range(shown_steps)]  # the instants of the frames above
        cells += [f"<img class='map' src='{_png(maps[step])}' alt='tokens of {html.escape(key)}'>" for step in at]
    film = f"<div class='scroll'><div class='film' style='--steps: {shown_steps}'>{''.join(cells)}</div></div>"
    return f"<div class='clip'><h3>{html.escape(clip['clip_id'])}</h3>{film}</div>"


def _thumbnails(clip: dict, roots: dict[str, str]) -> np.ndarray | None:
    """uint8 [STEPS or 1, S, S, 3], or None where the media are not at hand."""
    from pipeline.decode.decoders import decode_clip
    from pipeline.decode.sampling import DecodeJob
    from pipeline.views import ResizeRule, View

    folder = roots.get(clip["dataset"], roots.get(""))
    if folder is None:
        return None
    view = View(rule=ResizeRule(size=THUMBNAIL), num_frames=STEPS)
    fields = ("dataset", "path", "kind", "start_s", "end_s", "end_frame")
    job = DecodeJob(root=folder, clip=Clip(**{f: clip[f] for f in fields}), views=(view,), accept_damaged=True)
    try:
        return decode_clip(job).frames[view]
    except MervCacheError:
        return None


def _runs_table(runs: Sequence[dict]) -> str:
    rows = []
    for run in runs:
        summary = run["summary"]
        seconds = max(summary["elapsed_s"], 1e-9)
        stages = Counter(summary["stage_s"])
        total = stages.pop("total", 0) or 1
        stages.pop(DECODING, None)  # in processes of its own, beside these
        shares = ", ".join(f"{name} {s / total:.0%}" for name, s in stages.most_common())
        rows.append(
            [
                summary["run"],
                summary["clips"],
                summary["failed"],
                format_duration(seconds),
                f"{summary['clips'] / seconds:.2f}",
                f"{format_bytes(summary['bytes'] / seconds)}/s",
                prediction_text(summary.get("predicted")),
                shares,
            ]
        )
    columns = ("run", "clips", "failed", "time", "clips/s", "written", "predicted", "share of block time")
    return _table(columns, rows) if rows else "<p>No run has finished yet.</p>"


def _quarantine_table(store: FeatureStore) -> str:
    rows = store.quarantine.to_pylist()
    if not rows:
        return "<p>Empty: every clip that was tried is committed.</p>"
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        grouped.setdefault((row["clip_id"], row["reason"]), []).append(row["encoder"])
    listed = [(clip, ", ".join(encoders), reason) for (clip, reason), encoders in list(grouped.items())[:200]]
    more = f"<p class='quiet'>and {len(grouped) - 200} more</p>" if len(grouped) > 200 else ""
    return _table(("clip", "encoders", "reason"), listed) + more


class _Raw(str):
    """Markup of our own making, not to be escaped."""


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    text = value if isinstance(value, _Raw) else html.escape(str(value))
    return f"<td class='n'>{text}</td>" if isinstance(value, int | float) else f"<td>{text}</td>"


def _png(image_HWC: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
