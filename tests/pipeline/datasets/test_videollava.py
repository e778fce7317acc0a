import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.clips import Turn, check_relative_path
from mervcache.errors import UserError
from pipeline.datasets import load_dataset
from pipeline.datasets.base import RecordError, media_path
from pipeline.datasets.videollava import source_of

FINETUNE = "videollava-finetune"
ANSWERED = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]

ASKED = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "That."}]


def write_records(root: Path, records: object, name: str = "videochatgpt_llavaimage_tune.json") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(records))
    return root


def text_record(record_id: object = "t", **fields) -> dict:
    return {"id": record_id, "conversations": ANSWERED, **fields}


def reasons(root: Path) -> dict[str, int]:
    return {reason: rejected.count for reason, rejected in load_dataset("videollava", root).rejected.items()}


def test_the_real_small_set_has_the_counts_of_its_readme(mini):
    listing = load_dataset("videollava", mini)
    finetune, align = listing.samples[FINETUNE], listing.samples["videollava-align"]
    kinds = {clip.clip_id: clip.kind for clip in listing.clips}
    assert Counter(kinds.values()) == {"video": 27, "image": 11}
    assert len(finetune) == 124
    assert Counter(kinds.get(sample.clip_id, "text") for sample in finetune) == {"video": 108, "image": 11, "text": 5}
    assert Counter(kinds[sample.clip_id] for sample in align) == {"video": 27, "image": 11}
    assert Counter(sample.source for sample in finetune) == {"videochatgpt": 108, "coco": 11, "text": 5}
    several = [sample for sample in finetune if len(sample.turns) > 2]
    assert Counter(kinds.get(sample.clip_id, "text") for sample in several) == {"image": 7, "text": 3}
    assert listing.missing == {}
    assert listing.rejected == {}


def test_the_token_stands_once_in_the_first_human_turn_of_the_real_small_set(mini):
    listing = load_dataset("videollava", mini)
    kinds = {clip.clip_id: clip.kind for clip in listing.clips}
    for samples in listing.samples.values():
        for sample in samples:
            token = f"<{kinds[sample.clip_id]}>" if sample.clip_id else ""
            first, *rest = [turn.text for turn in sample.turns]
            assert first.count("<video>") + first.count("<image>") == bool(token)
            assert token in first
            assert not any("<video>" in text or "<image>" in text for text in rest)


def test_texts_and_roles_are_kept_as_found(tmp_path):
    turns = [{"from": "user", "value": " <video>\nWhat? "}, {"from": "assistant", "value": "是的"}]
    (tmp_path / "a.mp4").write_bytes(b"x")
    write_records(tmp_path, [text_record(conversations=turns, video="a.mp4")])
    (sample,) = load_dataset("videollava", tmp_path).samples[FINETUNE]
    assert sample.turns == (Turn(role="human", text=" <video>\nWhat? "), Turn(role="gpt", text="是的"))


def test_the_newer_packaging_of_one_file_per_source_is_read_in_its_order(tmp_path):
    write_records(tmp_path, [text_record("n")], "nlp_tune.json")
    write_records(tmp_path, [text_record("i")], "llava_image_tune_.json")
    write_records(tmp_path, [text_record("v")], "videochatgpt_tune_.json")
    listing = load_dataset("videollava", tmp_path, stage="finetune")
    assert [sample.sample_id for sample in listing.samples[FINETUNE]] == ["finetune/i", "finetune/v", "finetune/n"]
    assert listing.notes == ()


def test_a_packaging_that_is_there_in_part_is_read_and_said(tmp_path):
    write_records(tmp_path, [text_record("v")], "videochatgpt_tune_.json")
    listing = load_dataset("videollava", tmp_path, stage="finetune")
    assert len(listing.samples[FINETUNE]) == 1
    assert listing.notes == (
        "finetune: llava_image_tune_.json, nlp_tune.json is not there, only videochatgpt_tune_.json is read",
    )


def test_the_merged_packaging_is_preferred_and_said(tmp_path):
    write_records(tmp_path, [text_record("merged")])
    write_records(tmp_path, [text_record("n")], "nlp_tune.json")
    listing = load_dataset("videollava", tmp_path, stage="finetune")
    assert [sample.sample_id for sample in listing.samples[FINETUNE]] == ["finetune/merged"]
    assert listing.notes == (
        "finetune: nlp_tune.json passed over, videochatgpt_llavaimage_tune.json holds the same records",
    )


