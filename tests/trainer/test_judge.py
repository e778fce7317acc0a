"""The judge of open-ended answers, against a real server on loopback that fails as endpoints do."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from mervcache.errors import RunStoppedError, UserError
from tests.trainer.judge_server import VERSION, JudgeServer
from trainer.cli_eval import eval_main
from trainer.judge import DEFAULT_TEMPLATE, Judge, JudgeTemplate, Verdict, judge_answers, one_version, parse_verdict
from trainer.model.open_ended import OpenAnswer

pytestmark = pytest.mark.slow

KEY = "sk-of-nobody-4711"


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("{'pred': 'yes', 'score': 4}", (True, 4)),
        ('{"pred": "no", "score": 0}', (False, 0)),
        ("```python\n{'pred': 'Yes', 'score': 5}\n```", (True, 5)),
        ("{'score': 3, 'pred': 'no'}", (False, 3)),
        ("{'pred': 'yes', 'score': 4.0}", (True, 4)),
        ("{'pred': 'yes', 'score': 4.8}", None),
        ("{'pred': 'yes', 'score': 6}", None),
        ("{'pred': 'yes', 'score': -1}", None),
        ("{'pred': 'yes', 'score': True}", None),
        ('{"pred": "yes", "score": true}', None),
        ('{"pred": "yes", "score": NaN}', None),
        ("{'pred': 'yes', 'score': '4'}", None),
        ("{'pred': 'maybe', 'score': 4}", None),
        ("{'pred': 'yes'}", None),
        ("{'pred': 'yes', 'score': 4, 'why': 'x'}", None),
        ('{"pred": "no", "pred": "yes", "score": 4}', None),
        ("{'pred': 'yes', 'score': 4} or {'pred': 'no', 'score': 0}", None),
        ("{'pred': __import__('os').system('x'), 'score': 4}", None),
        ("yes, 4", None),
        ("", None),
    ],
)
def test_a_reply_is_one_dictionary_with_two_keys_or_nothing(text, verdict):
    assert parse_verdict(text) == verdict


def answers(number):
    """Every second one is right."""
    return [
        OpenAnswer(
            sample_id=f"s{index}",
            category="what",
            question=f"What is {index}?",
            correct=f"thing {index}",
            text=f"thing {index}" if index % 2 == 0 else "{question}",
            is_finished=True,
        )
        for index in range(number)
    ]


@pytest.fixture
def of_server(monkeypatch):
    """A judge at a server, that waits hardly at all between attempts."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def make(server, **options):
        return Judge(url=server.url, model="judge", backoff_s=0.01, **options)

    return make


def test_each_answer_is_requested_once_and_kept_without_the_key(tmp_path, of_server):
    with JudgeServer() as server:
        judge = of_server(server)
        verdicts = judge_answers(judge, answers(12), tmp_path)
        assert [(verdict.is_match, verdict.score) for verdict in verdicts] == [(True, 5), (False, 1)] * 6
        assert len(server.requests) == 12
        assert set(server.keys) == {f"Bearer {KEY}"}
        assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
        assert (server.requests[0]["model"], server.requests[0]["max_tokens"]) == ("judge", 500)
        assert judge_answers(judge, answers(13), tmp_path)[:12] == verdicts
        assert len(server.requests) == 13
        judge_answers(replace(judge, model="other"), answers(2), tmp_path)
        assert len(server.requests) == 15  # of another judge nothing is known
    kept = "".join(path.read_text() for path in tmp_path.iterdir())
    assert VERSION in kept
    assert KEY not in kept


def test_a_busy_endpoint_is_waited_for_and_a_broken_connection_tried_again(tmp_path, of_server):
    faults = [429, 503, "hang up", 429, 500, "hang up"]
    with JudgeServer(faults) as server:
        verdicts = judge_answers(of_server(server, concurrency=3), answers(10), tmp_path)
        assert [verdict.is_match for verdict in verdicts] == [True, False] * 5
        assert len(server.requests) == 10 + len(faults)


