"""`--log-json`: every line on stderr parses, whoever wrote it; results and exit codes are those of plain text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import logging, os, subprocess, sys, threading, time, warnings
import click
from mervcache.console import ProgressLine, echo, examples, handle_errors, handle_interrupts
from mervcache.errors import UserError
from mervcache.program import Program

@click.group(cls=Program)
def main(): pass

@click.command()
@handle_errors(interrupted="kept")
@click.argument("what")
def work(what):
    {body}

main.add_command(work)
main(prog_name="toy")
"""


def run(body: str, *arguments: str, check: int = 0) -> list[dict]:
    """Objects on stderr of a small program whose command does `body`."""
    program = PROGRAM.format(body=body.replace("\n", "\n    "))
    command = [sys.executable, "-c", program, *(arguments or ("--log-json", "work", "it"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert done.returncode == check, done.stderr
    assert done.stdout in ("", "result\n")
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"time", "level", "event"} <= line.keys() for line in lines)
    return lines


def test_messages_warnings_and_lines_of_others_are_objects():
    body = r"""
echo("one\nmessage with http://u:password@h/")
logging.getLogger("pipeline.x").info("of ours")
logging.getLogger("library").warning("of a library")
try: 1 / 0
except ZeroDivisionError: logging.getLogger("library").exception("failed")
warnings.warn("take care", stacklevel=1)
os.write(2, b"from C\n\x1b[31mred\r50%\r100%\n")
print("print", file=sys.stderr)
subprocess.run([sys.executable, "-c", "import os; os.write(2, b'a child' + bytes([10]) + b'half')"])
print("result", flush=True)
"""
    lines = run(body)
    by_event: dict[str, list[dict]] = {}
    for line in lines:
        by_event.setdefault(line["event"], []).append(line)
    assert [line["message"] for line in by_event["message"]] == ["one\nmessage with http://***@h/"]
    ours, library, failed = by_event["log"]
    assert (ours["logger"], ours["level"], ours["message"]) == ("pipeline.x", "info", "of ours")
    assert (library["logger"], library["level"]) == ("library", "warning")
    assert "ZeroDivisionError" in failed["traceback"]
    (warned,) = by_event["warning"]
    assert (warned["message"], warned["category"], warned["level"]) == ("take care", "UserWarning", "warning")
    others = [line["message"] for line in by_event["stderr"]]
    assert others == ["from C", "\\x1b[31mred", "50%", "100%", "print", "a child", "half"]


def test_progress_has_its_figures_by_name():
    body = """
with ProgressLine("extract", total=4, unit="clips") as line:
    line.advance(3, failed=1, frames=96)
    line.set_postfix("loss 1.5", metrics={"loss": float("nan"), "step": 3})
"""
    (line,) = run(body)
    assert (line["event"], line["label"], line["done"], line["total"], line["unit"]) == (
        *("progress", "extract", 3, 4),
        "clips",
    )
    assert line["failed"] == 1
    assert line["rate"] > 0
    assert line["eta_s"] > 0
    assert line["rates"]["frames"] > line["rate"]
    assert line["metrics"] == {"loss": None, "step": 3}


@pytest.mark.parametrize(
    ("body", "code", "event", "kind"),
    [
        ("raise UserError('give another number')", 1, "error", "UserError"),
        ("raise ModuleNotFoundError(name='torch')", 1, "error", "ModuleNotFoundError"),
        ("raise ZeroDivisionError('a bug')", 1, "crash", "ZeroDivisionError"),
        ("raise KeyboardInterrupt", 130, "interrupted", None),
        ("click.get_current_context().exit(3)", 3, None, None),
        ("sys.exit(3)", 3, None, None),
    ],
)
def test_errors_keep_their_exit_codes(body, code, event, kind):
    lines = run(body, check=code)
    assert [line["event"] for line in lines] == ([event] if event else [])
    for line in lines:
        assert line.get("type") == kind
        assert line["exit_code"] == code
    if event == "crash":
        assert lines[0]["traceback"].startswith("Traceback")
        assert lines[0]["message"] == "a bug"


def test_wrong_usage_is_an_object_wherever_the_option_stands():
    for arguments in (["--log-json", "work", "it", "--no"], ["work", "--log-json"], ["nothing", "--log-json"]):
        (line,) = run("pass", *arguments, check=2)
        assert (line["event"], line["exit_code"]) == ("error", 2)


def test_a_failing_thread_is_one_object():
    body = "thread = threading.Thread(target=lambda: 1 / 0)\nthread.start()\nthread.join()"
    (line,) = run(body)
    assert (line["event"], line["type"]) == ("crash", "ZeroDivisionError")


def test_a_signal_is_an_object_and_130():
    body = """
with handle_interrupts("stopping"):
    os.kill(os.getpid(), 15)
    time.sleep(60)
"""
    first, second = run(body, check=130)
    assert (first["event"], first["message"], first["signal"]) == ("interrupted", "stopping", "SIGTERM")
    assert (second["event"], second["message"]) == ("interrupted", "kept")


def test_nothing_below_the_level_is_written():
    body = """
echo("info")
logging.getLogger("pipeline.x").debug("debug")
logging.getLogger("pipeline.x").warning("warning")
with ProgressLine("extract", total=4, unit="clips") as line: line.advance()
raise UserError("error")
"""
    expected = {"debug": 5, "info": 4, "warning": 2, "error": 1}
    for level, count in expected.items():
        lines = run(body, "work", "it", "--log-json", "--log-level", level, check=1)
        assert len(lines) == count, level
        assert lines[-1]["message"] == "error"


def test_plain_text_obeys_the_level_too():
    program = PROGRAM.format(body="echo('info')\n    raise UserError('wrong')")
    command = [sys.executable, "-c", program, "work", "it", "--log-level", "error"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (1, "Error: wrong\n")


def test_lines_of_programs_within_programs_pass_unchanged():
    inner = PROGRAM.format(body="echo('inner')")
    body = f"subprocess.run([sys.executable, '-c', {inner!r}, '--log-json', 'work', 'it'])\necho('outer')"
    assert [(line["event"], line["message"]) for line in run(body)] == [("message", "inner"), ("message", "outer")]


def test_a_reader_of_the_log_that_leaves_ends_no_run():
    body = "[os.write(2, bytes([120] * 99 + [10])) for _ in range(30_000)]; echo('done'); print('result', flush=True)"
    command = [sys.executable, "-c", PROGRAM.format(body=body), "--log-json", "work", "it"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stderr.close()
        assert process.stdout.read() == "result\n"
        assert process.wait(timeout=120) == 0
