"""What all datasets share: `DatasetSpec`, the `DatasetListing` that it gives, and the `ListingBuilder` that fills one.

Annotations are untrusted: a malformed record is refused, counted and shown by example, and never ends the listing.
Media that are annotated but not there are counted by folder and left out together with their samples, so that a later
listing picks them up when they have appeared.
"""

from __future__ import annotations

import errno
import math
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featurestore.clips import Clip, Kind, Role, Sample, Turn, check_relative_path
from mervcache.console import plural
from mervcache.errors import UserError, nearest_name
from mervcache.reprs import brief
from pipeline.media import MediaRoot, Root, allowed_folders, is_inside, kind_of_path
from pipeline.remote_shards import RemoteRoot

EXAMPLES_KEPT = 5  # of refused records, per reason
FILES_NAMED = 10  # of absent media, in text
UNLISTED_NAMED = 3  # media that no record names, in text
MAX_COMPARED = 20_000  # names in a folder that are searched for one similar to an absent file's
REASONS_KEPT = 100  # a reason may quote a key of the record
OTHER_REASONS = "other reasons"
OUTSIDE_FILE = "a linked file whose target is outside the root"
OUTSIDE_FOLDER = "a linked folder whose target is outside the root"
NOT_FOLLOWED = "a linked folder is not followed"
LINK_ADVICE = "to read what links lead to outside the root, name that folder: --option media_links=DIR"
MAX_EXACT_FLOAT = 2.0**53  # beyond it neighbouring whole numbers are one float
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
FOLDER_FAULTS = {  # of one folder: they cost its clips and not the listing
    errno.ELOOP: "media folder is a loop of links",
    errno.EACCES: "media folder may not be listed: permission denied",
    errno.EPERM: "media folder may not be listed: permission denied",
}
ROLES: dict[str, Role] = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """Records of one kind of fault."""

    count: int
    examples: tuple[str, ...]  # ids or positions of the first few, for a person to look up


@dataclass(frozen=True, kw_only=True)
class DatasetListing:
    """A dataset as extraction reads it: clips to encode, and their samples."""

    name: str
    root: str | MediaRoot | RemoteRoot  # absolute folder, or URL, that clip paths are relative to
    clips: tuple[Clip, ...]  # unique, present, in annotation order
    samples: Mapping[str, tuple[Sample, ...]]  # NAME of samples/NAME.parquet -> samples of listed clips or of none
    missing: Mapping[str, int] = field(default_factory=dict)  # folder -> clips whose media are not there
    missing_files: tuple[str, ...] = ()  # paths of these media, sorted
    nearest: Mapping[str, str] = field(default_factory=dict)  # of the first of a folder: the most similar file there
    rejected: Mapping[str, Rejected] = field(default_factory=dict)  # reason -> records refused for it
    skipped: Mapping[str, int] = field(default_factory=dict)  # what a dataset does not read by its rules -> files
    notes: tuple[str, ...] = ()  # what was chosen on the user's behalf
    videos: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # id of a clip that was split -> its windows

    @property
    def clip_ids(self) -> set[str]:
        """What samples may be about: the clips, and the videos whose windows are among them."""
        return {clip.clip_id for clip in self.clips} | self.videos.keys()

    def __repr__(self) -> str:
        samples = sum(len(each) for each in self.samples.values())
        left_out = f"{sum(self.missing.values())} absent, {sum(each.count for each in self.rejected.values())} rejected"
        return brief(self, f"{self.name} at {self.root}: {len(self.clips)} clips, {samples} samples, {left_out}")


def loss_lines(listing: DatasetListing) -> list[str]:
    """What a listing left out, with examples, a line for each reason."""
    lines = [
        f"refused: {plural(records.count, 'record')}, {reason}; such as {', '.join(records.examples[:2])}"
        for reason, records in listing.rejected.items()
    ]
    nearest = {path.rpartition("/")[0] or ".": f"; {path}, nearest: {found}" for path, found in listing.nearest.items()}
    lines += [
        f"absent: media of {plural(count, 'clip')} in {folder_name(folder)}{nearest.get(folder, '')}"
        for folder, count in listing.missing.items()
    ]
    lines += [f"not read: {count} {what}" for what, count in listing.skipped.items()]
    return lines + link_advice(listing.rejected)


