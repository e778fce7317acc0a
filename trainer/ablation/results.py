"""Answers of a sweep's runs, checked: the same questions everywhere, one protocol, one snapshot.

Runs come in blocks that are never mixed: retrained; post-hoc, a finished run scored with encoders masked; one-shot, a
run that was trained with masks; and one-shot grids, a run that was trained at several numbers of tokens. A run without
answers is missing, with the reason; answers that cannot be compared are an error. Imports no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore import FeatureStore
from mervcache.errors import MervCacheError, UserError
from mervcache.files import load_json
from trainer.ablation.sweep import NESTED, NOT_COMPARED, ONE_SHOT, RETRAINED, SWEEP_FILE, read_sweep, resume_command
from trainer.config import RECORD_FILE
from trainer.runs.score_files import grid_scores_file, masked_scores_file, scores_file
from trainer.runs.stage_folders import last_stage

POST_HOC = "post-hoc"
BLOCKS = (RETRAINED, POST_HOC, ONE_SHOT, NESTED)
SUBSET_BLOCKS = (RETRAINED, POST_HOC, ONE_SHOT)  # that have several subsets of the encoders
LIKELIHOOD = "likelihood"  # protocol: the option with the best mean log-likelihood is the answer
CONDITIONS = ("protocol", "template")  # of scores, where they name them: equal in all runs
TIE_TOLERANCE = 1e-6  # relative, as `trainer/model/multiple_choice.py` has it
NO_SETTING = ("encoders", "seed", "method", "nested_grids", *NOT_COMPARED)  # of a run's entry; the rest are its setting
VISUAL_SETTING = ("fusion", "projector", "tokens_per_frame")  # mean nothing without encoders

Subset = tuple[str, ...]  # encoders in the order of the sweep; (): text only


@dataclass(frozen=True)
class Setting:
    """What answers share that differ in encoders and seed only."""

    values: tuple[tuple[str, Any], ...]  # fusion, projector, tokens_per_frame, then what else the sweep varies

    @classmethod
    def of(cls, entry: Mapping[str, Any], **changes: Any) -> Setting:
        """The setting of a run's entry in the sweep's record."""
        return cls(tuple((name, value) for name, value in {**entry, **changes}.items() if name not in NO_SETTING))

    @classmethod
    def all_of(cls, entry: Mapping[str, Any]) -> list[Setting]:
        """Those that a run has answers at: one, or one for each of its nested grids."""
        return [cls.of(entry, tokens_per_frame=tokens) for tokens in entry.get("nested_grids") or ()] or [cls.of(entry)]

    def get(self, name: str) -> Any:
        return dict(self.values).get(name)

    def without(self, *names: str) -> Setting:
        return Setting(tuple((name, value) for name, value in self.values if name not in names))

    def __str__(self) -> str:
        parts = []
        for name, value in self.values:
            if name in ("fusion", "projector"):
                parts += [str(value)] if value else []  # of a text-only run: none
            elif name == "tokens_per_frame":
                parts.append("stored grid" if value is None else f"{value} token{'s'[: value != 1]} per frame")
            elif (name, value) != ("rate", 1.0):
                parts.append(f"{name} {value}")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A place in the design: one subset of encoders, at one setting, with one seed."""

    block: str  # of BLOCKS
    setting: Setting
    subset: Subset
    seed: int
    run: str  # name of the run that answers, or would

    def __str__(self) -> str:
        if self.block == NESTED:
            return f"{self.run}, {self.setting.get('tokens_per_frame')} tokens per frame"
        masked = "" if self.block == RETRAINED else f", encoders left: {subset_name(self.subset)}"
        return f"{self.run}{masked}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """A run's answers in the order of `Questions`."""

    credit_Q: NDArray[np.float64]  # 1 right, 0 wrong or unreadable, 1/k where the right option ties with k - 1 others
    margin_Q: NDArray[np.float64] | None  # log-likelihood of the right option above the best other; None: not scored
    is_unreadable_Q: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What every run was asked."""

    sample_ids: tuple[str, ...]
    categories: tuple[str, ...]
    num_options: tuple[int, ...]
    correct: tuple[int, ...]
    videos: tuple[str, ...] = ()  # dataset and path of the media: several clips may be spans of one video

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def chance(self) -> float:
        return sum(1 / n for n in self.num_options) / len(self)


@dataclass(frozen=True, kw_only=True)
class Results:
    """A sweep's answers by member, and which are missing why."""

    folder: Path
    record: Mapping[str, Any]  # sweep.json, with the protocol of the scores
    encoders: tuple[str, ...]
    questions: Questions
    answers: Mapping[Member, Answers]
    missing: Mapping[Member, str]  # planned, without answers -> reason
    frame_rules: Mapping[str, str]  # encoder -> how its frames were chosen
    resume: str  # command that computes what is missing
    notes: tuple[str, ...] = field(default=())


