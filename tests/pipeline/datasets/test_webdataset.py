import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from featurestore.clips import Turn
from mervcache.errors import UserError
from pipeline.datasets import load_dataset
from pipeline.media import TarMember, resolve_media
from tests.pipeline.datasets.conftest import add_to_tar

ALIGN = "webdataset-align"


def write_shard(path: Path, samples: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def sample(key: str, caption: str | None = "A dog.", **extra: bytes) -> dict:
    media = extra or {"mp4": f"media of {key}".encode()}
    return {"__key__": key, **media} | ({"txt": caption.encode()} if caption is not None else {})


def captions(root: Path, **options) -> dict[str, str]:
    samples = load_dataset("webdataset", root, **options).samples[ALIGN]
    return {s.sample_id: s.turns[1].text for s in samples}


def test_members_are_clips_in_place_and_captions_are_samples(tmp_path):
    write_shard(tmp_path / "shards" / "00000.tar", [sample("000000001"), sample("000000002", "Two cats. ")])
    listing = load_dataset("webdataset", tmp_path)
    assert [clip.path for clip in listing.clips] == ["shards/00000.tar/000000001.mp4", "shards/00000.tar/000000002.mp4"]
    assert {clip.kind for clip in listing.clips} == {"video"}
    first, second = listing.samples[ALIGN]
    assert first.clip_id == listing.clips[0].clip_id == "webdataset/shards/00000.tar/000000001.mp4"
    assert first.turns == (Turn(role="human", text="<video>\nDescribe the video."), Turn(role="gpt", text="A dog."))
    assert second.sample_id == "align/shards/00000/000000002"
    media = resolve_media(listing.root, listing.clips[1].path)
    assert isinstance(media, TarMember)
    with open(media.tar_path, "rb") as file:
        file.seek(media.offset)
        assert file.read(media.size) == b"media of 000000002"


def test_a_caption_is_looked_for_in_json_then_text_then_parquet(tmp_path):
    by_json = json.dumps({"caption": "from json", "url": "x"}).encode()
    without = json.dumps({"caption": None, "status": "success"}).encode()
    write_shard(
        tmp_path / "a.tar",
        [
            sample("1", "from text", mp4=b"m", json=by_json),
            sample("2", "from text", mp4=b"m", json=without),
            sample("3", None, mp4=b"m", json=without),
            sample("4", None),
        ],
    )
    pq.write_table(pa.table({"key": ["3", "9"], "caption": ["from parquet", "of nobody"]}), tmp_path / "a.parquet")
    assert captions(tmp_path) == {"align/a/1": "from json", "align/a/2": "from text", "align/a/3": "from parquet"}
    assert len(load_dataset("webdataset", tmp_path).clips) == 4


def test_prompt_and_caption_key_are_options(tmp_path):
    write_shard(tmp_path / "a.tar", [sample("1", None, mp4=b"m", json=b'{"title": "A film"}')])
    (found,) = load_dataset("webdataset", tmp_path, caption_key="title", prompt="What is its title?").samples[ALIGN]
    assert [turn.text for turn in found.turns] == ["What is its title?", "A film"]


def test_a_conversation_in_the_json_is_taken_whole(tmp_path):
    talk = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "That."}]
    write_shard(tmp_path / "a.tar", [sample("1", "no", mp4=b"m", json=json.dumps({"conversations": talk}).encode())])
    (found,) = load_dataset("webdataset", tmp_path).samples[ALIGN]
    assert [turn.text for turn in found.turns] == ["<video>\nWhat?", "That."]


def test_images_are_clips_but_a_thumbnail_beside_a_video_is_not(tmp_path):
    write_shard(tmp_path / "a.tar", [sample("1", jpg=b"j", mp4=b"m"), sample("2", jpg=b"j"), sample("3", wav=b"w")])
    listing = load_dataset("webdataset", tmp_path)
    assert [(clip.path, clip.kind) for clip in listing.clips] == [("a.tar/1.mp4", "video"), ("a.tar/2.jpg", "image")]
    assert listing.samples[ALIGN][1].turns[0].text == "<image>\nDescribe the image."