def test_a_root_without_annotations_says_what_is_expected(tmp_path):
    with pytest.raises(UserError) as raised:
        load_dataset("videollava", tmp_path)
    first, *advice = str(raised.value).splitlines()
    names = "annotations.json or valley_llavaimage.json or videochatgpt_llavaimage_tune.json"
    assert first == f"no annotations under {tmp_path}: expected {names}"
    own, published = (next(n for n, line in enumerate(advice) if text in line) for text in ("of your own", "735 GB"))
    assert own < published
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").write_bytes(b"x")
    (tmp_path / "annotations.json").write_text("".join(advice[own + 2 : published]))  # the example is a whole file
    (sample,) = load_dataset("videollava", tmp_path).samples[FINETUNE]
    assert sample.clip_id == "videollava/clips/a.mp4"
    assert [turn.text for turn in sample.turns] == ["<video>\nWhat happens?", "A cup falls."]


def test_records_of_ones_own_are_the_whole_dataset_and_no_other_stage_is_missed(tmp_path):
    write_records(tmp_path, [text_record("own")], "annotations.json")
    listing = load_dataset("videollava", tmp_path)
    assert [sample.sample_id for sample in listing.samples[FINETUNE]] == ["finetune/own"]
    assert listing.notes == ()


def test_one_id_in_many_records_gets_running_numbers(tmp_path):
    records = [
        text_record("a"),
        text_record("a"),
        text_record("a#2"),
        text_record("a"),
        text_record(7),
        text_record(None),
    ]
    write_records(tmp_path, records)
    ids = [sample.sample_id for sample in load_dataset("videollava", tmp_path).samples[FINETUNE]]
    assert ids == ["finetune/a", "finetune/a#2", "finetune/a#2#2", "finetune/a#3", "finetune/7", "finetune/text"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("text", "record is not an object"),
        (None, "record is not an object"),
        ({"id": "a"}, "conversation is not a list of turns"),
        (text_record(conversations=[]), "conversation is not a list of turns"),
        (text_record(conversations={"from": "human"}), "conversation is not a list of turns"),
        (text_record(conversations=["hello"]), "turn is not an object"),
        (text_record(conversations=[{"from": "human", "value": 3}]), "text is not a string"),
        (text_record(conversations=[{"from": "human"}]), "text is not a string"),
        (text_record(conversations=[{"from": "human", "value": "\ud800"}]), "text is not valid Unicode"),
        (text_record(conversations=[{"from": ["human"], "value": "x"}]), "turn has an unknown role"),
        (text_record(conversations=[{"from": "system", "value": "x"}]), "turn has an unknown role"),
        (text_record(conversations=ANSWERED[::-1]), "turns do not alternate human, gpt"),
        (text_record(conversations=ANSWERED[:1] * 2), "turns do not alternate human, gpt"),
        (text_record(conversations=ANSWERED + ANSWERED[:1]), "last question has no answer"),
        (text_record(["a"]), "id is neither text nor a whole number"),
        (text_record(True), "id is neither text nor a whole number"),
        (text_record("\udfff"), "text is not valid Unicode"),
        (text_record(video="a.mp4", image="a.jpg"), "record names a video and an image"),
        (text_record(video=["a.mp4", "b.mp4"]), "record names several media under 'video'"),
        (text_record(images=["a.jpg", None, "b.jpg"]), "record names several media under 'images'"),
        (text_record(video="a.mp4", video_path="b.mp4"), "record names two media, under 'video' and 'video_path'"),
        (text_record(video="a.mp4", image_path="b.jpg"), "record names a video and an image"),
        (text_record(clip=3), "medium under 'clip' is not a path"),
        (text_record(image={"path": "a.jpg", "bytes": "AAAA"}), "medium under 'image' is not a path"),
        (text_record(media="a.xyz"), "medium under 'media' has an unknown extension"),
        (text_record(film="v/a.mp4"), "medium under 'film' is not read: rename the key"),
        (text_record(frames=["a.jpg", "b.jpg"]), "medium under 'frames' is not read: rename the key"),
        (
            text_record(video_id=3, conversations=ASKED),
            "question has a media placeholder and no key names a medium (other",
        ),
        (text_record(video=None, conversations=ASKED), "question has a media placeholder and no key names a medium"),
        (text_record(video="https://a/b.mp4"), "media path is a URL"),
        (text_record(video="../../etc/passwd"), "media path is unsafe"),
        (text_record(video="/etc/passwd"), "media path is unsafe"),
        (text_record(image="C:/a.jpg"), "media path is unsafe"),
        (text_record(image="a/../../b.jpg"), "media path is unsafe"),
        (text_record(image="a\nb.jpg"), "media path is unsafe"),
        (text_record(image="\\\\host\\a.jpg"), "media path is unsafe"),
        (text_record(image="."), "media path is unsafe"),
        (text_record(image="x" * 5000), "media path is unsafe"),
        (text_record(image="\ud83d.jpg"), "text is not valid Unicode"),
    ],
)
def test_a_malformed_record_is_refused_with_its_reason_and_the_others_stay(tmp_path, record, reason):
    write_records(tmp_path, [text_record("before"), record, text_record("after")])
    listing = load_dataset("videollava", tmp_path)
    assert [sample.sample_id for sample in listing.samples[FINETUNE]] == ["finetune/before", "finetune/after"]
    ((found, rejected),) = listing.rejected.items()
    assert found.startswith(reason)
    assert rejected.count == 1
    assert "videochatgpt_llavaimage_tune.json record 1" in rejected.examples[0]
    rejected.examples[0].encode()