def folder_name(folder: str) -> str:
    """A folder under the root, in words where it is the root itself."""
    return "the root" if folder == "." else folder


def missing_lines(files: Sequence[str]) -> list[str]:
    """The first few media that are not there, a line each."""
    lines = [f"absent: {path}" for path in files[:FILES_NAMED]]
    rest = len(files) - FILES_NAMED
    return [*lines, f"and {rest} more"] if rest > 0 else lines


def link_advice(reasons: Iterable[str]) -> list[str]:
    """The next step where links were refused."""
    return [LINK_ADVICE] if {OUTSIDE_FILE, OUTSIDE_FOLDER, NOT_FOLLOWED} & set(reasons) else []


def check_has_clips(listing: DatasetListing) -> None:
    """Raise `UserError` for a listing without a clip, with what was left out."""
    if not listing.clips:
        lost = [*loss_lines(listing)[:20], *missing_lines(listing.missing_files)]
        lines = "".join(f"\n  {line}" for line in lost)
        raise UserError(f"dataset {listing.name} lists no clip under {listing.root}: there is nothing to encode{lines}")


@dataclass(frozen=True, kw_only=True)
class Option:
    """A setting of one dataset."""

    default: Any
    help: str


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A dataset by name: how to describe it, and how to list it."""

    name: str
    summary: str
    default_root: str
    download: str  # what to get and where it goes, for the person whose root is missing
    collect: Callable[[ListingBuilder, Mapping[str, Any]], None]
    stages: tuple[str, ...] = ()  # of its samples; empty: it has no samples
    options: Mapping[str, Option] = field(default_factory=dict)
    makes_root: bool = False  # renders its own media
    lists_media: bool = False  # clips come from listing the media: none of them can be missing
    remote_root: Callable[[str | None, Mapping[str, Any]], RemoteRoot | None] = lambda root, options: None
    """The URL below which the media of a request (root as given, options) are; None for a folder."""


class RecordError(Exception):
    """One annotation record is refused; the text is the reason that records are counted under."""


class ListingBuilder:
    """Gathers clips and samples in annotation order; `finish` filters them and looks for their media.

    Parameters
    ----------
    name
        Of the dataset: the first part of clip ids.
    root
        Folder of its media.
    stage
        The training stage that is requested; None: all.
    links
        Folder outside the root that links may lead into; "": none.
    remote
        Where the media are, if not under a folder.
    """

    def __init__(
        self, name: str, root: Path, stage: str | None = None, links: str = "", remote: RemoteRoot | None = None
    ) -> None:
        self.name = name
        self.root = root
        self.remote = remote  # where the media are, if not under a folder
        self.links = links  # absolute folder that links under the root may lead into; "": none
        self.stage = stage  # None: all
        self.notes: list[str] = []
        self.missing: dict[str, int] = {}
        self._missing_files: set[str] = set()
        self.skipped: dict[str, int] = {}
        self._clips: dict[str, Clip] = {}  # clip id -> clip
        self._known: dict[tuple, str] = {}  # what names a clip -> clip id: building a Clip costs ten times a look-up
        self._samples: dict[str, list[Sample]] = {}
        self._sample_ids: set[str] = set()
        self._rejected: dict[str, list] = {}

    @property
    def media_root(self) -> str | MediaRoot | RemoteRoot:
        """The root, with the folder that its links may lead into."""
        if self.remote is not None:
            return self.remote
        return MediaRoot(str(self.root), self.links) if self.links else str(self.root)

    def wants(self, stage: str) -> bool:
        """True if samples of this stage are requested."""
        return self.stage in (None, stage)

    def add_clip(
        self,
        path: str,
        kind: Kind,
        *,
        start_s: float | None = None,
        end_s: float | None = None,
        end_frame: int | None = None,
    ) -> str:
        """The id of the clip at `path`, a "video" or "image" (`kind`), listed once however often it is named.

        `start_s` and `end_s` cut it in seconds, `end_frame` in frames. `RecordError` for an unsafe path or span.
        """
        key = (path, start_s, end_s, end_frame, kind)
        if key in self._known:
            return self._known[key]
        check_text(path)
        try:
            clip = Clip(dataset=self.name, path=path, kind=kind, start_s=start_s, end_s=end_s, end_frame=end_frame)
        except UserError:
            raise RecordError("span is not possible" if is_safe(path) else "media path is unsafe") from None
        clip_id = clip.clip_id
        if self._clips.setdefault(clip_id, clip).kind != kind:
            raise RecordError("media is named as a video and as an image")
        self._known[key] = clip_id
        return clip_id

    def add_sample(
        self, name: str, record_id: str, clip_id: str | None, turns: tuple[Turn, ...], **fields: Any
    ) -> None:
        """Add a conversation of `turns` to samples/`name`, about the clip `clip_id`, or about none.

        Its id is `STAGE/RECORD_ID` of `record_id`, with `#2`, `#3`, ... where records share one; `fields` are further
        ones of `Sample`, such as stage and split.
        """
        sample_id = wanted = f"{fields['stage']}/{record_id}"
        number = 1
        while sample_id in self._sample_ids:
            number += 1
            sample_id = f"{wanted}#{number}"
        self._sample_ids.add(sample_id)
        self._samples.setdefault(name, []).append(Sample(sample_id=sample_id, clip_id=clip_id, turns=turns, **fields))

    def declare_samples(self, name: str) -> None:
        """Let samples/`name` exist even if no record survives."""
        self._samples.setdefault(name, [])

    def reject(self, reason: str, example: object, count: int = 1) -> None:
        """Count `count` refused records under a `reason`, with an `example` that helps to find them."""
        if len(self._rejected) >= REASONS_KEPT and reason not in self._rejected:
            reason = OTHER_REASONS
        entry = self._rejected.setdefault(reason, [0, []])
        entry[0] += count
        if len(entry[1]) < EXAMPLES_KEPT:
            entry[1].append(str(example)[:200].encode("utf-8", "replace").decode())

    @property
    def clips(self) -> list[Clip]:
        """All clips so far, in their order."""
        return list(self._clips.values())

    @property
    def has_rejected(self) -> bool:
        return bool(self._rejected)

    def skip(self, what: str, count: int = 1) -> None:
        """Count `count` files that the dataset does not read by its rules; `what` they are, in words."""
        if len(self.skipped) >= REASONS_KEPT and what not in self.skipped:
            what = "other files"
        self.skipped[what] = self.skipped.get(what, 0) + count

    def miss(self, path: str, count: int = 1) -> None:
        """Count `count` clips of a file that is not there; `path` lacks the extension where the annotations do."""
        folder = path.rpartition("/")[0] or "."
        self.missing[folder] = self.missing.get(folder, 0) + count
        self._missing_files.add(path)

    def finish(self, *, kind: str | None = None, limit: int | None = None, look: bool = True) -> DatasetListing:
        """Freeze the listing, less the clips of other kinds than `kind` and those behind the first `limit`.

        With `look` clips without media on disk are dropped and counted.
        """
        clips = [clip for clip in self._clips.values() if kind in (None, clip.kind)]
        nearest: dict[str, str] = {}
        if look:
            root = self.media_root
            assert not isinstance(root, RemoteRoot), "datasets of remote media list them"
            absent, refused, nearest, unlisted = find_missing(root, clips)
            if unlisted and (kind, self.stage) == (None, None):  # else they may be of records left out by request
                named = ", ".join(unlisted[:UNLISTED_NAMED]) + ", ..." * (len(unlisted) > UNLISTED_NAMED)
                self.notes.append(f"of no record: {plural(len(unlisted), 'media file')} under {self.root}: {named}")
            absent_paths = {path: count for paths in absent.values() for path, count in paths.items()}
            for path, count in absent_paths.items():
                self.miss(path, count)
            for path, reason in refused.items():
                self.reject(reason, path)
            clips = [clip for clip in clips if clip.path not in absent_paths and clip.path not in refused]
        clips = clips[:limit]
        return DatasetListing(
            name=self.name,
            root=self.media_root,
            clips=tuple(clips),
            samples=self._kept_samples({clip.clip_id for clip in clips}, kind, limit),
            missing=dict(sorted(self.missing.items())),
            missing_files=tuple(sorted(self._missing_files)),
            nearest=nearest,
            rejected={why: Rejected(count=n, examples=tuple(seen)) for why, (n, seen) in self._rejected.items()},
            skipped=dict(sorted(self.skipped.items())),
            notes=tuple(self.notes),
        )

    def _kept_samples(self, clip_ids: set[str], kind: str | None, limit: int | None) -> dict[str, tuple[Sample, ...]]:
        """Samples of kept clips; text-only ones if no kind is requested, at most `limit` of them per name."""
        kept = {}
        for name, samples in self._samples.items():
            texts_left = 0 if kind else len(samples) if limit is None else limit
            chosen = []
            for sample in samples:
                if sample.clip_id is None:
                    texts_left -= 1
                    if texts_left >= 0:
                        chosen.append(sample)
                elif sample.clip_id in clip_ids:
                    chosen.append(sample)
            kept[name] = tuple(chosen)
        return kept


def is_safe(path: str) -> bool:
    """True for a path that a clip may have."""
    try:
        check_relative_path(path)
    except UserError:
        return False
    return True


def find_missing(
    root: Root, clips: Iterable[Clip]
) -> tuple[dict[str, dict[str, int]], dict[str, str], dict[str, str], list[str]]:
    """What clips lack, and what their folders hold besides.

    Folder -> media path -> clips of it, for media that are not on disk; media path -> why it is refused; for the first
    absent path of a few folders, the most similar one that exists; and media in these folders of no clip, sorted.

    One scandir per folder and no stat per file, except for links: on a network share a stat costs a round trip, and the
    whole training set has 0.4 million files. Members of tar archives are not for here: their datasets list them from
    the archives.
    """
    wanted: dict[str, dict[str, int]] = {}
    for clip in clips:
        paths = wanted.setdefault(clip.path.rpartition("/")[0], {})
        paths[clip.path] = paths.get(clip.path, 0) + 1
    missing: dict[str, dict[str, int]] = {}
    refused: dict[str, str] = {}
    nearest: dict[str, str] = {}
    unlisted: list[str] = []
    assert not isinstance(root, RemoteRoot)  # whose shards are listed from their archives
    allowed = allowed_folders(root)
    for folder, paths in wanted.items():
        place = os.path.join(root, folder)
        try:
            if not is_inside(os.path.realpath(place), allowed):
                refused |= dict.fromkeys(paths, OUTSIDE_FOLDER)
                continue
            with os.scandir(place) as entries:
                is_link = {entry.name: entry.is_symlink() for entry in entries}
        except OSError as error:
            if error.errno in FOLDER_FAULTS:
                refused |= dict.fromkeys(paths, FOLDER_FAULTS[error.errno])
            elif error.errno in ABSENT:
                missing[folder] = paths
            else:
                raise UserError(f"media folder {place} cannot be listed: {error.strerror}") from error
            continue
        absent = {}
        for path, count in paths.items():
            name = path.rpartition("/")[2]
            if name not in is_link:
                absent[path] = count
            elif is_link[name]:
                real = os.path.realpath(os.path.join(place, name))
                if not is_inside(real, allowed):
                    refused[path] = OUTSIDE_FILE
                elif not os.path.exists(real):
                    absent[path] = count
        here = f"{folder}/" if folder else ""
        unlisted += [here + name for name in is_link if here + name not in paths and kind_of_path(name)]
        if absent:
            missing[folder] = absent
            if len(nearest) < FILES_NAMED:
                first = min(absent).rpartition("/")[2]
                present = [name for name in is_link if here + name not in absent]
                if found := nearest_name(first, present[:MAX_COMPARED]):
                    nearest[here + first] = here + found
    return missing, refused, nearest, sorted(unlisted)


def parse_turns(conversation: object) -> tuple[Turn, ...]:
    """`[{"from": "human", "value": "..."}, {"from": "gpt", ...}]` -> turns, texts exactly as found, tokens included.

    >>> parse_turns([{"from": "user", "value": "<video>\\nWhat?"}, {"from": "assistant", "value": "A dog."}])
    (Turn(role='human', text='<video>\\nWhat?'), Turn(role='gpt', text='A dog.'))
    """
    if not isinstance(conversation, list) or not conversation:
        raise RecordError("conversation is not a list of turns")
    turns = []
    for position, turn in enumerate(conversation):
        if not isinstance(turn, dict):
            raise RecordError("turn is not an object")
        name = turn.get("from")
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise RecordError(f"turn has an unknown role (known: {', '.join(ROLES)})")
        if role != ("gpt" if position % 2 else "human"):
            raise RecordError("turns do not alternate human, gpt")
        turns.append(Turn(role=role, text=check_text(turn.get("value"))))
    if len(turns) % 2:
        raise RecordError("last question has no answer")
    return tuple(turns)


def check_text(text: object) -> str:
    """The text, if it is one and can be written as UTF-8 (JSON can hold half a surrogate pair, Parquet cannot)."""
    if not isinstance(text, str):
        raise RecordError("text is not a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RecordError("text is not valid Unicode") from None
    return text


def media_path(root: Path, text: object) -> str:
    """The path of a medium as annotations write it, relative to the root; `RecordError` for one that leads out of it.

    "./v/a.mp4", "v//a.mp4", "v/x/../a.mp4", "v\\\\a.mp4" and an absolute path under the root name the same file.
    """
    path = check_text(text)
    if "://" in path and path.isprintable():
        raise RecordError("media path is a URL, and only files under the root are read")
    path = path.replace("\\", "/")
    path = posixpath.normpath(path) if path else path
    if path.startswith("/"):
        for folder in (str(root), os.path.realpath(root)):
            path = path.removeprefix(f"{folder}/")
    if not is_safe(path):
        raise RecordError("media path is unsafe")
    return path


def is_absent(value: object) -> bool:
    """True for what tables write where a record has no value: null, NaN, an empty text or list, a list of these."""
    if isinstance(value, list):
        return all(not isinstance(entry, list) and is_absent(entry) for entry in value)
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def whole_number(value: object) -> int | None:
    """The whole number that a table holds, as 3 or, in a column with gaps, as 3.0; None for any other value."""
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_EXACT_FLOAT:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def number_or_text(value: object) -> str:
    """A text, or a whole number as text: "3" for 3 and 3.0."""
    number = whole_number(value)
    return check_text(value) if number is None else str(number)


def record_id(value: object) -> str:
    """A record's own id as text, "" where it has none; ids are names here, never numbers."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str) and whole_number(value) is None:
        raise RecordError("id is neither text nor a whole number")
    return number_or_text(value)


def each_record(builder: ListingBuilder, records: Iterable[object], origin: str) -> Iterator[tuple[int, dict]]:
    """(position, record) of those that are objects; the others are refused."""
    for position, record in enumerate(records):
        if isinstance(record, dict):
            yield position, record
        elif isinstance(record, list):
            builder.reject("record is a list of values without their names", f"{origin} record {position}")
        else:
            builder.reject("record is not an object", f"{origin} record {position}")