def subset_name(subset: Iterable[str]) -> str:
    """`languagebind+dinov2`, or `text-only`."""
    return "+".join(subset) or "text-only"


def read_results(folder: Path, *, store: str | None = None) -> Results:
    """Read a sweep's scores; `store` is where its store is now, if that has moved.

    Raises UserError for runs that cannot be compared: other questions, another protocol or snapshot, broken scores.
    """
    folder = Path(folder)
    record = read_sweep(folder)
    encoders = tuple(record["encoders"])
    reader = _Reader(record, encoders, resume_command(folder))
    for name, entry in record["runs"].items():
        reader.read_run(name, entry, folder / "runs" / name)
    expected = record.get("num_questions")
    if reader.questions is not None and expected is not None and len(reader.questions) != expected:
        raise UserError(
            f"the runs of {folder} answer {len(reader.questions)} questions, {SWEEP_FILE} names {expected}; score them"
            f" again with {resume_command(folder)}"
        )
    return reader.results(folder, store)


def read_run_results(
    folder: Path, encoders: Subset, entry: Mapping[str, Any], conditions: Mapping[str, Any], *, store: str | None = None
) -> Results:
    """One run's own scores and those with masks, as a sweep of that run alone.

    `entry` is what a sweep's record would say of it, `conditions` name its split and the protocol of its scores.
    """
    folder = Path(folder)
    name = folder.resolve().name
    record = {"encoders": list(encoders), **conditions, "runs": {name: dict(entry)}}
    command = {ONE_SHOT: "mask", NESTED: "grids"}.get(entry["method"], "run")
    options = f"--checkpoint {folder} --split {conditions['split']} --protocol {conditions['protocol']}"
    reader = _Reader(record, encoders, f"merv-eval {command} {options}")
    reader.read_run(name, entry, folder)
    return reader.results(folder, store)


