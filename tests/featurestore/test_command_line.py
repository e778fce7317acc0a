"""What all command lines share: how errors, interrupts and results are told."""

from __future__ import annotations

import json

import pytest

from mervcache.console import handle_errors, print_result, report_saved, stacked
from mervcache.errors import StoreError, UserError

handle_cli_errors = handle_errors(UserError, interrupted="Interrupted. What was committed is kept.")


def raising(error: BaseException):
    @handle_cli_errors
    def command(*, number: int) -> None:
        raise error

    return command


def test_an_error_of_ours_is_its_message_and_code_1(capsys):
    with pytest.raises(SystemExit) as left:
        raising(UserError("give another number"))(number=3)
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
    assert capsys.readouterr() == ("", "kept as journal/parity-1\nnot kept in the store: the store is read-only\n")
