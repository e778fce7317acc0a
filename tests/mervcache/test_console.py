"""What all command lines share: errors, interrupts, results and log messages."""

from __future__ import annotations

import json
import logging
import os
import signal

import pytest

from mervcache.console import handle_errors, handle_interrupts, print_result, report_saved, stacked
from mervcache.errors import ClusterError, StoreError, UserError

handle_cli_errors = handle_errors(interrupted="Interrupted. What was committed is kept.")


def raising(error: BaseException):
    @handle_cli_errors
    def command(*, number: int) -> None:
        raise error

    return command


@pytest.mark.parametrize("kind", [UserError, ClusterError, StoreError])
def test_an_error_of_ours_is_its_message_and_code_1(capsys, kind):
    with pytest.raises(SystemExit) as left:
        raising(kind("give another number"))(number=3)
    assert left.value.code == 1
    assert capsys.readouterr() == ("", "Error: give another number\n")


def test_ctrl_c_is_code_130_and_says_what_is_kept(capsys):
    with pytest.raises(SystemExit) as left:
        raising(KeyboardInterrupt())(number=3)
    assert left.value.code == 130
    assert capsys.readouterr() == ("", "\nInterrupted. What was committed is kept.\n")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())(number=3)


def test_of_several_decorators_the_first_is_on_top():
    def adding(letter):
        return lambda function: lambda: letter + function()

    assert stacked(adding("a"), adding("b"))(lambda: "c")() == "abc"


def test_a_result_is_json_for_a_program_and_words_for_a_person(capsys):
    print_result({"clips": 3}, True, lambda: print("never"))
    print_result({"clips": 3}, False, lambda: print("3 clips"))
    first, second = capsys.readouterr().out.splitlines()
    assert (json.loads(first), second) == ({"clips": 3}, "3 clips")


def test_a_measurement_that_cannot_be_kept_is_said_and_no_error(capsys):
    def refuse():
        raise StoreError("the store is read-only")

    report_saved(lambda: "journal/parity-1")
    report_saved(refuse)
    assert capsys.readouterr() == ("", "saved as journal/parity-1\nnot saved in the store: the store is read-only\n")


def test_log_messages_of_the_packages_are_plain_lines_on_stderr_once(capsys):
    @handle_cli_errors
    def command() -> None:
        logging.getLogger("jobs.slurm").info("2 jobs submitted")
        logging.getLogger("jobs.slurm").debug("never")
        logging.getLogger("elsewhere").info("never")

    command()
    command()
    assert capsys.readouterr() == ("", "2 jobs submitted\n" * 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_prints_its_message_at_once_and_interrupts(capsys, number):
    before = signal.signal(number, signal.SIG_DFL)  # the suite may itself run under nohup

    def interrupted() -> None:
        with handle_interrupts("stopping: once more to stop without waiting"):
            os.kill(os.getpid(), number)
            signal.pause()

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(number, before)
    assert capsys.readouterr() == ("", "\nstopping: once more to stop without waiting\n")


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_interrupts("stopping"):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