class _Reader:
    """Collects answers, and checks each against the first."""

    def __init__(self, record: Mapping[str, Any], encoders: tuple[str, ...], resume: str) -> None:
        self._record, self._encoders, self._resume = record, encoders, resume
        self.conditions = {name: record[name] for name in CONDITIONS if name in record}  # else of the first scores
        self.questions: Questions | None = None
        self._first = ""  # the run that the questions were read from
        self.clips: dict[str, str | None] = {}  # sample id -> clip id, where answers name it
        self.answers: dict[Member, Answers] = {}
        self.missing: dict[Member, str] = {}
        self.frame_rules: dict[str, str] = {}
        self.notes: list[str] = []

    def results(self, folder: Path, store: str | None) -> Results:
        """All that was read; UserError where there are no answers at all."""
        if self.questions is None:
            reasons = "; ".join(f"{n} x {reason}" for reason, n in Counter(self.missing.values()).items())
            raise UserError(f"{folder} has no scored run yet ({reasons}); run {self._resume}")
        return Results(
            folder=folder,
            record={"protocol": LIKELIHOOD, **self.conditions, **self._record},
            encoders=self._encoders,
            questions=_with_videos(self.questions, self.clips, self._record, store),
            answers=self.answers,
            missing=self.missing,
            frame_rules=self.frame_rules,
            resume=self._resume,
            notes=tuple(self.notes),
        )

    def read_run(self, name: str, entry: Mapping[str, Any], folder: Path) -> None:
        """The run's own scores, and those with masks."""
        subset = self._ordered(entry["encoders"])
        member = Member(block=entry["method"], setting=Setting.of(entry), subset=subset, seed=entry["seed"], run=name)
        folder = last_stage(folder)
        split = self._record["split"]
        protocol = self._record.get("protocol", LIKELIHOOD)
        masked = masked_scores_file(folder, split, protocol=protocol)
        step, reason = self._check_finished(folder, entry)
        if member.block == RETRAINED:
            path = scores_file(folder, split, protocol=protocol)
            found, unscored = self._read_scores(path, step, "it is not scored")
            if reason or found is None:
                self.missing[member] = reason or unscored
            else:
                self.answers[member] = self._parse(found.get("answers"), str(path))
        if member.block == NESTED:
            self._read_grids(member, entry, grid_scores_file(folder, split, protocol=protocol), step, reason)
            return
        if subset and subset == self._encoders:
            self._read_masked(member, masked, step, reason)
        elif masked.is_file() or member.block == ONE_SHOT:
            self.notes.append(
                f"The masked scores of {name} are left out: it has encoders {subset_name(subset)}, the sweep has"
                f" {subset_name(self._encoders)}."
            )

    def _ordered(self, names: Iterable[str]) -> Subset:
        names = set(names)
        return tuple(encoder for encoder in self._encoders if encoder in names)

    def _check_finished(self, folder: Path, entry: Mapping[str, Any]) -> tuple[int, str | None]:
        """The run's last step, and why it has none; a run that is scored untrained has step 0."""
        if not entry.get("is_trained", True):
            return 0, None
        path = folder / RECORD_FILE
        if not path.is_file():
            return 0, "it has not begun"
        run = load_json(path.read_bytes(), str(path))
        if not isinstance(run, dict) or not isinstance(run.get("num_steps"), int):
            raise UserError(f"{path} is no record of a run; remove {folder} and run {self._resume}")
        for encoder, facts in (run.get("encoders") or {}).items():
            identity = facts.get("identity") or {}
            if "frame_rule" in identity:
                self.frame_rules[encoder] = f"{identity.get('num_frames')} frames by {identity['frame_rule']}"
        return run["num_steps"], None

    def _read_scores(self, path: Path, step: int, absent: str) -> tuple[dict[str, Any] | None, str]:
        """A file of scores on the sweep's questions at the run's last step; or None, and why there is none yet."""
        if not path.is_file():
            return None, absent
        record = load_json(path.read_bytes(), str(path))
        if not isinstance(record, dict) or not {"split", "snapshot", "step"} <= record.keys():
            raise UserError(f"{path} holds no scores of this version; remove it and score the run again")
        wanted = {name: self._record[name] for name in ("split", "snapshot") if name in self._record}
        for name in (*wanted, *CONDITIONS):
            if name in CONDITIONS and name not in record:
                continue  # written before there was a choice
            value = wanted[name] if name in wanted else self.conditions.setdefault(name, record[name])
            if record.get(name) != value:
                raise UserError(
                    f"{path} cannot be compared: its {name} is {record.get(name)!r}, the sweep's is {value!r}; remove"
                    f" it and run {self._resume}"
                )
        if record.get("limit") is not None:
            raise UserError(f"{path} is about the first {record['limit']} questions only; score the run on all of them")
        if record["step"] != step:
            return None, f"its scores are of step {record['step']}, its last one is {step}"
        return record, ""

    def _read_masked(self, member: Member, path: Path, step: int, reason: str | None) -> None:
        block = POST_HOC if member.block == RETRAINED else ONE_SHOT
        if block == POST_HOC and (reason or not path.is_file()):
            return  # no sweep plans these: they are there or not
        subsets = [
            tuple(e for i, e in enumerate(self._encoders) if mask >> i & 1) for mask in range(1 << len(self._encoders))
        ]
        places = {
            s: Member(block=block, setting=member.setting, subset=s, seed=member.seed, run=member.run) for s in subsets
        }
        record, unscored = self._read_scores(path, step, "it is not scored with masks")
        if reason or record is None:
            self.missing |= dict.fromkeys(places.values(), reason or unscored)
            return
        if record.get("method") != block:
            raise UserError(
                f"{path} has method {record.get('method')!r}, that of a {member.block} run is {block!r}; the two are"
                " never mixed"
            )
        if not isinstance(record.get("subsets"), dict):
            raise UserError(f"{path} has no answers by subset; remove it and score the run with masks again")
        given = {}
        for key, answers in record["subsets"].items():
            names = [name for name in key.split("+") if name]
            if unknown := [name for name in names if name not in self._encoders]:
                raise UserError(f"{path} masks encoder {unknown[0]!r}, the sweep has {', '.join(self._encoders)}")
            given[self._ordered(names)] = self._parse(answers, f"{path}, {subset_name(names)}")
        for subset, place in places.items():
            if subset in given:
                self.answers[place] = given[subset]
            else:
                self.missing[place] = "its masked scores lack this subset"

    def _read_grids(self, member: Member, entry: Mapping[str, Any], path: Path, step: int, reason: str | None) -> None:
        record, unscored = self._read_scores(path, step, "it is not scored at its grids")
        if record is not None and not isinstance(record.get("grids"), dict):
            raise UserError(f"{path} has no answers by grid; remove it and score the run's grids again")
        for setting in Setting.all_of(entry):
            place, tokens = replace(member, setting=setting), str(setting.get("tokens_per_frame"))
            if reason or record is None:
                self.missing[place] = reason or unscored
            elif tokens in record["grids"]:
                self.answers[place] = self._parse(record["grids"][tokens], f"{path}, {tokens} tokens per frame")
            else:
                self.missing[place] = "its scores lack this grid"

    def _parse(self, answers: Any, where: str) -> Answers:
        """Answers in the order of the questions; the first ones define what the questions are."""
        if not isinstance(answers, list) or not answers:
            raise UserError(f"{where} holds no answers; score the run again")
        protocol = self.conditions.get("protocol", LIKELIHOOD)
        parsed = [_parse_answer(answer, where, protocol) for answer in answers]
        by_id = {one.sample_id: one for one in parsed}
        if len(by_id) < len(parsed):
            twice = next(name for name, n in Counter(one.sample_id for one in parsed).items() if n > 1)
            raise UserError(f"{where} answers question {twice!r} twice")
        if self.questions is None:
            self._first = where
            self.questions = Questions(
                sample_ids=tuple(by_id),
                categories=tuple(one.category for one in parsed),
                num_options=tuple(one.num_options for one in parsed),
                correct=tuple(one.correct for one in parsed),
            )
        self.clips |= {one.sample_id: one.clip_id for one in parsed if one.has_clip}
        return self._align(by_id, where)

    def _align(self, by_id: Mapping[str, _Answer], where: str) -> Answers:
        asked = self.questions
        assert asked is not None
        if differing := by_id.keys() ^ set(asked.sample_ids):
            raise UserError(
                f"{where} and {self._first} answer different questions ({len(by_id)} and {len(asked)}); only one of"
                f" them has {', '.join(sorted(differing)[:3])}. Runs of one sweep answer one list: remove the scores"
                f" and run {self._resume}"
            )
        ordered = [by_id[name] for name in asked.sample_ids]
        for one, options, correct in zip(ordered, asked.num_options, asked.correct, strict=True):
            if (one.num_options, one.correct) != (options, correct):
                raise UserError(
                    f"question {one.sample_id!r} has {one.num_options} options, {one.correct} right in {where}, but"
                    f" {options} options, {correct} right in {self._first}"
                )
        margins = [one.margin for one in ordered]
        if 0 < sum(margin is None for margin in margins) < len(margins):
            lacking = next(one.sample_id for one in ordered if one.margin is None)
            raise UserError(f"{where} has scores of some questions only, none of {lacking!r}; score the run again")
        return Answers(
            credit_Q=np.array([one.credit for one in ordered]),
            margin_Q=None if margins[0] is None else np.array(margins),
            is_unreadable_Q=np.array([one.is_unreadable for one in ordered]),
        )


