"""Benchmarks in the formats that they are published in: small files written by hand."""

import json
from collections import Counter

import pytest

from mervcache.errors import UserError
from pipeline.datasets import load_dataset
from pipeline.datasets.benchmarks import TEMPORAL_CLASSES, label_options, read_classes


@pytest.fixture
def bench(tmp_path):
    """Writes a benchmark's files and media, and lists it: the listing and its samples."""

    def make(files, media, name="Bench", **options):
        for path, content in files.items():
            target = tmp_path / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content if isinstance(content, str) else json.dumps(content))
        for path in media:
            target = tmp_path / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"media")
        listing = load_dataset("eval", tmp_path, **options)
        return listing, listing.samples[f"eval-{name}"]

    return make


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def shown(sample):
    return sample.turns[0].text, sample.turns[1].text, sample.options, sample.answer_index, sample.category


def test_msvd_names_its_videos_by_the_mapping(bench):
    rows = [
        {"answer": "someone", "id": 30933, "question": "who pours liquid?", "video_id": 1301},
        {"answer": "two", "id": 30934, "question": "how many are there?", "video_id": 1302},
        {"answer": "up", "id": 30935, "question": "is it up?", "video_id": 9},
    ]
    mapping = "-4wsuPCjDBc_5_15 vid1301\n-7KMZQEsJW4_205_208 vid1302\n"
    files = {"test_qa.json": rows, "youtube_mapping.txt": mapping}
    media = ["YouTubeClips/-4wsuPCjDBc_5_15.avi", "YouTubeClips/-7KMZQEsJW4_205_208.avi"]
    listing, samples = bench(files, media, "MSVD")
    assert [sample.clip_id for sample in samples] == [f"eval/MSVD/{path}" for path in media]
    assert shown(samples[0]) == ("who pours liquid?", "someone", (), None, "who")
    assert (samples[1].sample_id, samples[1].source, samples[1].category) == ("eval/MSVD/30934", "MSVD", "how")
    assert listing.rejected["video is not in youtube_mapping.txt"].count == 1


def test_msrvtt_names_its_videos_by_number_and_what_is_missing_is_counted(bench):
    rows = [
        {"answer": "couch", "category_id": 14, "id": 0, "question": "what are sitting?", "video_id": 7010},
        {"answer": "3", "category_id": 14, "id": 1, "question": "Is it?", "video_id": 7011},
    ]
    listing, samples = bench({"test_qa.json": rows}, ["videos/video7010.mp4"], "MSRVTT")
    assert [sample.clip_id for sample in samples] == ["eval/MSRVTT/videos/video7010.mp4"]
    assert listing.missing == {"MSRVTT/videos": 1}


def test_tgif_frame_questions_are_tab_separated(bench):
    table = (
        "gif_name\tquestion\tanswer\ttype\tvid_id\tdescription\n"
        'tumblr_nk172\twhat is the man holding ?\tguitar\t0\tFRAMEQA1\ta man, "sitting"\n'
        "tumblr_nk173\thow many dogs walk ?\ttwo\t1\tFRAMEQA2\tdogs\n"
        "tumblr_nk174\tshort row\n"
    )
    media = ["gifs/tumblr_nk172.gif", "gifs/tumblr_nk173.gif"]
    listing, samples = bench({"Test_frameqa_question.csv": table}, media, "TGIF")
    assert shown(samples[0]) == ("what is the man holding ?", "guitar", (), None, "object")
    assert [sample.sample_id for sample in samples] == ["eval/TGIF/FRAMEQA1", "eval/TGIF/FRAMEQA2"]
    assert listing.rejected["row has another number of fields than the header"].count == 1


def test_activitynet_has_merv_s_layout_numbered_types_and_longer_file_names(bench):
    questions = [
        {"question": "is the athlete wearing trousers", "video_name": "1QIUV7WYKXg", "question_id": "v_1QIUV7WYKXg_3"},
        {"question": "what happens before", "video_name": "abc", "question_id": "v_abc_1"},
    ]
    answers = [
        {"answer": "yes", "type": 3, "question_id": "v_1QIUV7WYKXg_3"},
        {"answer": "a jump", "type": 2, "question_id": "v_abc_1"},
    ]
    media = ["videos/v_1QIUV7WYKXg.mp4", "videos/abc.mp4"]
    _, samples = bench({"test_q.json": questions, "test_a.json": answers}, media, "ActivityNet")
    assert [sample.clip_id for sample in samples] == [f"eval/ActivityNet/{path}" for path in media]
    assert [sample.category for sample in samples] == ["yes/no", "temporal relationship"]


