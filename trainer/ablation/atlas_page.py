"""The page of an atlas: what enters the LLM, correlations, clips that activate each encoder, datasets, change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from mervcache.console import plural
from mervcache.page import Markup, cards, escaped, make_page, note, table
from trainer.ablation.atlas import Atlas, store_name
from trainer.ablation.atlas_findings import (
    MIN_MEDIA,
    PUBLISHED,
    Activation,
    Change,
    Correlation,
    Spread,
    most_activating,
    spreads,
)
from trainer.ablation.atlas_media import MeasuredProperties
from trainer.ablation.statistics import LEVEL, Floats, mean_ranks

if TYPE_CHECKING:
    from trainer.end_to_end import StoreMedia

SHOWN = 6  # clips of each encoder
PICTURES = 4  # of each clip
LABELS = {"motion": "motion", "edges": "edges", "length_s": "length"}
KINDS = {"video": "videos", "image": "stills"}
DOTS = 400  # of a scatter plot: more are not seen


@dataclass(frozen=True, kw_only=True)
class AtlasResult:
    """All that the page says."""

    atlas: Atlas
    properties: MeasuredProperties
    correlations: Sequence[Correlation]
    draws: int
    before: Atlas | None = None  # the checkpoint that is compared with
    changes: Sequence[Change] = ()
    not_compared: int = 0  # clips without tokens of the other run's encoders


def atlas_page(result: AtlasResult, media: StoreMedia, keys: Mapping[str, str]) -> str:
    """The page as HTML; `keys` are the store's names of the run's encoders, for maps of tokens."""
    atlas = result.atlas
    videos = atlas.kinds.count("video")
    body = "".join(
        [
            cards(
                {
                    "videos": f"{videos:,}",
                    "stills": f"{len(atlas.kinds) - videos:,}",
                    "clips decoded": f"{result.properties.measured:,}",
                    "fusion": atlas.fusion,
                }
            ),
            "<h2>What enters the LLM</h2>",
            _contributions(atlas),
            "<h2>What the contributions follow</h2>",
            _correlations(result),
            "<h2>Clips that activate each encoder most</h2>",
            _galleries(result, media, keys),
            "<h2>By dataset</h2>",
            _datasets(atlas),
            *(["<h2>Change between checkpoints</h2>", _changes(result)] if result.before is not None else []),
        ]
    )
    return make_page(
        title=f"Atlas of {atlas.run} at step {atlas.step:,}",
        subtitle=f"{store_name(atlas.store)} at snapshot {atlas.snapshot}",
        notices=notices(result),
        style=(files("trainer") / "ablation" / "atlas.css").read_text(),
        body=Markup(body),
    )


def notices(result: AtlasResult) -> list[str]:
    """What a reader must know before any figure: stand-ins, and what is missing."""
    atlas, found = result.atlas, []
    if random := atlas.random_encoders:
        found.append(
            f"Random encoders: {', '.join(random)} have seeded random weights, never trained. What is shown of them"
            " says nothing about the real ones."
        )
    if atlas.without:
        found.append(f"{plural(atlas.without, 'clip')} of the store without tokens of every encoder: left out.")
    if len(atlas.clip_ids) < atlas.available:
        found.append(f"A sample: {len(atlas.clip_ids):,} of {atlas.available:,} clips, drawn with seed {atlas.seed}.")
    found += properties_notices(result)
    if result.not_compared:
        found.append(f"{plural(result.not_compared, 'clip')} without tokens of the other run's encoders: not compared.")
    return found


def properties_notices(result: AtlasResult) -> list[str]:
    """Clips without properties."""
    properties, found = result.properties, []
    if properties.gone:
        known = properties.gone - properties.gone_unmeasured
        earlier = f" ({known:,} have them from an earlier atlas of this run)" if known else ""
        found.append(
            f"{plural(properties.gone, 'clip')} without media: their folder is gone or not known here, so they have no"
            f" frames and no properties{earlier}; name it with --root."
        )
    if properties.failed:
        (reason, number), *more = properties.reasons
        others = f" and {len(more)} other reasons" if len(more) > 1 else " and another reason" if more else ""
        found.append(
            f"{plural(len(properties.failed), 'clip')} could not be decoded and have no properties: {reason}"
            f" ({number:,}){others}."
        )
    return found


def _contributions(atlas: Atlas) -> str:
    share_CE, parts = atlas.share_CE, []
    rows = []
    for place, encoder in enumerate(atlas.encoders):
        weights = [] if atlas.weight_CE is None else [_with_range(atlas.weight_CE[:, place], "{:.3f}")]
        share = float(share_CE[:, place].mean())
        rows.append([encoder, *weights, _with_range(atlas.norm_CE[:, place], "{:.3g}"), f"{share:.0%}", _bar(share)])
    weight = [] if atlas.weight_CE is None else ["weight"]
    parts.append(table(("encoder", *weight, "norm", "share of the norms", ""), rows))
    if atlas.weight_CE is None:
        parts.append(note(f"The fusion {atlas.fusion} has no weights: there are norms only."))
    elif not atlas.has_clip_weights:
        parts.append(note(f"The weights of the fusion {atlas.fusion} are the same for every clip; norms differ."))
    parts.append(
        note(
            "Means over clips, in brackets percentiles 10 and 90. A weight alone is no measure of importance, because"
            f" encoders differ in scale: the norm is the {atlas.norm_definition}. A part that is the same for every"
            " clip counts in it too. Share: of the sum of a clip's norms. Computed in float32, without the LLM."
        )
    )
    return "".join(parts)


def findings(found: Sequence[Correlation]) -> list[str]:
    """The correlations whose intervals are away from 0, a line per encoder and property."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for each in found:
        if each.is_away:
            mark = "" if each.is_away_after_holm else ", not after Holm's correction"
            lines.setdefault((each.encoder, each.other, each.kind), []).append(
                f"{each.measure} {_interval(each)}{mark}"
            )
    return [
        f"{encoder} with {LABELS.get(other, other)} of {KINDS.get(kind, kind)}: {'; '.join(texts)}"
        for (encoder, other, kind), texts in lines.items()
    ]


