"""Requests of lmms-eval: as its tasks make them, and by its own evaluator where lmms-eval is installed.

The tuples below are those of `ConfigurableTask.construct_requests` in lmms-eval 0.7.3, whose `multiple_choice` takes
the option with the lowest number.
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from featurestore import FeatureStore
from mervcache.errors import UserError
from pipeline.config import read_config as read_extract_config
from pipeline.extract import extract
from trainer.config import OptimizerConfig, ProjectorConfig, TrainConfig
from trainer.evaluate import EvaluationRequest, evaluate_run
from trainer.lmms_requests import Requests
from trainer.loop.train import train
from trainer.media_tokens import MediaTokens
from trainer.model.llm import FRESH_LLMS, FreshLLM
from trainer.runs.load import load_run
from trainer.sources import open_store

pytestmark = pytest.mark.slow

QUESTION, OPTIONS = "What colour is it?", ["red", "green", "blue", "white"]
FILMS = {"one": "red", "two": "green", "three": "blue"}  # of the benchmark, and the film that each is a copy of
CONFIG = TrainConfig(
    llm="fresh:mini",
    train_llm="full",
    projector=ProjectorConfig(standardise=True),
    optimizer=OptimizerConfig(projector_lr=3e-3, fusion_lr=3e-3, llm_lr=3e-3, warmup_ratio=0.1),
    batch_size=7,
    micro_batch_size=7,
    max_steps=60,
    precision="fp32",
    checkpoint_every=100,
)
GREEDY = {"until": ["\n\n"], "do_sample": False}


@pytest.fixture(scope="module")
def run(extracted, tmp_path_factory):
    """Knows the colours of the films by heart."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "colours"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FRESH_LLMS, "mini", FreshLLM(hidden_size=32, num_layers=1, num_heads=2, context=64))
        samples, source = open_store(str(extracted), CONFIG)
        train(CONFIG, samples, source, out, store=str(extracted), quiet=True)
    return out


@pytest.fixture(scope="module")
def quiz(media_root, tmp_path_factory):
    """A benchmark of three films in the MERV layout."""
    root = tmp_path_factory.mktemp("quiz")
    videos = root / "Colours/videos"
    videos.mkdir(parents=True)
    for name, colour in FILMS.items():
        shutil.copy(media_root / f"films/{colour}.mp4", videos / f"{name}.mp4")
    rows = [{"question_id": name, "video_name": name, "question": QUESTION, "options": OPTIONS} for name in FILMS]
    answers = [{"question_id": name, "answer": c, "answer_id": OPTIONS.index(c)} for name, c in FILMS.items()]
    (root / "Colours/test_q.json").write_text(json.dumps(rows))
    (root / "Colours/test_a.json").write_text(json.dumps(answers))
    return root