def test_what_does_not_fit_the_schema_is_asked_again_and_then_counts_as_unreadable(tmp_path, of_server):
    with JudgeServer(["What?", "{'pred': 'yes'}", "no"]) as server:
        judge = of_server(server, concurrency=1)
        first, second = judge_answers(judge, answers(2), tmp_path)
        assert (first, second.is_match) == (Verdict(is_match=None, score=None, version=VERSION), False)
        assert len(server.requests) == 4
        server.faults.append("hm")
        (third,) = judge_answers(judge, answers(3)[2:], tmp_path)
        assert third.is_match is True


def test_a_page_in_the_place_of_a_reply_is_unreadable_and_no_version_of_the_judge(tmp_path, of_server):
    with JudgeServer([b"<html>", b"{}", b'{"choices": [{"message": {}}]}']) as server:
        judge = of_server(server, concurrency=1)
        verdicts = judge_answers(judge, answers(2), tmp_path)
        assert verdicts[0] == Verdict(is_match=None, score=None, version="")
        assert len(server.requests) == 4
        assert one_version(verdicts, judge) == VERSION


@pytest.mark.parametrize("status", [401, 400, 302])
def test_a_refusal_ends_the_command_at_once_and_the_key_is_nowhere(tmp_path, of_server, status):
    with JudgeServer([status] * 40) as server:
        with pytest.raises(UserError, match=rf"refused the request with HTTP {status}.*0 of 30 answers") as caught:
            judge_answers(of_server(server, concurrency=4), answers(30), tmp_path)
        assert len(server.requests) <= 8
    assert KEY not in str(caught.value)
    assert all(KEY not in path.read_text() for path in tmp_path.iterdir())


def test_an_endpoint_that_stays_busy_ends_the_command_and_what_it_said_is_kept(tmp_path, of_server):
    with JudgeServer() as server:
        judge = of_server(server, concurrency=1, attempts=3)
        judge_answers(judge, answers(4), tmp_path)
        server.faults.extend([503] * 100)
        with pytest.raises(RunStoppedError, match=r"3 attempts \(HTTP 503\).*0 of 6 answers were judged"):
            judge_answers(judge, answers(10), tmp_path)
        server.faults.clear()
        server.requests.clear()
        judge_answers(judge, answers(10), tmp_path)
        assert len(server.requests) == 6


def test_without_an_endpoint_the_message_names_the_reason(tmp_path, of_server):
    with JudgeServer() as server:
        judge = of_server(server, attempts=2)
    with pytest.raises(RunStoppedError, match=r"2 attempts \(.*refused"):
        judge_answers(judge, answers(1), tmp_path)


def test_a_killed_command_goes_on_with_what_is_missing(tmp_path, of_server):
    code = (
        "import sys; from pathlib import Path; from tests.trainer.test_judge import Judge, answers, judge_answers\n"
        "judge = Judge(url=sys.argv[1], model='judge', concurrency=1)\n"
        "judge_answers(judge, answers(9), Path(sys.argv[2]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with JudgeServer() as server:
        server.faults.extend([*(["{'pred': 'no', 'score': 2}"] * 5), "hang"])
        process = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path)], env=environment)
        deadline = time.monotonic() + 120
        while kept(tmp_path) < 5 or len(server.requests) < 6:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
        (path,) = tmp_path.iterdir()
        with path.open("a") as file:
            file.write('{"key": "torn')
        server.may_go.set()
        server.requests.clear()
        verdicts = judge_answers(of_server(server), answers(9), tmp_path)
        assert len(server.requests) == 9 - 5
        assert sorted(verdict.score for verdict in verdicts) == sorted([2] * 5 + [1, 1, 5, 5])


def kept(folder):
    return sum(line.count(VERSION) for path in folder.iterdir() for line in path.read_text().splitlines())


