import gzip
import json
import math
from pathlib import Path

import pytest

from featurestore.clips import Turn
from mervcache.errors import UserError
from pipeline.datasets import DatasetListing, load_dataset


def write_benchmark(root: Path, questions: list, answers: list, name: str = "Bench", videos=("a.mp4",)) -> Path:
    folder = root / name / "videos"
    folder.mkdir(parents=True)
    for video in videos:
        (folder / video).write_bytes(b"media")
    (root / name / "test_q.json").write_text(json.dumps(questions))
    (root / name / "test_a.json").write_text(json.dumps(answers))
    return root


def question(question_id: object = 1, video: object = "a", **fields) -> dict:
    return {"video_name": video, "question_id": question_id, "question": "What?", **fields}


def one(root: Path, row: dict, answer: dict) -> DatasetListing:
    return load_dataset("eval", write_benchmark(root, [row], [{"question_id": 1, **answer}]))


def test_the_real_small_benchmarks_have_the_counts_of_their_readme(mini):
    listing = load_dataset("eval", mini / "eval")
    assert {name: len(samples) for name, samples in listing.samples.items()} == {
        "eval-mini_mcq": 54,
        "eval-mini_openended": 81,
    }
    assert len(listing.clips) == 27
    assert Path(listing.root) == mini
    assert listing.missing == {}
    assert listing.rejected == {}
    choices = listing.samples["eval-mini_mcq"]
    assert [sum(s.answer_index == i for s in choices) for i in range(4)] == [14, 14, 13, 13]
    answers = {row["question_id"]: row for row in json.loads((mini / "eval/mini_mcq/test_a.json").read_text())}
    for sample in choices:
        assert sample.options[sample.answer_index] == answers[sample.sample_id.rpartition("/")[2]]["answer"]
    assert all(s.options == () and s.answer_index is None for s in listing.samples["eval-mini_openended"])


def test_the_media_root_and_the_benchmarks_can_be_named(mini):
    listing = load_dataset("eval", mini / "eval", media_root="..", benchmarks="mini_mcq")
    assert list(listing.samples) == ["eval-mini_mcq"]
    with pytest.raises(UserError, match=r"no benchmark MSVD under .*there are mini_mcq, mini_openended"):
        load_dataset("eval", mini / "eval", benchmarks="MSVD")


@pytest.mark.parametrize("media_root", ["Bench", "/etc", "../nothing"])
def test_the_media_root_must_be_the_root_or_above_it(tmp_path, media_root):
    write_benchmark(tmp_path / "eval", [question()], [{"question_id": 1, "answer": "x"}])
    with pytest.raises(UserError, match="media_root must be the root"):
        load_dataset("eval", tmp_path / "eval", media_root=media_root)


def test_the_root_may_be_one_benchmark_itself(tmp_path):
    write_benchmark(tmp_path, [question()], [{"question_id": 1, "answer": "x"}])
    listing = load_dataset("eval", tmp_path / "Bench")
    assert [clip.path for clip in listing.clips] == ["videos/a.mp4"]
    assert list(listing.samples) == ["eval-Bench"]


def test_an_open_question_is_a_heldout_sample_with_its_answer(tmp_path):
    listing = one(tmp_path, question(type="colour"), {"answer": "red"})
    (sample,) = listing.samples["eval-Bench"]
    assert sample.turns == (Turn(role="human", text="What?"), Turn(role="gpt", text="red"))
    assert (sample.stage, sample.split, sample.source) == ("eval", "heldout", "Bench")
    assert (sample.sample_id, sample.category) == ("eval/Bench/1", "colour")
    assert sample.clip_id == "eval/Bench/videos/a.mp4"


