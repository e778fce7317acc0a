import json
import os
from contextlib import suppress

import av
import pytest
from PIL import Image

from mervcache.errors import UserError
from pipeline.datasets import load_dataset
from pipeline.decode.container import FORMATS
from pipeline.decode.stills import IMAGE_FORMATS
from pipeline.media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS


def test_videos_and_images_are_listed_by_path_and_hidden_ones_are_not(tmp_path):
    for name in ("b/2.mp4", "b/1.MOV", "a.jpg", ".hidden.mp4", ".git/c.mp4", "notes.txt", "b.c/3.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    listing = load_dataset("folder", tmp_path)
    assert [(clip.path, clip.kind) for clip in listing.clips] == [
        ("a.jpg", "image"),
        ("b.c/3.webm", "video"),
        ("b/1.MOV", "video"),
        ("b/2.mp4", "video"),
    ]
    assert listing.samples == {}


def test_what_is_not_listed_is_counted(tmp_path):
    names = ("a.mp4", "b.txt", "c.TXT", "d", ".e.mp4", "._a.mp4", ".git/f.mp4", "g.wav", "h.tar.gz")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    listing = load_dataset("folder", tmp_path)
    assert [clip.path for clip in listing.clips] == ["a.mp4"]
    assert listing.skipped == {
        "files that end in .gz": 1,
        "files that end in .txt": 2,
        "files that end in .wav": 1,
        "files that end in no extension": 1,
        "hidden files": 2,
        "hidden folders": 1,
    }


def test_endings_that_cannot_be_printed_are_spelled_out(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    for name in (b"b.\xff", b"c.\x1b[31m"):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(b"x")
    skipped = load_dataset("folder", tmp_path).skipped
    assert set(skipped) == {r"files that end in .\udcff", r"files that end in .\x1b[31m"}
    json.dumps(skipped, ensure_ascii=False).encode()


def test_a_folder_whose_path_is_too_long_costs_its_files_and_not_the_listing(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    for _ in range(20):
        os.mkdir("x" * 250)
        os.chdir("x" * 250)
    listing = load_dataset("folder", tmp_path)
    assert [clip.path for clip in listing.clips] == ["a.mp4"]
    assert listing.rejected["media folder has too long a path"].count == 1


def test_a_folder_without_media_says_what_is_in_it(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no video or image under .* \(1 files that end in \.txt\)"):
        load_dataset("folder", tmp_path)


SOUND = {
    "aac",
    "flac",
    "m2a",
    "m4a",
    "m4b",
    "mka",
    "mks",
    "mp2",
    "mp3",
    "mpa",
    "ogg",
    "ra",
    "wav",
    "wma",
    "isma",
    "mpo",
}
NOT_READ = {"avif", "heic", "heif", "ism", "ismv", "psp", "h26l", "h263"}  # stills of the mov reader, and rare ones


def test_every_extension_of_a_format_that_the_decoder_opens_is_listed_or_sound():
    names = set()
    for name in FORMATS:
        for mode in "rw":
            with suppress(ValueError):
                names |= av.format.ContainerFormat(name, mode).extensions
    assert {f".{name}" for name in names - SOUND - NOT_READ} <= VIDEO_EXTENSIONS | IMAGE_EXTENSIONS


def test_every_extension_that_pillow_has_for_a_format_that_is_read_is_listed():
    Image.init()
    names = {extension for extension, name in Image.registered_extensions().items() if name in IMAGE_FORMATS}
    assert names - {".pfm"} <= VIDEO_EXTENSIONS | IMAGE_EXTENSIONS  # floats without a range


def test_links_to_folders_are_not_followed(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.mp4").write_bytes(b"x")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "b.mp4").write_bytes(b"x")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    listing = load_dataset("folder", tmp_path / "root")
    assert [clip.path for clip in listing.clips] == ["a.mp4"]
    assert listing.rejected["a linked folder is not followed"].examples == ("link", "loop")


def test_a_linked_file_counts_where_its_target_lies_under_the_root(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a.mp4").write_bytes(b"x")
    (tmp_path / "b.mp4").write_bytes(b"x")
    (tmp_path / "root/inside.mp4").symlink_to("a.mp4")
    (tmp_path / "root/outside.mp4").symlink_to(tmp_path / "b.mp4")
    listing = load_dataset("folder", tmp_path / "root")
    assert [clip.path for clip in listing.clips] == ["a.mp4", "inside.mp4"]
    assert listing.rejected["a linked file whose target is outside the root"].examples == ("outside.mp4",)


def test_a_name_that_no_clip_can_have_is_counted(tmp_path):
    (tmp_path / "good.mp4").write_bytes(b"x")
    (tmp_path / "new\nline.mp4").write_bytes(b"x")
    with open(os.fsencode(tmp_path) + b"/\xff.mp4", "wb") as file:
        file.write(b"x")
    listing = load_dataset("folder", tmp_path)
    assert [clip.path for clip in listing.clips] == ["good.mp4"]
    assert {why: found.count for why, found in listing.rejected.items()} == {
        "media path is unsafe": 1,
        "text is not valid Unicode": 1,
    }


def test_the_real_small_set_holds_27_videos_and_11_images(mini):
    kinds = [clip.kind for clip in load_dataset("folder", mini).clips]
    assert (kinds.count("video"), kinds.count("image")) == (27, 11)


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_folders_name_classes_to_train_on_and_to_score(tmp_path):
    put(tmp_path, "train/cat/a.mp4", "train/dog/b.jpg", "val/cat/c.mp4", "loose.mp4", "train/d.mp4")
    listing = load_dataset("folder", tmp_path, labels="folders")
    samples = [sample for found in listing.samples.values() for sample in found]
    by_path = {sample.clip_id.removeprefix("folder/"): sample for sample in samples}
    assert {path: (s.category, s.stage, s.split, s.options) for path, s in by_path.items()} == {
        "train/cat/a.mp4": ("cat", "finetune", "train", ()),
        "train/dog/b.jpg": ("dog", "finetune", "train", ()),
        "val/cat/c.mp4": ("cat", "eval", "heldout", ("cat", "dog")),
    }
    assert by_path["val/cat/c.mp4"].answer_index == 0
    assert by_path["train/dog/b.jpg"].turns[1].text == "dog"
    assert len(listing.clips) == 5
    assert listing.skipped == {"clips without a label, which have no conversation": 2}
    assert set(load_dataset("folder", tmp_path, stage="eval", labels="folders").samples) == {"folder-eval"}


@pytest.mark.parametrize("heading", ["path,label", "file_name,class", "Video,Category", "label,image_path"])
def test_a_table_of_labels_is_read_under_the_usual_headings(tmp_path, heading):
    put(tmp_path, "v/a.mp4", "v/b.mp4", "v/c.mp4")
    rows = [
        ("./v/a.mp4", "cat, small"),
        ("v//b.mp4", "dog"),
        ("v/gone.mp4", "dog"),
        ("../x.mp4", "dog"),
        ("v/c.mp4", ""),
    ]
    is_turned = heading.startswith("label")
    lines = [f'"{label}",{path}' if is_turned else f'{path},"{label}"' for path, label in rows]
    (tmp_path / "labels.csv").write_text("\n".join([heading, *lines]) + "\n")
    listing = load_dataset("folder", tmp_path, labels="labels.csv")
    (samples,) = listing.samples.values()
    assert {sample.clip_id: sample.category for sample in samples} == {
        "folder/v/a.mp4": "cat, small",
        "folder/v/b.mp4": "dog",
    }
    assert listing.missing == {"v": 1}
    assert {reason: found.count for reason, found in listing.rejected.items()} == {
        "media path is unsafe": 1,
        "row without a label": 1,
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name,label\na.mp4,cat\n", "column of paths"),
        ("path,label\nb.mp4,cat\n", "none of the 1 clips"),
        ("path,label\na.mp4,cat\na.mp4,dog\n", "keep one"),
        (None, "no such file"),
    ],
)
def test_a_table_that_labels_nothing_or_twice_is_an_error(tmp_path, text, reason):
    put(tmp_path, "a.mp4")
    if text is not None:
        (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=reason):
        load_dataset("folder", tmp_path, labels="labels.csv")
