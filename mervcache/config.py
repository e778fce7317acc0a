"""Settings from YAML and options as frozen dataclasses: every name and type is checked against the dataclass.

An unknown setting is an error that names the nearest known one: a misspelt setting that is ignored wastes a long run.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from mervcache.errors import MervCacheError, UserError, nearest_name, unknown_name

Config = TypeVar("Config")

MAX_DEPTH = 64  # levels of a YAML text
MAX_VALUES = 1_000_000
NUM_LISTED = 8  # known names in a message; a training run has some sixty settings
ALIASES = {  # names in transformers.TrainingArguments -> names here
    "learning_rate": "optimizer.projector_lr",
    "lr": "optimizer.projector_lr",
    "max_grad_norm": "optimizer.clip_norm",
    "num_train_epochs": "epochs",
    "gradient_checkpointing": "activation_checkpointing",
    "logging_steps": "log_every",
    "save_steps": "checkpoint_every",
    "eval_steps": "eval_every",
}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a config file; {} for an empty one."""
    try:
        loaded = parse_yaml(Path(path).read_bytes())  # the parser decodes UTF-8 and UTF-16 itself
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"config file {path} is not YAML: {error}") from error
    if not isinstance(loaded or {}, dict):
        raise UserError(f"config file {path} must hold `setting: value` lines, got {type(loaded).__name__}")
    return loaded or {}


def parse_yaml(text: str | bytes) -> Any:
    """The value of a YAML text; `ValueError` for anything else."""
    import yaml  # --help needs none

    try:
        loaded = yaml.safe_load(text)
        size, depth = _extent(loaded, 0, {})
        if depth > MAX_DEPTH:
            raise RecursionError
        if size > MAX_VALUES:
            raise ValueError(f"its aliases stand for more than {MAX_VALUES:,} values")
        return loaded
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, AttributeError, TypeError) as error:
        # the last ones: a value that its tag does not allow, such as `!!bool often`
        raise ValueError(str(error) or type(error).__name__) from error


