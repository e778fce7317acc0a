"""Parity: do the encoders of this machine make the tokens that a store holds?

Comes in: a store, and where the weights are. Goes out: a `ParityRecord`, a row per encoder and kind. Each encoder is
built from its identity and must have it, so other weights are refused by their digest; then the canaries (or clips of
the store, with their media) go through decoding, resizing and the encoder in the group's own batch shape, are stored as
extraction stores them, and are compared with what is there. Digests of the frames tell a drift of decoding or resizing
from one of the encoder.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from featurestore.clips import KINDS
from featurestore.identity import FeatureIdentity
from featurestore.locate import Place
from featurestore.objects.base import Objects
from featurestore.objects.open import open_objects
from featurestore.quality import ParityRecord, ParityRow, now
from featurestore.records import maker_of
from featurestore.reference_clips import Canaries, read_canaries
from featurestore.store import FeatureStore
from featurestore.transfer.merge import read_clip_list
from featurestore.zarr_metadata import read_group
from mervcache.errors import StoreFormatError, UserError, unknown_name
from pipeline.certify.canaries import CLIPS, RENDERING, decode_canaries, encode_canaries
from pipeline.certify.parity_clips import check_clips, clips_by_kind
from pipeline.certify.parity_figures import compare
from pipeline.config import EncoderSettings, EngineSettings
from pipeline.summary import software_versions

if TYPE_CHECKING:
    from pipeline.decode.job import Decoded
    from pipeline.worker.engine import EncoderRun, Engine

MAX_PARAMETERS = 1 << 34  # that a stranger's identity may make us build


def check_parity(
    place: Place,
    *,
    encoders: Sequence[str] | None = None,
    weights: Mapping[str, str] | None = None,
    device: str | None = None,
    clips: str | Path | None = None,
    root: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ParityRecord:
    """Encode again and compare; `clips`, a file of clip ids of the store, takes the place of the canaries.

    `weights` is encoder -> SPEC, "" for all the others; by default what the store was made with.
    """
    store = FeatureStore.open(place)
    chosen = _chosen(store, encoders)
    listed = clips_by_kind(store, read_clip_list(clips)) if clips else None
    if listed is None:
        _refuse_without_canaries(place, store, chosen)
    with engine_without_encoders(device) as engine:
        check = _Check(place=place, store=store, engine=engine, weights=weights or {}, listed=listed, root=root)
        rows = [row for key, identity in chosen.items() for row in check.rows(key, identity, say)]
        device_name = _device_name(engine.device)
    return ParityRecord(
        time=now(),
        snapshot=store.snapshot,
        device=device_name,
        machine=platform.machine(),
        versions=software_versions(),
        rows=tuple(rows),
    )


def made_again(
    objects: Objects, kind: str, identity: FeatureIdentity, weights: Mapping[str, str], device: str | None
) -> Canaries:
    """A group's canaries as this machine makes them."""
    with engine_without_encoders(device) as engine:
        run = load_as_stored(objects, identity.encoder, identity, weights, engine.device)
        return _own_canaries(objects, kind, run, decode_canaries(engine, [run], kind))


@contextmanager
def engine_without_encoders(device: str | None) -> Iterator[Engine]:
    """A device and one decode process; encoders are loaded one at a time, by `load_as_stored`."""
    from pipeline.worker.engine import Engine  # torch and the models

    with closing(Engine(EngineSettings(encoders=(), device=device or "auto", decode_processes=1))) as engine:
        yield engine


@dataclass(frozen=True, kw_only=True)
class _Check:
    """What all encoders of one check have in common."""

    place: Place
    store: FeatureStore
    engine: Engine
    weights: Mapping[str, str]  # encoder -> SPEC, "" for all the others
    listed: Mapping[str, Sequence[str]] | None  # kind -> clips of the store; None: the canaries
    root: str | None  # of the clips' media, where it is not what the journal says

    def rows(self, key: str, identity: FeatureIdentity, say: Callable[[str], None]) -> list[ParityRow]:
        """Load one encoder and check it; a row for each kind of which there is anything to compare."""
        kinds = _kinds_with_canaries(self.store, identity) if self.listed is None else list(self.listed)
        if not kinds:
            say(f"{key}: no canaries, not checked")
            return []
        say(f"{key}: loading")
        run = load_as_stored(open_objects(self.place), key, identity, self.weights, self.engine.device)
        check = self._of_canaries if self.listed is None else self._of_clips
        return [row for kind in kinds if (row := check(run, key, kind)).clips]

    def _of_clips(self, run: EncoderRun, key: str, kind: str) -> ParityRow:
        return check_clips(self.place, self.engine, run, key, kind, self.listed[kind], root=self.root)

    def _of_canaries(self, run: EncoderRun, key: str, kind: str) -> ParityRow:
        objects = open_objects(self.place)
        theirs = read_canaries(objects, kind, run.identity)
        _refuse_other_pictures(theirs, key)
        decoded = decode_canaries(self.engine, [run], kind)
        _refuse_other_media(theirs, decoded, key)
        mine = _own_canaries(objects, kind, run, decoded)
        here = {clip.name: clip for clip in mine.clips}
        same = all(here[c.name].frames_sha256 == c.frames_sha256 for c in theirs.clips if c.name in here)
        row = compare(key, kind, run.identity, [(theirs.stored(c.name), mine.stored(c.name)) for c in theirs.clips])
        sha256 = self.store.canaries[f"{kind}/{run.identity.group_name}"]
        return replace(row, canaries=sha256, frames="equal" if same else "differ")