def test_of_the_options_the_first_num_option_count(tmp_path):
    row = question(options=["a", "b", "c", "", ""], num_option=3)
    (sample,) = one(tmp_path, row, {"answer_id": 2, "answer": "c"}).samples["eval-Bench"]
    assert sample.options == ("a", "b", "c")
    assert sample.answer_index == 2
    assert sample.turns[1].text == "c"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (None, None, None)),
        ({"time": None}, (None, None, None)),
        ({"time": [1.5, 4]}, (1.5, 4.0, None)),
        ({"time": [math.nan, 4]}, (0.0, 4.0, None)),
        ({"time": [2, math.nan]}, (2.0, None, None)),
        ({"time": [math.nan, math.nan]}, (0.0, None, None)),
        ({"time": [1, 2], "end_frame": 7}, (None, None, 7)),
        ({"time": [1, 2], "end_frame": 0}, (None, None, 0)),
        ({"time": [1, 2], "end_frame": -1}, (1.0, 2.0, None)),
        ({"end_frame": 7.0}, (None, None, 7)),
        ({"end_frame": math.nan, "time": [1, 2]}, (1.0, 2.0, None)),
        ({"time": math.nan}, (None, None, None)),
    ],
)
def test_spans_and_end_frames_go_into_the_clip(tmp_path, fields, expected):
    (clip,) = one(tmp_path, question(**fields), {"answer": "x"}).clips
    assert (clip.start_s, clip.end_s, clip.end_frame) == expected


def test_two_spans_of_one_video_are_two_clips_and_one_span_is_one(tmp_path):
    rows = [question(i, time=span) for i, span in enumerate([[0, 1], [1, 2], [0, 1]])]
    listing = load_dataset(
        "eval", write_benchmark(tmp_path, rows, [{"question_id": i, "answer": "x"} for i in range(3)])
    )
    assert [clip.clip_id.rpartition("#")[2] for clip in listing.clips] == ["t=0.0,1.0", "t=1.0,2.0"]
    assert len(listing.samples["eval-Bench"]) == 3


@pytest.mark.parametrize(
    ("fields", "answer", "reason"),
    [
        ({"time": [4, 1]}, {"answer": "x"}, "span is not possible"),
        ({"time": [-1, 1]}, {"answer": "x"}, "span is not possible"),
        ({"time": [0, math.inf]}, {"answer": "x"}, "span is not possible"),
        ({"time": [0, 10**400]}, {"answer": "x"}, "span is not possible"),
        ({"time": [1]}, {"answer": "x"}, "time is not [start, end] in seconds"),
        ({"time": "1-2"}, {"answer": "x"}, "time is not [start, end] in seconds"),
        ({"time": [True, 2]}, {"answer": "x"}, "time is not [start, end] in seconds"),
        ({"end_frame": 1.5}, {"answer": "x"}, "end_frame is not a frame's number"),
        ({"end_frame": True}, {"answer": "x"}, "end_frame is not a frame's number"),
        ({"end_frame": 10**400}, {"answer": "x"}, "end_frame is not a frame's number"),
        ({"end_frame": "7"}, {"answer": "x"}, "end_frame is not a frame's number"),
        ({"options": []}, {"answer_id": 0}, "options are not a list of texts"),
        ({"options": ["a", [1]]}, {"answer_id": 0}, "text is not a string"),
        ({"options": ["a", math.nan, "b"]}, {"answer_id": 0}, "text is not a string"),
        ({"options": ["a", 1.5]}, {"answer_id": 0}, "text is not a string"),
        ({"options": [math.nan, None]}, {"answer_id": 0}, "options are not a list of texts"),
        ({"options": ["a", "b", math.nan], "num_option": 3}, {"answer_id": 0}, "text is not a string"),
        ({"options": ["a", "b", math.nan]}, {"answer_id": 2}, "answer_id is not one of the options"),
        ({"options": ["a", "b"]}, {"answer_id": math.nan}, "answer_id is not one of the options"),
        ({"options": ["a", "b"]}, {"answer_id": 0.5}, "answer_id is not one of the options"),
        ({"options": ["a"], "num_option": 2}, {"answer_id": 0}, "num_option is not a number of the options"),
        ({"options": ["a", "b"], "num_option": 1}, {"answer_id": 1}, "answer_id is not one of the options"),
        ({"options": ["a", "b"]}, {"answer_id": -1}, "answer_id is not one of the options"),
        ({"options": ["a", "b"]}, {"answer_id": "0"}, "answer_id is not one of the options"),
        ({}, {"answer": None}, "text is not a string"),
        ({"question": 3}, {"answer": "x"}, "text is not a string"),
        ({"video_name": 3.5}, {"answer": "x"}, "text is not a string"),
        ({"video_name": "../../a"}, {"answer": "x"}, "media path is unsafe"),
        ({"video_name": "/etc/a"}, {"answer": "x"}, "media path is unsafe"),
        ({"video_name": "a\0b/c"}, {"answer": "x"}, "media path is unsafe"),
        ({"question_id": 2}, {"answer": "x"}, "question has no answer"),
        ({"question_id": [1]}, {"answer": "x"}, "id is neither text nor a whole number"),
        ({"question_id": 1.5}, {"answer": "x"}, "id is neither text nor a whole number"),
        ({"question_id": math.nan}, {"answer": "x"}, "row has no question_id"),
    ],
)
def test_a_malformed_question_is_refused_with_its_reason(tmp_path, fields, answer, reason):
    listing = one(tmp_path, question(**{"time": None} | fields), answer)
    assert {why: found.count for why, found in listing.rejected.items()} == {reason: 1}
    assert listing.samples["eval-Bench"] == ()