def test_types_of_other_benchmarks_in_that_layout_have_no_names(bench):
    files = {
        "test_q.json": [{"question": "who?", "video_name": "a", "question_id": 1}],
        "test_a.json": [{"answer": "x", "type": 3, "question_id": 1}],
    }
    _, (sample,) = bench(files, ["videos/a.mp4"], "MSVD")
    assert sample.category is None


PERCEPTION = {
    "video_10336": {
        "metadata": {"split": "valid", "video_id": "video_10336", "frame_rate": 29.9, "num_frames": 900},
        "object_tracking": [],
        "mc_question": [
            {
                "id": 0,
                "question": "Is the camera moving or static?",
                "options": ["static or shaking", "I don't know", "moving"],
                "answer_id": 2,
                "area": "physics",
                "reasoning": "descriptive",
                "tag": ["motion"],
            },
            {"id": 1, "question": "Is it?", "options": ["yes", "no", "maybe"], "area": "memory"},
        ],
    },
    "video_2": {"metadata": {}, "mc_question": []},
    "video_3": {"metadata": {}},
}


def test_perception_test_ends_at_the_frame_of_its_cut(bench):
    files = {"mc_question_valid.json": PERCEPTION, "cut_frame_mapping_valid.json": {"video_10336": 595}}
    listing, (sample,) = bench(files, ["videos/video_10336.mp4"], "PerceptionTest")
    options = ("static or shaking", "I don't know", "moving")
    assert shown(sample) == ("Is the camera moving or static?", "moving", options, 2, "physics")
    assert sample.sample_id == "eval/PerceptionTest/video_10336_0"
    assert [clip.end_frame for clip in listing.clips] == [595]
    assert {reason: found.count for reason, found in listing.rejected.items()} == {
        "answer is not the index of an option": 1
    }
    assert listing.notes == ()


def test_perception_test_without_its_cuts_says_so(bench):
    listing, _ = bench({"all_valid.json": PERCEPTION}, ["videos/video_10336.mp4"], "PerceptionTest")
    assert [clip.end_frame for clip in listing.clips] == [None]
    assert "read to their end" in listing.notes[0]


NEXTQA = (
    "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
    '4010069381,369,640,480,"how do the two men play, then",2,6,CH,roll,tap,strum the string,hit,pat\n'
    "4010069381,369,640,480,why,5,7,CW,a,b,c,d,e\n"
)


def test_nextqa_finds_its_videos_by_the_map(bench):
    files = {"val.csv": NEXTQA, "map_vid_vidorID.json": {"4010069381": "1164/4010069381"}}
    listing, (sample,) = bench(files, ["NExTVideo/1164/4010069381.mp4"], "NExT-QA")
    options = ("roll", "tap", "strum the string", "hit", "pat")
    assert shown(sample) == ("how do the two men play, then", "strum the string", options, 2, "CH")
    assert (sample.sample_id, sample.clip_id) == (
        "eval/NExT-QA/4010069381_6",
        "eval/NExT-QA/NExTVideo/1164/4010069381.mp4",
    )
    assert listing.rejected["answer is not the index of an option"].count == 1


def test_of_two_splits_one_is_read_and_the_other_named(bench):
    listing, samples = bench({"val.csv": NEXTQA, "test.csv": NEXTQA}, ["videos/4010069381.mp4"], "NExT-QA")
    assert len(samples) == 1
    assert any("test.csv passed over" in note for note in listing.notes)


def test_a_table_of_another_kind_is_named_with_its_columns(bench):
    with pytest.raises(UserError, match=r"val\.csv has no column qid, a0.*its columns are video, question, answer"):
        bench({"val.csv": "video,question,answer\nv,q,1\n"}, [], "NExT-QA")


