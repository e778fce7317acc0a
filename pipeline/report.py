"""One self-contained HTML page about a store: what each encoder sees, sizes, rates, failures.

The page has no scripts and no links, so it can be mailed. Token maps are principal components of the stored tokens.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

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
from featurestore.token_maps import principal_maps
from mervcache.console import format_bytes, format_duration
from mervcache.errors import MervCacheError, UserError
from mervcache.page import Markup, cards, escaped, make_page, note, table
from pipeline.media import Root
from pipeline.status import store_status
from pipeline.summary import hours_text, media_roots, prediction_text
from pipeline.worker.reports import PARALLEL_STAGES

STEPS = 8  # time steps pictured per clip
THUMBNAIL = 96  # pixels per side


def write_report(path: Place, *, out: str | Path | None = None, root: str | None = None, num_clips: int = 8) -> Path:
    """Write the page and return its path; media that cannot be read are left out of the pictures, never an error.

    By default it is `NAME-report.html` next to the store, or in the current folder for a store at a URL.
    """
    place = place_of(path)
    path = Path(str(place).rpartition("/")[2]) if is_url(place) else Path(place)
    store, status = FeatureStore.open(place), store_status(place)
    runs = store.runs()
    random = sorted({entry["encoder"] for entry in status["encoders"] if entry["weights"].startswith("random")})
    warning = f"Seeded random weights, not trained ones: {', '.join(random)}."
    clips, num_bytes = sum(status["clips"].values()), status["bytes"]
    facts = {
        "clips": f"{clips:,}",
        "samples": f"{sum(status['samples'].values()):,}",
        "on disk": format_bytes(num_bytes),
        "per clip": format_bytes(num_bytes / clips) if clips else "-",
        "clips quarantined": f"{len(set(store.quarantine['clip_id'].to_pylist())):,}",
    }
    folder = files("pipeline")
    body = Template((folder / "report.html").read_text()).substitute(
        cards=cards(facts),
        encoders=_encoder_table(store, status),
        distortion=_distortion_tables(store),
        clips=_clips_html(store, num_clips, media_roots(runs, root)),
        runs=_runs_table([run for run in runs if run["summary"]["clips"]]),
        quarantine=_quarantine_table(store),
    )
    page = make_page(
        title=f"MERV Cache: {path.name}",
        subtitle=f"snapshot {status['snapshot']} · datasets {', '.join(status['datasets'])}",
        notices=[warning] if random else [],
        style=(folder / "report.css").read_text(),
        body=Markup(body),
    )
    target = Path(out) if out else path.with_name(f"{path.name.removesuffix('.zarr')}-report.html")
    try:
        target.write_text(page)
    except OSError as error:
        raise UserError(f"the page cannot be written to {target}: {error.strerror}; give another --out") from error
    return target


def _encoder_table(store: FeatureStore, status: dict[str, Any]) -> str:
    groups, checked, rows = store.info()["groups"], read_parity(store), []
    stored_bytes = {key: groups[identity.group_name]["stored_bytes"] for key, identity in store.encoders.items()}
    largest = max(stored_bytes.values(), default=0) or 1
    for entry in status["encoders"]:
        key = entry["encoder"]
        rows.append(
            [
                key,
                entry["identity"],
                entry["weights"],
                "x".join(map(str, [*entry["grid"], entry["width"]])),
                entry["storage"],
                entry["committed"],
                entry["failed"],
                entry["to_do"],
                parity_words(checked[key]),
                format_bytes(stored_bytes[key]),
                Markup(f"<div class='bar'><i style='width:{100 * stored_bytes[key] / largest:.0f}%'></i></div>"),
            ]
        )
    columns = ("encoder", "identity", "weights", "tokens", "stored as", "committed", "failed", "to do", "parity")
    return table((*columns, "bytes", "bytes relative to the largest"), rows)


def _distortion_tables(store: FeatureStore) -> str:
    """What was measured of storage dtypes, or the command that measures it."""
    found, parts = read_distortion(store), []
    if found.tokens:
        parts += [table(*token_table(found.tokens)), *map(note, token_notes(found.tokens))]
    else:
        parts.append(note(f"Bytes, speed and error not measured: run merv-pipeline distortion {store.path}"))
    if found.loss:
        parts += [table(*loss_table(found.loss)), *map(note, loss_notes(found.loss))]
    else:
        parts.append(note(f"Loss not measured: run merv-eval distortion --checkpoint RUN --store {store.path}"))
    return "".join(parts)


def _clips_html(store: FeatureStore, num_clips: int, roots: Mapping[str, Root]) -> str:
    """Frames and token maps of clips that are committed for every encoder, spread evenly over the store."""
    clips = [clip for clip in store.clips.to_pylist() if all(clip[key] for key in store.encoders)]
    clips.sort(key=lambda clip: clip["kind"] != "video")  # videos first: stills repeat themselves
    complete = len(clips)
    if len(clips) > num_clips:
        clips = [clips[i] for i in np.linspace(0, len(clips) - 1, num_clips).astype(int)]
    if not clips:
        return "<p>No clip is committed for every encoder yet.</p>"
    ids = [clip["clip_id"] for clip in clips]
    maps = {key: principal_maps(store.read(ids, encoder=key)) for key in store.encoders}
    parts = []
    if len(clips) < complete:
        text = f"{len(clips)} of the {complete:,} clips that have tokens of every encoder, evenly spaced"
        parts.append(note(f"{text}; --clips sets their number."))
    for number, clip in enumerate(clips):
        steps = STEPS if clip["kind"] == "video" else 1  # a still's tokens repeat
        cells = ["<div class='name'></div>", *(f"<div class='t'>{step / STEPS:.0%}</div>" for step in range(steps))]
        if (frames := thumbnails(clip, roots)) is not None:
            cells += [
                "<div class='name'>frames</div>",
                *(f"<img src='{png_url(frame)}' alt='frame'>" for frame in frames[:steps]),
            ]
        for key, maps_BTHWC in maps.items():
            maps_THWC, name = maps_BTHWC[number], escaped(key)
            instants = [step * len(maps_THWC) // STEPS for step in range(steps)]  # those of the frames above
            pictures = (png_url(maps_THWC[instant]) for instant in instants)
            cells += [
                f"<div class='name'>{name}</div>",
                *(f"<img class='map' src='{p}' alt='tokens of {name}'>" for p in pictures),
            ]
        film = f"<div class='scroll'><div class='film' style='--steps: {steps}'>{''.join(cells)}</div></div>"
        parts.append(f"<div class='clip'><h3>{escaped(clip['clip_id'])}</h3>{film}</div>")
    return "".join(parts)


def thumbnails(clip: Mapping[str, Any], roots: Mapping[str, Root]) -> np.ndarray | None:
    """uint8 [STEPS or 1, S, S, 3] of a row of `FeatureStore.clips`, or None where the media cannot be read."""
    from pipeline.decode.decoders import decode_clip
    from pipeline.decode.sampling import DecodeJob
    from pipeline.properties import clip_of, root_of
    from pipeline.views import ResizeRule, View

    if (folder := root_of(clip, roots)) is None:
        return None
    view = View(rule=ResizeRule(size=THUMBNAIL), num_frames=STEPS)
    job = DecodeJob(root=folder, clip=clip_of(clip), views=(view,), accept_damaged=True)
    try:
        return decode_clip(job).frames[view]
    except MervCacheError:
        return None


def image_bytes(image_HWC: np.ndarray, format: str) -> bytes:
    """A uint8 RGB picture as PNG or JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format=format, optimize=True)
    return buffer.getvalue()