def test_a_judge_that_changes_its_version_has_no_score(tmp_path, of_server):
    with JudgeServer(version="judge-1") as server:
        judge = of_server(server)
        verdicts = judge_answers(judge, answers(2), tmp_path)
        assert one_version(verdicts, judge) == "judge-1"
        server.version = "judge-2"
        verdicts = judge_answers(judge, answers(3), tmp_path)
        with pytest.raises(UserError, match=r"answered as judge-1 \(2 answers\), judge-2 \(1 answers\)"):
            one_version(verdicts, judge)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.com/v1", "in clear; use https"),
        ("https://me:secret@example.com/v1", "no password in the address"),
        ("ftp://example.com", "base address"),
        ("example.com", "base address"),
    ],
)
def test_an_address_that_would_leak_is_refused(url, message):
    with pytest.raises(UserError, match=message) as caught:
        Judge(url=url, model="judge")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "[::1]"])
def test_this_machine_needs_no_encryption(host):
    assert Judge(url=f"http://{host}:1/v1/", model="judge").address == f"http://{host}:1/v1/chat/completions"


def test_the_template_has_two_parts_and_is_filled_in_one_pass(tmp_path):
    system, user = JudgeTemplate.read().messages(answers(2)[1])
    assert (system["role"], user["role"]) == ("system", "user")
    assert "Question: What is 1?\nReference answer: thing 1\nModel's answer: {question}\n" in user["content"]
    path = tmp_path / "own.txt"
    for text, message in (
        ("{question}", r"must be \[system\], a text"),
        ("[system]\nx\n[user]\n{question} {correct}\n", r"has no \{prediction\}"),
        ("[system]\n{answer}\n[user]\n{question} {correct} {prediction}\n", "unknown place 'answer'"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            JudgeTemplate.read(path)
    assert DEFAULT_TEMPLATE.is_file()


def test_scores_name_their_judge_and_those_of_two_judges_lie_apart(benchmark_run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def score(server, model, *more):
        arguments = [
            "--checkpoint",
            benchmark_run,
            "--max-new-tokens",
            3,
            "--judge",
            server.url,
            "--judge-model",
            model,
            *more,
        ]
        shown = CliRunner().invoke(eval_main, ["run", *map(str, arguments)])
        assert shown.exit_code == 0, shown.output
        return shown.stdout

    with JudgeServer(["?", "?", "?"]) as server:
        first = score(server, "one", "--judge-requests", 1)
        assert f"yes by {VERSION}" in " ".join(first.split())
        assert f"Judge: {VERSION} at {server.url}/chat/completions" in " ".join(first.split())
        assert "Unreadable verdicts: 1 of 3" in first
        report = json.loads(score(server, "one", "--baseline", benchmark_run, "--json"))["open_ended"]
        assert len(server.requests) == 5
        server.version = "judge-2"
        score(server, "two")
        assert len(server.requests) == 8
    rows = report["scores"]["MSVD"]
    assert rows == report["beside"][str(benchmark_run)]["MSVD"]
    matches = sum(answer["text"] == answer["correct"] for answer in report["answers"])
    assert rows[0]["judge_accuracy"] in (matches / 3, (matches - 1) / 3)
    assert rows[0]["judge_unreadable"] == 1
    assert (report["judge"]["version"], report["judge"]["model"]) == (VERSION, "one")
    names = {path.name.rpartition("-")[0] for path in (benchmark_run / "scores/open-ended").iterdir()}
    assert names == {f"heldout-{VERSION}", "heldout-judge-2"}
    assert all(KEY not in path.read_text() for path in benchmark_run.rglob("*.json*"))


def test_a_judge_needs_an_address_and_a_model(benchmark_run):
    for arguments, message in (
        (["--judge-model", "x"], "give --judge URL too"),
        (["--judge", "http://localhost:1"], "Give --judge-model NAME"),
    ):
        shown = CliRunner().invoke(eval_main, ["run", "--checkpoint", str(benchmark_run), *arguments])
        assert shown.exit_code == 1
        assert message in " ".join(shown.stderr.split())
