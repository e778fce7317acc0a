"""Load: a run's folder -> its model, ready to use.

A folder is enough: of a run, of a chain of stages (its last one), or an export.
"""

from __future__ import annotations

from pathlib import Path

from mervcache.errors import UserError
from trainer.config import read_config
from trainer.runs import checkpoint
from trainer.runs.chain import last_stage, no_checkpoint
from trainer.runs.exported import is_export, load_export
from trainer.runs.rebuild import LoadedRun, rebuild, resumed_llm
from trainer.runs.record import RunRecord


def load_run(run: Path, *, best: bool = False) -> LoadedRun:
    """The newest checkpoint of a run, or of a chain's last stage, or an export, as a model in evaluation mode.

    `best`: instead of the newest, the one with the best validation.
    """
    run = last_stage(Path(run))
    if is_export(run):
        return load_export(run)
    folder = checkpoint.newest(run)
    if best and folder is not None:
        folder = checkpoint.best(run)
        if folder is None:
            raise UserError(f"no checkpoint of {run} was validated: train with --eval-every, or leave out --best")
    if folder is None:
        raise UserError(no_checkpoint(run))
    config = read_config(run)
    record = RunRecord.read(run)
    built = rebuild(config, record, resumed_llm(config, run))
    state = checkpoint.load_state(folder)
    checkpoint.load_model(folder, built.model, with_llm=built.saves_llm)
    built.model.eval()
    return LoadedRun(built=built, record=record, step=state.step)
