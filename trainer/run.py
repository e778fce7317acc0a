"""Runs: what the commands call. Opens a store or a live source, joins samples and tokens, trains or evaluates.

Everything heavy is imported here, so that the command line can be read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from featurestore import FeatureStore
from featurestore.errors import UserError, unknown_name
from featurestore.samples import Sample
from trainer.bar import Bar
from trainer.config import LISTING, LiveRequest, TrainConfig, used_encoders
from trainer.data.batches import named_samples
from trainer.data.tokens import StoreTokens, TokenSource
from trainer.evaluate import Answer, answer_all, check_identities, questions, report, showable
from trainer.loop.stages import describe_stages, train_stages
from trainer.model.build import LoadedRun
from trainer.model.resamplers import parts_of
from trainer.recipes import Stages
from trainer.runs.chain import last_stage
from trainer.runs.load import load_run
from trainer.runs.scores import ScoreSource, write_scores

Place = str | LiveRequest  # where tokens come from: a store's path, or what is encoded on the spot
OpenTokens = Callable[[TrainConfig], tuple[list[Sample], TokenSource]]


def dry_run_stages(stages: Stages, place: Place) -> dict[str, Any]:
    """All that is known before the first step of every stage."""
    with opened(place) as open_tokens:
        return describe_stages(stages, open_tokens, store=store_of(place))


def train_in_stages(
    stages: Stages, place: Place, out: Path, *, resume: bool, only: str | None = None
) -> list[dict[str, Any]]:
    """Train a recipe's stages to their end, or `only` the one that is named."""
    with opened(place, out) as open_tokens:
        results = train_stages(stages, open_tokens, out, store=store_of(place), resume=resume, only=only)
    return [asdict(result) for result in results]


@contextmanager
def opened(place: Place, out: Path | None = None) -> Iterator[OpenTokens]:
    """What gives samples and tokens for a config; processes it has started end with the block.

    `out` is the run's folder: it keeps what a live source has found out about the media.
    """
    if isinstance(place, str):
        yield lambda config: open_store(place, config)
        return
    from trainer.end_to_end import live_source  # the pipeline, only where it runs

    with ExitStack() as stack:

        def open_live(config: TrainConfig) -> tuple[list[Sample], TokenSource]:
            stack.close()  # the encoders of one stage go before those of the next come
            source = live_source(config, place.settings, place.config_file, out=out, is_trusted=place.is_trusted)
            return stack.enter_context(source)

        yield open_live


def store_of(place: Place) -> str:
    """The path that a run's record keeps."""
    return place if isinstance(place, str) else ""


def evaluate_run(
    run: Path,
    store: str | None,
    *,
    dataset: str | None = None,
    root: str | None = None,
    weights: Sequence[str] = (),
    beside: Sequence[Path] = (),
    split: str = "heldout",
    limit: int | None = None,
    batch_size: int = 16,
    best: bool = False,
) -> dict[str, Any]:
    """Answer the held-out questions with a run, and the same questions with every run beside it.

    They are those of a store, or of a dataset whose media are decoded and encoded now; by default of the one that the
    run was trained on.
    """
    loaded = load_run(run, best=best)
    place = questions_place(run, loaded, store, {"dataset": dataset, "root": root})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with opened_for(loaded, place, weights, device) as (samples, source):
        asked = questions(samples, source, split=split, has_visual=loaded.built.model.fusion is not None)[:limit]
        answers = _answers(loaded, asked, source, batch_size, device)
        state = source.snapshot if isinstance(place, str) else f"live-{_digest(asked, source)[:12]}"
    others = {}
    for path in beside:
        other = load_run(path, best=best)
        with opened_for(other, _place_beside(other, place, store), weights, device) as (_, source):
            _check_asked(path, other, asked, source)
            others[str(path)] = _answers(other, asked, source, batch_size, device)
    result = report(loaded, answers, others)
    named = place if isinstance(place, str) else place.settings["dataset"]
    _keep_scores(run, result, ScoreSource(split=split, limit=limit, store=named, snapshot=state))
    return result