@pytest.fixture(scope="module")
def quiz_store(quiz, media_lab, tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "quiz.zarr"
    extract(read_extract_config(None, media_lab.settings(quiz, dataset="eval", store=str(path))), quiet=True)
    return path


@pytest.fixture
def opened(run, quiz_store):
    """Makes the run answer requests; of the quiz's store unless another is given."""
    made = []

    def open_run(checkpoint=run, **options):
        made.append(Requests(str(checkpoint), device="cpu", **{"store": str(quiz_store), **options}))
        return made[-1]

    yield open_run
    for requests in made:
        requests.close()


def docs_of(visuals):
    return {"task": {"test": [{"video": visual} for visual in visuals]}}


def show(doc):
    return [doc["video"]]


def nothing(doc):
    return []


def open_question(number, settings=GREEDY, show=show, text=QUESTION):
    return (text, dict(settings), show, number, "task", "test")


def options_of(number):
    """`multiple_choice`: the default target_delimiter is a blank."""
    return [(QUESTION, f" {option}", show, number, "task", "test") for option in OPTIONS]


def films(root):
    return [str(root / f"Colours/videos/{name}.mp4") for name in FILMS]


def test_options_are_ranked_as_merv_eval_ranks_them(opened, run, quiz, quiz_store):
    result = evaluate_run(run, EvaluationRequest(store=str(quiz_store), protocol="likelihood"))
    requests = [request for number in range(3) for request in options_of(number)]
    found = opened(batch_size=5).loglikelihood(requests, docs_of(films(quiz)))
    assert len(result["answers"]) == 3
    for row in result["answers"]:
        number = list(FILMS).index(row["sample_id"].rpartition("/")[2])
        losses = [loss for loss, _ in found[4 * number : 4 * number + 4]]
        assert losses == pytest.approx([-score for score in row["scores"]], abs=1e-5)
        assert np.argmin(losses) == row["predicted"] == row["correct"]


def test_a_continuation_is_greedy_where_the_model_writes_it(opened, quiz):
    answerer, docs = opened(batch_size=5), docs_of(films(quiz))
    for number in range(3):
        (text,) = answerer.generate_until([open_question(number)], docs)
        longer = (QUESTION, f" {text} {text}", show, number, "task", "test")
        found = answerer.loglikelihood([*options_of(number), longer], docs)
        assert [is_greedy for _, is_greedy in found] == [option == text for option in [*OPTIONS, longer[1]]]


def test_a_single_continuation_gets_its_log_likelihood(opened, quiz):
    """The output type loglikelihood gives a function of the document: two tokens, the word and the end token."""
    answerer, docs = opened(), docs_of(films(quiz))
    ((loss, _),) = answerer.loglikelihood(options_of(0)[:1], docs)
    request = (QUESTION, lambda doc: "red", show, 0, "task", "test")
    ((total, is_greedy),) = answerer.loglikelihood([request], docs)
    assert (total, is_greedy) == (pytest.approx(-2 * loss), True)


def test_answers_come_in_the_order_of_the_requests(opened, quiz):
    docs, numbers = docs_of(films(quiz)), [2, 0, 1, 0, 2]
    lengths = [GREEDY | {"max_new_tokens": 4 + number} for number in range(5)]
    requests = [open_question(number, length) for number, length in zip(numbers, lengths, strict=True)]
    assert opened(batch_size=2).generate_until(requests, docs) == ["blue", "red", "green", "red", "blue"]


def test_an_answer_ends_at_a_stop_string_and_at_its_length(opened, quiz):
    answerer, docs = opened(), docs_of(films(quiz))
    settings = [GREEDY | {"until": "ee"}, GREEDY | {"until": ["n", "r"]}, {"until": None, "max_new_tokens": 1}]
    assert answerer.generate_until([open_question(1, each) for each in settings], docs) == ["gr", "g", "green"]


def test_tokens_are_read_where_the_store_has_the_bytes_and_made_where_not(run, quiz, quiz_store, media_root, tmp_path):
    moved, changed = tmp_path / "moved.mp4", tmp_path / "one.mp4"
    shutil.copy(quiz / "Colours/videos/one.mp4", moved)
    shutil.copy(media_root / "films/white.mp4", changed)
    tokens = MediaTokens(load_run(run), store=str(quiz_store))
    ids = [tokens.find(each) for each in (changed, moved, media_root / "films/red.mp4")]
    assert ids[1:] == ["eval/Colours/videos/one.mp4"] * 2  # the same bytes
    assert (tokens.from_store, set(tokens.encoded)) == ({ids[1]}, {ids[0]})
    found = tokens.fetch([ids[1], ids[0]])
    store, own = FeatureStore.open(quiz_store), FeatureStore.open(load_run(run).record.store)
    for encoder, values in found.items():
        assert np.array_equal(values[0].numpy(), store.read([ids[1]], encoder=encoder)[0])
        white = own.read(["videollava/films/white.mp4"], encoder=encoder)[0]
        assert values[1].numpy() == pytest.approx(white, abs=1e-3)
    assert tokens.find(moved, (1.0, None)) not in ids  # a span is another clip
    tokens.close()


def test_a_file_that_is_not_there_is_found_by_its_path(run, quiz, quiz_store, tmp_path):
    tokens = MediaTokens(load_run(run), store=str(quiz_store), root=tmp_path)
    for path in ("Colours/videos/two.mp4", tmp_path / "Colours/videos/two.mp4"):
        assert tokens.find(path) == "eval/Colours/videos/two.mp4"
    assert tokens.by_path == {"eval/Colours/videos/two.mp4"}
    with pytest.raises(UserError, match=r"no clip of the store has the path Colours/videos/four\.mp4"):
        tokens.find("Colours/videos/four.mp4")
    with pytest.raises(UserError, match=r"there is no file /nowhere/two\.mp4"):
        tokens.find("/nowhere/two.mp4")
    there = MediaTokens(load_run(run), store=str(quiz_store), root=quiz)
    assert there.find("Colours/videos/two.mp4") == "eval/Colours/videos/two.mp4"
    assert (there.by_path, len(there.from_store)) == (set(), 1)  # compared by its bytes


def test_a_document_shows_a_video_a_picture_or_nothing(opened, media_root, media_lab):
    picture = Image.open(media_root / "pictures/blue.png")
    described = {"type": "video", "path": str(media_root / "films/green.mp4"), "video_start": 1.0, "video_end": None}
    docs = docs_of([picture, described, str(media_root / "pictures/red.png"), [picture, picture]])
    answerer = opened()
    requests = [open_question(number) for number in range(3)]
    assert answerer.generate_until(requests, docs) == ["blue", "green", "red"]
    assert len(answerer.generate_until([open_question(0, show=nothing), open_question(0, show=None)], docs)) == 2
    assert answerer.summary() == "3 clips encoded now; 2 requests without a clip"
    with pytest.raises(UserError, match="document 3 of task shows 2 videos or images"):
        answerer.generate_until([open_question(3)], docs)
    with pytest.raises(UserError, match="shows a int"):
        answerer.generate_until([open_question(0)], docs_of([7]))


def test_what_cannot_be_answered_as_wanted_is_refused(opened, quiz, media_root, media_lab):
    answerer, docs = opened(), docs_of([*films(quiz), str(media_root / media_lab.BROKEN)])
    for settings in (
        {"do_sample": True, "temperature": 0.7},
        {"temperature": 0.2},
        {"num_beams": 3},
        {"do_sample": True},
    ):
        with pytest.raises(UserError, match="a run answers greedily"):
            answerer.generate_until([open_question(0, settings)], docs)
    assert answerer.generate_until([open_question(0, {"do_sample": True, "temperature": 0})], docs) == ["red"]
    with pytest.raises(UserError, match="document 0 of task is longer than the"):
        answerer.generate_until([open_question(0, text="colour " * 80)], docs)
    with pytest.raises(UserError, match="document 0 of task is longer than the"):
        answerer.loglikelihood([("colour " * 80, " red", show, 0, "task", "test")], docs)
    with pytest.raises(UserError, match=rf"^{media_root / media_lab.BROKEN} cannot be decoded"):
        answerer.generate_until([open_question(3)], docs)
    with pytest.raises(UserError, match="acc_mutual_info"):
        answerer.loglikelihood([("", "red")], docs)


def test_rounds_go_on_until_the_task_ends_them(opened, quiz):
    """`doc_to_text` of a round gives what is shown and asked next, or ends; documents may end at different rounds."""
    docs, given = docs_of(films(quiz)), []

    def doc_to_text(doc, previous_output=None, round_idx=None, previous_round_info=None):
        given.append((doc["video"], list(previous_output), round_idx, previous_round_info))
        is_last = round_idx == (2 if doc["video"] == films(quiz)[0] else 1)
        visuals = None if is_last else [films(quiz)[2]]
        return visuals, None if is_last else QUESTION, is_last, previous_output, {"rounds": round_idx}

    requests = [(QUESTION, dict(GREEDY), show, doc_to_text, number, "task", "test") for number in range(2)]
    assert opened().generate_until_multi_round(requests, docs) == [["red", "blue"], ["green"]]
    first, second, _ = films(quiz)
    assert given == [
        (first, ["red"], 1, None),
        (second, ["green"], 1, None),
        (first, ["red", "blue"], 2, {"rounds": 1}),
    ]


def test_a_run_without_eyes_answers_without_media(extracted, quiz, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FRESH_LLMS, "mini", FreshLLM(hidden_size=32, num_layers=1, num_heads=2, context=64))
        samples, source = open_store(str(extracted), CONFIG)
        train(replace(CONFIG, mode="text-only", max_steps=1), samples, source, tmp_path / "run", quiet=True)
    answerer = Requests(str(tmp_path / "run"), device="cpu")
    found = answerer.loglikelihood(options_of(0), docs_of(["/nowhere.mp4"]))
    assert all(math.isfinite(loss) for loss, _ in found)
    texts = answerer.generate_until(
        [open_question(0, {"max_new_tokens": n}) for n in (9, 3)], docs_of(["/nowhere.mp4"])
    )
    assert [len(text.split()) for text in texts] == [9, 3]  # it has not learned to end
    assert "text alone" in answerer.summary()
    answerer.close()


TASKS = {
    "colours_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "options",
        "doc_to_target": "answer_id",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "colours_open": {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 8, "do_sample": False, "temperature": 0, "until": ["\n\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_lmms_eval_gives_the_answers_of_merv_eval(run, quiz, quiz_store, media_root, tmp_path):
    """Its own command, on a task of local files: three films of the store, and one that is encoded now."""
    rows = [
        {"video": path, "question": QUESTION, "options": OPTIONS, "answer": c, "answer_id": OPTIONS.index(c)}
        for path, c in zip([*films(quiz), str(media_root / "films/white.mp4")], [*FILMS.values(), "white"], strict=True)
    ]
    (tmp_path / "docs.json").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "tasks").mkdir()
    for name, about in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.json")}},
            "test_split": "test",
            "doc_to_visual": "video",
            "doc_to_text": "question",
        }
        (tmp_path / f"tasks/{name}.yaml").write_text(yaml.safe_dump(task | about))
    command = f"{sys.executable} -m lmms_eval --model merv --device cpu --batch_size 4 --log_samples"
    options = {
        "--model_args": f"checkpoint={run},store={quiz_store}",
        "--tasks": ",".join(TASKS),
        "--include_path": str(tmp_path / "tasks"),
        "--output_path": str(tmp_path / "out"),
    }
    done = subprocess.run(
        [*command.split(), *(word for pair in options.items() for word in pair)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert f"3 clips read from {quiz_store}; 1 clip encoded now" in done.stderr
    (path,) = Path(tmp_path / "out").rglob("*_results.json")
    results = json.loads(path.read_text())["results"]
    assert (results["colours_choice"]["acc,none"], results["colours_open"]["exact_match,none"]) == (1.0, 1.0)
    result = evaluate_run(run, EvaluationRequest(store=str(quiz_store), protocol="likelihood"))
    ours = {row["sample_id"].rpartition("/")[2]: [-score for score in row["scores"]] for row in result["answers"]}
    logged = logged_samples(tmp_path / "out", "colours_choice")
    assert len(logged) == 4
    for name, row in zip(FILMS, logged, strict=False):
        assert [float(loss) for loss, _ in row["filtered_resps"]] == pytest.approx(ours[name], abs=1e-5)
    texts = [row["filtered_resps"] for row in logged_samples(tmp_path / "out", "colours_open")]
    assert texts == [row["answer"] for row in rows]


def logged_samples(out, task):
    (path,) = out.rglob(f"*samples_{task}.jsonl")
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])
