"""Write docs/settings.md: every setting of a config file, from the dataclasses and their comments.

python scripts/settings_reference.py            # writes the page
python scripts/settings_reference.py --check    # exit code 1 if it is not current
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import sys
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from jobs.settings import ClusterSettings
from mervcache.config import to_builtin
from pipeline.config import ExtractConfig
from pipeline.datasets import BUILT_IN, LINKS, LINKS_OPTION
from trainer.ablation.sweep import SweepConfig
from trainer.config import FusionConfig, LoraConfig, OptimizerConfig, ProjectorConfig, TrainConfig
from trainer.recipes import RECIPES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
HEAD = """# Settings

Made by `python scripts/settings_reference.py` from the dataclasses that check the settings; do not edit it by hand.

A config file is YAML: `setting: value` lines, nested ones as mappings (`optimizer: {projector_lr: 1.0e-3}`). Options of
the command line win over the file, the file over the recipe or the defaults. An unknown setting is an error that names
the nearest one.

```bash
merv-pipeline extract --dataset demo --print-config    # every setting of an extraction, as YAML for --config
merv-train --recipe merv-full --print-config           # every setting of a training run
```
"""
SECTIONS = (  # heading, prefix of the names, dataclass
    ("Extraction: ExtractConfig", "", ExtractConfig),
    ("Clusters: cluster", "cluster.", ClusterSettings),
    ("Training: TrainConfig", "", TrainConfig),
    ("Training: projector", "projector.", ProjectorConfig),
    ("Training: fusion", "fusion.", FusionConfig),
    ("Training: lora", "lora.", LoraConfig),
    ("Training: optimizer", "optimizer.", OptimizerConfig),
    ("Sweeps: sweep", "sweep.", SweepConfig),
)


def reference() -> str:
    """The page."""
    parts = [HEAD]
    for heading, prefix, config in SECTIONS:
        summary = (inspect.getdoc(config) or "").split("\n\n")[0].replace("\n", " ")
        hints = typing.get_type_hints(config)
        rows = [
            [f"`{prefix}{field.name}`", kind_of(hints[field.name]), default_of(field), comment]
            for field, comment in zip(dataclasses.fields(config), comments_of(config), strict=True)
        ]
        parts.append(f"## {heading}\n\n{summary}\n\n" + table(("setting", "type", "default", "meaning"), rows))
    parts.append("## Recipes\n\nWhat `--recipe` changes of the defaults of `TrainConfig`.\n\n" + recipes())
    parts.append(
        "## Options of datasets\n\n`--option KEY=VALUE`, or `options:` in a config file.\n\n" + dataset_options()
    )
    return "\n".join(parts)


def kind_of(hint: Any) -> str:
    """The type of a setting in words, of a choice its values."""
    origin = typing.get_origin(hint)
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in kinds)
    if origin in (types.UnionType, typing.Union):
        return kind_of(kinds[0])
    if origin is tuple:
        is_uniform = kinds[-1] is Ellipsis
        return f"list of {kind_of(kinds[0])}" if is_uniform else f"list of {len(kinds)} {kind_of(kinds[0])}"
    if origin is Mapping:
        return f"mapping to {kind_of(kinds[1])}"
    if dataclasses.is_dataclass(hint):
        return "mapping"
    return "any" if hint is Any else hint.__name__


def default_of(field: dataclasses.Field[Any]) -> str:
    """The default as YAML, `null` for None."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(value):
        return "see its section"
    return f"`{json.dumps(to_builtin(value))}`"


def comments_of(config: type) -> Iterator[str]:
    """The comment of each field: behind it, continued below it in lower case, or on the lines above it."""
    source = inspect.getsource(config)
    tokens = [
        token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT
    ]
    comments = {token.start[0]: token.string.removeprefix("#").strip() for token in tokens}
    alone = {token.start[0] for token in tokens if token.line.lstrip().startswith("#")}
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if not isinstance(node, ast.AnnAssign):
            continue
        last = node.end_lineno or node.lineno
        own = [comments.pop(line) for line in range(node.lineno, last + 1) if line in comments]
        while own and last + 1 in alone and comments[last + 1][0].islower():
            last += 1
            own.append(comments.pop(last))
        above = [comments.pop(line) for line in sorted(comments) if line < node.lineno]
        yield " ".join([*above, *own]).replace("None", "null").replace("<", "&lt;")


def recipes() -> str:
    """A row per stage of a recipe."""
    rows = []
    for name, stages in RECIPES.items():
        for stage in stages:
            changed = changes(stage.config, TrainConfig())
            text = ", ".join(f"`{setting}: {json.dumps(value)}`" for setting, value in changed.items())
            rows.append([f"`{name}`", stage.name, text or "none"])
    return table(("recipe", "stage", "settings"), rows)


def changes(config: Any, default: Any, prefix: str = "") -> dict[str, Any]:
    """Settings that differ, by dotted name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        here, there = getattr(config, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(here):
            found |= changes(here, there, f"{prefix}{field.name}.")
        elif here != there:
            found[prefix + field.name] = to_builtin(here)
    return found


def dataset_options() -> str:
    """A row per option of a built-in dataset."""
    rows = [
        [f"`{spec.name}`", f"`{name}`", f"`{json.dumps(option.default)}`", option.help]
        for spec in BUILT_IN.values()
        for name, option in spec.options.items()
    ]
    rows.append(["all but `demo`", f"`{LINKS_OPTION}`", f"`{json.dumps(LINKS.default)}`", LINKS.help])
    return table(("dataset", "option", "default", "meaning"), rows)


def table(names: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [names, ["---"] * len(names), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@click.command()
@click.option("--check", is_flag=True, help="Only compare; exit code 1 if the page is not current.")
def main(check: bool) -> None:
    """Write docs/settings.md from the dataclasses."""
    text = reference()
    if check and PAGE.read_text() != text:
        sys.exit(f"{PAGE} is not current: run `python scripts/settings_reference.py`")
    if not check:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
