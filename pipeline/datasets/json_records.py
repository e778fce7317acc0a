"""Records of an annotation file, one at a time: a JSON array, JSON Lines, or an object that holds the records.

The training set's file has 1 GB, and `json.load` would hold it as bytes, as text (four bytes a character if a single
emoji is in it) and as objects at once. Here a window of text and one record are in memory; only tables by column
(pandas' default) are held whole. What could be read in two ways is refused.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mervcache.errors import UserError

WINDOW_CHARS = 1 << 22
MAX_RECORD_CHARS = 1 << 26  # a record that is longer is not an annotation
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")  # of an annotation file that is expected as NAME.json
# Keys of an object under which a list is a list of records, read without holding it.
WRAPPERS = frozenset(
    "data records rows samples annotations items examples instances questions answers train test val validation".split()
)
FIELDS = frozenset(  # of records: they distinguish a table's columns from its rows
    "id conversations video videos image images question question_id answer answer_id options video_name".split()
)
OF_A_RECORD = frozenset(("conversations", "question", "question_id"))  # no object around records has these
_SPACE = " \t\r\n\ufeff"  # a byte order mark stays where files were joined
_FORMS = 'a JSON array of records, JSON Lines, or an object with one list of records such as {"data": [...]}'


def find_annotations(folder: Path, name: str, notes: list[str] | None = None) -> Path | None:
    """The file `name`, which ends in .json, or in its place the same name as JSON Lines or compressed.

    Where there are several forms the first is taken, which is added to `notes`.
    """
    stem = name.removesuffix(".json")
    found = [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
    if len(found) > 1 and notes is not None:
        notes.append(f"{', '.join(path.name for path in found[1:])} passed over in {folder}, {found[0].name} is read")
    return found[0] if found else None


def read_records(path: Path, window_chars: int = WINDOW_CHARS) -> Iterator[object]:
    """Yield the records in `path`, gzip or not; `UserError`, with line and column, for a file that holds none."""
    try:
        with _open_text(path) as file:
            yield from _Window(file, path, window_chars).records()
    except UnicodeError as error:
        raise UserError(f"annotation file {path} is not UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"annotation file {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    with open(path, "rb") as raw:
        data = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
        is_utf16 = data.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")
        with io.TextIOWrapper(data, encoding="utf-16" if is_utf16 else "utf-8-sig") as file:
            yield file


class _Window:
    """The stretch of text that is being parsed."""

    def __init__(self, file: TextIO, path: Path, window_chars: int) -> None:
        self.file, self.path, self.window_chars = file, path, window_chars
        self.text, self.position, self.is_last = "", 0, False
        self.lines_before, self.columns_before = 0, 0  # of the text's first character
        self.decode = json.JSONDecoder().raw_decode

    def records(self) -> Iterator[object]:
        first = self._peek()
        if first == "[":
            self.position += 1
            yield from self._items()
        elif first == "{":
            yield from self._objects()
        else:
            raise self._error(f"annotations must be {_FORMS}")
        if self._peek():
            raise self._error("there is more text after the records")

    def _objects(self) -> Iterator[object]:
        """Records of a text that begins with an object: the object is the first of them, or it holds them."""
        whole = yield from self._first_object()
        if whole is None:
            return
        if not self._peek():
            yield from self._unpacked(whole)
            return
        yield whole
        while self._peek():
            yield self._element()

    def _first_object(self) -> Iterator[object]:
        """Yield the records of a list in the object, if it holds one, and return None; else return the object."""
        self._expect("{", "expected an object")
        held: dict[str, Any] = {}
        streamed = None
        is_first = True
        while self._peek() != "}":
            if not is_first:
                self._expect(",", "expected ',' or '}' after a value")
            is_first = False
            if self._peek() != '"':
                raise self._error("expected a name in double quotes")
            key = self._element()
            self._expect(":", "expected ':' after a name")
            if self._peek() != "[":
                held[key] = self._element()
                continue
            self.position += 1
            begin, items = self._peek(), self._items()
            columns = held.get("columns") if key == "data" and begin == "[" else None
            if streamed is None and key in WRAPPERS and begin == "{" and OF_A_RECORD.isdisjoint(held):
                streamed = key
                yield from items
            elif streamed is None and isinstance(columns, list):
                streamed = key
                yield from (_named_values(columns, row) for row in items)
            else:
                held[key] = list(items)
        self.position += 1
        if streamed is None:
            return held
        if not OF_A_RECORD.isdisjoint(held):
            raise self._unclear(f"it may be a record, or hold records under {streamed!r}")
        self._check_single([streamed, *(key for key, value in held.items() if _is_records(value))])
        return None

    def _unpacked(self, whole: Mapping[str, Any]) -> Iterator[object]:
        """The records in the only object of a file: a table in one of pandas' forms, a list under a key, a record."""
        values = list(whole.values())
        has_fields = not FIELDS.isdisjoint(whole)
        if values and all(isinstance(value, dict) for value in values):
            if has_fields == any(not FIELDS.isdisjoint(value) for value in values):
                raise self._unclear("rows and columns cannot be distinguished")
            yield from _rows_of_columns(whole) if has_fields else values
            return
        talks = whole.get("conversations")
        if has_fields and _is_list_of(list, values) and (talks is None or _is_list_of(list, talks)):
            if len({len(value) for value in values}) > 1:
                raise self._unclear("its columns have different lengths")
            yield from (dict(zip(whole, row, strict=True)) for row in zip(*values, strict=True))
            return
        lists = [key for key, value in whole.items() if _is_records(value)]
        if lists and OF_A_RECORD.isdisjoint(whole):
            self._check_single(lists)
            yield from whole[lists[0]]
        elif has_fields:
            yield whole
        elif _is_list_of(list, whole.get("data")) and whole["data"]:
            raise self._unclear("it holds rows without, or before, the names of their columns")
        elif not any(value == [] for key, value in whole.items() if key in WRAPPERS):
            raise self._unclear("it holds one object without records")

    def _check_single(self, keys: list[str]) -> None:
        if len(keys) > 1:
            raise self._unclear(f"it holds several lists of records ({', '.join(map(repr, keys[:5]))}): keep one")

    def _unclear(self, message: str) -> UserError:
        return UserError(f"annotation file {self.path} is not clear: {message}; write {_FORMS}")

    def _items(self) -> Iterator[object]:
        """The elements of an array whose bracket has been read, up to and with its end."""
        if self._peek() == "]":
            self.position += 1
            return
        while True:
            self._peek()
            yield self._element()
            if self._peek() == "]":
                self.position += 1
                return
            self._expect(",", "expected ',' or ']' after a record")

    def _element(self) -> Any:
        """One value; a value cut off by the window's end looks like an error until more text is there."""
        while True:
            try:
                value, end = self.decode(self.text, self.position)
                # A number near the window's end may go on behind it: of "1e+10" the parser takes the 1 from "1e+".
                if self.is_last or len(self.text) - end > 2 or not isinstance(value, int | float):
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                if self.is_last or len(self.text) - self.position > MAX_RECORD_CHARS:
                    raise self._error(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:  # digits without end, brackets without end
                raise self._error(f"a value is too large ({type(error).__name__})") from None
            self._more()

    def _peek(self) -> str:
        """The next character that is not space, "" at the end of the file."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in _SPACE:
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if self.is_last:
                return ""
            self._more()

    def _expect(self, character: str, message: str) -> None:
        if self._peek() != character:
            raise self._error(message)
        self.position += 1

    def _more(self) -> None:
        """Drop what is parsed and read on, at least as much as is kept, so that retries stay linear."""
        newlines = self.text.count("\n", 0, self.position)
        last = self.text.rfind("\n", 0, self.position)
        self.columns_before = self.position - last - 1 if newlines else self.columns_before + self.position
        self.lines_before += newlines
        kept = self.text[self.position :]
        fresh = self.file.read(max(self.window_chars, len(kept)))
        self.text, self.position, self.is_last = kept + fresh, 0, not fresh

    def _error(self, message: str, position: int | None = None) -> UserError:
        position = self.position if position is None else position
        newlines = self.text.count("\n", 0, position)
        before = self.columns_before if not newlines else -self.text.rfind("\n", 0, position) - 1
        line, column = self.lines_before + newlines + 1, before + position + 1
        return UserError(
            f"annotation file {self.path} is broken at line {line}, column {column}: {message}; "
            "if it was downloaded, compare its size with the original's"
        )


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def _is_records(value: object) -> bool:
    return bool(value) and _is_list_of(dict, value)


def _named_values(columns: list, row: object) -> object:
    if not isinstance(row, list) or len(row) != len(columns):
        return row  # no record: refused and counted where records are checked
    return {str(name): value for name, value in zip(columns, row, strict=True)}


def _rows_of_columns(columns: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of {column: {row label: value}}, in the order of the labels; null where a column has no such label."""
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    return ({name: column.get(label) for name, column in columns.items()} for label in labels)
