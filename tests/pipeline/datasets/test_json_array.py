import json
import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mervcache.errors import UserError
from pipeline.datasets import videollava
from pipeline.datasets.videollava import read_json_array

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def read(path: Path, text: str, window_chars: int) -> list:
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    return list(read_json_array(path, window_chars))


@settings(max_examples=100, deadline=None)
@given(
    records=st.lists(values, max_size=6),
    window=st.integers(1, 50),
    indent=st.sampled_from([None, 1]),
    is_ascii=st.booleans(),
)
def test_any_array_is_read_as_json_reads_it_whatever_the_window(tmp_path_factory, records, window, indent, is_ascii):
    text = json.dumps(records, indent=indent, ensure_ascii=is_ascii)
    path = tmp_path_factory.getbasetemp() / "records.json"
    assert read(path, text, window) == json.loads(text)


@pytest.mark.parametrize("window", [1, 2, 3, 7, 1000])
def test_numbers_and_letters_outside_ascii_survive_the_windows_edge(tmp_path, window):
    assert read(tmp_path / "a.json", ' [12345 ,-1.5e10,"é😀"]\r\n', window) == [12345, -1.5e10, "é😀"]


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ('{"a": 1}', 1, 1, "must be an array"),
        ("", 1, 1, "must be an array"),
        ('[\n {"a": 1},\n {"b" 2}\n]', 3, 7, "Expecting ':' delimiter"),
        ('[{"a": 1}\n{"b": 2}]', 2, 1, "expected ',' or ']'"),
        ('[{"a": 1},', 1, 11, "Expecting value"),
        ('[{"a": 1},]', 1, 11, "Expecting value"),
        ('[1] x', 1, 5, "more text after"),
        ('[{"a": "cut off', 1, 8, "Unterminated string"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("window", [1, 5, 1000])
def test_a_broken_file_is_an_error_with_its_line_and_column(tmp_path, text, line, column, words, window):
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.json", text, window)
    assert f"line {line}, column {column}" in str(caught.value)
    assert words in str(caught.value)
    assert "a.json" in str(caught.value)


def test_records_before_the_break_are_given_out(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, {"b": ')
    records = read_json_array(tmp_path / "a.json")
    assert next(records) == {"a": 1}
    with pytest.raises(UserError, match="broken at line 1"):
        next(records)


def test_a_record_without_end_is_refused_and_not_read_to_the_end_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(videollava, "MAX_RECORD_CHARS", 1000)
    os.mkfifo(tmp_path / "a.json")

    def write_for_ever() -> None:
        with suppress(BrokenPipeError), open(tmp_path / "a.json", "wb", buffering=0) as pipe:
            pipe.write(b'["')
            while True:
                pipe.write(b"x" * 1000)

    writer = threading.Thread(target=write_for_ever, daemon=True)
    writer.start()
    with pytest.raises(UserError, match="Unterminated string"):
        list(read_json_array(tmp_path / "a.json", 100))
    writer.join(30)
    assert not writer.is_alive()


@pytest.mark.parametrize("text", ["[" * 100_000, "[" + "9" * 10_000 + "]"])
def test_brackets_and_digits_without_end_are_an_error_and_not_a_crash(tmp_path, text):
    with pytest.raises(UserError, match="broken at line 1"):
        read(tmp_path / "a.json", text, 1 << 20)


def test_a_file_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "a.json").write_bytes(b'["\xff\xfe"]')
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_json_array(tmp_path / "a.json"))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert list(read_json_array(tmp_path / "a.json")) == [1]


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        list(read_json_array(tmp_path / "a.json"))
