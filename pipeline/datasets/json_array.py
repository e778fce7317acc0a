"""JSON array: the records of a large annotation file, one by one.

Comes in: a file whose top level is an array (the training set's is 1 GB). Goes out: its records, in order. `json.load`
would hold the file as bytes, as text (four bytes a character if a single emoji is in it) and as objects, all at once;
here `WINDOW_CHARS` of text and one record are alive, and the parser is the same C one. A broken file is a `UserError`
with its line and column.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mervcache.errors import UserError

WINDOW_CHARS = 1 << 22
MAX_RECORD_CHARS = 1 << 26  # a record that is longer is not an annotation
_SPACE = " \t\r\n"


def read_json_array(path: Path, window_chars: int = WINDOW_CHARS) -> Iterator[object]:
    """Yield the elements of the array in `path`."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from _Window(file, path, window_chars).elements()
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"annotation file {path} is not UTF-8 text: {error.reason}") from error


class _Window:
    """The stretch of text that is being parsed."""

    def __init__(self, file: TextIO, path: Path, window_chars: int) -> None:
        self.file, self.path, self.window_chars = file, path, window_chars
        self.text, self.position, self.is_last = "", 0, False
        self.lines_before, self.columns_before = 0, 0  # of the text's first character

    def elements(self) -> Iterator[object]:
        decode = json.JSONDecoder().raw_decode
        self._expect("[", "annotations must be an array of records")
        if self._peek() == "]":
            self.position += 1
        else:
            while True:
                self._peek()
                yield self._element(decode)
                if self._peek() == "]":
                    self.position += 1
                    break
                self._expect(",", "expected ',' or ']' after a record")
        if self._peek():
            raise self._error("there is more text after the array")

    def _element(self, decode) -> object:
        """One value; a value cut off by the window's end looks like an error until more text is there."""
        while True:
            try:
                value, end = decode(self.text, self.position)
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
            f"annotation file {self.path} is broken at line {line}, column {column}: {message}; download it again"
        )
