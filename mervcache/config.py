"""Overlay: mappings as YAML holds them, laid over a frozen dataclass, checked against its type hints.

Comes in: a value and changes. Goes out: the changed value, or an error that names the setting, what it is and what was
given; an unknown name is answered with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from mervcache.errors import UserError, unknown_name

NUM_LISTED = 8  # known names in a message; a run has some sixty settings
OTHER_WORDS = {  # what other trainers call a setting
    "learning_rate": "optimizer.projector_lr",
    "lr": "optimizer.projector_lr",
    "max_grad_norm": "optimizer.clip_norm",
    "num_train_epochs": "epochs",
    "gradient_checkpointing": "activation_checkpointing",
    "logging_steps": "log_every",
    "save_steps": "checkpoint_every",
    "eval_steps": "eval_every",
}


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a config file."""
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from error
    if not isinstance(loaded or {}, dict):
        raise UserError(f"config file {path} must hold a mapping of settings, got a {type(loaded).__name__}")
    return loaded or {}


def overlay(config: Any, changes: Mapping[str, Any], where: str = "") -> Any:
    """`config` with `changes` laid over it; nested mappings change nested values, unknown keys are errors."""
    hints = typing.get_type_hints(type(config))
    values = {}
    for key, value in changes.items():
        name = f"{where}{key}"
        if key not in hints:
            raise UserError(_unknown_setting(name, config, where))
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise UserError(f"setting {name} is a mapping, got {value!r}")
            values[key] = overlay(current, value, where=f"{name}.")
        else:
            values[key] = _typed(value, hints[key], name)
    return dataclasses.replace(config, **values)


def _unknown_setting(name: str, config: Any, where: str) -> str:
    """The message for a setting that is not in `config`: the nearest one, nested ones too, then some known ones."""
    nested = list(_names(config, where))
    if name in nested:
        parent, _, child = name.rpartition(".")
        return f"setting {name!r} is one of a mapping: write {parent}: {{{child}: ...}}"
    own = [f"{where}{field.name}" for field in dataclasses.fields(config)]
    words = {f"{where}{word}": known for word, known in OTHER_WORDS.items() if known in nested}
    words |= {where + known.rpartition(".")[2]: known for known in nested} | {known: known for known in [*nested, *own]}
    nearest = difflib.get_close_matches(name, words, n=1, cutoff=0.5)
    hint = f", the nearest known one is {words[nearest[0]]!r}" if nearest else ""
    listed, rest = own, ""
    if len(own) > NUM_LISTED:
        listed, rest = difflib.get_close_matches(name, own, n=NUM_LISTED, cutoff=0.0), "; --print-config prints all"
    return f"unknown setting {name!r}{hint}; known: {', '.join(listed)}{rest}"


def _names(config: Any, where: str) -> Iterator[str]:
    """Every setting by its whole name, those of nested values too."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _names(value, f"{where}{field.name}.")
        else:
            yield f"{where}{field.name}"


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as the field's type, or an error that says what is expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _typed(value, next(a for a in arguments if a is not type(None)), name)
    if origin is Literal:
        if value not in arguments:
            raise UserError(unknown_name(f"value of {name}", value, list(arguments)))
        return value
    if origin is Mapping:
        if not isinstance(value, dict):
            raise UserError(f"setting {name} is a mapping, got {value!r}")
        return {str(key): _typed(item, arguments[1], f"{name}.{key}") for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"setting {name} is a list, got {value!r}")
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) != len(value):
            raise UserError(f"setting {name} has {len(inner)} entries, got {value!r}")
        return tuple(_typed(item, kind, name) for item, kind in zip(value, inner, strict=True))
    return _scalar(value, hint, name)


def _scalar(value: Any, hint: type, name: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 2e-5 as text: it wants 2.0e-5
        except ValueError:
            pass
    if hint is float and is_number:
        return float(value)
    if type(value) is hint:
        return value
    raise UserError(f"setting {name} is {hint.__name__}, got {value!r}")


def plain(value: Any) -> Any:
    """A value as YAML holds it: tuples as lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
