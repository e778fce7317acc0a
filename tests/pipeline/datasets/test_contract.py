"""What every dataset promises, whatever its layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from featurestore.clips import KINDS, check_relative_path
from mervcache.errors import MediaError, UserError
from pipeline.datasets import DATASETS, DatasetListing, check_has_clips, load_dataset, loss_lines, options_of
from pipeline.media import resolve_media
from tests.pipeline.datasets import conftest as layouts

OPTIONS = {"demo": {"train": 12, "heldout": 3, "size": 32, "num_frames": 4}, "folder": {"labels": "folders"}}


@pytest.fixture(scope="module", params=list(DATASETS))
def dataset(request, tmp_path_factory) -> tuple[str, Path]:
    root = layouts.MAKERS[request.param](tmp_path_factory.mktemp(request.param) / "root")
    load_dataset(request.param, root, **OPTIONS.get(request.param, {}))
    return request.param, root


def listing_of(dataset: tuple[str, Path], **filters) -> DatasetListing:
    name, root = dataset
    return load_dataset(name, root, **filters, **OPTIONS.get(name, {}))


def test_clips_are_unique_safe_and_there(dataset):
    listing = listing_of(dataset)
    assert len(listing.clips) >= 3
    assert len({clip.clip_id for clip in listing.clips}) == len(listing.clips)
    for clip in listing.clips:
        check_relative_path(clip.path)
        assert clip.dataset == listing.name
        resolve_media(listing.root, clip.path)
    assert listing.missing == {}
    assert listing.rejected == {}


def test_samples_have_unique_ids_and_speak_of_listed_clips(dataset):
    listing = listing_of(dataset)
    clip_ids = {clip.clip_id for clip in listing.clips}
    ids = [sample.sample_id for samples in listing.samples.values() for sample in samples]
    assert len(set(ids)) == len(ids)
    for samples in listing.samples.values():
        assert all(sample.clip_id is None or sample.clip_id in clip_ids for sample in samples)
        assert all(sample.sample_id.startswith(f"{sample.stage}/") for sample in samples)
    assert bool(listing.samples) == bool(DATASETS[listing.name].stages)


def test_listing_twice_gives_the_same_in_the_same_order(dataset):
    assert listing_of(dataset) == listing_of(dataset)


def test_a_limit_keeps_the_first_clips_and_what_is_said_of_them(dataset):
    whole, limited = listing_of(dataset), listing_of(dataset, limit=2)
    assert limited.clips == whole.clips[:2]
    kept = {clip.clip_id for clip in limited.clips}
    for name, samples in whole.samples.items():
        expected = [sample for sample in samples if sample.clip_id in kept or sample.clip_id is None]
        assert list(limited.samples[name]) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_leaves_clips_of_that_kind_and_no_text_only_samples(dataset, kind):
    whole, chosen = listing_of(dataset), listing_of(dataset, kind=kind)
    assert chosen.clips == tuple(clip for clip in whole.clips if clip.kind == kind)
    kept = {clip.clip_id for clip in chosen.clips}
    assert all(sample.clip_id in kept for samples in chosen.samples.values() for sample in samples)


def test_a_stage_leaves_samples_of_that_stage(dataset):
    whole = listing_of(dataset)
    for stage in DATASETS[whole.name].stages:
        chosen = listing_of(dataset, stage=stage)
        assert {sample.stage for samples in chosen.samples.values() for sample in samples} == {stage}
        assert dict(chosen.samples).items() <= dict(whole.samples).items()


def test_filters_that_are_unknown_list_the_known(dataset):
    name, root = dataset
    with pytest.raises(UserError, match="kind must be one of video, image"):
        load_dataset(name, root, kind="sound")
    with pytest.raises(UserError, match=f"stage of {name} must be one of"):
        load_dataset(name, root, stage="pretraining")
    with pytest.raises(UserError, match="at least 1"):
        load_dataset(name, root, limit=0)
    with pytest.raises(UserError, match="has no option colour; its options are"):
        load_dataset(name, root, colour="blue")
    assert ("media_links" in options_of(DATASETS[name])) != DATASETS[name].makes_root


def test_a_missing_root_says_what_to_get_and_offers_the_demo(dataset, tmp_path, monkeypatch):
    name, _ = dataset
    if DATASETS[name].makes_root:
        return
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_dataset(name)
    assert "does not exist" in str(caught.value)
    assert DATASETS[name].download in str(caught.value)
    assert "--dataset demo" in str(caught.value)


def test_a_root_that_was_mistyped_is_told_in_one_line(dataset, tmp_path):
    name, _ = dataset
    if DATASETS[name].makes_root:
        return
    with pytest.raises(UserError, match=r"--root .*nothing does not exist") as caught:
        load_dataset(name, tmp_path / "nothing")
    assert "\n" not in str(caught.value)


def test_an_unknown_dataset_lists_the_known():
    with pytest.raises(UserError, match="known: demo, videollava, webdataset, folder, eval"):
        load_dataset("imagenet")


@pytest.mark.parametrize(("name", "path", "folder"), [
    ("videollava", "videochatgpt_tune/c.mp4", "videochatgpt_tune"),
    ("eval", "Open/videos/c.mkv", "Open/videos"),
])  # fmt: skip
def test_media_that_are_not_there_are_counted_and_listed_once_they_appear(tmp_path, name, path, folder):
    root = layouts.MAKERS[name](tmp_path / "root")
    whole = load_dataset(name, root)
    (root / path).unlink()
    partial = load_dataset(name, root)
    assert partial.missing == {folder: 1}
    assert partial.missing_files in ((path,), (path.removesuffix(".mkv"),))  # questions name videos without extension
    assert partial.clips == tuple(clip for clip in whole.clips if clip.path != path)
    assert not any(s.clip_id and s.clip_id.endswith(path) for samples in partial.samples.values() for s in samples)
    layouts.write(root / path)
    assert load_dataset(name, root) == whole


def test_a_whole_folder_that_is_not_there_is_counted_as_one(tmp_path):
    root = layouts.make_videollava(tmp_path / "root")
    (root / "videochatgpt_tune").rename(tmp_path / "elsewhere")
    assert load_dataset("videollava", root).missing == {"videochatgpt_tune": 2}


def test_an_absent_file_is_shown_with_the_nearest_one_and_media_of_no_record_are_counted(tmp_path):
    records = [
        {"id": name, "video": name, "conversations": layouts.talk("What?", "That.")}
        for name in ("yogaa.mp4", "cups.mp4")
    ]
    layouts.write(tmp_path / "annotations.json", records)
    for name in ("cups.mp4", "yoga.mp4", "z1.mp4", "z2.mp4", "z3.jpg", "readme.txt"):
        layouts.write(tmp_path / name)
    listing = load_dataset("videollava", tmp_path)
    assert loss_lines(listing) == ["absent: media of 1 clip in the root; yogaa.mp4, nearest: yoga.mp4"]
    assert listing.notes == (f"of no record: 4 media files under {tmp_path}: yoga.mp4, z1.mp4, z2.mp4, ...",)
    assert load_dataset("videollava", tmp_path, stage="finetune").notes == ()  # other stages may have the others


def test_a_media_folder_that_links_out_of_the_root_costs_its_clips_and_not_the_listing(tmp_path):
    root = layouts.make_videollava(tmp_path / "root")
    (root / "videochatgpt_tune").rename(tmp_path / "elsewhere")
    (root / "videochatgpt_tune").symlink_to(tmp_path / "elsewhere")
    listing = load_dataset("videollava", root)
    assert [clip.path for clip in listing.clips] == ["llava_image_tune/gqa/b.jpg"]
    rejected = listing.rejected["a linked folder whose target is outside the root"]
    assert (rejected.count, rejected.examples) == (2, ("videochatgpt_tune/a.mp4", "videochatgpt_tune/c.mp4"))
    assert any("media_links" in line for line in loss_lines(listing))
    assert listing.missing == {}


@pytest.mark.parametrize(
    ("name", "reason"),
    [("loop", "media folder is a loop of links"), ("x" * 300, None), ("file", None), ("nothing", None)],
)
def test_a_folder_that_cannot_be_listed_costs_its_clips_and_not_the_listing(tmp_path, name, reason):
    root = layouts.make_videollava(tmp_path / "root")
    (root / "loop").symlink_to("loop")
    (root / "file").write_bytes(b"x")
    records = json.loads((root / "valley_llavaimage.json").read_text())
    layouts.write(root / "valley_llavaimage.json", [*records, records[0] | {"video": f"{name}/a.mp4"}])
    listing = load_dataset("videollava", root)
    assert len(listing.clips) == 3
    assert {why: found.count for why, found in listing.rejected.items()} == ({reason: 1} if reason else {})
    assert listing.missing == ({} if reason else {name: 1})


def hub_cache(folder: Path) -> Path:
    """A dataset as `huggingface_hub.snapshot_download` leaves it: files are links to ../../blobs; returns the root."""
    source, root = layouts.make_videollava(folder / "source"), folder / "hub/snapshots/rev"
    for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        blob = layouts.write(folder / f"hub/blobs/{number}", path.read_bytes())
        link = root / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return root


@pytest.mark.parametrize("dataset_name", ["videollava", "folder"])
def test_links_into_a_folder_that_is_named_are_read_as_if_they_were_files(tmp_path, dataset_name):
    root = hub_cache(tmp_path)
    plain = load_dataset(dataset_name, tmp_path / "source")
    closed = load_dataset(dataset_name, root)
    assert closed.clips == ()
    assert closed.rejected["a linked file whose target is outside the root"].count == 3
    with pytest.raises(UserError, match="media_links=DIR"):
        check_has_clips(closed)
    for links in ("../../blobs", str(tmp_path / "hub/blobs")):
        opened = load_dataset(dataset_name, root, media_links=links)
        assert opened.clips == plain.clips
        assert opened.samples == plain.samples
        assert opened.rejected == {}
        for clip in opened.clips:
            found = resolve_media(opened.root, clip.path)
            assert found.path.parent == Path(os.path.realpath(tmp_path / "hub/blobs"))
            with pytest.raises(MediaError, match="out of the dataset root"):
                resolve_media(str(opened.root), clip.path)


def test_links_to_anywhere_else_stay_refused_and_dangling_ones_are_absent(tmp_path):
    root = hub_cache(tmp_path)
    layouts.write(tmp_path / "secret.mp4")
    for name, target in (("a", tmp_path / "secret.mp4"), ("c", tmp_path / "hub/blobs/gone")):
        (root / f"videochatgpt_tune/{name}.mp4").unlink()
        (root / f"videochatgpt_tune/{name}.mp4").symlink_to(target)
    listing = load_dataset("videollava", root, media_links="../../blobs")
    assert [clip.path for clip in listing.clips] == ["llava_image_tune/gqa/b.jpg"]
    assert listing.rejected["a linked file whose target is outside the root"].examples == ("videochatgpt_tune/a.mp4",)
    assert listing.missing == {"videochatgpt_tune": 1}
    with pytest.raises(UserError, match="must be a folder"):
        load_dataset("videollava", root, media_links="../nothing")


def test_a_linked_folder_is_read_where_it_leads_into_the_folder_that_is_named(tmp_path):
    root = layouts.make_videollava(tmp_path / "root")
    (root / "videochatgpt_tune").rename(tmp_path / "elsewhere")
    (root / "videochatgpt_tune").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(root / "videochatgpt_tune")
    for name in ("videollava", "folder"):
        listing = load_dataset(name, root, media_links="../elsewhere")
        assert sorted(clip.path for clip in listing.clips) == [
            "llava_image_tune/gqa/b.jpg",
            "videochatgpt_tune/a.mp4",
            "videochatgpt_tune/c.mp4",
        ]


def test_the_table_of_datasets_loads_nothing_heavy():
    code = "import sys, pipeline.datasets; print([m for m in ('torch', 'av', 'PIL', 'webdataset') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_dataset_describes_itself():
    for name, spec in DATASETS.items():
        assert name == spec.name
        assert spec.summary
        assert spec.download
        assert spec.default_root == f"data/{name}"
        assert all(option.help for option in spec.options.values())