def test_refused_records_are_counted_and_only_a_few_are_shown(tmp_path):
    write_records(tmp_path, [text_record(i, conversations=[]) for i in range(100)])
    (rejected,) = load_dataset("videollava", tmp_path).rejected.values()
    assert rejected.count == 100
    assert len(rejected.examples) == 5


def test_a_medium_that_is_named_as_video_and_as_image_is_refused_the_second_time(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"x")
    write_records(tmp_path, [text_record("a", video="a.gif"), text_record("b", image="a.gif")])
    assert reasons(tmp_path) == {"media is named as a video and as an image": 1}


ABSENT = [None, float("nan"), "", " ", [], [None], [""]]


@pytest.mark.parametrize("absent", ABSENT)
def test_an_absent_medium_is_no_medium_however_a_table_writes_it(tmp_path, absent):
    for name in ("a.mp4", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    records = [
        text_record("v", video="a.mp4", image=absent, conversations=ASKED),
        text_record("i", video=absent, images=["b.png"], conversations=ASKED),
        text_record("t", video=absent, image=absent),
        text_record(absent if not isinstance(absent, list | str) else None),
    ]
    write_records(tmp_path, records)
    listing = load_dataset("videollava", tmp_path)
    assert listing.rejected == {}
    assert {sample.sample_id: sample.clip_id for sample in listing.samples[FINETUNE]} == {
        "finetune/v": "videollava/a.mp4",
        "finetune/i": "videollava/b.png",
        "finetune/t": None,
        "finetune/text": None,
    }


@pytest.mark.parametrize(
    "medium",
    [
        {"videos": ["v/a.mp4"]},
        {"video_path": "v/a.mp4"},
        {"videoPath": "v/a.mp4"},
        {"clip": "v/a.mp4"},
        {"media": ["v/a.mp4", None]},
        {"video": {"path": "v/a.mp4", "bytes": None}},
        {"video": "v/a.mp4", "video_path": "v/a.mp4"},
        {"video": "./v/a.mp4"},
        {"video": "v//a.mp4"},
        {"video": "v/x/../a.mp4"},
        {"video": "v\\a.mp4"},
        {"video": "v/./a.mp4/"},
    ],
)
def test_other_spellings_of_a_medium_name_the_same_clip(tmp_path, medium):
    (tmp_path / "v").mkdir()
    (tmp_path / "v/a.mp4").write_bytes(b"x")
    write_records(tmp_path, [text_record("a", conversations=ASKED, **medium)])
    listing = load_dataset("videollava", tmp_path)
    assert listing.rejected == {}
    assert [clip.clip_id for clip in listing.clips] == ["videollava/v/a.mp4"]
    assert [sample.clip_id for sample in listing.samples[FINETUNE]] == ["videollava/v/a.mp4"]


def test_an_absolute_path_under_the_root_is_a_path_under_the_root(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path)
    paths = [f"{tmp_path}/a.jpg", f"{tmp_path}//v/../a.jpg", "/etc/a.jpg", f"{tmp_path}.jpg", f"{tmp_path}/../a.jpg"]
    write_records(tmp_path, [text_record(str(number), image=path) for number, path in enumerate(paths)])
    for root in (tmp_path, tmp_path / "link"):
        listing = load_dataset("videollava", root)
        assert [clip.path for clip in listing.clips] == ["a.jpg"]
        assert [sample.sample_id for sample in listing.samples[FINETUNE]] == ["finetune/0", "finetune/1"]
        assert listing.rejected["media path is unsafe"].count == 3


def test_a_text_that_speaks_of_a_tag_is_text(tmp_path):
    turns = [{"from": "human", "value": "Is <video> an HTML tag?"}, {"from": "gpt", "value": "<video> is."}]
    write_records(tmp_path, [text_record("a", conversations=turns)])
    (sample,) = load_dataset("videollava", tmp_path).samples[FINETUNE]
    assert (sample.clip_id, sample.turns[1].text) == (None, "<video> is.")


def test_spans_that_are_not_read_are_counted(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    write_records(
        tmp_path, [text_record("a", video="a.mp4", start=1.0, end=2.0), text_record("b", video="a.mp4", end=None)]
    )
    assert load_dataset("videollava", tmp_path).skipped == {"spans under 'start': the whole file is the clip": 1}


def test_a_record_in_another_layout_is_refused_with_its_keys(tmp_path):
    write_records(tmp_path, [{"video": "a.mp4", "QA": [{"q": "What?", "a": "That."}]}])
    assert reasons(tmp_path) == {
        "conversation is not a list of turns: the record has none (other keys: 'video', 'QA')": 1
    }


def test_of_two_forms_of_a_file_the_one_that_is_passed_over_is_named(tmp_path):
    write_records(tmp_path, [text_record("a")])
    (tmp_path / "videochatgpt_llavaimage_tune.jsonl").write_text(json.dumps(text_record("b")))
    listing = load_dataset("videollava", tmp_path, stage="finetune")
    assert [sample.sample_id for sample in listing.samples[FINETUNE]] == ["finetune/a"]
    assert listing.notes[0].startswith("videochatgpt_llavaimage_tune.jsonl passed over")


@given(st.text(st.sampled_from("a./\\:%~ é")) | st.text(max_size=20))
def test_a_path_is_refused_or_lies_under_the_root(text):
    try:
        path = media_path(Path("/data/media"), text)
    except RecordError:
        return
    check_relative_path(path)
    assert os.path.normpath(f"/data/media/{path}") == f"/data/media/{path}"


def test_reasons_that_quote_keys_are_bounded(tmp_path):
    write_records(tmp_path, [text_record(i, **{f"film{i}": "a.mp4"}) for i in range(300)])
    rejected = load_dataset("videollava", tmp_path).rejected
    assert sum(records.count for records in rejected.values()) == 300
    assert len(rejected) <= 101


def test_an_id_that_a_table_wrote_as_a_float_is_a_whole_number(tmp_path):
    write_records(tmp_path, [text_record(7.0), text_record(2.0**60), text_record(0.5)])
    listing = load_dataset("videollava", tmp_path)
    assert [sample.sample_id for sample in listing.samples[FINETUNE]] == ["finetune/7"]
    assert listing.rejected["id is neither text nor a whole number"].count == 2


junk = st.recursive(
    st.sampled_from([None, True, 3, 0.5, float("nan"), "human", "gpt", "a/b.mp4", "../a"]) | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["id", "video", "images", "video_path", "media", "film", "conversations", "from", "value"]),
            inner,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(records=st.lists(junk, max_size=5))
def test_whatever_the_records_every_one_becomes_a_sample_or_is_counted(tmp_path_factory, records):
    root = write_records(tmp_path_factory.getbasetemp() / "junk", records)
    listing = load_dataset("videollava", root)
    counted = len(listing.samples[FINETUNE]) + sum(rejected.count for rejected in listing.rejected.values())
    # A sample whose media are not there waits for them: only then may a record be neither.
    assert counted <= len(records) if listing.missing else counted == len(records)


def test_broken_json_is_an_error_with_file_and_position(tmp_path):
    (tmp_path / "valley_llavaimage.json").write_text('[\n{"id": "a"},\n{"id": }\n]')
    with pytest.raises(UserError, match=r"valley_llavaimage\.json is broken at line 3, column 8"):
        load_dataset("videollava", tmp_path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("valley/000001_000050/1.mp4", "valley"),
        ("llava_image/00453/1.jpg", "llava_image"),
        ("videochatgpt_tune/v_1.mp4", "videochatgpt"),
        ("llava_image_tune/coco/train2017/1.jpg", "coco"),
        ("llava_image_tune/ocr_vqa/images/1.jpg", "ocr_vqa"),
        ("llava_image_tune/textvqa/train_images/1.jpg", "textvqa"),
        ("llava_image_tune/vg/VG_100K/1.jpg", "vg"),
        ("llava_image_tune/1.jpg", "llava_image_tune"),
        ("mine/1.jpg", "mine"),
        ("1.jpg", "other"),
        (None, "text"),
    ],
)
def test_the_source_follows_from_the_leading_folders(path, source):
    assert source_of(path) == source


@pytest.mark.parametrize("name", ["annotations.json", "annotations.jsonl", "annotations.jsonl.gz"])
def test_records_of_ones_own_have_a_name_that_anyone_would_choose(tmp_path, name):
    record = {
        "id": "1",
        "video": "a.mp4",
        "conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    }
    text = json.dumps(record) + "\n" if ".jsonl" in name else json.dumps([record])
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    (tmp_path / "a.mp4").write_bytes(b"x")
    listing = load_dataset("videollava", tmp_path)
    assert [clip.path for clip in listing.clips] == ["a.mp4"]
    assert [sample.stage for sample in listing.samples["videollava-finetune"]] == ["finetune"]