def test_tvqa_has_spans_and_no_subtitles(bench):
    row = {"a0": "A martini", "a1": "Nachos", "a2": "Her purse", "a3": "A book", "a4": "Beer", "answer_idx": 4}
    rows = [
        {**row, "q": "What is Robin holding?", "qid": 7, "ts": "1.21-8.49", "vid_name": "met_s06e22_seg01_clip_02"},
        {**row, "q": "Who?", "qid": 8, "ts": "nan-nan", "vid_name": "s05e02_seg02_clip_00", "show_name": "BBT"},
        {**row, "q": "Who?", "qid": 9, "ts": "8.49", "vid_name": "s05e02_seg02_clip_00"},
    ]
    media = [
        "frames_hq/met_frames/met_s06e22_seg01_clip_02/00001.jpg",
        "frames_hq/bbt_frames/s05e02_seg02_clip_00/00001.jpg",
    ]
    listing, samples = bench({"tvqa_val.jsonl": lines(*rows)}, media, "TVQA")
    assert [(clip.path, clip.start_s, clip.end_s) for clip in listing.clips] == [
        ("TVQA/frames_hq/met_frames/met_s06e22_seg01_clip_02", 1.21, 8.49),
        ("TVQA/frames_hq/bbt_frames/s05e02_seg02_clip_00", 0.0, None),
    ]
    assert shown(samples[0])[1:] == ("Beer", ("A martini", "Nachos", "Her purse", "A book", "Beer"), 4, None)
    assert samples[1].category == "BBT"
    assert listing.rejected["ts is not START-END in seconds"].count == 1
    assert "subtitles are not used" in listing.notes[0]


def test_vlep_asks_which_event_is_next(bench):
    rows = [
        {
            "example_id": 21411,
            "vid_name": "OO9kSxcT9Rg_subs_012_00:13:00_00:14:00_ep",
            "ts": [10.54, 13.55],
            "events": ["The customer eats.", "The customer takes the tray."],
            "answer": 1,
            "split": "dev",
        },
        {"example_id": 2, "vid_name": "x", "ts": [1, 2], "events": ["a", "b"], "split": "test"},
    ]
    media = ["vlep_frames/OO9kSxcT9Rg_subs_012_00:13:00_00:14:00_ep/00001.jpg"]
    listing, (sample,) = bench({"vlep_dev_release.jsonl": lines(*rows)}, media, "VLEP")
    assert (listing.clips[0].start_s, listing.clips[0].end_s) == (10.54, 13.55)
    assert sample.options == ("The customer eats.", "The customer takes the tray.")
    assert (sample.answer_index, sample.sample_id) == (1, "eval/VLEP/21411")
    assert "likely" in sample.turns[0].text
    assert listing.rejected["answer is not the index of an option"].count == 1


LABELS = {
    "Pushing something from left to right": "0",
    "Pushing something from right to left": "1",
    "Closing something": "2",
    "Opening something": "3",
    "Tearing something into two pieces": "4",
    "Folding something": "5",
    "Poking something so lightly that it doesn't move": "6",
}
VALIDATION = [
    {
        "id": "74225",
        "label": "pushing cup from left to right",
        "template": "Pushing [something] from left to right",
        "placeholders": ["cup"],
    },
    {"id": "74226", "label": "closing a box", "template": "Closing [something]", "placeholders": ["a box"]},
    {"id": "74227", "label": "odd", "template": "Juggling [something]", "placeholders": ["a"]},
]


def ssv2(bench, **options):
    files = {"something-something-v2-validation.json": VALIDATION, "something-something-v2-labels.json": LABELS}
    media = [f"20bn-something-something-v2/{row['id']}.webm" for row in VALIDATION]
    return bench(files, media, "SSv2", **options)


def test_labels_of_something_become_questions_with_five_options(bench):
    listing, samples = ssv2(bench)
    for sample, label in zip(samples, ("Pushing something from left to right", "Closing something"), strict=True):
        assert sample.options[sample.answer_index] == sample.turns[1].text == label
        assert len(set(sample.options)) == 5
        assert set(sample.options) < LABELS.keys()
    assert [sample.category for sample in samples] == ["temporal", "other"]
    assert samples[0].clip_id == "eval/SSv2/20bn-something-something-v2/74225.webm"
    assert listing.rejected["template is not one of the labels"].count == 1
    assert [sample.options for sample in ssv2(bench, ssv2_seed=1)[1]] != [sample.options for sample in samples]


def test_the_seed_is_a_number(bench):
    with pytest.raises(UserError, match="ssv2_seed is a whole number, got 'x'"):
        ssv2(bench, ssv2_seed="x")


def test_the_temporal_subset_may_be_another_list(bench, tmp_path):
    (tmp_path / "own.txt").write_text("# mine\nClosing something\n")
    _, samples = ssv2(bench, ssv2_temporal=str(tmp_path / "own.txt"))
    assert [sample.category for sample in samples] == ["other", "temporal"]


