"""Parity: do the encoders of this machine make the tokens that a store holds?

Comes in: a store, and where the weights are. Goes out: a `ParityRecord`, a row per encoder and kind. Each encoder is
built from its identity and must have it, so other weights are refused by their digest; then the canaries (or clips of
the store, with their media) go through decoding, resizing and the encoder in the group's own batch shape, are stored as
extraction stores them, and are compared with what is there. Digests of the frames tell a drift of decoding or resizing
from one of the encoder.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from featurestore.canaries import Canaries, read_canaries
from featurestore.clips import KINDS
from featurestore.errors import StoreFormatError, UserError, unknown_name
from featurestore.find import Place
from featurestore.groups import read_group
from featurestore.identity import FeatureIdentity
from featurestore.journal import maker_of
from featurestore.measurements import now
from featurestore.parity import ParityRecord, ParityRow
from featurestore.places.by_url import open_objects
from featurestore.places.objects import Objects
from featurestore.share.selection import read_clip_list
from featurestore.store import FeatureStore
from pipeline.certify.canaries import CLIPS, RENDERING, decode_canaries, encode_canaries
from pipeline.certify.parity_figures import compare
from pipeline.config import EncoderSettings, EngineSettings
from pipeline.summary import software_versions

if TYPE_CHECKING:
    from pipeline.engine import EncoderRun, Engine

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
    from pipeline.certify.parity_clips import check_clips, clips_by_kind
    from pipeline.engine import Engine  # torch and the models

    store, objects = FeatureStore.open(place), open_objects(place)
    chosen = _chosen(store, encoders)
    listed = clips_by_kind(store, read_clip_list(clips)) if clips else None
    if listed is None and not any(_kinds_with_canaries(store, identity) for identity in chosen.values()):
        raise UserError(
            f"{place} has no canaries of {', '.join(chosen) or 'any encoder'}: run its `merv-pipeline extract` again, "
            "which adds them where it made the tokens; or name clips of the store with --clips, and their --root"
        )
    rows: list[ParityRow] = []
    with closing(Engine(EngineSettings(encoders=(), device=device or "auto", decode_processes=1))) as engine:
        for key, identity in chosen.items():
            kinds = _kinds_with_canaries(store, identity) if listed is None else list(listed)
            if not kinds:
                say(f"{key}: no canaries, not checked")
                continue
            say(f"{key}: loading")
            run = load_encoder(objects, key, identity, weights or {}, engine.device)
            for kind in kinds:
                if listed is None:
                    row = _check_canaries(store, objects, engine, run, key, kind)
                else:
                    row = check_clips(place, engine, run, key, kind, listed[kind], root=root)
                rows += [row] if row.clips else []
        name = _device_name(engine.device)
    return ParityRecord(
        time=now(),
        snapshot=store.snapshot,
        device=name,
        machine=platform.machine(),
        versions=software_versions(),
        rows=tuple(rows),
    )


def made_again(
    objects: Objects, kind: str, identity: FeatureIdentity, weights: Mapping[str, str], device: str | None
) -> Canaries:
    """A group's canaries as this machine makes them."""
    from pipeline.engine import Engine  # torch and the models

    with closing(Engine(EngineSettings(encoders=(), device=device or "auto", decode_processes=1))) as engine:
        run = load_encoder(objects, identity.encoder, identity, weights, engine.device)
        decoded = decode_canaries(engine, [run], kind, identity.decode)
        return encode_canaries(run, kind, read_group(objects, kind, identity.group_name).batch_shape, decoded)


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


def load_encoder(
    objects: Objects, key: str, identity: FeatureIdentity, weights: Mapping[str, str], device: str
) -> EncoderRun:
    """The encoder as its identity says; refused where it is another one."""
    import torch

    from pipeline.engine import EncoderRun

    spec, threads = _made_with(objects, identity)
    spec = weights.get(identity.encoder, weights.get("", spec))
    if threads and device == "cpu":
        torch.set_num_threads(threads)  # they decide the last bits of a sum
    settings = EncoderSettings.of_identity(identity, spec)
    _refuse_monsters(settings, key)
    run = EncoderRun(settings, device)
    if odd := run.identity.differences(identity):
        _refuse(key, spec, odd)
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


def _refuse(key: str, spec: str, odd: Mapping[str, tuple]) -> None:
    if "weights_sha256" in odd:
        ours, theirs = (digest[:12] for digest in odd["weights_sha256"])
        raise UserError(
            f"{key}: the weights of {spec} have sha256 {ours}, the store's tokens were made with {theirs}: they are "
            f"other weights, so nothing is compared; name the right ones with --weights {key.split('@')[0]}=SPEC"
        )
    fields = "; ".join(f"{name} is {ours!r} here, {theirs!r} in the store" for name, (ours, theirs) in odd.items())
    raise UserError(f"{key}: this version builds another encoder than the identity says: {fields}")


def _check_canaries(
    store: FeatureStore, objects: Objects, engine: Engine, run: EncoderRun, key: str, kind: str
) -> ParityRow:
    theirs = read_canaries(objects, kind, run.identity)
    _refuse_other_pictures(theirs, key)
    decoded = decode_canaries(engine, [run], kind, run.identity.decode)
    mine = encode_canaries(run, kind, read_group(objects, kind, run.identity.group_name).batch_shape, decoded)
    for clip in theirs.clips:
        if clip.media_sha256 != decoded[clip.name].media_sha256:
            raise StoreFormatError(
                f"{key}: the canary {clip.name} is rendered to other bytes here: nothing is compared"
            )
    here = {clip.name: clip for clip in mine.clips}
    same = all(here[c.name].frames_sha256 == c.frames_sha256 for c in theirs.clips if c.name in here)
    row = compare(key, kind, run.identity, [(theirs.stored(c.name), mine.stored(c.name)) for c in theirs.clips])
    sha256 = store.canaries[f"{kind}/{run.identity.group_name}"]
    return replace(row, canaries=sha256, frames="equal" if same else "differ")


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
