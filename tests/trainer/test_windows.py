"""Training on long videos: a bounded number of windows, the same from a store and end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mervcache.errors import UserError
from pipeline.config import read_config as read_extract_config
from pipeline.extract import extract
from tests.trainer.test_end_to_end import toy_config
from trainer.ask import parse_clip
from trainer.config import FusionConfig
from trainer.data.batches import select
from trainer.data.collate import make_batch
from trainer.data.prompts import Rendered
from trainer.end_to_end import live_source, source_like
from trainer.loop.plan import make_plan
from trainer.loop.train import train
from trainer.model.llm import FRESH_LLMS, FreshLLM
from trainer.runs.load import load_run
from trainer.runs.run_record import read_metrics
from trainer.sources import open_store, open_store_for

WINDOWS = {"fps": 8, "window": 8}  # of a second: films of 4 s have 4
ENCODERS = ["languagebind", "dinov2"]
RED = "videollava/films/red.mp4"


@pytest.fixture(autouse=True)
def longer_mini_llm(monkeypatch):
    monkeypatch.setitem(FRESH_LLMS, "mini", FreshLLM(hidden_size=32, num_layers=1, num_heads=2, context=128))


@pytest.fixture(scope="module")
def settings(media_lab, media_root):
    return media_lab.settings(media_root, encoders=ENCODERS, **WINDOWS)


@pytest.fixture(scope="module")
def windowed(settings, tmp_path_factory):
    store = tmp_path_factory.mktemp("windowed") / "store.zarr"
    extract(read_extract_config(None, settings | {"store": str(store), "canaries": False}), quiet=True)
    return str(store)


def config(**changes):
    return toy_config(**{"encoders": tuple(ENCODERS), "max_windows": 3, **changes})


def test_a_sample_is_shown_a_bounded_number_of_windows_of_its_video(windowed):
    _, source = open_store(windowed, config())
    assert source.windows(RED) == tuple(f"{RED}#t={k}.0,{k + 1}.0" for k in (0, 2, 3))
    _, source = open_store(windowed, config(max_windows=9))
    assert len(source.windows(RED)) == 4
    assert source.windows("videollava/pictures/red.png") == ("videollava/pictures/red.png",)
    wanted = {RED, "videollava/films/broken.mp4", "videollava/pictures/red.png"}
    assert source.available(wanted) == wanted - {"videollava/films/broken.mp4"}


def test_a_batch_has_the_visual_tokens_of_every_window_in_their_order(windowed):
    samples, source = open_store(windowed, config())
    built = make_plan(config(), samples, source).built
    text = Rendered(input_ids=(1, 5, 6), labels=(-100, 5, 6), visual_at=1)
    count = built.model.num_visual_tokens
    image = "videollava/pictures/red.png"
    batch = make_batch([text] * 4, [RED, image, None, RED], source, count, None)
    assert batch.clip_rows == (0, 3, -1, 0)
    assert batch.num_rows == (3, 1, 0, 3)
    assert batch.attention_mask_BS.sum(1).tolist() == [3 + 3 * count, 3 + count, 3, 3 + 3 * count]
    with torch.no_grad():
        embeddings_BSM = built.model.splice(batch)
        for place, clip_id in ((0, RED), (1, image)):
            alone = [source.fetch([window]) for window in source.windows(clip_id)]
            expected = torch.cat([built.model.visual_tokens(tokens)[0][0] for tokens in alone])
            torch.testing.assert_close(embeddings_BSM[place, 1 : 1 + len(expected)], expected)


@pytest.mark.parametrize("leaves_out", [True, False])
def test_masks_are_those_of_the_sample_in_every_window(windowed, leaves_out):
    _, source = open_store(windowed, config())
    text = Rendered(input_ids=(1, 5), labels=(-100, 5), visual_at=1)
    masks = [(True, False), (True, True), (False, False), (True, False)]
    clips = [RED, RED, RED, "videollava/films/blue.mp4"]
    batch = make_batch([text] * 4, clips, source, 8, None, masks=masks, leaves_out_masked=leaves_out)
    assert batch.clip_rows == (0, 3, -1, 6)
    assert batch.num_rows == (3, 3, 0, 3)
    assert batch.masks == ((True, False),) * 3 + ((True, True),) * 3 + ((True, False),) * 3
    rows = [window for clip_id in (RED, RED, clips[3]) for window in source.windows(clip_id)]
    torch.testing.assert_close(batch.tokens["dinov2"], source.fetch(rows)["dinov2"])
    half = 4 if leaves_out else 8
    assert batch.attention_mask_BS.sum(1).tolist() == [2 + 3 * half, 2 + 3 * 8, 2, 2 + 3 * half]


def test_losses_from_a_store_and_end_to_end_are_the_same_bits(windowed, settings, tmp_path):
    chosen = config(sampler="split_modality")
    train(chosen, *open_store(windowed, chosen), tmp_path / "cache", store="s", quiet=True)
    with live_source(chosen, settings) as (samples, source):
        assert source.windows(RED) == open_store(windowed, chosen)[1].windows(RED)
        train(chosen, samples, source, tmp_path / "live", quiet=True)
    cached, live = ([row["loss"] for row in read_metrics(tmp_path / run)] for run in ("cache", "live"))
    assert len(set(cached)) == 3
    assert cached == live
    run = load_run(tmp_path / "cache")
    assert open_store_for(run, windowed)[1].windows(RED) == open_store(windowed, chosen)[1].windows(RED)


def test_a_file_that_a_run_is_asked_about_is_split_as_its_training_videos_were(windowed, settings, tmp_path):
    chosen = config(max_steps=1)
    train(chosen, *open_store(windowed, chosen), tmp_path / "run", store=windowed, quiet=True)
    run, stored = load_run(tmp_path / "run"), open_store(windowed, chosen)[1]
    root, clip = parse_clip(Path(settings["root"]) / "films/red.mp4", None)
    with source_like(run.built.config, run.record, trained={}) as source:
        source.include(root, [clip])
        windows = source.windows(clip.clip_id)
        assert [window.partition("#")[2] for window in windows] == ["t=0.0,1.0", "t=2.0,3.0", "t=3.0,4.0"]
        live, cached = source.fetch(windows), stored.fetch(stored.windows(RED))
    for encoder in ENCODERS:
        torch.testing.assert_close(live[encoder], cached[encoder], rtol=0, atol=2e-3)  # batches of other shapes


def test_the_number_of_windows_decides_the_data_digest(windowed):
    digests = set()
    for number in (1, 2, 3):
        samples, source = open_store(windowed, config(max_windows=number))
        digests.add(select(samples, source, config(max_windows=number)).digest)
    assert len(digests) == 3


def test_a_run_that_does_not_say_how_many_is_refused(windowed):
    unsaid = config(max_windows=None)
    with pytest.raises(UserError, match="up to 4 windows of its video: set max_windows"):
        select(*open_store(windowed, unsaid), unsaid)


def test_windows_that_leave_no_context_to_text_are_refused(windowed):
    samples, source = open_store(windowed, config(max_windows=8))
    with pytest.raises(UserError, match="visual tokens"):
        make_plan(config(max_windows=8, fusion=FusionConfig(name="concat_sequence")), samples, source)


def test_encoders_of_unlike_windows_are_refused(windowed, settings, tmp_path):
    store = tmp_path / "store.zarr"
    base = settings | {"store": str(store), "canaries": False, "limit": 1, "kind": "video"}
    extract(read_extract_config(None, base | {"encoders": ["dinov2"]}), quiet=True)
    extract(read_extract_config(None, base | {"encoders": ["languagebind"], "fps": 4}), quiet=True)
    with pytest.raises(UserError, match=r"windows of 1 s and windows of 2 s"):
        open_store(str(store), config())
