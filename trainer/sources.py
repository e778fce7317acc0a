"""Open the samples and tokens of a run: from a feature store, or from media encoded live.

The pipeline is imported only for live tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from featurestore import FeatureStore
from featurestore.clips import Sample
from featurestore.encoder_keys import keys_of
from mervcache.errors import StoreError, UserError, unknown_name
from trainer.config import RECORD_FILE, LiveRequest, TrainConfig, in_paper_order, used_encoders
from trainer.data.batches import named_samples
from trainer.data.tokens import StoreTokens, TokenSource
from trainer.model.projectors import parts_of
from trainer.runs import checkpoint
from trainer.runs.load import LoadedRun
from trainer.runs.run_record import RunRecord
from trainer.runs.stage_folders import last_stage
from trainer.runs.unbound import is_unbound, why_unreadable

TokenPlace = str | LiveRequest  # a store's path, or a live extraction
# Settings, and the folder of a run that may have begun with them -> its samples and tokens.
OpenTokens = Callable[[TrainConfig, Path | None], tuple[Sequence[Sample], TokenSource]]
NO_ENCODERS: Mapping[str, str] = MappingProxyType({})


def store_of(place: TokenPlace) -> str:
    """The path that a run's record keeps."""
    return place if isinstance(place, str) else ""


@contextmanager
def opened(place: TokenPlace, out: Path | None = None) -> Iterator[OpenTokens]:
    """What gives samples and tokens for a config; processes it has started end with the block.

    `out` is the run's folder: it keeps what a live source has found out about the media.
    """
    if isinstance(place, str):
        yield lambda config, run: open_store(
            place, config, snapshot=_snapshot_of(run), encoders=recorded_encoders(config, run)
        )
        return
    from trainer.end_to_end import live_source  # the pipeline, only where it runs

    with ExitStack() as stack:

        def open_live(config: TrainConfig, run: Path | None) -> tuple[list[Sample], TokenSource]:
            stack.close()  # the encoders of one stage go before those of the next come
            source = live_source(
                config,
                place.settings,
                place.config_file,
                out=out,
                is_trusted=place.is_trusted,
                recorded=tuple(recorded_encoders(config, run)),
            )
            return stack.enter_context(source)

        yield open_live


@contextmanager
def opened_for(
    run: LoadedRun, place: TokenPlace, weights: Sequence[str] = (), device: str = "auto"
) -> Iterator[tuple[list[Sample], TokenSource]]:
    """The samples of a place, and its tokens as a finished run reads them: those of its own trained encoders live."""
    config, trained = run.built.config, run.built.model.trained
    if isinstance(place, str):
        yield open_store_for(run, place)
        return
    from trainer.end_to_end import dataset_like  # the pipeline, only where it runs

    with dataset_like(config, run.record, place.settings, trained=trained, weights=weights, device=device) as found:
        yield found


def open_store(
    path: str, config: TrainConfig, *, snapshot: str = "", encoders: Mapping[str, str] = NO_ENCODERS
) -> tuple[list[Sample], StoreTokens]:
    """The samples the config asks for, and a source of the encoders it uses; at a snapshot, where it is there.

    `encoders` are those of `recorded_encoders`, found by identity and in the recorded order; without them and without a
    choice in the config all of the store are used, in the paper's order.
    """
    store = FeatureStore.open(path, snapshot=config.snapshot) if config.snapshot else _at_snapshot(path, snapshot)
    samples = named_samples(config.samples, store.sample_names, store.samples)
    stored = {identity.id: key for key, identity in store.encoders.items()}

    def key(encoder: str) -> str:
        return stored.get(encoders.get(encoder, "")) or _stored_key(store, encoder)

    used = used_encoders(config, list(encoders or config.encoders) or in_paper_order(store.encoders))
    source = StoreTokens(
        store,
        {encoder: key(encoder) for encoder in used},
        parts=parts_of(config.projector),
        clips_with=[key(encoder) for encoder in config.clips_with],
        max_windows=config.max_windows,
    )
    return samples, source


