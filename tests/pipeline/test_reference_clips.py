"""Reference clips: the same bytes everywhere, decoded alike by every decoder, and written once for every group."""

from __future__ import annotations

import numpy as np
import pytest

from featurestore import FeatureStore, verify_store
from featurestore.clips import Clip
from featurestore.objects.open import open_objects
from featurestore.reference_clips import read_reference_clips
from mervcache.files import sha256_hex
from pipeline.decode.decoders import DECODERS, decode_clip
from pipeline.decode.sampling import DecodeJob
from pipeline.reference_clips import CLIPS, media_bytes
from pipeline.views import ResizeRule, View

RENDERED = {  # of canaries/1: other bytes need another number
    "scene": "5de2623a24679c064f365e65a612f633405d7ff83f2d3afca16fce5b27fa4794",
    "noise": "fb8311837505ed8915a4166d4f268d4c0ade10d1540c36a06cb5696fc49a7c13",
    "still": "b1db4364174d8beab412711b948fb7ce05a9d1ade397facaa2fe493852bd4723",
}


def test_the_media_are_the_bytes_that_stores_name():
    assert {name: sha256_hex(media_bytes(name)) for names in CLIPS.values() for name in names} == RENDERED


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_gives_the_same_frames(tmp_path, decoder):
    (tmp_path / "noise.avi").write_bytes(media_bytes("noise"))
    view = View(rule=ResizeRule(size=32), num_frames=8)

    def frames(name: str) -> np.ndarray:
        clip = Clip(dataset="canaries", path="noise.avi", kind="video")
        return decode_clip(DecodeJob(root=str(tmp_path), clip=clip, views=(view,), decoder=name)).frames[view]

    assert np.array_equal(frames(decoder), frames("frames/1"))


def test_extraction_puts_canaries_beside_every_group_and_the_snapshot_names_them(extracted):
    store = FeatureStore.open(extracted.store)
    groups = [identity.group_name for identity in store.encoders.values()]
    assert set(store.canaries) == {f"{kind}/{group}" for kind in ("video", "image") for group in groups}
    assert sorted(extracted.summary.canaries) == sorted(store.canaries)
    for identity in store.encoders.values():
        for kind, names in CLIPS.items():
            canaries = read_reference_clips(open_objects(extracted.store), kind, identity)
            assert tuple(clip.name for clip in canaries.clips) == names
            assert canaries.arrays["tokens"].shape == (len(names), *identity.grid_of(kind), identity.width)
            assert {clip.media_sha256 for clip in canaries.clips} == {RENDERED[name] for name in names}


def test_canaries_are_added_to_a_finished_store_once_and_no_other_byte_is_touched(lab):
    lab.extract(encoders=["siglip"], limit=2, kind="video")
    before = {file: file.read_bytes() for file in lab.store.rglob("*") if file.is_file()}
    assert not (lab.store / "canaries").exists()
    added = lab.extract(encoders=["siglip"], limit=2, kind="video", canaries=True)
    assert (len(added.canaries), added.clips) == (1, 0)
    (file,) = (lab.store / "canaries").rglob("*.safetensors")
    data = file.read_bytes()
    assert lab.extract(encoders=["siglip"], limit=2, kind="video", canaries=True).canaries == []
    assert file.read_bytes() == data
    assert {file: file.read_bytes() for file in before} == before
    assert verify_store(lab.store, "full") == []


def test_the_same_extraction_elsewhere_gives_the_same_canaries(lab, extracted):
    lab.extract(encoders=["vivit"], limit=1, canaries=True)
    for file in (lab.store / "canaries").rglob("*.safetensors"):
        twin = extracted.store / file.relative_to(lab.store)
        assert file.read_bytes() == twin.read_bytes()