def test_options_depend_on_seed_and_video_alone_and_every_place_is_as_likely():
    labels = [f"class {number}" for number in range(20)]
    once = label_options("7", "class 3", labels)
    assert label_options("7", "class 3", reversed(labels)) == once
    assert label_options("8", "class 3", labels) != once
    drawn = [label_options(str(video), "class 3", labels) for video in range(2000)]
    places = Counter(index for _, index in drawn)
    assert min(places[place] for place in range(5)) > 320  # 400 expected, standard deviation 18
    distractors = Counter(option for options, _ in drawn for option in options)
    assert distractors.pop("class 3") == 2000
    assert min(distractors.values()) > 320  # 421 expected
    assert len(distractors) == 19


def test_the_temporal_list_has_twelve_classes():
    assert len(read_classes(TEMPORAL_CLASSES)) == 12


def test_plain_questions_as_json_lines(bench):
    rows = [
        {"video": "a", "question": "What?", "answer": "red", "category": "colour"},
        {"video": "a.mp4", "question": "Which?", "options": ["red", "blue"], "answer_index": 1, "start": 1, "end": 2.5},
        {"video": "a", "question": "Which?", "options": ["red", "blue"], "answer": "blue", "end_frame": 9},
        {"video": "a", "question": "Which?", "options": ["red", "red"], "answer": "red"},
        {"video": "a", "question": "Which?", "options": ["red", "blue"], "answer_index": 2},
        {"video": "a", "question": "Which?"},
        {"video": "a", "answer": "x"},
    ]
    listing, samples = bench({"questions.jsonl": lines(*rows)}, ["videos/a.mp4"])
    assert [shown(sample) for sample in samples] == [
        ("What?", "red", (), None, "colour"),
        ("Which?", "blue", ("red", "blue"), 1, None),
        ("Which?", "blue", ("red", "blue"), 1, None),
    ]
    assert [sample.clip_id.partition("a.mp4")[2] for sample in samples] == ["", "#t=1.0,2.5", "#end_frame=9"]
    assert {reason: found.count for reason, found in listing.rejected.items()} == {
        "answer is not the text of one option; give answer_index, which counts from 0": 1,
        "answer is not the index of an option": 1,
        "row has no answer": 1,
        "row has no question": 1,
    }


def test_plain_questions_as_a_table(bench):
    table = (
        "question_id,video,question,answer,options,answer_index,a0,a1,a2,start,end,end_frame\n"
        'q1,a,What?,"red, mostly",,,,,,,,\n'
        'q2,a,Which?,,"[""red"", ""blue""]",1,,,,0.5,,\n'
        "q3,a,Which?,yes,,,yes,no,,,,12\n"
        "q4,a,Which?,,not json,1,,,,,,\n"
    )
    listing, samples = bench({"questions.csv": table}, ["videos/a.mp4"])
    assert [shown(sample)[:4] for sample in samples] == [
        ("What?", "red, mostly", (), None),
        ("Which?", "blue", ("red", "blue"), 1),
        ("Which?", "yes", ("yes", "no"), 0),
    ]
    assert [sample.sample_id for sample in samples] == [f"eval/Bench/q{number}" for number in (1, 2, 3)]
    assert [sample.clip_id.partition("a.mp4")[2] for sample in samples] == ["", "#t=0.5,", "#end_frame=12"]
    assert listing.rejected['options are not a JSON list such as ["red", "blue"]'].count == 1


def test_merv_s_layout_wins_over_the_published_file_beside_it(bench):
    files = {
        "test_q.json": [{"question": "who?", "video_name": "4010069381", "question_id": 1}],
        "test_a.json": [{"answer": "x", "question_id": 1}],
        "val.csv": NEXTQA,
    }
    listing, samples = bench(files, ["videos/4010069381.mp4"], "NExT-QA")
    assert [sample.sample_id for sample in samples] == ["eval/NExT-QA/1"]
    assert any("val.csv passed over" in note for note in listing.notes)


def test_several_formats_lie_under_one_root(bench):
    bench({"questions.jsonl": lines({"video": "a", "question": "W?", "answer": "x"})}, ["videos/a.mp4"], "Own")
    listing, _ = bench({"val.csv": NEXTQA}, ["videos/4010069381.mp4"], "NExT-QA")
    assert {name: len(samples) for name, samples in listing.samples.items()} == {"eval-NExT-QA": 1, "eval-Own": 1}
