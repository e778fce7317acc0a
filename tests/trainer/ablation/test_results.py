"""What is read from a sweep's folder, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from featurestore import Clip
from featurestore.clips import Sample, Turn
from mervcache.errors import UserError
from tests.trainer.ablation.conftest import entry, make_answer
from trainer.ablation.results import read_results
from trainer.runs.run_record import ScoreSource, write_scores


def answers(*right: bool, **changes):
    return [make_answer(index, right=is_right, **changes) for index, is_right in enumerate(right)]


@pytest.fixture
def sweep(new_sweep):
    """Both encoders and one alone."""
    folder = new_sweep()
    folder.add(entry("ab"), answers(True, True, False, True))
    folder.add(entry("a"), answers(True, False, False, False))
    return folder


def by_subset(results):
    return {member.subset: found for member, found in results.answers.items() if member.block == "retrained"}


def test_answers_are_read_by_subset_in_the_order_of_the_first_run(sweep):
    name = next(name for name, run in sweep.runs.items() if run["encoders"] == ["a"])
    shuffled = [make_answer(index, right=index == 0) for index in (3, 1, 0, 2)]
    sweep.score(name, answers=shuffled)
    results = read_results(sweep.path)
    assert results.questions.sample_ids == ("q0", "q1", "q2", "q3")
    assert results.questions.videos == ("set/clip0.mp4", "set/clip0.mp4", "set/clip1.mp4", "set/clip1.mp4")
    assert results.questions.chance == 0.25
    found = by_subset(results)
    np.testing.assert_array_equal(found[("a", "b")].credit_Q, [1, 1, 0, 1])
    np.testing.assert_array_equal(found[("a",)].credit_Q, [1, 0, 0, 0])
    np.testing.assert_allclose(found[("a",)].margin_Q, [1, -1, -1, -1])  # best option 1 above the others
    assert not results.missing
    assert results.frame_rules == {"a": "16 frames by linspace-32/2", "b": "16 frames by linspace-32/2"}


def test_a_tie_counts_a_share_and_a_recorded_credit_is_taken_as_it_is(sweep):
    tied = {**make_answer(0, right=True), "scores": [-1.0, -1.0, -1.0, -2.0]}
    lost = {**make_answer(1, right=False), "scores": [-1.0, -2.0, -1.0, -2.0]}
    recorded = make_answer(2, right=False, credit=0.5)
    named = make_answer(3, right=False, tied=[0, 1])
    sweep.add(entry("b"), [tied, lost, recorded, named])
    found = by_subset(read_results(sweep.path))[("b",)]
    np.testing.assert_allclose(found.credit_Q, [1 / 3, 0, 0.5, 1 / 3])
    np.testing.assert_allclose(found.margin_Q[:2], [0, -1])


def test_letters_may_be_unreadable_and_have_no_likelihoods(new_sweep):
    sweep = new_sweep(protocol="letters")
    given = [{**answer, "scores": None} for answer in answers(True, False, True)]
    given[2]["predicted"] = None
    sweep.add(entry("a"), given, protocol="letters")
    found = by_subset(read_results(sweep.path))[("a",)]
    np.testing.assert_array_equal(found.credit_Q, [1, 0, 0])
    np.testing.assert_array_equal(found.is_unreadable_Q, [False, False, True])
    assert found.margin_Q is None


@pytest.mark.parametrize("protocol", ["letters", "likelihood"])
def test_scores_are_read_where_an_evaluation_by_the_protocol_of_the_sweep_writes_them(new_sweep, protocol):
    sweep = new_sweep(protocol=protocol)
    name = sweep.add(entry("a"))
    source = ScoreSource(split="heldout", limit=None, store="nowhere.zarr", snapshot="00001-abc")
    for written in ("letters", "likelihood"):
        result = {"protocol": written, "step": 60, "answers": answers(written == protocol)}
        write_scores(sweep.path / "runs" / name, result, source)
    (found,) = read_results(sweep.path).answers.values()
    np.testing.assert_array_equal(found.credit_Q, [1])


def test_spans_of_one_video_are_one_cluster_and_text_only_questions_are_their_own(sweep):
    clips = ["set/a.mp4#t=0.0,4.0", "set/a.mp4#t=4.0,8.0", None, None]
    for name in sweep.runs:
        given = [{**answer, "clip_id": clip} for answer, clip in zip(answers(*[True] * 4), clips, strict=True)]
        sweep.score(name, answers=given)
    videos = read_results(sweep.path).questions.videos
    assert videos[0] == videos[1] == "set/a.mp4"
    assert len(set(videos)) == 3


def test_videos_come_from_the_store_where_answers_do_not_name_them(tmp_path, new_sweep, toy_identity, write_store):
    clips = [Clip(dataset="set", path=f"clip{index}.mp4", kind="video") for index in range(2)]
    arrays = {("toy", clip.clip_id): {"tokens": np.zeros((4, 2, 2, 8), np.float32)} for clip in clips}
    writer = write_store(tmp_path / "store.zarr", clips, {"toy": toy_identity()}, arrays)
    turns = (Turn(role="human", text="?"), Turn(role="gpt", text="red"))
    options = {"options": ("red", "green", "blue", "grey"), "answer_index": 1}
    common = {"turns": turns, "stage": "eval", "split": "heldout", "source": "toy", **options}
    named = [Sample(sample_id=f"q{i}", clip_id=clips[i % 2].clip_id, **common) for i in range(4)]
    writer.add_samples("eval", named)
    snapshot = writer.publish_snapshot()
    sweep = new_sweep(snapshot=snapshot, store=str(tmp_path / "moved.zarr"))
    given = answers(True, True, False, True)
    for answer in given:
        del answer["clip_id"]
    sweep.add(entry("a"), given, snapshot=snapshot)
    with pytest.raises(UserError, match=r"moved\.zarr cannot be opened"):
        read_results(sweep.path)
    videos = read_results(sweep.path, store=str(tmp_path / "store.zarr")).questions.videos
    assert videos == ("set/clip0.mp4", "set/clip1.mp4", "set/clip0.mp4", "set/clip1.mp4")


def test_runs_without_scores_are_missing_with_the_reason(sweep):
    sweep.add(entry("b"))
    stopped = sweep.add(entry("a", seed=1), answers(True, True, True, True), step=40)
    begun = sweep.add(entry("ab", seed=1))
    (sweep.path / "runs" / begun / "run.json").unlink()
    results = read_results(sweep.path)
    reasons = {(member.subset, member.seed): reason for member, reason in results.missing.items()}
    assert reasons[("b",), 0] == "it is not scored"
    assert reasons[("a", "b"), 1] == "it has not begun"
    assert reasons[("a",), 1] == "its scores are of step 40, its last one is 60"
    assert stopped not in {member.run for member in results.answers}


def test_masked_scores_are_a_block_of_their_own(sweep):
    name = next(name for name, run in sweep.runs.items() if len(run["encoders"]) == 2)
    subsets = {"": answers(False, False, False, True), "b+a": answers(True, True, False, True)}
    sweep.mask(name, subsets)
    results = read_results(sweep.path)
    masked = {member.subset: found for member, found in results.answers.items() if member.block == "post-hoc"}
    assert set(masked) == {(), ("a", "b")}
    np.testing.assert_array_equal(masked[()].credit_Q, [0, 0, 0, 1])
    assert {member.subset for member in results.missing} == {("a",), ("b",)}  # of the four subsets


def test_one_shot_runs_need_masked_scores(new_sweep):
    sweep = new_sweep()
    name = sweep.add(entry("ab", method="one-shot"), answers(True, True))
    sweep.add(entry("a"), answers(True, False))
    results = read_results(sweep.path)
    assert len(results.missing) == 4
    sweep.mask(name, {"a": answers(True, True)}, method="one-shot")
    assert {m.subset for m in read_results(sweep.path).answers if m.block == "one-shot"} == {("a",)}


def change(index, **values):
    def apply(given):
        given[index] |= values
        return given

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda given: given[:3], r"different questions \(3 and 4\).*q3"),
        (lambda given: [*given, make_answer(3, right=True)], "question 'q3' twice"),
        (change(2, sample_id="other"), "different questions.*other, q2"),
        (change(2, correct=3), "'q2' has 4 options, 3 right in .*4 options, 1 right"),
        (change(2, num_options=3, scores=[0.0, 1.0, 2.0]), "'q2' has 3 options"),
        (change(1, scores=None), "'q1': scores are missing"),
        (change(1, scores=[1.0, 2.0]), "'q1': scores are .*4 finite"),
        (change(1, scores=[1.0, 2.0, float("nan"), 0.0]), "'q1': scores are .*nan"),
        (change(1, predicted=7), "'q1': predicted is 7 of 4"),
        (change(1, correct=4), "'q1': option 4 of 4 is right"),
        (change(1, credit=2.0), "'q1': credit is 2.0"),
        (lambda given: [{"sample_id": "q0"}, *given[1:]], "without 'num_options'"),
        (lambda given: [None, *given[1:]], "question None"),
        (lambda given: [], "holds no answers"),
    ],
)
def test_answers_that_cannot_be_compared_are_errors(sweep, spoil, message):
    sweep.add(entry("b"), spoil(answers(True, True, True, True)))
    with pytest.raises(UserError, match=message):
        read_results(sweep.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "letters"}, "protocol is 'letters', the sweep's is 'likelihood'"),
        ({"snapshot": "00002-def"}, "snapshot is '00002-def', the sweep's is '00001-abc'"),
        ({"split": "validation"}, "split is 'validation'"),
        ({"limit": 3}, "first 3 questions only"),
    ],
)
def test_scores_of_other_conditions_are_errors(sweep, changes, message):
    sweep.add(entry("b"), answers(True, True, True, True), **changes)
    with pytest.raises(UserError, match=message):
        read_results(sweep.path)


def test_runs_of_two_protocols_or_templates_are_errors_also_where_the_sweep_names_none(new_sweep):
    sweep = new_sweep()
    del sweep.record["protocol"]
    given = [{**answer, "scores": []} for answer in answers(True, False)]
    sweep.add(entry("a"), given, protocol="letters", template={"prompt": "one"})
    second = sweep.add(entry("b"), given, protocol="letters", template={"prompt": "other"})
    with pytest.raises(UserError, match=r"template is \{'prompt': 'other'\}"):
        read_results(sweep.path)
    sweep.score(second, answers=given, protocol="likelihood")
    with pytest.raises(UserError, match="protocol is 'likelihood', the sweep's is 'letters'"):
        read_results(sweep.path)
    sweep.score(second, answers=given, protocol="letters", template={"prompt": "one"})
    assert read_results(sweep.path).record["protocol"] == "letters"


def test_masks_of_another_method_are_errors(sweep):
    name = next(name for name, run in sweep.runs.items() if len(run["encoders"]) == 2)
    sweep.mask(name, {"a": answers(True, True, True, True)}, method="one-shot")
    with pytest.raises(UserError, match=r"method 'one-shot'.*never mixed"):
        read_results(sweep.path)
    sweep.mask(name, {"c": answers(True, True, True, True)})
    with pytest.raises(UserError, match="masks encoder 'c', the sweep has a, b"):
        read_results(sweep.path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda record: record.update(format=2), "its format is 2"),
        (lambda record: record.pop("split"), "entry 'split' is missing"),
        (lambda record: record.update(encoders=["a", "a"]), "different names"),
        (lambda record: record["runs"].update({"../x": entry("a")}), r"'\.\./x' is no name of a run"),
        (lambda record: record["runs"].update({"x": entry("c")}), "run x has encoder 'c'"),
        (lambda record: record["runs"].update({"x": entry("a", method="guess")}), "method 'guess'"),
        (lambda record: record["runs"].update({"x": entry("ba")}), "x have the same encoders, settings and seed"),
        (lambda record: record.update(num_questions=9), "answer 4 questions, sweep.json names 9"),
    ],
)
def test_a_broken_record_is_an_error(sweep, spoil, message):
    record = {**sweep.record, "runs": sweep.runs}
    spoil(record)
    (sweep.path / "sweep.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        read_results(sweep.path)


def test_folders_without_a_sweep_or_scores_say_what_to_do(tmp_path, new_sweep):
    with pytest.raises(UserError, match=r"no sweep: it has no sweep\.json"):
        read_results(tmp_path)
    sweep = new_sweep()
    sweep.add(entry("a"))
    with pytest.raises(UserError, match=r"no scored run yet \(1 x it is not scored\); run merv-train sweep"):
        read_results(sweep.path)