def write_members(path: Path, *names: str) -> Path:
    """A tar of files that hold their own name."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            add_to_tar(tar, name, name.encode())
    return path


def left_of(root: Path, **options) -> tuple[dict[str, str | None], dict[str, int], dict[str, int]]:
    """(clip -> caption, what is refused, what is not read)."""
    listing = load_dataset("webdataset", root, **options)
    captions = {clip.path.partition(".tar/")[2]: None for clip in listing.clips}
    for one in listing.samples[ALIGN]:
        captions[one.clip_id.partition(".tar/")[2]] = one.turns[1].text
    return captions, {why: found.count for why, found in listing.rejected.items()}, dict(listing.skipped)


def test_a_name_with_dots_keeps_its_clip_and_its_caption(tmp_path):
    stems = ["clip.v1", "clip.v2", "Movie 2.0 (clean)", "ok", "a.b/c"]
    write_members(tmp_path / "a.tar", *(f"{stem}.{end}" for stem in stems for end in ("mp4", "txt")))
    assert left_of(tmp_path) == ({f"{stem}.mp4": f"{stem}.txt" for stem in stems}, {}, {})
    ids = [one.sample_id for one in load_dataset("webdataset", tmp_path).samples[ALIGN]]
    assert ids == ["align/a/clip.v1", "align/a/clip.v2", "align/a/Movie 2", "align/a/ok", "align/a/a.b/c"]


def test_a_lone_medium_with_a_longer_extension_has_the_caption_of_its_key(tmp_path):
    write_members(tmp_path / "a.tar", "1.720p.mp4", "1.txt", "2.frame.jpg", "2.json")
    captions, rejected, _ = left_of(tmp_path)
    assert captions == {"1.720p.mp4": "1.txt"}
    assert rejected == {"json of the media is broken": 1}  # the name is its content


def test_every_video_of_a_key_is_a_clip_and_its_caption_is_given_once(tmp_path):
    write_members(tmp_path / "a.tar", "1.mp4", "1.webm", "1.left.mp4", "1.txt", "2.left.mp4", "2.right.mp4", "2.txt")
    captions, rejected, skipped = left_of(tmp_path)
    assert captions == {
        "1.mp4": "1.txt",
        "1.webm": None,
        "1.left.mp4": None,
        "2.left.mp4": "2.txt",
        "2.right.mp4": None,
    }
    assert rejected == {}
    assert skipped == {"further media of a key, listed without its caption": 3}


def test_capital_extensions_are_read(tmp_path):
    write_members(tmp_path / "A.TAR", "1.MP4", "1.TXT", "2.JPG", "2.Txt")
    assert left_of(tmp_path)[1:] == ({}, {})
    listing = load_dataset("webdataset", tmp_path)
    assert [one.turns[1].text for one in listing.samples[ALIGN]] == ["1.TXT", "2.Txt"]
    assert all(isinstance(resolve_media(listing.root, clip.path), TarMember) for clip in listing.clips)


def test_what_is_neither_clip_nor_caption_is_counted(tmp_path):
    names = ("1.mp4", "1.jpg", "1.txt", "2.txt", "3.cls", "3.wav", "._1.mp4", "4.mp4", "4.mp4", "README")
    write_members(tmp_path / "a.tar", *names)
    captions, rejected, skipped = left_of(tmp_path)
    assert captions == {"1.mp4": "1.txt", "4.mp4": None}
    assert rejected == {}
    assert skipped == {
        "captions without a video or image": 1,
        "hidden tar members": 1,
        "images beside a video of the same key": 1,
        "tar members that a later one of the same name replaces": 1,
        "tar members that end in .cls": 1,
        "tar members that end in .wav": 1,
        "tar members that end in no extension": 1,
    }


def test_members_whose_names_no_clip_can_have_are_refused_and_harmless_ones_are_not(tmp_path):
    write_members(tmp_path / "a.tar", "./v//1.mp4", "../2.mp4", "/3.mp4", "a\\4.mp4", "v/./5.mp4")
    captions, rejected, _ = left_of(tmp_path)
    assert set(captions) == {"v/1.mp4", "v/5.mp4"}
    assert rejected == {"tar member has a name that no clip can have": 3}
    listing = load_dataset("webdataset", tmp_path)
    assert "'/3.mp4'" in listing.rejected["tar member has a name that no clip can have"].examples[0]
    assert all(isinstance(resolve_media(listing.root, clip.path), TarMember) for clip in listing.clips)


def test_compressed_shards_and_loose_media_are_counted(tmp_path):
    write_members(tmp_path / "a.tar", "1.mp4")
    for name in ("b.tar.gz", "c.tgz", "loose.mp4", "a_stats.json"):
        (tmp_path / name).write_bytes(b"x")
    _, rejected, skipped = left_of(tmp_path)
    assert list(rejected.values()) == [2]
    assert skipped == {"media files outside of tar shards": 1}


def test_linked_shards_are_read_with_their_table_where_links_are_allowed(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "blobs").mkdir()
    write_members(tmp_path / "blobs/0", "1.mp4")
    pq.write_table(pa.table({"key": ["1"], "caption": ["from parquet"]}), tmp_path / "blobs/1")
    (tmp_path / "root/a.tar").symlink_to("../blobs/0")
    (tmp_path / "root/a.parquet").symlink_to("../blobs/1")
    assert left_of(tmp_path / "root", media_links="../blobs")[0] == {"1.mp4": "from parquet"}
    captions, rejected, _ = left_of(tmp_path / "root")
    assert (captions, rejected) == ({}, {"a linked file whose target is outside the root": 1})


@pytest.mark.parametrize(
    ("json_text", "reason"),
    [
        (b"{broken", "json of the media is broken"),
        (b"[" * 100_000, "json of the media is broken"),
        (b"[1]", "json of the media is not an object"),
        (b"\xff", "text of the media is not UTF-8"),
        (b" " * (2 << 20), "text of the media is larger than 1 MiB"),
        (b'{"caption": 3}', "text is not a string"),
        (b'{"conversations": "hello"}', "conversation is not a list of turns"),
    ],
)
def test_a_member_with_hostile_text_is_refused_and_the_others_stay(tmp_path, json_text, reason):
    write_shard(tmp_path / "a.tar", [sample("1", "x", mp4=b"m", json=json_text), sample("2")])
    listing = load_dataset("webdataset", tmp_path)
    assert {why: found.examples for why, found in listing.rejected.items()} == {reason: ("a.tar/1",)}
    assert [clip.path for clip in listing.clips] == ["a.tar/2.mp4"]


def test_links_in_a_shard_are_counted_and_not_listed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("1.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        info = tarfile.TarInfo("2.mp4")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"m"))
    listing = load_dataset("webdataset", tmp_path)
    assert [clip.path for clip in listing.clips] == ["a.tar/2.mp4"]
    assert listing.rejected["tar member is a link"].examples == ("a.tar/1.mp4",)


def test_a_broken_shard_is_counted_and_the_others_are_listed(tmp_path):
    whole = write_shard(tmp_path / "a.tar", [sample("1"), sample("2")])
    (tmp_path / "b.tar").write_bytes(b"not a tar" * 1000)
    (tmp_path / "c.tar").write_bytes(whole.read_bytes()[:2048])  # two members of a block and a header each
    listing = load_dataset("webdataset", tmp_path)
    assert {clip.path.split("/")[0] for clip in listing.clips} == {"a.tar", "c.tar"}
    assert listing.rejected["tar archive is not a plain, readable tar"].examples == ("b.tar",)


def test_shards_can_be_named_by_a_brace_pattern_and_missing_ones_are_counted(tmp_path):
    for number in range(3):
        write_shard(tmp_path / "s" / f"{number:03d}.tar", [sample(f"{number}")])
    listing = load_dataset("webdataset", tmp_path, shards="s/{001..004}.tar")
    assert [clip.path for clip in listing.clips] == ["s/001.tar/1.mp4", "s/002.tar/2.mp4"]
    assert listing.missing == {"s": 2}


def test_shards_outside_the_root_are_refused(tmp_path):
    write_shard(tmp_path / "out.tar", [sample("1")])
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "x").touch()
    for pattern in ("../out.tar", str(tmp_path / "out.tar")):
        listing = load_dataset("webdataset", tmp_path / "root", shards=pattern)
        assert listing.clips == ()
        assert sum(found.count for found in listing.rejected.values()) == 1


def test_a_parquet_that_is_broken_is_an_error_that_says_what_to_do(tmp_path):
    write_shard(tmp_path / "a.tar", [sample("1", None)])
    (tmp_path / "a.parquet").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read .*remove it"):
        load_dataset("webdataset", tmp_path)


def test_a_root_without_shards_says_what_to_get(tmp_path):
    with pytest.raises(UserError, match=r"no \*\.tar under .*\n.*video2dataset"):
        load_dataset("webdataset", tmp_path)