def png_url(image_HWC: np.ndarray) -> str:
    """A picture as a data URL."""
    return "data:image/png;base64," + base64.b64encode(image_bytes(image_HWC, "PNG")).decode()


def _runs_table(runs: Sequence[dict]) -> str:
    rows = []
    for run in runs:
        summary = run["summary"]
        seconds = max(summary["elapsed_s"], 1e-9)
        stages = Counter(summary["stage_s"])
        total = stages.pop("total", 0) or 1
        for name in PARALLEL_STAGES:
            stages.pop(name, None)
        device = summary.get("device", "")
        shares = ", ".join(f"{name} {s / total:.0%}" for name, s in stages.most_common())
        rows.append(
            [
                summary["run"],
                summary["clips"],
                summary["failed"],
                format_duration(seconds),
                f"{summary['clips'] / seconds:.2f}",
                f"{format_bytes(summary['bytes'] / seconds)}/s",
                hours_text(worker_s, device, summary["gpu_cost"]) if (worker_s := summary.get("worker_s")) else "-",
                prediction_text(summary.get("predicted"), device),
                shares,
            ]
        )
    columns = ("run", "clips", "failed", "time", "clips/s", "written", "spent", "predicted", "share of block time")
    return table(columns, rows) if rows else "<p>No run has finished yet.</p>"


def _quarantine_table(store: FeatureStore) -> str:
    rows = store.quarantine.to_pylist()
    if not rows:
        return "<p>Empty: every clip that was tried is committed.</p>"
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        grouped.setdefault((row["clip_id"], row["reason"]), []).append(row["encoder"])
    listed = [(clip, ", ".join(encoders), reason) for (clip, reason), encoders in list(grouped.items())[:200]]
    more = f"<p class='quiet'>and {len(grouped) - 200} more</p>" if len(grouped) > 200 else ""
    return table(("clip", "encoders", "reason"), listed) + more