def _correlations(result: AtlasResult) -> str:
    found, properties = result.correlations, result.properties
    if not found:
        return note("No clip was decoded, so nothing is known of motion, edges and length.")
    away, tested = findings(found), sum(each.p is not None for each in found)
    parts = ["<h3>Intervals away from 0</h3>"]
    if away:
        parts.append(f"<ul>{''.join(f'<li>{escaped(line)}</li>' for line in away)}</ul>")
    else:
        parts.append(note("None." if tested else f"No interval: fewer than {MIN_MEDIA} media files were decoded."))
    parts += ["<h3>The published finding</h3>", _published(result)]
    parts += ["<h3>All correlations</h3>", _scatters(result), _matrix(result.atlas, found)]
    parts.append(
        note(
            "In bold: the interval is away from 0, also after Holm's correction; a star: only before it."
            f" Spearman's rank correlation over {properties.measured:,} decoded clips of"
            f" {len(result.atlas.clip_ids):,}, all datasets together: what differs between datasets is in it. In"
            f" brackets {LEVEL:.0%} percentile intervals of {result.draws:,} bootstrap draws of media files; p of rho ="
            f" 0 by the same draws, adjusted by Holm for the {tested} of the table; about {(1 - LEVEL) * tested:.0f} of"
            " these intervals would be away from 0 by chance alone. Correlation is not cause: properties are correlated"
            " among themselves."
        )
    )
    parts += [note(f"{LABELS[name]}: {text}.") for name, text in properties.definitions.items()]
    return "".join(parts)


def _matrix(atlas: Atlas, found: Sequence[Correlation]) -> str:
    """A row per encoder and measure, a column per property and kind of clip."""
    columns = dict.fromkeys((each.other, each.kind) for each in found)
    rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    reasons: dict[str, None] = {}
    for each in sorted(found, key=lambda each: atlas.encoders.index(each.encoder)):
        text = "-" if each.rho is None else f"{each.rho:+.2f}" if each.low is None else _interval(each)
        if each.is_away:
            text = Markup(f"<b>{escaped(text)}</b>") if each.is_away_after_holm else f"{text} *"
        rows.setdefault((each.encoder, each.measure), {})[each.other, each.kind] = text
        if each.reason:
            reasons[f"{LABELS.get(each.other, each.other)} of {KINDS.get(each.kind, each.kind)}: {each.reason}."] = None
    numbers = {(each.other, each.kind): each.clips for each in found}
    heads = [f"{LABELS.get(o, o)} of {numbers[o, kind]:,} {KINDS.get(kind, kind)}" for o, kind in columns]
    body = [(*names, *(cells.get(column, "-") for column in columns)) for names, cells in rows.items()]
    return table(("encoder", "measure", *heads), body) + "".join(map(note, reasons))


