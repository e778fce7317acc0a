"""Entry points `merv-train` and `merv-eval`: `trainer.cli` and `trainer.cli_eval`, with the commands of the ablations.

`merv-train` trains one run when it is called without a command, so its own options stand before none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import click
from click.core import ParameterSource

from mervcache.errors import UserError
from mervcache.program import Program
from trainer import cli
from trainer.ablation.cli import COMMANDS
from trainer.ablation.cli_probe import probe_command
from trainer.ablation.cli_sweep import sweep
from trainer.cli_eval import eval_main

for command in (*COMMANDS, probe_command):
    eval_main.add_command(command)


@cli.handle_cli_errors
def _train_or_command(**options: Any) -> None:
    context = click.get_current_context()
    if context.invoked_subcommand is None:
        cast("Callable[..., Any]", cli.train_main.callback)(**options)
        return
    typed = [name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if typed:
        name = typed[0].replace("_", "-")
        raise UserError(
            f"options of {context.invoked_subcommand} stand behind it: merv-train {context.invoked_subcommand} ..., not"
            f" `merv-train ... {context.invoked_subcommand}`; found {name} before it"
        )


train_main = Program(
    "merv-train",
    commands=[sweep],
    params=cli.train_main.params,
    callback=_train_or_command,
    invoke_without_command=True,
    context_settings=cli.train_main.context_settings,
    help=cli.train_main.help,
    epilog=cli.train_main.epilog,
)


if __name__ == "__main__":  # python -P -m trainer.main train|eval ...: in any folder, with any PATH
    name = sys.argv.pop(1)
    {"train": train_main, "eval": eval_main}[name](prog_name=f"merv-{name}")
