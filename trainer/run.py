"""Runs: what the commands call. Opens a store or a live source, joins samples and tokens, trains or evaluates.

Everything heavy is imported here, so that the command line can be read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from featurestore import FeatureStore
from featurestore.errors import UserError, unknown_name
from featurestore.samples import Sample
from trainer.config import LiveRequest, TrainConfig, used_encoders
from trainer.data.batches import named_samples
from trainer.data.tokens import StoreTokens, TokenSource
from trainer.evaluate import Answer, answer_all, check_identities, questions, report
from trainer.loop.stages import describe_stages, train_stages
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
    beside: Sequence[Path] = (),
    split: str = "heldout",
    limit: int | None = None,
    batch_size: int = 16,
    best: bool = False,
) -> dict[str, Any]:
    """Answer the held-out questions with a run, and the same questions with every run beside it."""
    loaded = load_run(run, best=best)
    path = store or loaded.record.store
    if not path:
        raise UserError(f"{run} names no store of its own; give the one that holds the questions with --store")
    samples, source = open_store(path, loaded.built.config)
    check_identities(loaded, source)
    asked = questions(samples, source, split=split, has_visual=loaded.built.model.fusion is not None)[:limit]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    answers = list(answer_all(loaded.built, asked, source, batch_size=batch_size, device=device))
    others = {str(path): _other(path, asked, store, source, batch_size, device, best) for path in beside}
    result = report(loaded, answers, others)
    _keep_scores(run, result, ScoreSource(split=split, limit=limit, store=path, snapshot=source.snapshot))
    return result


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


def print_scores(result: dict[str, Any]) -> None:
    """A table on stdout: a line per category."""
    table = Table("questions about", "number", "accuracy", "chance", *result["beside"])
    others = [{row["category"]: row for row in rows} for rows in result["beside"].values()]
    for row in result["scores"]:
        cells = [f"{other[row['category']]['accuracy']:.2f}" for other in others]
        table.add_row(row["category"], str(row["questions"]), f"{row['accuracy']:.2f}", f"{row['chance']:.2f}", *cells)
    Console().print(table)


def _keep_scores(run: Path, result: dict[str, Any], source: ScoreSource) -> None:
    try:
        write_scores(last_stage(run), result, source)
    except OSError as error:
        Console(stderr=True).print(f"the scores were not kept in {run}: {error.strerror}", markup=False)


def _other(
    path: Path,
    asked: Sequence[Sample],
    store: str | None,
    source: TokenSource,
    batch_size: int,
    device: str,
    best: bool,
) -> list[Answer]:
    loaded = load_run(path, best=best)
    if loaded.built.model.fusion is not None:
        _, source = open_store(store or loaded.record.store, loaded.built.config)
        check_identities(loaded, source)
    return list(answer_all(loaded.built, asked, source, batch_size=batch_size, device=device))