def published_findings(atlas: Atlas, found: Sequence[Correlation]) -> list[tuple[str, str, str]]:
    """(what arXiv 2501.01426 says, what is seen here, the verdict) for each encoder of it that the run has."""
    measure = "weight" if atlas.has_clip_weights else atlas.activation
    rows = []
    for encoder, other, sign, words in PUBLISHED:
        if encoder not in atlas.encoders:
            continue
        claim = f"{encoder}: {words} ({'more' if sign > 0 else 'less'} {LABELS[other]}, larger weight)"
        each = next(
            (
                c
                for c in found
                if (c.measure, c.encoder, c.other, c.kind) == (measure, encoder, other, "video") and c.rho is not None
            ),
            None,
        )
        if each is None or each.rho is None or each.low is None:
            rho = "-" if each is None or each.rho is None else f"rho {each.rho:+.2f}"
            rows.append((claim, rho, "not tested: too few clips"))
        else:
            agrees = "seen here" if each.rho * sign > 0 else "the opposite is seen here"
            verdict = agrees if each.is_away else "not seen here: the interval holds 0"
            rows.append((claim, f"{measure}, rho {_interval(each)}", verdict))
    return rows


def _published(result: AtlasResult) -> str:
    rows = published_findings(result.atlas, result.correlations)
    if not rows:
        return note("arXiv 2501.01426 names none of these encoders.")
    random = (
        " Random encoders: neither verdict says anything about the real ones." if result.atlas.random_encoders else ""
    )
    return table(("arXiv 2501.01426, of its trained model", "here", ""), rows) + note(
        "The paper looks at weights of clips with motion, with text and of static scenes; edges stand for text here."
        + random
    )