def test_numbers_and_padding_of_a_table_are_read_as_what_they_were(tmp_path):
    rows = [
        question(
            1.0, 7.0, options=["a", "b", math.nan, None, ""], num_option=math.nan, category=math.nan, type="colour"
        ),
        question(2.0, 7.0, options=["a", "b", "c"], num_option=2.0),
        question(3.0, 7.0, options=[1.0, 2.0, math.nan]),
        question(4.0, 7.0, options=math.nan),
    ]
    answers = [
        {"question_id": 1, "answer_id": 1.0},
        {"question_id": 2, "answer_id": 0.0},
        {"question_id": 3, "answer_id": 1.0},
        {"question_id": 4, "answer_id": math.nan, "answer": 12.0},
    ]
    listing = load_dataset("eval", write_benchmark(tmp_path, rows, answers, videos=("7.mp4",)))
    assert listing.rejected == {}
    found = [(s.sample_id, s.options, s.answer_index, s.turns[1].text) for s in listing.samples["eval-Bench"]]
    assert found == [
        ("eval/Bench/1", ("a", "b"), 1, "b"),
        ("eval/Bench/2", ("a", "b"), 0, "a"),
        ("eval/Bench/3", ("1", "2"), 1, "2"),
        ("eval/Bench/4", (), None, "12"),
    ]
    assert listing.samples["eval-Bench"][0].category == "colour"


def test_rows_without_an_id_are_not_paired_with_each_other(tmp_path):
    rows, answers = [question(None), question(math.nan)], [{"answer": "x"}, {"question_id": None, "answer": "y"}]
    listing = load_dataset("eval", write_benchmark(tmp_path, rows, answers))
    assert listing.samples["eval-Bench"] == ()
    assert listing.rejected["row has no question_id"].count == 4


@pytest.mark.parametrize("name", ["a.mp4", "./a", "./a.mp4", "sub/../a", "sub//b.avi", "sub\\b"])
def test_a_video_may_be_named_with_its_extension_and_any_harmless_path(tmp_path, name):
    write_benchmark(tmp_path, [question(video=name)], [{"question_id": 1, "answer": "x"}])
    (tmp_path / "Bench/videos/sub").mkdir()
    (tmp_path / "Bench/videos/sub/b.avi").write_bytes(b"x")
    listing = load_dataset("eval", tmp_path)
    assert [clip.path for clip in listing.clips] == [
        "Bench/videos/sub/b.avi" if name.endswith(("b", "b.avi")) else "Bench/videos/a.mp4"
    ]


def test_a_folder_that_cannot_be_listed_costs_its_questions_and_not_the_listing(tmp_path):
    names = ["a", "loop/b", "x" * 300 + "/c"]
    rows, answers = zip(
        *((question(n, name), {"question_id": n, "answer": "x"}) for n, name in enumerate(names)), strict=True
    )
    write_benchmark(tmp_path, list(rows), list(answers))
    (tmp_path / "Bench/videos/loop").symlink_to("loop")
    listing = load_dataset("eval", tmp_path)
    assert [clip.path for clip in listing.clips] == ["Bench/videos/a.mp4"]
    assert listing.rejected["media folder is a loop of links"].count == 1
    assert listing.missing == {f"Bench/videos/{'x' * 300}": 1}


