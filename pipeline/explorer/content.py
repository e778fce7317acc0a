"""What the explorer shows of a store: the table of clips, the map, and each clip's pictures, text and neighbours.

Every file of the page has a path, such as `clips/17.js`, and `Explorer.respond` makes its bytes: a server calls it for
what a browser wants, an export for all of them. Clips are named by their place in the page's table, so no path of a
request ever reaches the file system.

C clips, D width of an encoder, T time steps.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.clips import Sample
from featurestore.store import FeatureStore
from featurestore.token_maps import PrincipalColours
from featurestore.windows import videos_in_windows, window_length
from mervcache.console import ProgressLine, plural
from mervcache.errors import MediaError, MervCacheError, UserError
from mervcache.text import safe
from pipeline.decode.pool import DecodePool
from pipeline.decode.sampling import DecodeJob
from pipeline.explorer.figures import bokeh_scripts, table_and_map
from pipeline.explorer.projection import project
from pipeline.explorer.run_results import RunResults
from pipeline.media import FrameFolder, LocalFile, Source, TarMember
from pipeline.properties import clip_of, root_of
from pipeline.remote_shards import remote_root
from pipeline.report import image_bytes
from pipeline.summary import media_roots
from pipeline.vectors import ClipVectors, pool_clips
from pipeline.views import ResizeRule, View

MAX_CLIPS = 5000  # in the page by default: the table and the vectors are held in memory, here and in the browser
STEPS = 16  # frames pictured of a video
FRAME = 192  # pixels per side
NEIGHBOURS = 8
CAPTION = 160  # characters of it in the table
COLOUR_CLIPS = 32  # whose tokens decide the colours of all maps
SCRIPT, STYLE = "text/javascript; charset=utf-8", "text/css; charset=utf-8"
# What browsers play by themselves; other files are shown as the frames that the encoders saw.
PLAYABLE = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/mp4",
    ".webm": "video/webm",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
}


@dataclass(frozen=True, kw_only=True)
class Response:
    """A file of the page: bytes, or media that are read in parts."""

    type: str
    body: bytes | Source


class Explorer:
    """The page over a store's clips. Close it, or use it as a context.

    Parameters
    ----------
    store
        An open store.
    root
        Folder of the media; default: where the extractions found them. Without media the page has no pictures but those
        of tokens.
    run
        Folder of a training run, whose answers and fusion weights are shown.
    projection
        "pca", or "umap" where umap-learn is installed.
    max_clips
        Clips shown, evenly spaced over the store.
    plays_media
        False: frames of the media alone, no copies of them.
    quiet
        Show no progress on stderr.
    """

    def __init__(
        self,
        store: FeatureStore,
        *,
        root: str | None = None,
        run: Path | None = None,
        projection: str = "pca",
        max_clips: int = MAX_CLIPS,
        plays_media: bool = True,
        quiet: bool = False,
    ) -> None:
        rows = store.clips.to_pylist()
        if not rows:
            raise UserError(f"{store.path} has no clip to look at: `merv-pipeline status` says what it waits for")
        if max_clips < 1:
            raise UserError(f"a page has at least one clip, got max_clips={max_clips}")
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(max_clips, len(rows))).astype(int))
        self.store, self.num_clips, self._plays_media = store, len(rows), plays_media
        self.rows = [rows[place] for place in chosen]
        self._roots = media_roots(store.runs(), root)
        self._results = None if run is None else RunResults.read(run)
        self._place = {row["clip_id"]: place for place, row in enumerate(self.rows)}
        in_windows = any(window_length(identity.frame_rule) is not None for identity in store.encoders.values())
        self._samples = _samples_by_clip(store.samples(), self._place, in_windows=in_windows)
        self._reasons = _reasons_by_clip(store)
        self._lock = threading.Lock()  # requests come in threads; what follows is made once
        self._pool: DecodePool | None = None
        self._colours: dict[str, PrincipalColours] = {}
        clip_ids = [row["clip_id"] for row in self.rows]
        self.vectors: dict[str, ClipVectors] = {}
        total = sum(row[encoder] for encoder in store.encoders for row in self.rows)
        with ProgressLine("pool", unit="clips", total=total, quiet=quiet) as progress:
            for encoder in store.encoders:
                self.vectors[encoder] = pool_clips(store, encoder, clip_ids, progress=progress)
        self.encoders = [encoder for encoder, found in self.vectors.items() if found.clip_ids]
        self._normalised = {encoder: self.vectors[encoder].normalised() for encoder in self.encoders}
        self._maps = {encoder: project(self._normalised[encoder], projection) for encoder in self.encoders}
        self._projection = projection

    def __enter__(self) -> Explorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the decode process."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()
                self._pool = None

    @cached_property
    def missing_media(self) -> Mapping[str, int]:
        """Folder on this machine -> clips of the page whose media are not under it; "" where no folder is known."""
        found: Counter[str] = Counter()
        for place, row in enumerate(self.rows):
            folder = self._roots.get(row["dataset"], self._roots.get("", ""))
            if remote_root(folder) is None and self._source(place) is None:
                found[str(folder)] += 1
        return found

    def paths(self) -> Iterator[str]:
        """Every file of the page."""
        yield from self._assets
        for place in range(len(self.rows)):
            yield f"clips/{place}.js"
            if self._source(place) is not None:
                yield f"frames/{place}.jpg"
            for number, encoder in enumerate(self.encoders):
                if self.rows[place][encoder]:
                    yield f"maps/{place}-{number}.png"
            if name := self._media_name(place):
                yield name

    def respond(self, path: str) -> Response | None:
        """The file at a path of the page; None where there is none."""
        if path in self._assets:
            return self._assets[path]
        folder, _, name = path.partition("/")
        stem, _, suffix = name.partition(".")
        place, _, number = stem.partition("-")
        if not (place.isascii() and place.isdigit() and len(place) < 9 and int(place) < len(self.rows)):
            return None
        row = int(place)
        if path == f"clips/{row}.js":
            return Response(type=SCRIPT, body=_call("explorer.show", row, self._details(row)))
        if path == f"frames/{row}.jpg":
            return self._frames(row)
        if folder == "maps" and suffix == "png" and number in map(str, range(len(self.encoders))):
            return self._token_maps(row, self.encoders[int(number)])
        if path == self._media_name(row) and (source := self._source(row)) is not None:
            return Response(type=PLAYABLE[Path(path).suffix], body=source)
        return None

    @cached_property
    def _assets(self) -> dict[str, Response]:
        folder = files("pipeline.explorer")
        found = {
            "index.html": Response(type="text/html; charset=utf-8", body=(folder / "explorer.html").read_bytes()),
            "explorer.js": Response(type=SCRIPT, body=(folder / "explorer.js").read_bytes()),
            "explorer.css": Response(type=STYLE, body=(folder / "explorer.css").read_bytes()),
            "data.js": Response(type=SCRIPT, body=_call("explorer.start", self._overview())),
        }
        return found | {name: Response(type=SCRIPT, body=body) for name, body in bokeh_scripts().items()}

    def _overview(self) -> dict[str, Any]:
        """The table, the maps, and what the page is about."""
        right = self._results.right_by_sample if self._results else {}
        columns: dict[str, list] = defaultdict(list)
        for row in self.rows:
            clip_id, samples = row["clip_id"], self._samples[row["clip_id"]]
            credits = [right[sample.digest] for sample in samples if sample.digest in right]
            columns["clip"].append(safe(clip_id))
            columns["path"].append(safe(clip_id.removeprefix(f"{row['dataset']}/")))
            columns["dataset"].append(safe(row["dataset"]))
            columns["kind"].append(row["kind"])
            columns["caption"].append(safe(_caption(samples)))
            columns["tokens"].append(self._state(row))
            columns["questions"].append(len(credits))
            columns["wrong"].append(sum(credit < 1 for credit in credits))
        notices = []
        random = {entry["weights"] for entry in self.store.info()["groups"].values()}
        if any(label.startswith("random") for label in random):
            notices.append("Encoders with seeded random weights: near is not alike in meaning.")
        if len(self.rows) < self.num_clips:
            notices.append(f"{len(self.rows):,} of {self.num_clips:,} clips, evenly spaced; --max-clips shows more.")
        if without := sum(self.missing_media.values()):
            notices.append(f"{plural(without, 'clip')} without media: name their folder with --root.")
        found = {}
        for encoder, xy_C2 in self._maps.items():
            full_C2 = np.full((len(self.rows), 2), np.nan)
            full_C2[[self._place[clip] for clip in self.vectors[encoder].clip_ids]] = xy_C2
            found[encoder] = [[None if np.isnan(v) else round(float(v), 4) for v in axis] for axis in full_C2.T]
        return {
            "title": safe(Path(self.store.path).name),
            "subtitle": f"snapshot {self.store.snapshot}"
            + (f" · run {safe(self._results.name)}" if self._results else ""),
            "notices": notices,
            "columns": columns,
            "maps": found,
            "projection": {"pca": "First two principal components", "umap": "UMAP"}[self._projection],
            "figures": table_and_map(dict(columns), with_answers=self._results is not None),
        }

    def _state(self, row: Mapping[str, Any]) -> str:
        if row["clip_id"] in self._reasons:
            return "quarantined"
        return "complete" if all(row[encoder] for encoder in self.store.encoders) else "missing"

    def _details(self, place: int) -> dict[str, Any]:
        """All that the page shows of one clip."""
        row = self.rows[place]
        clip_id, source = row["clip_id"], self._source(place)
        numbers = {encoder: number for number, encoder in enumerate(self.encoders) if row[encoder]}
        steps = {encoder: self.store.encoders[encoder].grid_of(row["kind"])[0] for encoder in numbers}
        return {
            "clip": safe(clip_id),
            "kind": row["kind"],
            "span": [row["start_s"], row["end_s"], row["end_frame"]],
            "reasons": {encoder: safe(reason) for encoder, reason in self._reasons.get(clip_id, {}).items()},
            "media": self._media_name(place),
            "note": self._media_note(place),
            "frames": None if source is None else [f"frames/{place}.jpg", STEPS if row["kind"] == "video" else 1],
            "maps": {encoder: [f"maps/{place}-{number}.png", steps[encoder]] for encoder, number in numbers.items()},
            "near": {encoder: self._neighbours(place, encoder) for encoder in numbers},
            "samples": [self._conversation(sample) for sample in self._samples[clip_id]],
            "fusion": self._results.fusion.get(clip_id, {}) if self._results else {},
        }

    def _neighbours(self, place: int, encoder: str) -> list[tuple[int, float]]:
        """(place, cosine) of the clips nearest by an encoder's mean tokens; a negative cosine is not near."""
        clip_ids, unit_CD = self.vectors[encoder].clip_ids, self._normalised[encoder]
        own = clip_ids.index(self.rows[place]["clip_id"])
        cosines_C = unit_CD @ unit_CD[own]
        cosines_C[own] = -np.inf
        order = np.argsort(-cosines_C, kind="stable")[: min(NEIGHBOURS, len(clip_ids) - 1)]
        return [(self._place[clip_ids[i]], round(float(cosines_C[i]), 4)) for i in order if cosines_C[i] > 0]

    def _conversation(self, sample: Sample) -> dict[str, Any]:
        answers = self._results.answers.get(sample.digest, []) if self._results else []
        return {
            "about": " · ".join(filter(None, (sample.source, sample.stage, sample.split, sample.category))),
            "turns": [[turn.role, safe(turn.text)] for turn in sample.turns],
            "options": [safe(option) for option in sample.options],
            "correct": sample.answer_index,
            "answers": [{"by": safe(a.by), "text": safe(a.text(sample)), "credit": a.credit} for a in answers],
        }

    def _source(self, place: int) -> Source | None:
        """The media of a clip, where they are still there."""
        row = self.rows[place]
        root = root_of(row, self._roots)
        if root is None:
            return None
        try:
            return Source.find(root, row["path"])
        except MervCacheError:
            return None

    def _media_name(self, place: int) -> str | None:
        """The path of a clip's media in the page, where a browser plays them."""
        suffix = Path(self.rows[place]["path"]).suffix.lower()
        source = self._source(place) if self._plays_media and suffix in PLAYABLE else None
        is_one_file = source is not None and isinstance(source.media, LocalFile | TarMember)
        return f"media/{place}{suffix}" if is_one_file else None

    def _media_note(self, place: int) -> str:
        """Why the page has no player for a clip; empty where it has one."""
        source, suffix = self._source(place), Path(self.rows[place]["path"]).suffix.lower()
        if source is None:
            return "Its media were not found: name their folder with --root."
        if self._media_name(place):
            return ""
        if isinstance(source.media, FrameFolder):
            reason = "The clip is a folder of frames"
        elif suffix not in PLAYABLE:
            reason = f"Browsers do not play {suffix or 'such'} files"
        elif not self._plays_media:
            reason = "The page was written without --media"
        else:
            reason = "Media at a URL are not played here"
        return f"{reason}; its frames, as an encoder's crop sees them:"

    def _frames(self, place: int) -> Response | None:
        """Frames of a clip next to each other, as an encoder's crop sees them."""
        row = self.rows[place]
        root = root_of(row, self._roots)
        if root is None:
            return None
        view = View(rule=ResizeRule(size=FRAME), num_frames=STEPS)
        job = DecodeJob(root=root, clip=clip_of(row), views=(view,), accept_damaged=True)
        with self._lock:
            self._pool = self._pool or DecodePool(1)
            future = self._pool.submit(job)
        try:
            frames_THWC = future.result().frames[view]
        except MediaError:
            return None
        shown = frames_THWC if row["kind"] == "video" else frames_THWC[:1]
        return Response(type="image/jpeg", body=image_bytes(np.concatenate(list(shown), axis=1), "JPEG"))

    def _token_maps(self, place: int, encoder: str) -> Response | None:
        """The token maps of all time steps next to each other, a pixel per token."""
        row = self.rows[place]
        if not row[encoder]:
            return None
        with self._lock:
            if encoder not in self._colours:
                clip_ids = self.vectors[encoder].clip_ids
                spread = np.unique(np.linspace(0, len(clip_ids) - 1, min(COLOUR_CLIPS, len(clip_ids))).astype(int))
                tokens_BTHWD = self.store.read([clip_ids[i] for i in spread], encoder=encoder)
                self._colours[encoder] = PrincipalColours.fit(tokens_BTHWD)
            tokens_BTHWD = self.store.read([row["clip_id"]], encoder=encoder)
        steps = self.store.encoders[encoder].grid_of(row["kind"])[0]
        maps_THWC = self._colours[encoder].maps(tokens_BTHWD)[0][:steps]
        return Response(type="image/png", body=image_bytes(np.concatenate(list(maps_THWC), axis=1), "PNG"))


