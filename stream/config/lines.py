"""On which line of a TOML text each value stands. Neither tomllib nor tomlkit tells."""

import re
import tomllib
from bisect import bisect_left
from typing import Any

KeyPath = tuple[str | int, ...]
"""Keys and positions in arrays, from the top: ("webhook", 0, "url")."""

_SPACE = re.compile(r"(?:\s|#[^\n]*)*")
_KEY = re.compile(r"[A-Za-z0-9_-]+|\"(?:\\.|[^\"\\])*\"|'[^']*'")
# Three quotes first: two of them alone are an empty string. The last three of up to five close a text of many lines.
_STRING = re.compile(
    r'"""(?:\\[\s\S]|[^\\])*?"{3,5}|' + r"'''[\s\S]*?'{3,5}|" + r'"(?:\\.|[^"\\])*"|' + r"'[^']*'",
)
_SCALAR = re.compile(r"[^,\]}#\n]+")  # a date may hold a space


def value_lines(text: str) -> dict[KeyPath, int]:
    """The line, from 1, of the key of every value, of the header of every table and of every element of an array.

    `text` must be TOML that tomllib reads. Of other text the outcome is not defined.
    """
    return _Scanner(text).lines


def line_of(lines: dict[KeyPath, int], path: KeyPath) -> int:
    """The line of a value, or of what it would stand in if it were there; 1 where that is the file itself."""
    return next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 1)


class _Scanner:
    """Reads the text once, front to back."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._breaks = [match.start() for match in re.finditer("\n", text)]
        self._tables: dict[KeyPath, int] = {}  # arrays of tables -> how many headers were seen
        self.lines: dict[KeyPath, int] = {}
        table: KeyPath = ()
        while self._skip_space() < len(text):
            table = self._header() if text[self._at] == "[" else self._pair(table)

    def _header(self) -> KeyPath:
        """[a.b] or [[a.b]]: the table that what follows belongs to."""
        at, many = self._at, self._text.startswith("[[", self._at)
        self._at += 1 + many
        path: KeyPath = ()
        keys = self._keys()
        for key in keys[:-1]:
            path = (*path, key)
            if path in self._tables:  # such a header speaks of the last of them
                path = (*path, self._tables[path])
            self._note(path, at)
        path = (*path, keys[-1])
        self._note(path, at)
        if many:
            self._tables[path] = self._tables.get(path, -1) + 1
            path = (*path, self._tables[path])
            self._note(path, at)
        self._skip_space()
        self._at += 1 + many
        return path

    def _pair(self, table: KeyPath) -> KeyPath:
        at, path = self._at, table
        for key in self._keys():
            path = (*path, key)
            self._note(path, at)
        self._skip_space()
        self._at += 1  # =
        self._value(path)
        return table

    def _keys(self) -> list[str]:
        keys = []
        while True:
            self._skip_space()
            match = _KEY.match(self._text, self._at)
            if not match:
                raise ValueError(f"no key at {self._at}")
            self._at, key = match.end(), match[0]
            keys.append(str(_parse(key)) if key[0] in "\"'" else key)
            if self._text[self._skip_space() : self._at + 1] != ".":
                return keys
            self._at += 1

    def _value(self, path: KeyPath) -> None:
        self._skip_space()
        opener = self._text[self._at]
        if opener in "[{":
            self._at += 1
            self._elements(path, "]" if opener == "[" else "}")
            return
        match = (_STRING if opener in "\"'" else _SCALAR).match(self._text, self._at)
        if not match:
            raise ValueError(f"no value at {self._at}")
        self._at = match.end()

    def _elements(self, path: KeyPath, closer: str) -> None:
        """What stands in an array or an inline table."""
        index = 0
        while self._text[self._skip_space()] != closer:
            if self._text[self._at] == ",":
                self._at += 1
            elif closer == "}":
                self._pair(path)
            else:
                self._note((*path, index), self._at)
                self._value((*path, index))
                index += 1
        self._at += 1

    def _skip_space(self) -> int:
        """Go on to what is neither space nor comment."""
        match = _SPACE.match(self._text, self._at)
        assert match
        self._at = match.end()
        return self._at

    def _note(self, path: KeyPath, at: int) -> None:
        self.lines.setdefault(path, bisect_left(self._breaks, at) + 1)


def _parse(key: str) -> Any:
    return tomllib.loads(f"key = {key}")["key"]
