"""Typed settings: what is accepted, converted and refused, with which message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from mervcache.config import check_types, from_settings, load_yaml, overlay
from mervcache.errors import ClusterError, UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    name: Literal["first", "mean"] = "first"


@dataclass(frozen=True)
class Outer:
    steps: int = 3
    quiet: bool = False
    label: str | None = None
    grid: tuple[int, int, int] | None = None
    lines: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    free: Mapping[str, Any] = field(default_factory=dict)
    share: float = 0.5
    inner: Inner = field(default_factory=Inner)


def test_changes_become_the_types_of_their_fields():
    changes = {"grid": [8, 4, 4], "lines": ["a"], "share": 1, "inner": {"rate": "2e-5"}, "sizes": {"video": 8}}
    changed = overlay(Outer(label="x"), changes | {"label": None})
    assert changed == Outer(grid=(8, 4, 4), lines=("a",), share=1.0, inner=Inner(rate=2e-5), sizes={"video": 8})
    assert type(changed.share) is float


REFUSED = [
    ({"steps": True}, "steps must be a whole number, got True"),
    ({"steps": 2.0}, "steps must be a whole number, got 2.0"),
    ({"steps": None}, "steps must be a whole number, got None"),
    ({"quiet": 1}, "quiet must be true or false, got 1"),
    ({"label": 7}, "label must be text, got 7"),
    ({"grid": [8, 4]}, r"grid must be a list of 3 entries, got \[8, 4\]"),
    ({"lines": "one"}, "lines must be a list, got 'one'"),
    ({"lines": ["a", 3]}, r"lines\[1\] must be text, got 3"),
    ({"sizes": {"video": "x"}}, "sizes.video must be a whole number, got 'x'"),
    ({"sizes": 3}, "sizes must be `name: value` pairs, got 3"),
    ({"share": "half"}, "share must be a number, got 'half'"),
    ({"inner": 3}, "inner must be `name: value` pairs, got 3"),
    ({"inner": {"name": "frist"}}, "unknown value of inner.name 'frist', the nearest known one is 'first'"),
    ({"inner": {"rat": 1}}, "unknown setting 'inner.rat', the nearest known one is 'inner.rate'"),
    ({"stesp": 1}, r"unknown setting 'stesp', the nearest known one is 'steps'; known: .*; --print-config prints all"),
    ({3: 1}, "unknown setting '3'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_wrong_setting_is_named_with_what_was_given(changes, message):
    with pytest.raises(UserError, match=message):
        overlay(Outer(), changes)


def test_from_settings_raises_the_callers_error_and_none_keeps_a_default():
    made = from_settings(Outer, {"steps": None, "label": "x"}, where="cluster.", error=ClusterError, see="see FILE")
    assert made == Outer(label="x")
    with pytest.raises(ClusterError, match=r"'cluster.stesp', the nearest known one is 'cluster.steps'; .*; see FILE"):
        from_settings(Outer, {"stesp": None}, where="cluster.", error=ClusterError, see="see FILE")


def test_a_value_made_in_code_is_checked_but_not_converted():
    check_types(Outer(share=1, free={"a": object()}))
    for wrong in (Outer(steps="3"), Outer(share="2e-5"), Outer(lines=["a"])):
        with pytest.raises(UserError, match="must be "):
            check_types(wrong)


def test_a_file_is_a_mapping_and_an_empty_one_has_no_settings(tmp_path):
    file = tmp_path / "a.yaml"
    with pytest.raises(UserError, match=r"a.yaml cannot be read: No such file"):
        load_yaml(file)
    for text, message in (("- a", "must hold `setting: value` lines, got list"), ("a: [", "is not YAML")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            load_yaml(file)
    file.write_text("")
    assert load_yaml(file) == {}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"epochs: \xff\xfe", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"name: caf\xe9", "not YAML"),
        (b"[" * 100_000, "nested too deeply"),
        (b"- " * 100_000, "nested too deeply"),
        (b"{a: " * 100_000, "nested too deeply"),
        (b"a: " + b"[" * 300 + b"]" * 300, "nested too deeply"),
        (b"a: &a [*a]", "nested too deeply"),
        (
            b"\n".join(b"a%d: &a%d [*a%d]" % (n, n, n - 1) if n else b"a0: &a0 [1]" for n in range(200)),
            "nested too deeply",
        ),
        (
            b"\n".join(
                b"a%d: &a%d [%s]" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9 if n else [b"1"])) for n in range(20)
            ),
            "aliases",
        ),
        (b"a: \x00", "not YAML"),
        (b"a: !!bool often", "not YAML"),
        (b"a: !!timestamp soon", "not YAML"),
        (b"a: 2024-13-45", "not YAML"),
        (b"a: " + b"9" * 10_000, "not YAML"),
        (b"? [1]\n: 2", "not YAML"),
    ],
)
def test_a_file_that_is_no_yaml_is_an_error_with_its_name(tmp_path, data, words):
    (tmp_path / "a.yaml").write_bytes(data)
    with pytest.raises(UserError, match=r"config file .*a\.yaml is not YAML") as caught:
        load_yaml(tmp_path / "a.yaml")
    assert words in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_yaml_is_read_in_every_encoding_that_it_may_have(tmp_path, encoding):
    (tmp_path / "a.yaml").write_bytes("name: café".encode(encoding))
    assert load_yaml(tmp_path / "a.yaml") == {"name": "café"}
