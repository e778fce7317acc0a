"""Tokens of media files for a finished run: read from a store that holds them, else encoded now.

A file is the clip of a store whose tokens were made from the same bytes and span, whatever its path is there. A file
that is not there is found by its path under `root`. Equal bytes are required of every encoder: a clip whose media
changed between two extractions is encoded now.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from featurestore.clips import Clip, Kind, Sample
from featurestore.windows import window_length
from mervcache.errors import StoreNotFoundError, UserError, no_file
from trainer.data.tokens import ClipTokens, PrefixedTokens, StoreTokens, TokenSource, grid_of
from trainer.runs.load import LoadedRun
from trainer.sources import open_store_for

if TYPE_CHECKING:
    from trainer.end_to_end import LiveTokens

log = logging.getLogger(__name__)

Span = tuple[float | None, float | None]  # seconds; None: the file's start or end
WHOLE: Span = (None, None)
LIVE = "live"  # dataset name of the clips that are encoded now


class MediaTokens(TokenSource):
    """Tokens by the ids that `find` gives; encoders and a decode process are held from the first live clip on."""

    def __init__(
        self,
        run: LoadedRun,
        *,
        store: str | None = None,  # None: the one the run was trained on, where it is there
        root: Path | None = None,
        weights: Sequence[str] = (),
        device: str = "cpu",
    ) -> None:
        rules = [facts.get("identity", {}).get("frame_rule", "") for facts in run.record.encoders.values()]
        if any(window_length(rule) is not None for rule in rules):
            raise UserError(
                "the run reads videos in windows, and media files are found here as whole clips: score it with"
                " `merv-eval run`, or ask about a file with `merv-eval ask`"
            )
        self.shapes, self.trained = run.record.shapes, MappingProxyType(run.built.model.trained)
        self.from_store: set[str] = set()  # clips found by their bytes
        self.by_path: set[str] = set()  # clips of the store whose media are not there to compare
        self.encoded: dict[str, str] = {}  # clips that are encoded now, and their files
        self.store = ""  # where tokens are read
        self._run, self._root, self._weights, self._device = run, root, tuple(weights), device
        self._opened = ExitStack()
        self._live: LiveTokens | None = None
        self._recent: dict[str, dict[str, ClipTokens]] = {}  # live clips of the last fetch
        self._stored = self._open(store)
        self._by_bytes: dict[tuple[str, Span], str] = {}
        self._by_path: dict[tuple[str, Span], list[str]] = {}
        if self._stored is not None:
            self._index(self._stored)

    def find(self, file: Path | str, span: Span = WHOLE, kind: Kind | None = None) -> str:
        """The clip id of a media file, or of a folder of frames; `kind` is that of its extension by default."""
        path = Path(file)
        if not path.exists() and self._root is not None:
            path = self._root / path
        if not path.exists():
            return self._find_by_path(path, file, span)
        from trainer.end_to_end import media_of  # the pipeline, which knows media

        of_extension, sha256 = media_of(path.resolve())
        if (clip_id := self._by_bytes.get((sha256, span))) is not None:
            self.from_store.add(clip_id)
            return clip_id
        return self._include(path.resolve(), kind or of_extension, span)

    def _of_store(self, clip_ids: Sequence[str]) -> dict[str, ClipTokens]:
        assert self._stored is not None  # the clips were found in it
        return self._stored.fetch(clip_ids)

    def fetch(self, clip_ids: Sequence[str]) -> dict[str, ClipTokens]:
        live = [clip_id for clip_id in clip_ids if clip_id in self.encoded]
        stored = [clip_id for clip_id in clip_ids if clip_id not in self.encoded]
        self._recent = {clip_id: self._recent.get(clip_id) or self._encode(clip_id) for clip_id in live}
        if not live:
            return self._of_store(stored)
        parts = [self._recent[clip_id] for clip_id in live]
        if stored:
            parts.append(self._of_store(stored))
        places = [(live + stored).index(clip_id) for clip_id in clip_ids]
        return {encoder: _joined([part[encoder] for part in parts])[places] for encoder in self.shapes}

    def expect(self, clip_ids: Iterable[str]) -> None:
        if self._live is not None:
            self._live.expect(c for c in clip_ids if c in self.encoded and c not in self._recent)

    def available(self, clip_ids: Iterable[str]) -> set[str]:
        return {clip_id for clip_id in clip_ids if clip_id in self.from_store | self.by_path | self.encoded.keys()}

    def data_digest(self, clip_ids: Iterable[str], samples: Iterable[Sample]) -> str:
        raise NotImplementedError  # no run is trained from these

    def close(self) -> None:
        """Stop the decode process and release the encoders."""
        self._opened.close()
        self._live, self._recent = None, {}

    def _open(self, store: str | None) -> StoreTokens | None:
        record = self._run.record
        if store is not None:
            self.store = store
            return open_store_for(self._run, store)[1]
        if not record.store or self._run.built.config.train_encoders:
            return None
        try:
            found = open_store_for(self._run, record.store)[1]
        except StoreNotFoundError:
            log.warning(
                "the run's store %s is not there, so all clips are encoded now; name it with store=", record.store
            )
            return None
        self.store = record.store
        return found

    def _index(self, stored: StoreTokens) -> None:
        media = stored.media_sha256()
        for clip in stored.listed():
            if clip.end_frame is not None:
                continue  # no question of a file ends at a frame
            span = (clip.start_s, clip.end_s)
            self._by_path.setdefault((clip.path, span), []).append(clip.clip_id)
            if clip.clip_id in media:
                self._by_bytes.setdefault((media[clip.clip_id], span), clip.clip_id)

    def _find_by_path(self, path: Path, file: Path | str, span: Span) -> str:
        """The store's clip of a file that is not there."""
        if self._root is None or not path.absolute().is_relative_to(self._root.absolute()):
            hint = "" if self._root is not None else "; with root=DIR a file is found in the store by its path under it"
            raise UserError(no_file(file) + hint)
        relative = path.absolute().relative_to(self._root.absolute()).as_posix()
        found = self._by_path.get((relative, span), [])
        if len(found) != 1:
            what = f"{len(found)} clips of {self.store} have" if found else "no clip of the store has"
            raise UserError(f"{no_file(file)}, and {what} the path {relative}")
        self.by_path.add(found[0])
        return found[0]

    def _include(self, path: Path, kind: Kind, span: Span) -> str:
        clip = Clip(dataset=LIVE, path=path.as_posix().lstrip("/"), kind=kind, start_s=span[0], end_s=span[1])
        if clip.clip_id not in self.encoded:
            self._opened_live().include("/", [clip])
            self.encoded[clip.clip_id] = str(path)
        return clip.clip_id

    def _encode(self, clip_id: str) -> dict[str, ClipTokens]:
        try:
            return self._opened_live().fetch([clip_id])
        except UserError as error:  # sources name clips, the task gave a path
            raise UserError(str(error).replace(clip_id, self.encoded[clip_id])) from error

    def _opened_live(self) -> LiveTokens:
        if self._live is None:
            from trainer.end_to_end import source_like  # the pipeline, only where it runs

            run = self._run
            source = source_like(
                run.built.config, run.record, trained=self.trained, weights=self._weights, device=self._device
            )
            self._live = self._opened.enter_context(source)
        return self._live


def _joined(parts: Sequence[ClipTokens]) -> ClipTokens:
    """Clips of several fetches as one."""
    grids = [grid for grid in map(grid_of, parts) if grid is not None]
    prefixes = [part.prefix_BTKD for part in parts if isinstance(part, PrefixedTokens)]
    if not prefixes:
        return torch.cat(grids)
    return PrefixedTokens(tokens_BTHWD=torch.cat(grids) if grids else None, prefix_BTKD=torch.cat(prefixes))