def _answers(
    run: LoadedRun, asked: Sequence[Sample], source: TokenSource, batch_size: int, device: str
) -> list[Answer]:
    with Bar("questions", total=len(asked)) as bar:
        return list(bar.over(answer_all(run.built, asked, source, batch_size=batch_size, device=device)))


def questions_place(run: Path, loaded: LoadedRun, store: str | None, media: Mapping[str, str | None]) -> Place:
    """Where the questions are and their clips' tokens come from: as asked, else as in the run's training."""
    given = {name: value for name, value in media.items() if value is not None}
    if store is not None and given:
        raise UserError(
            f"tokens are read from a store or made on the spot: give --store or --{', --'.join(given)}, not both"
        )
    record = loaded.record
    if store is not None:
        return store
    if record.store and not given and not loaded.built.config.train_encoders:
        return record.store
    known = {name: value for name, value in (record.live or {}).items() if name in LISTING}
    if given.get("dataset", known.get("dataset")) != known.get("dataset"):
        known = {}
    if "dataset" not in {**known, **given}:
        raise UserError(
            f"{run} names no store of its own; give the one that holds the questions with --store, or --dataset and"
            " --root to decode and encode their clips now"
        )
    return LiveRequest(settings={**known, **given})


@contextmanager
def opened_for(
    loaded: LoadedRun, place: Place, weights: Sequence[str] = (), device: str = "auto"
) -> Iterator[tuple[list[Sample], TokenSource]]:
    """The samples of a place, and its tokens as a finished run reads them: those of its own trained encoders live."""
    config, model = loaded.built.config, loaded.built.model
    if isinstance(place, str):
        samples, source = open_store(place, config)
        check_identities(loaded, source)
        yield samples, source
        return
    from trainer.end_to_end import dataset_like  # the pipeline, only where it runs

    media, trained = place.settings, model.trained
    with dataset_like(config, loaded.record, media, trained=trained, weights=weights, device=device) as found:
        yield found


def _place_beside(other: LoadedRun, place: Place, store: str | None) -> Place:
    """Where another run finds the clips of the same questions."""
    record = other.record
    if isinstance(place, str) and other.built.config.train_encoders and record.live:
        return LiveRequest(settings={name: value for name, value in record.live.items() if name in LISTING})
    is_theirs = store is None and isinstance(place, str) and other.built.model.fusion is not None
    return record.store or place if is_theirs else place


def _check_asked(path: Path, other: LoadedRun, asked: Sequence[Sample], source: TokenSource) -> None:
    found = showable(asked, source, has_visual=other.built.model.fusion is not None)
    if missing := len(asked) - len(found):
        raise UserError(
            f"{path} cannot be asked the same questions: it has no tokens of the clips of {missing} of {len(asked)};"
            " name one place for all runs, with --store or with --dataset and --root"
        )


def _digest(asked: Sequence[Sample], source: TokenSource) -> str:
    """Names what was asked about, and the media where they were looked at."""
    return source.data_digest({sample.clip_id for sample in asked if sample.clip_id is not None}, asked)


def open_store(path: str, config: TrainConfig) -> tuple[list[Sample], StoreTokens]:
    """The samples the config asks for, and a source of the encoders it uses."""
    store = FeatureStore.open(path)
    samples = named_samples(config.samples, store.sample_names, store.samples)
    _check_stored(config.encoders, list(store.encoders))
    used = used_encoders(config, list(store.encoders))
    return samples, StoreTokens(store, used, parts=parts_of(config.projector))


def _check_stored(wanted: Sequence[str], stored: Sequence[str]) -> None:
    """Refuse an encoder without tokens; which encoders exist is known to the pipeline, not here."""
    if missing := [name for name in wanted if name not in stored]:
        raise UserError(
            f"{unknown_name('encoder', missing[0], stored)}. This store has no {missing[0]} tokens; `merv-pipeline"
            f" encoders` lists what can be added, with `merv-pipeline extract ... --encoders {missing[0]}` and the"
            " settings the store was made with"
        )


def _keep_scores(run: Path, result: dict[str, Any], source: ScoreSource) -> None:
    try:
        write_scores(last_stage(run), result, source)
    except OSError as error:
        Console(stderr=True).print(f"the scores were not kept in {run}: {error.strerror}", markup=False)
