"""The probe: a few real clips decoded, encoded and compressed on a worker, for the forecast.

Comes in: engine settings and some clips per kind. Goes out: a `Probe`, seconds and bytes per clip and encoder. Clips
that cannot be decoded are left out: they count as failures, not as time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from featurestore.clips import Clip
from featurestore.identity import FeatureIdentity
from featurestore.reader import encode_row
from featurestore.storage_dtypes import OverflowedTokens, to_stored
from featurestore.zarr_metadata import array_specs
from mervcache.errors import MediaError
from pipeline.config import EngineSettings
from pipeline.decode.job import Decoded
from pipeline.worker.engine import EncoderRun, Engine, decode_job, encode_batch, reporting_engine
from pipeline.worker.reports import EncoderProbe, Probe, ProbeRecord


def probe_clips(
    settings: EngineSettings,
    root: str,
    chosen: Mapping[str, Sequence[Clip]],
    batch: Mapping[str, int],
) -> Probe:
    """Load the encoders and run the chosen clips through them; `batch` is kind -> clips per forward, where given."""
    started = time.monotonic()
    engine = reporting_engine(settings)
    startup_s = time.monotonic() - started
    sizes = {kind: batch.get(kind) or engine.batch_of(kind) for kind in chosen}
    return Probe(
        device=engine.device,
        startup_s=startup_s,
        identities={name: run.identity for name, run in engine.encoders.items()},
        clips={kind: _probe_kind(engine, root, kind, clips, sizes[kind]) for kind, clips in chosen.items()},
    )


def _probe_kind(engine: Engine, root: str, kind: str, clips: Sequence[Clip], batch: int) -> list[ProbeRecord]:
    """One forward of each encoder per batch: at full size on a CPU a forward is half a minute, so none is repeated."""
    decoded = [result for clip in clips if (result := _decode(engine, root, clip)) is not None]
    if engine.device != "cpu" and decoded:
        for run in engine.encoders.values():
            _probe_encoder(run, kind, decoded[:1], batch)  # the first forward on a device picks kernels
    records = []
    for start in range(0, len(decoded), batch):
        together = decoded[start : start + batch]
        encoders = {name: _probe_encoder(run, kind, together, batch) for name, run in engine.encoders.items()}
        records += [_record(engine, clip, encoders) for clip in together]
    return records


def _decode(engine: Engine, root: str, clip: Clip) -> Decoded | None:
    try:
        return engine.pool.submit(decode_job(root, clip, engine.encoders.values())).result()
    except MediaError:
        return None


def _record(engine: Engine, decoded: Decoded, encoders: Mapping[str, EncoderProbe]) -> ProbeRecord:
    encode_s = sum(probed.seconds for probed in encoders.values())
    # Decoding runs beside the encoders: it costs wall time only where it is the slower of the two.
    wall_s = max(encode_s, decoded.seconds / engine.num_decoders)
    return ProbeRecord(decode_s=decoded.seconds, wall_s=wall_s, encoders=encoders)


def _probe_encoder(run: EncoderRun, kind: str, together: Sequence[Decoded], batch: int) -> EncoderProbe:
    """Encode these clips in one forward of a full batch."""
    frames = {slot: decoded.frames[run.view] for slot, decoded in enumerate(together)}
    started = time.perf_counter()
    arrays, _ = encode_batch(run, frames, range(batch))
    seconds = (time.perf_counter() - started) / batch
    sizes = [_stored_bytes(run.identity, kind, {name: a[slot] for name, a in arrays.items()}) for slot in frames]
    return EncoderProbe(seconds=seconds, stored_bytes=sum(sizes) / len(sizes))


def _stored_bytes(identity: FeatureIdentity, kind: str, arrays: Mapping[str, np.ndarray]) -> int:
    """Bytes of one clip as it would stand in a shard; none where it would be quarantined."""
    specs = array_specs(identity, kind, blocks=1, block_rows=1)
    try:
        stored = to_stored(arrays, identity.storage_dtype)
    except OverflowedTokens:
        return 0
    return sum(len(encode_row(specs[name], array)) for name, array in stored.items())
