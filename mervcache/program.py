"""A program's command line: every command takes `--log-json` and `--log-level`, and usage errors follow them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import click

from mervcache.logs import JSON_OPTION, LEVEL_OPTION, LEVELS, echo, is_json, set_level, start_json_if_given


def log_options() -> list[click.Option]:
    """The options of logging, for a program and each of its commands. They pass nothing to the function."""

    def level_given(context: click.Context, option: click.Parameter, name: str | None) -> None:
        if name is not None:
            set_level(name)

    return [
        click.Option(
            [JSON_OPTION],  # read by `main` below, before anything is parsed
            is_flag=True,
            expose_value=False,
            help="Messages and progress on stderr as JSON, one object a line.",
        ),
        click.Option(
            [LEVEL_OPTION],
            type=click.Choice(list(LEVELS)),
            show_default="info",
            expose_value=False,
            is_eager=True,
            callback=level_given,
            help="Write only what is at least as important; progress is info.",
        ),
    ]


class _Logged(click.Command):
    def main(self, args: Sequence[str] | None = None, *given: Any, standalone_mode: bool = True, **options: Any) -> Any:
        start_json_if_given(sys.argv[1:] if args is None else args)
        if not (is_json() and standalone_mode):
            return super().main(args, *given, standalone_mode=standalone_mode, **options)
        try:
            code = super().main(args, *given, standalone_mode=False, **options)
        except click.ClickException as error:
            fields = {"message": error.format_message(), "type": type(error).__name__, "exit_code": error.exit_code}
            echo("", event="error", level=logging.ERROR, **fields)
            sys.exit(error.exit_code)
        except click.Abort:
            echo("Aborted!", event="interrupted", level=logging.WARNING, exit_code=1)
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


class ProgramCommand(_Logged):
    """A program without commands."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        _add_options(self)


class Program(_Logged, click.Group):
    """A program with commands, each of which gets the options too."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        _add_options(self)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(cmd, name)
        _add_options(cmd)


def _add_options(command: click.Command) -> None:
    known = {option.name for option in command.params}
    command.params = [*command.params, *(option for option in log_options() if option.name not in known)]
    for child in command.commands.values() if isinstance(command, click.Group) else ():
        _add_options(child)
