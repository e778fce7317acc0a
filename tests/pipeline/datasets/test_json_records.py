import gzip
import json
import os
import threading
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mervcache.errors import UserError
from pipeline.datasets import json_records
from pipeline.datasets.json_records import read_records

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def read(path: Path, text: str, window_chars: int) -> list:
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    return list(read_records(path, window_chars))


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
        ("", 1, 1, "must be a JSON array"),
        ('"a"', 1, 1, "must be a JSON array"),
        ('{"id": "1"}\n{"id": }', 2, 8, "Expecting value"),
        ('{"data": [{"a": 1}', 1, 19, "expected ',' or ']'"),
        ('{"data": [{"a": 1}]} {"b": 1}', 1, 22, "more text after"),
        ('{"id": 1,}', 1, 10, "expected a name"),
        ('{"id" 1}', 1, 7, "expected ':'"),
        ('{"id": 1 "b": 2}', 1, 10, "expected ',' or '}'"),
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


rows = st.lists(
    st.fixed_dictionaries({"id": st.text(max_size=5), "conversations": st.just([{"from": "human"}])}), max_size=4
)
WRAP = {
    "array": json.dumps,
    "lines": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "lines without an end": lambda rows: "\r\n".join(json.dumps(row) for row in rows),
    "data": lambda rows: json.dumps({"version": "1.0", "data": rows, "licence": ["x"]}),
    "a list of its own name": lambda rows: json.dumps({"info": {"year": 2024}, "my_set": rows}),
    "split": lambda rows: pd.DataFrame(rows, columns=["id", "conversations"]).to_json(orient="split"),
    "records": lambda rows: pd.DataFrame(rows).to_json(orient="records"),
    "pandas lines": lambda rows: pd.DataFrame(rows).to_json(orient="records", lines=True),
    "index": lambda rows: pd.DataFrame(rows).to_json(orient="index"),
    "columns": lambda rows: pd.DataFrame(rows).to_json(orient="columns"),
    "list": lambda rows: json.dumps(pd.DataFrame(rows).to_dict(orient="list")),
}


@pytest.mark.parametrize("form", WRAP)
@settings(max_examples=30, deadline=None)
@given(records=rows.filter(bool), window=st.integers(1, 50), mark=st.sampled_from(["", "\ufeff"]))
def test_every_usual_form_of_a_table_holds_the_same_records(tmp_path_factory, form, records, window, mark):
    path = tmp_path_factory.getbasetemp() / "form.json"
    assert read(path, mark + WRAP[form](records), window) == records


def test_a_table_with_schema_holds_the_records_and_their_row_labels(tmp_path):
    text = pd.DataFrame([{"id": "a", "question": "?"}]).to_json(orient="table")
    assert read(tmp_path / "a.json", text, 7) == [{"index": 0, "id": "a", "question": "?"}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"train": [{"id": 1}], "test": [{"id": 2}]}', "several lists of records ('train', 'test')"),
        ('{"one": [{"id": 1}], "two": [{"id": 2}]}', "several lists of records ('one', 'two')"),
        ('{"a": {"b": {"c": 1}}}', "rows and columns cannot be distinguished"),
        ('{"id": {"id": 1}}', "rows and columns cannot be distinguished"),
        ('{"id": ["a"], "video": ["a.mp4", "b.mp4"]}', "different lengths"),
        ('{"data": [[1, 2]], "columns": ["id", "video"]}', "names of their columns"),
        ('{"annotations": [{"a": 1}], "conversations": []}', "may be a record"),
        ('{"a": 1}', "one object without records"),
        ("{}", "one object without records"),
    ],
)
@pytest.mark.parametrize("window", [1, 1000])
def test_what_could_be_read_in_two_ways_is_refused(tmp_path, text, words, window):
    with pytest.raises(UserError, match="is not clear") as caught:
        read(tmp_path / "a.json", text, window)
    assert words in str(caught.value)


def test_a_single_record_is_a_file_of_one_line(tmp_path):
    record = {"id": "1", "objects": [{"box": 1}], "conversations": [{"from": "human"}]}
    assert read(tmp_path / "a.json", json.dumps(record), 5) == [record]


def test_an_empty_list_of_records_holds_none(tmp_path):
    assert read(tmp_path / "a.json", '{"data": []}', 5) == []


def test_rows_without_names_come_as_lists(tmp_path):
    assert read(tmp_path / "a.json", "[[1, 2], [3, 4]]", 5) == [[1, 2], [3, 4]]
    assert read(tmp_path / "a.json", '{"columns": ["id", "b"], "data": [[1], [3, 4]]}', 5) == [[1], {"id": 3, "b": 4}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("is_compressed", [False, True])
def test_compressed_files_and_every_byte_order_mark_are_read(tmp_path, encoding, is_compressed):
    data = '[{"id": "é😀"}]'.encode(encoding)
    (tmp_path / "a.json").write_bytes(gzip.compress(data) if is_compressed else data)
    assert list(read_records(tmp_path / "a.json")) == [{"id": "é😀"}]


@pytest.mark.parametrize("cut", [5, 12, 30, -4])
def test_a_compressed_file_that_is_cut_is_an_error(tmp_path, cut):
    (tmp_path / "a.json").write_bytes(gzip.compress(b'[{"id": "1"}, {"id": "2"}]')[:cut])
    with pytest.raises(UserError, match=r"a\.json"):
        list(read_records(tmp_path / "a.json"))


def test_records_before_the_break_are_given_out(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, {"b": ')
    records = read_records(tmp_path / "a.json")
    assert next(records) == {"a": 1}
    with pytest.raises(UserError, match="broken at line 1"):
        next(records)


def test_a_record_without_end_is_refused_and_not_read_to_the_end_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "MAX_RECORD_CHARS", 1000)
    os.mkfifo(tmp_path / "a.json")

    def write_for_ever() -> None:
        with suppress(BrokenPipeError), open(tmp_path / "a.json", "wb", buffering=0) as pipe:
            pipe.write(b'["')
            while True:
                pipe.write(b"x" * 1000)

    writer = threading.Thread(target=write_for_ever, daemon=True)
    writer.start()
    with pytest.raises(UserError, match="Unterminated string"):
        list(read_records(tmp_path / "a.json", 100))
    writer.join(30)
    assert not writer.is_alive()


@pytest.mark.parametrize("text", ["[" * 100_000, "[" + "9" * 10_000 + "]"])
def test_brackets_and_digits_without_end_are_an_error_and_not_a_crash(tmp_path, text):
    with pytest.raises(UserError, match="broken at line 1"):
        read(tmp_path / "a.json", text, 1 << 20)


def test_a_file_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "a.json").write_bytes(b'["\xff\xfe"]')
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_records(tmp_path / "a.json"))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert list(read_records(tmp_path / "a.json")) == [1]


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        list(read_records(tmp_path / "a.json"))