def _own_canaries(objects: Objects, kind: str, run: EncoderRun, decoded: Mapping[str, Decoded]) -> Canaries:
    """In the batch shape of the encoder's group."""
    return encode_canaries(run, kind, read_group(objects, kind, run.identity.group_name).batch_shape, decoded)


def _chosen(store: FeatureStore, encoders: Sequence[str] | None) -> dict[str, FeatureIdentity]:
    """Identities by key; a bare name means every identity of it."""
    for name in encoders or ():
        if not any(name in (key, key.split("@")[0]) for key in store.encoders):
            raise UserError(unknown_name("encoder", name, store.encoders))
    return {
        key: identity
        for key, identity in store.encoders.items()
        if encoders is None or key in encoders or key.split("@")[0] in encoders
    }


def _kinds_with_canaries(store: FeatureStore, identity: FeatureIdentity) -> list[str]:
    return [kind for kind in KINDS if f"{kind}/{identity.group_name}" in store.canaries]


def load_as_stored(
    objects: Objects, key: str, identity: FeatureIdentity, weights: Mapping[str, str], device: str
) -> EncoderRun:
    """The encoder that made a store's tokens; refused if what is loaded has another identity."""
    import torch

    from pipeline.worker.engine import EncoderRun

    made_with, threads = _made_with(objects, identity)
    own_weights = weights.get(identity.encoder, weights.get("", made_with))
    if threads and device == "cpu":
        torch.set_num_threads(threads)  # they decide the last bits of a sum
    settings = EncoderSettings.of_identity(identity, own_weights)
    _refuse_monsters(settings, key)
    run = EncoderRun(settings, device)
    if odd := run.identity.differences(identity):
        _refuse(key, own_weights, odd)
    return run


def _made_with(objects: Objects, identity: FeatureIdentity) -> tuple[str, int | None]:
    """(weights SPEC, threads) of the newest run that wrote to the group, else what the group itself says."""
    if maker := maker_of(objects, identity.group_name):
        given = maker.run["config"]["weights"]
        return given.get(maker.encoder, given.get("", "hub")), maker.threads
    kind = next(kind for kind in KINDS if identity.group_name in objects.list_names(kind))
    label = read_group(objects, kind, identity.group_name).weights
    return ("hub" if label == "pretrained" else label), None


def _refuse_monsters(settings: EncoderSettings, key: str) -> None:
    """An identity may be a stranger's, and a network is allocated before its weights can be compared."""
    sizes = settings.spec.architecture
    width, layers = sizes["hidden_size"], sizes["num_layers"]
    if layers * width * (4 * width + 2 * sizes["mlp_size"]) > MAX_PARAMETERS:
        raise StoreFormatError(f"{key}: {layers} layers of width {width} are more than any encoder has: not built")


def _refuse(key: str, weights: str, odd: Mapping[str, tuple]) -> None:
    if "weights_sha256" in odd:
        ours, theirs = (digest[:12] for digest in odd["weights_sha256"])
        raise UserError(
            f"{key}: the weights of {weights} have sha256 {ours}, the store's tokens were made with {theirs}: they are "
            f"other weights, so nothing is compared; name the right ones with --weights {key.split('@')[0]}=SPEC"
        )
    fields = "; ".join(f"{name} is {ours!r} here, {theirs!r} in the store" for name, (ours, theirs) in odd.items())
    raise UserError(f"{key}: this version builds another encoder than the identity says: {fields}")


def _refuse_without_canaries(place: Place, store: FeatureStore, chosen: Mapping[str, FeatureIdentity]) -> None:
    if not any(_kinds_with_canaries(store, identity) for identity in chosen.values()):
        raise UserError(
            f"{place} has no canaries of {', '.join(chosen) or 'any encoder'}: run its `merv-pipeline extract` again, "
            "which adds them where it made the tokens; or name clips of the store with --clips, and their --root"
        )


def _refuse_other_media(canaries: Canaries, decoded: Mapping[str, Decoded], key: str) -> None:
    for clip in canaries.clips:
        if clip.media_sha256 != decoded[clip.name].media_sha256:
            raise StoreFormatError(
                f"{key}: the canary {clip.name} is rendered to other bytes here: nothing is compared"
            )


def _refuse_other_pictures(canaries: Canaries, key: str) -> None:
    names = {clip.name for clip in canaries.clips}
    if canaries.rendering != RENDERING or not names <= set(CLIPS[canaries.kind]):
        raise UserError(
            f"{key}: its canaries are pictures of {canaries.rendering[:40]!r}, this version renders {RENDERING!r}; "
            "check it with a newer merv-pipeline"
        )


def _device_name(device: str) -> str:
    import torch

    return f"{device} {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else device