def test_questions_may_be_json_lines_and_compressed(tmp_path):
    write_benchmark(tmp_path, [question()], [{"question_id": 1, "answer": "x"}])
    (tmp_path / "Bench/test_q.json").rename(tmp_path / "Bench/test_q.jsonl")
    with gzip.open(tmp_path / "Bench/test_a.json.gz", "wb") as file:
        file.write((tmp_path / "Bench/test_a.json").read_bytes())
    (tmp_path / "Bench/test_a.json").unlink()
    assert len(load_dataset("eval", tmp_path).samples["eval-Bench"]) == 1


def test_a_second_answer_to_a_question_is_refused(tmp_path):
    answers = [{"question_id": 1, "answer": "first"}, {"question_id": 1, "answer": "second"}]
    listing = load_dataset("eval", write_benchmark(tmp_path, [question()], answers))
    assert listing.samples["eval-Bench"][0].turns[1].text == "first"
    assert listing.rejected["question has two answers"].count == 1


def test_a_video_is_found_under_any_extension_and_may_be_a_folder_of_frames(tmp_path):
    names = ("a.b.webm", "c.txt", "c.mkv", ".d.mp4")
    rows = [question(i, name) for i, name in enumerate(["a.b", "c", "frames", "sub/e", "d"])]
    write_benchmark(tmp_path, rows, [{"question_id": i, "answer": "x"} for i in range(5)], videos=names)
    for path in ("frames/00001.jpg", "sub/e.mp4"):
        (tmp_path / "Bench" / "videos" / path).parent.mkdir()
        (tmp_path / "Bench" / "videos" / path).write_bytes(b"x")
    listing = load_dataset("eval", tmp_path)
    paths = [clip.path.removeprefix("Bench/videos/") for clip in listing.clips]
    assert paths == ["a.b.webm", "c.mkv", "frames", "sub/e.mp4"]
    assert {clip.kind for clip in listing.clips} == {"video"}
    assert listing.missing == {"Bench/videos": 1}


def test_one_missing_video_of_many_questions_counts_once(tmp_path):
    rows = [question(i, "gone") for i in range(5)]
    listing = load_dataset(
        "eval", write_benchmark(tmp_path, rows, [{"question_id": i, "answer": "x"} for i in range(5)])
    )
    assert listing.missing == {"Bench/videos": 1}


def test_a_table_of_videos_that_leads_outside_is_refused_by_record(tmp_path):
    rows, answers = [question(1, "a"), question(2, "b")], [{"question_id": i, "answer": "x"} for i in (1, 2)]
    write_benchmark(tmp_path / "eval", rows, answers)
    (tmp_path / "eval" / "Bench" / "videos.txt").write_text("a\t../../etc/passwd\n")
    listing = load_dataset("eval", tmp_path / "eval")
    assert {why: found.count for why, found in listing.rejected.items()} == {
        "media path is unsafe": 1,
        "video is not in videos.txt": 1,
    }


def test_a_table_of_videos_with_a_broken_line_is_an_error(tmp_path):
    write_benchmark(tmp_path / "eval", [question()], [{"question_id": 1, "answer": "x"}])
    (tmp_path / "eval" / "Bench" / "videos.txt").write_text("a b.mp4\n")
    with pytest.raises(UserError, match=r"videos\.txt, entry 1: expected NAME, one tab, path"):
        load_dataset("eval", tmp_path / "eval")


def test_questions_without_answers_beside_them_are_an_error(tmp_path):
    write_benchmark(tmp_path, [question()], [])
    (tmp_path / "Bench" / "test_a.json").unlink()
    with pytest.raises(UserError, match=r"Bench has test_q\.json but no test_a\.json"):
        load_dataset("eval", tmp_path)


def test_a_root_without_benchmarks_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"expected BENCHMARK/test_q\.json"):
        load_dataset("eval", tmp_path)


def test_a_root_one_folder_too_high_is_answered_with_the_right_one(mini):
    with pytest.raises(UserError, match=r"expected BENCHMARK/test_q\.json; did you mean --root .*/eval\?"):
        load_dataset("eval", mini)
