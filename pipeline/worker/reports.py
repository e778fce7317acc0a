"""Values that workers report to the driver: loaded encoders, computed blocks, probed clips.

They travel by Dask's pickle, and a block's also as JSON out of a child process (`isolate.py`). No torch here, because
the driver imports this module too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from featurestore.clips import Clip
from featurestore.identity import FeatureIdentity
from mervcache.console import Counts
from mervcache.logs import emit

DECODING = "decode (in its processes)"
COMPRESSING, COMMITTING = "compress (in its threads)", "commit (in its thread)"  # "commit" was a part of "total" once
PARALLEL_STAGES = (DECODING, COMPRESSING, COMMITTING)  # beside the encoders; the other stages add up to "total"
NOT_STAGES = ("total", *PARALLEL_STAGES)  # not counted as a worker's stages


@dataclass(frozen=True, kw_only=True)
class EncoderDescription:
    """An encoder as a worker loaded it."""

    identity: FeatureIdentity
    weights_label: str  # "pretrained" or "random:SEED"
    device: str
    threads: int  # of torch on the worker: part of what decides the last bits
    batch: Mapping[str, int] = field(default_factory=dict)  # kind -> clips per forward that its device holds
    load_s: float = 0.0
    fingerprint: str | None = None  # of the files that it was loaded from
    compiled: bool = False  # by torch.compile, which changes the last bits

    @property
    def journal_entry(self) -> dict[str, str | int]:
        """The encoder in a run's record: the group of its tokens, and what they were made on."""
        entry: dict[str, str | int] = {
            "group": self.identity.group_name,
            "device": self.device,
            "threads": self.threads,
        }
        return entry | ({"compiled": True} if self.compiled else {})


@dataclass(frozen=True, kw_only=True)
class BlockCounts:
    """Counts of a block, while it is computed and at its end."""

    clips: int  # computed or failed
    failed: int
    frames: int  # decoded
    bytes: int  # of the shards, as far as they are compressed
    halvings: int  # batches cut for lack of device memory
    seconds: Mapping[str, float]  # by stage

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @property
    def progress(self) -> Counts:
        """The same for the progress line."""
        return Counts(
            done=self.clips,
            failed=self.failed,
            amounts={"frames": self.frames, "MB": self.bytes / 1e6},
            seconds={name.removeprefix("encode:"): s for name, s in self.seconds.items() if name not in NOT_STAGES},
            notes={"batches halved": self.halvings},
        )


@dataclass(frozen=True, kw_only=True)
class EncoderWork:
    """What one encoder did in a block."""

    clips: int
    seconds: float  # of its forwards
    bytes: int  # of its shard


@dataclass(frozen=True, kw_only=True)
class BlockReport(BlockCounts):
    """A committed block: its counts, and what a summary adds up."""

    kind: str
    block: int
    reused: int  # cells (clip and encoder) copied from another store
    same_media: int = 0  # cells copied from clips of other datasets in this store that were made of the same bytes
    made: Mapping[str, EncoderWork]  # by encoder
    reasons: Mapping[str, int]  # why clips failed -> how many
    failures: Mapping[str, str] = field(default_factory=dict)  # clip id -> why it failed

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> BlockReport:
        made = {name: EncoderWork(**work) for name, work in record["made"].items()}
        return cls(**{**record, "made": made})

    def emit(self) -> None:
        """A JSON line per quarantined clip and one for the block, with `--log-json`; text has the progress line."""
        where = {"kind": self.kind, "block": self.block}
        for clip_id, reason in self.failures.items():
            emit("quarantined", level=logging.WARNING, **where, clip=clip_id, reason=reason)
        emit("block", **where, clips=self.clips, failed=self.failed, bytes=self.bytes, seconds=self.seconds)


@dataclass(frozen=True, kw_only=True)
class EncoderProbe:
    """What a probed clip costs with one encoder."""

    seconds: float  # per clip of a full batch; a forward that several share is the first one's
    stored_bytes: float  # the mean over the clips that were encoded together
    write_s: float = 0.0  # core seconds per clip, to compress its tokens


@dataclass(frozen=True, kw_only=True)
class ProbeRecord:
    """What a probed clip costs."""

    decode_s: float  # in a decode process
    wall_s: float  # on a worker that decodes while it encodes
    encoders: Mapping[str, EncoderProbe]
    worker: int = 0  # which of the probed workers it was
    media: tuple[Clip, str] | None = None  # the clip, and the sha256 of its media
    decoders: int = 1  # decode processes of that worker


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A few real clips decoded, encoded and compressed on one or several workers."""

    device: str
    startup_s: float  # until a worker has loaded the encoders
    identities: Mapping[str, FeatureIdentity]  # by encoder
    clips: Mapping[str, Sequence[ProbeRecord]]  # by kind; clips that cannot be decoded are left out
    batch: Mapping[str, int]  # clips per forward, by kind
    forwards: Sequence[Sequence[str]]  # the encoders, together where they share a forward
    workers: int = 1