def _scatters(result: AtlasResult) -> str:
    """A row of plots per property, one per encoder."""
    atlas, parts = result.atlas, []
    measure = "weight" if atlas.has_clip_weights else atlas.activation
    for name, values in result.properties.values.items():
        rows = [r for r, c in enumerate(atlas.clip_ids) if atlas.kinds[r] == "video" and values.get(c) is not None]
        if len({values[atlas.clip_ids[row]] for row in rows}) < 2:
            continue
        rows = rows[:: -(-len(rows) // DOTS)]
        x_C = np.array([values[atlas.clip_ids[row]] for row in rows])
        cells = [
            f"<figure>{_scatter(x_C, atlas.measures[measure][rows, place])}<figcaption>{escaped(encoder)}"
            "</figcaption></figure>"
            for place, encoder in enumerate(atlas.encoders)
        ]
        parts.append(f"<div class='plots'><div>{escaped(LABELS.get(name, name))}</div>{''.join(cells)}</div>")
    if parts:
        parts.append(
            note(f"Videos: the property to the right, by rank; the {measure} upwards, by rank, as rho reads them.")
        )
    return "".join(parts)


def _scatter(x_C: Floats, y_C: Floats) -> str:
    width, height = 160, 110
    places = [(mean_ranks(values_C) - 1) / (len(values_C) - 1) for values_C in (x_C, y_C)]
    dots = "".join(
        f"<circle cx='{4 + x * (width - 8):.1f}' cy='{height - 4 - y * (height - 8):.1f}' r='2'/>"
        for x, y in zip(*places, strict=True)
    )
    return (
        f"<svg viewBox='0 0 {width} {height}' width='{width}' height='{height}' role='img'"
        f" aria-label='scatter plot'><rect width='{width}' height='{height}'/>{dots}</svg>"
    )


def _galleries(result: AtlasResult, media: StoreMedia, keys: Mapping[str, str]) -> str:
    atlas = result.atlas
    noun = "encoder's share of a clip's norms" if atlas.activation == "share" else "norm of a clip"
    parts = [
        note(
            f"Activation: the {noun} divided by the encoder's mean over all clips of this page."
            f" The {SHOWN} largest, one clip of each media file."
        )
    ]
    for encoder in atlas.encoders:
        found = most_activating(atlas, encoder, SHOWN)
        pictures = media.pictures([atlas.clip_ids[each.row] for each in found], encoder=keys[encoder], count=PICTURES)
        shown = []
        for each in found:
            clip_id = atlas.clip_ids[each.row]
            seen = pictures[clip_id]
            label, style = ("frame", "") if seen.are_frames else (f"tokens of {encoder}", " class='map'")
            images = "".join(f"<img{style} src='{url}' alt='{escaped(label)}'>" for url in seen.urls)
            shown.append(
                f"<div class='activation'><div class='film'>{images}</div>"
                f"<b>{each.ratio:.2f} x mean</b> {escaped(_values(atlas, each))}"
                f"<div class='quiet'>{escaped(clip_id)}{escaped(_seen_properties(result, clip_id))}</div></div>"
            )
        parts.append(Markup(f"<h3>{escaped(encoder)}</h3><div class='gallery'>{''.join(shown)}</div>"))
    if result.properties.gone:
        parts.append(
            note(
                "Clips without media show maps of the encoder's tokens: their first three principal components as red,"
                " green and blue."
            )
        )
    return "".join(parts)


def _values(atlas: Atlas, each: Activation) -> str:
    """Shares, and weights, of all encoders of a clip."""
    texts = []
    for place, encoder in enumerate(atlas.encoders):
        weight = ""
        if atlas.has_clip_weights and atlas.weight_CE is not None:
            weight = f" ({atlas.weight_CE[each.row, place]:.2f})"
        texts.append(f"{encoder} {atlas.share_CE[each.row, place]:.0%}{weight}")
    return f"{'shares (weights)' if atlas.has_clip_weights else 'shares'}: {', '.join(texts)}"


def _seen_properties(result: AtlasResult, clip_id: str) -> str:
    formats = {"motion": "{:.1f}", "edges": "{:.1%}", "length_s": "{:.1f} s"}
    found = [
        f"{LABELS.get(name, name)} {formats.get(name, '{:.3g}').format(values[clip_id])}"
        for name, values in result.properties.values.items()
        if values.get(clip_id) is not None
    ]
    return f" · {', '.join(found)}" if found else ""


def _datasets(atlas: Atlas) -> str:
    parts = []
    for measure in atlas.measures:
        found = spreads(atlas, measure)
        low, high = min(each.low for each in found), max(each.high for each in found)
        groups: dict[tuple[str, str], list[Spread]] = {}
        for each in found:
            groups.setdefault((each.dataset, each.kind), []).append(each)
        rows = [
            (
                dataset,
                KINDS.get(kind, kind),
                f"{group[0].clips:,}",
                *(Markup(f"{each.median:.2f} {_range(each, low, high)}") for each in group),
            )
            for (dataset, kind), group in groups.items()
        ]
        parts.append(f"<h3>{measure}</h3>")
        parts.append(table(("dataset", "clips", "number", *atlas.encoders), rows, right=(2,)))
    parts.append(
        note(
            "Relative to the encoder's mean over all clips of this page: median, and percentiles 10 to 90 as a bar; the"
            " thin line is 1, the mean."
        )
    )
    return "".join(parts)


def _range(each: Spread, low: float, high: float) -> str:
    width, span = 120, (high - low) or 1.0

    def x(value: float) -> float:
        return 2 + (width - 4) * min(1.0, max(0.0, (value - low) / span))

    one = f"<line x1='{x(1):.1f}' x2='{x(1):.1f}' y1='0' y2='14' class='one'/>" if low <= 1 <= high else ""
    return (
        f"<svg class='range' viewBox='0 0 {width} 14' width='{width}' height='14' role='img'"
        f" aria-label='{each.low:.2f} to {each.high:.2f}'>{one}"
        f"<rect x='{x(each.low):.1f}' y='5' width='{max(1.0, x(each.high) - x(each.low)):.1f}' height='4'/>"
        f"<circle cx='{x(each.median):.1f}' cy='7' r='3.5'/></svg>"
    )


def _changes(result: AtlasResult) -> str:
    before, atlas = result.before, result.atlas
    assert before is not None
    names = [f"{each.run} at step {each.step:,}" for each in (before, atlas)]
    rows = []
    for change in result.changes:
        order = change.order
        rho = order.reason if order.rho is None else f"{order.rho:+.2f}" if order.low is None else _interval(order)
        digits = ".3f" if change.measure == "weight" else ".1%"
        values = (format(value, digits) for value in (change.before, change.after, change.mean_abs))
        rows.append((change.encoder, change.measure, *values, rho))
    columns = ("encoder", "measure", *names, "mean change of a clip", "same clips: rho")
    missing = [e for e in (*before.encoders, *atlas.encoders) if not (e in before.encoders and e in atlas.encoders)]
    lines = [
        f"Over {len(before.clip_ids):,} clips. Share: of the sum of a clip's norms. Rho: Spearman's, between both"
        " checkpoints over clips; near 1 the same clips activate the encoder."
    ]
    if missing:
        lines.append(f"Only one of both has {', '.join(missing)}, so shares are of different sums.")
    return table(columns, rows, right=(2, 3, 4)) + "".join(map(note, lines))


def _interval(each: Correlation) -> str:
    return f"{each.rho:+.2f} ({each.low:+.2f} to {each.high:+.2f})"


def _with_range(values_C: Floats, form: str) -> str:
    low, high = np.percentile(values_C, (10, 90))
    return f"{form.format(values_C.mean())} ({form.format(low)} to {form.format(high)})"


def _bar(share: float) -> Markup:
    return Markup(f"<div class='bar'><i style='width:{100 * share:.0f}%'></i></div>")