def _extent(value: Any, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(values, levels) with every alias written out; a list that holds itself has too many levels."""
    if isinstance(value, dict):
        mapping = cast("dict[Any, Any]", value)
        entries = [*mapping, *mapping.values()]
    elif isinstance(value, list | tuple | set):
        entries = [*cast("Iterable[Any]", value)]
    else:
        return 1, 0
    key = id(cast("Any", value))
    if depth > MAX_DEPTH:
        raise RecursionError
    if key not in known:
        extents = [_extent(entry, depth + 1, known) for entry in entries]
        known[key] = 1 + sum(size for size, _ in extents), 1 + max((levels for _, levels in extents), default=0)
    return known[key]


def parse_pairs(option: str, pairs: Iterable[str]) -> dict[str, Any]:
    """`["spool_gb=100"]` -> name -> value: numbers and booleans as YAML reads them, what is no YAML as text.

    `option` is named in errors.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise UserError(f"{option} is KEY=VALUE, got {pair!r}")
        try:
            settings[name] = parse_yaml(value)
        except ValueError:  # such as "{00..09}.tar"
            settings[name] = value
    return settings


def to_builtin(value: Any) -> Any:
    """A value as YAML holds it: tuples as lists."""
    if isinstance(value, Mapping):
        return {key: to_builtin(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    return [to_builtin(item) for item in cast("Sequence[Any]", value)] if isinstance(value, list | tuple) else value


def from_settings(
    cls: type[Config], settings: Mapping[str, Any], *, where: str, error: type[MervCacheError], see: str
) -> Config:
    """A `cls` made of settings, converted to its types; None keeps a default. In messages `where` precedes names."""
    check_names(cls, settings, where=where, error=error, see=see)
    hints, given = typing.get_type_hints(cls), {name: value for name, value in settings.items() if value is not None}
    return cls(**{name: _typed(value, hints[name], f"{where}{name}", error) for name, value in given.items()})


def overlay(config: Config, changes: Mapping[str, Any], where: str = "") -> Config:
    """`config` with `changes`, of which a mapping changes a nested dataclass; else a `UserError`."""
    check_names(config, changes, where=where)
    hints, values = typing.get_type_hints(type(config)), cast("dict[str, Any]", {})
    for key, value in changes.items():
        current, name = getattr(config, key), f"{where}{key}"
        if not dataclasses.is_dataclass(current):
            values[key] = _typed(value, hints[key], name, UserError)
        elif isinstance(value, Mapping):
            values[key] = overlay(cast("Any", current), cast("Mapping[str, Any]", value), where=f"{name}.")
        else:
            raise UserError(f"{name} must be `name: value` pairs, got {value!r}")
    return cast("Config", dataclasses.replace(cast("Any", config), **values))


def check_types(config: Any) -> None:
    """Raise `UserError` for a field that does not hold a value of its type."""
    hints = typing.get_type_hints(cast("type[Any]", type(config)))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if _typed(value, hints[field.name], field.name, UserError) != value:  # "2e-5" is a number only in `overlay`
            raise UserError(f"{field.name} must be {_WORDS.get(hints[field.name], 'of its type')}, got {value!r}")


def check_names(
    config: Any,
    names: Iterable[Any],
    *,
    where: str = "",
    source: str = "",
    see: str = "--print-config prints all",
    error: type[MervCacheError] = UserError,
) -> None:
    """Raise `error` for a name that is no field of `config`, a dataclass or a value of one.

    The nearest known name may be nested, or an alias of one. `source`, such as a file, begins the message; `see` says
    where all names are listed.
    """
    own = [f"{where}{field.name}" for field in dataclasses.fields(config)]
    nested = list(_nested_names(config, where))
    for name in (f"{where}{name}" for name in names):
        if name in own:
            continue
        if name in nested:
            parent, _, child = name.rpartition(".")
            raise error(f"{source}setting {name!r} is one of a mapping: write {parent}: {{{child}: ...}}")
        known = {f"{where}{alias}": name for alias, name in ALIASES.items() if name in nested}
        known |= {where + name.rpartition(".")[2]: name for name in nested} | {name: name for name in [*nested, *own]}
        nearest = nearest_name(name, known)
        listed, rest = own, ""
        if len(own) > NUM_LISTED:
            listed, rest = difflib.get_close_matches(name, own, n=NUM_LISTED, cutoff=0.0), f"; {see}"
        raise error(source + unknown_name("setting", name, listed, nearest=known.get(nearest, "")) + rest)


def _nested_names(config: Any, where: str) -> Iterator[str]:
    """Full names of all settings, those of nested dataclasses too."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        if dataclasses.is_dataclass(value):
            yield from _nested_names(value, f"{where}{field.name}.")
        else:
            yield f"{where}{field.name}"


def _typed(value: Any, hint: Any, name: str, error: type[MervCacheError]) -> Any:
    """`value` as the type `hint`: lists become tuples, whole numbers floats where the type is float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _typed(value, next(a for a in arguments if a is not type(None)), name, error)
    if origin is Literal:
        if value not in arguments:
            raise error(unknown_name(f"value of {name}", value, arguments))
        return value
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise error(f"{name} must be `name: value` pairs, got {value!r}")
        pairs = cast("Mapping[Any, Any]", value).items()
        return {str(key): _typed(item, arguments[1], f"{name}.{key}", error) for key, item in pairs}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise error(f"{name} must be a list, got {value!r}")
        items = cast("Sequence[Any]", value)
        inner = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) != len(items):
            raise error(f"{name} must be a list of {len(inner)} entries, got {value!r}")
        numbered = enumerate(zip(items, inner, strict=True))
        return tuple(_typed(item, kind, f"{name}[{number}]", error) for number, (item, kind) in numbered)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 2e-5 as text: it wants 2.0e-5
        except ValueError:
            pass
    if type(value) is not hint:
        raise error(f"{name} must be {_WORDS[hint]}, got {value!r}")
    return value