def recorded_encoders(config: TrainConfig, run: Path | None) -> dict[str, str]:
    """Encoder -> identity, in order, of the run that is resumed, else of the run that `config.init` names.

    Weights of a fusion may depend on the order, and runs of version 0.1 have another one than new runs. A store that
    has grown since may have other keys for these identities.
    """
    record = None
    if run is not None and checkpoint.newest(run) is not None:
        record = RunRecord.read(run)
    elif config.init is not None and not config.encoders:
        origin = last_stage(Path(config.init))
        if (origin / RECORD_FILE).is_file():  # `read_origin` reports one that is missing
            record = RunRecord.read(origin)
    return {} if record is None else {encoder: record.shapes[encoder].identity for encoder in record.encoder_order}


def open_store_for(run: LoadedRun, path: str, *, names: Sequence[str] = ()) -> tuple[list[Sample], StoreTokens]:
    """Samples of a store, all or those of these names, and a source of the tokens that a finished run reads.

    Encoders are found by identity: a store that holds one twice has other keys for it than the run was trained with.
    In the store it was trained on, wherever that is now, a run keeps to its settings `snapshot` and `clips_with`.
    """
    check_has_a_store(run)
    config, is_own = run.built.config, path == run.record.store
    if is_own:
        store = FeatureStore.open(path, snapshot=config.snapshot or None)
    else:
        store = _at_snapshot(path, config.snapshot)
        is_own = bool(config.snapshot) and store.snapshot == run.record.snapshot  # an id holds a digest of the content
    keys = {identity.id: key for key, identity in store.encoders.items()}
    wanted = {encoder: keys.get(shape.identity, encoder) for encoder, shape in run.record.shapes.items()}
    wanted = wanted or {key: key for key in store.encoders}  # text only: the clips of all encoders
    stored = {encoder: key for encoder, key in wanted.items() if key in store.encoders}
    if not stored:
        raise UserError(
            f"the run was trained on tokens of {', '.join(wanted)}, {path} holds {', '.join(store.encoders) or 'none'};"
            " use the store it was trained on, or extract them"
        )
    clips_with = config.clips_with if is_own else ()
    parts, windows = parts_of(config.projector), config.max_windows or 1
    source = StoreTokens(store, stored, parts=parts, clips_with=clips_with, max_windows=windows)
    check_identities(run, source)
    return named_samples(names, store.sample_names, store.samples), source


def _at_snapshot(path: str, snapshot: str) -> FeatureStore:
    """A store as it was when a run began with it, or as it is: a copy may hold its newest snapshot alone."""
    if snapshot:
        with suppress(StoreError):
            return FeatureStore.open(path, snapshot=snapshot)
    return FeatureStore.open(path)


def _snapshot_of(run: Path | None) -> str:
    """The snapshot that a run has begun with; none where there is no step to go on from."""
    if run is None or checkpoint.newest(run) is None:
        return ""
    return RunRecord.read(run).snapshot


def _stored_key(store: FeatureStore, encoder: str) -> str:
    """The store's key of an encoder; which encoders exist is known to the pipeline, not here."""
    if not keys_of(encoder, store.encoders):
        raise UserError(
            f"{unknown_name('encoder', encoder, store.encoders)}. This store has no {encoder} tokens; `merv-pipeline"
            f" encoders` lists what can be added, with `merv-pipeline extract ... --encoders {encoder}` and the"
            " settings the store was made with"
        )
    return store.encoder_key(encoder)


def check_has_a_store(run: LoadedRun) -> None:
    """Refuse a run that trained its encoders: no store holds their tokens."""
    if trained := run.built.config.train_encoders:
        raise UserError(
            f"the run also trained {', '.join(trained)}, so no store holds their tokens; without --store they are"
            " computed live, from the training media or from --dataset and --root"
        )


def check_identities(run: LoadedRun, source: TokenSource) -> None:
    """A model only understands tokens of the identities it was trained on; an unbound one wants sizes and frames."""
    check_has_a_store(run)
    for encoder, shape in run.record.shapes.items():
        found = source.shapes.get(encoder)
        if found is not None and is_unbound(shape):
            if reason := why_unreadable(run.record, encoder, found, source.facts.get(encoder, {})):
                raise UserError(reason)
        elif found is None or found.identity != shape.identity:
            raise UserError(
                f"the run was trained on {encoder} tokens of identity {shape.identity}, this source has"
                f" {found.identity if found else 'none'}; use the store it was trained on, or extract that identity"
            )