def _samples_by_clip(
    samples: Sequence[Sample], wanted: Mapping[str, int], *, in_windows: bool
) -> dict[str, list[Sample]]:
    """Conversations about each clip; about a window those about its video."""
    found: dict[str, list[Sample]] = {clip_id: [] for clip_id in wanted}
    videos = videos_in_windows((sample.clip_id for sample in samples), wanted) if in_windows else {}
    for sample in samples:
        for clip_id in videos.get(sample.clip_id, (sample.clip_id,)) if sample.clip_id else ():
            if clip_id in found:
                found[clip_id].append(sample)
    return found


def _reasons_by_clip(store: FeatureStore) -> dict[str, dict[str, str]]:
    """Clip -> encoder -> why it is in quarantine."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for row in store.quarantine.to_pylist():
        found[row["clip_id"]][row["encoder"]] = row["reason"]
    return dict(found)


def _caption(samples: Sequence[Sample]) -> str:
    """The first answer of a description, else the first question."""
    for wanted, role in (("align", 1), ("finetune", 1), ("eval", 0)):
        for sample in samples:
            if sample.stage == wanted:
                return sample.turns[role].text[:CAPTION]
    return ""


def _call(function: str, *arguments: Any) -> bytes:
    """A script of one call: a page opened from a disk may load scripts, but fetch nothing."""
    return f"{function}({', '.join(json.dumps(argument, allow_nan=False) for argument in arguments)});\n".encode()