@dataclass(frozen=True, kw_only=True)
class _Answer:
    sample_id: str
    category: str
    num_options: int
    correct: int
    credit: float
    margin: float | None
    is_unreadable: bool
    clip_id: str | None
    has_clip: bool


def _parse_answer(answer: Any, where: str, protocol: str) -> _Answer:
    try:
        name, options, correct = str(answer["sample_id"]), answer["num_options"], answer["correct"]
        predicted, scores = answer["predicted"], answer.get("scores")
        if not (isinstance(options, int) and options >= 2 and isinstance(correct, int) and 0 <= correct < options):
            raise ValueError(f"option {correct!r} of {options!r} is right")
        if not (predicted is None or (isinstance(predicted, int) and predicted < options)):
            raise ValueError(f"predicted is {predicted!r} of {options} options")
        if not scores and protocol == LIKELIHOOD:
            raise ValueError("scores are missing")
        if scores and (len(scores) != options or not all(map(math.isfinite, scores))):
            raise ValueError(f"scores are {scores}, {options} finite ones are needed")
        is_unreadable = predicted is None or predicted < 0
        credit = 0.0 if predicted is None or is_unreadable else _credit(answer, predicted, correct, scores, protocol)
        if not 0 <= credit <= 1:
            raise ValueError(f"credit is {credit}")
    except KeyError as error:
        raise UserError(f"{where} has an answer without {error}; score the run again") from error
    except (TypeError, ValueError, AttributeError) as error:
        named = answer.get("sample_id") if isinstance(answer, dict) else answer
        raise UserError(f"{where}, question {named!r}: {error}; score the run again") from error
    return _Answer(
        sample_id=name,
        category=str(answer.get("category") or ""),
        num_options=options,
        correct=correct,
        credit=credit,
        margin=scores[correct] - max(s for i, s in enumerate(scores) if i != correct) if scores else None,
        is_unreadable=is_unreadable,
        clip_id=answer.get("clip_id"),
        has_clip="clip_id" in answer,
    )


def _credit(
    answer: Mapping[str, Any], predicted: int, correct: int, scores: Sequence[float] | None, protocol: str
) -> float:
    """As recorded, else 1/k where the right option is one of k equally good ones."""
    if "credit" in answer:
        return float(answer["credit"])
    chosen = {predicted, *answer.get("tied", ())}
    if protocol == LIKELIHOOD and scores and "tied" not in answer:
        chosen = {i for i, score in enumerate(scores) if math.isclose(score, max(scores), rel_tol=TIE_TOLERANCE)}
    return (correct in chosen) / len(chosen)


def _with_videos(
    questions: Questions, clips: Mapping[str, str | None], record: Mapping[str, Any], store: str | None
) -> Questions:
    """The questions with the video of each: from the answers, else from the store's samples.

    A question without a clip, or whose clip nothing names, would be a cluster of its own and make intervals too short:
    the second is an error.
    """
    clips = dict(clips)
    if unknown := [name for name in questions.sample_ids if name not in clips]:
        path = store or record.get("store")
        try:
            opened = FeatureStore.open(str(path), snapshot=record.get("snapshot"))
            stored = [(sample.sample_id, sample.clip_id) for sample in opened.samples()]
        except MervCacheError as error:
            raise UserError(
                f"the videos of the questions are read from the store, and {path} cannot be opened: {error}. Give the"
                " store's place now with --store"
            ) from error
        wanted = set(unknown)
        for name, clip in stored:
            if name in wanted and clips.setdefault(name, clip) != clip:
                raise UserError(f"question {name!r} is about {clips[name]} and {clip} in {path}: its id is not unique")
        if unknown := [name for name in unknown if name not in clips]:
            raise UserError(
                f"{len(unknown)} of {len(questions)} questions are not in {path} at snapshot {record.get('snapshot')},"
                f" among them {unknown[0]!r}; give the store of the sweep with --store"
            )
    videos = tuple(_video(name, clips[name]) for name in questions.sample_ids)
    return Questions(**{**vars(questions), "videos": videos})


def _video(sample_id: str, clip_id: str | None) -> str:
    """The media of a clip; a text-only question is a cluster of its own."""
    return f"text-only question {sample_id}" if clip_id is None else video_of(clip_id)


def video_of(clip_id: str) -> str:
    """Dataset and path of a clip's media, without its span."""
    return clip_id.partition("#")[0]
