"""The codec of the journal and the undo file: fields as JSON, then tables of 64-bit numbers, with a digest.

Input is untrusted: every field is bounded and checked before use. All errors are `ImageError` with the file, the field,
its offset, the value found and the values allowed.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from vmconv.errors import ImageError
from vmconv.io.directory import NAME_MAX

Ranges = npt.NDArray[np.int64]
"""Rows `(offset, length)`, bytes."""

MAX_BODY = 64 << 20
"""Bytes of fields and tables, which are held in memory."""
MAX_TEXT = 8 << 20
"""Bytes of fields."""
MAX_NAMES = 16384
"""Files in one field."""
MAX_OFFSET = 1 << 62
"""Bytes of a file, and of a device below it."""
MAX_TIME = (1 << 63) - 1
MAX_OWNER = (1 << 32) - 1

DIGEST = 32
"""Bytes of a digest."""
PIECE = 1 << 20
"""Bytes of one read."""

_LENGTH = struct.Struct("<Q")
_FORMAT = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_SHOWN = 80


def digest_of(body: bytes) -> bytes:
    """Returns the digest of a body."""
    return hashlib.blake2b(body, digest_size=DIGEST).digest()


def encode(values: Mapping[str, Any], tables: Iterable[Ranges]) -> bytes:
    """Returns a body: the fields, then the tables."""
    import json

    # File names need not be Unicode: JSON escapes the surrogates of such bytes.
    text = json.dumps(values).encode("ascii")
    return b"".join([_LENGTH.pack(len(text)), text, *(table.astype("<i8").tobytes() for table in tables)])


def decode(path: str, body: memoryview, offset: int) -> tuple[Fields, Tables]:
    """Returns the fields and tables of a body at `offset` of the file `path`."""
    length = _LENGTH.unpack_from(body)[0] if len(body) >= _LENGTH.size else 0
    most = max(0, min(MAX_TEXT, len(body) - _LENGTH.size))
    if not 0 < length <= most:
        raise ImageError(f"{path}: length of the fields at {offset:#x}: {length} bytes, {most} at most")
    text = body[_LENGTH.size : _LENGTH.size + length]
    return Fields(path, text, offset + _LENGTH.size), Tables(path, body, _LENGTH.size + length, offset)


class Fields:
    """The fields of a JSON object at `offset` of the file `path`; each is taken once."""

    def __init__(self, path: str, text: bytes | memoryview, offset: int) -> None:
        import json

        self.path = path
        self.offset = offset
        try:
            found = json.loads(bytes(text))
        # Brackets nested too deep for the parser are a RecursionError.
        except (ValueError, RecursionError) as exc:
            raise ImageError(f"{path}: fields at {offset:#x}: are no JSON text") from exc
        if not isinstance(found, dict):
            self.refuse("fields", found, "an object")
        self._left: dict[str, Any] = found

    def refuse(self, name: str, value: object, allowed: str) -> NoReturn:
        raise ImageError(f"{self.path}: {name} at {self.offset:#x}: {_shown(value)} is not {allowed}")

    def take(self, name: str) -> Any:
        if name not in self._left:
            raise ImageError(f"{self.path}: fields at {self.offset:#x}: {name} is missing")
        return self._left.pop(name)

    def has(self, name: str) -> bool:
        return name in self._left

    def end(self) -> None:
        """Raises `ImageError` if a field was not taken."""
        if self._left:
            raise ImageError(f"{self.path}: fields at {self.offset:#x}: {_shown(next(iter(self._left)))} is unknown")

    def number(self, name: str, most: int, least: int = 0) -> int:
        return self.checked_number(name, self.take(name), most, least)

    def checked_number(self, name: str, value: object, most: int, least: int = 0) -> int:
        # A bool is an int in Python.
        if type(value) is not int or not least <= value <= most:
            self.refuse(name, value, f"a number from {least} to {most}")
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if type(value) is not bool:
            self.refuse(name, value, "true or false")
        return value

    def items(self, name: str, most: int = MAX_NAMES) -> list[Any]:
        value = self.take(name)
        if not isinstance(value, list) or len(value) > most:
            self.refuse(name, value, f"a list of at most {most}")
        return value

    def format(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str) or not _FORMAT.fullmatch(value):
            self.refuse(name, value, "the name of a format")
        return value

    def name(self, name: str, but: Collection[str]) -> str:
        return self.checked_name(name, self.take(name), but)

    def names(self, name: str, but: Collection[str]) -> tuple[str, ...]:
        return self.apart(name, [self.checked_name(name, each, but) for each in self.items(name)])

    def apart(self, name: str, names: list[str]) -> tuple[str, ...]:
        """Returns the names. Raises `ImageError` if two are equal."""
        if len(set(names)) < len(names):
            self.refuse(name, names, "a list of different names")
        return tuple(names)

    def checked_name(self, name: str, value: object, but: Collection[str]) -> str:
        """Returns the name. Raises `ImageError` unless it is a plain file name and none of `but`."""
        if not isinstance(value, str) or not _is_plain(value):
            self.refuse(name, value, "the name of a file in the same directory")
        if value in but:
            self.refuse(name, value, "another file than those of the change itself")
        return value

    def counts(self, name: str, columns: Mapping[str, int]) -> dict[str, int]:
        """Returns the number of rows of each table, in file order; `columns` are all the tables there must be."""
        value = self.take(name)
        if not isinstance(value, dict) or value.keys() != columns.keys():
            self.refuse(name, value, f"the shapes of {', '.join(columns)}")
        found = {}
        for table, shape in value.items():
            if not isinstance(shape, list) or len(shape) != 2 or shape[1] != columns[table]:
                self.refuse(f"{name}.{table}", shape, f"a number of rows, and {columns[table]}")
            found[table] = self.checked_number(f"{name}.{table}", shape[0], MAX_BODY // (8 * columns[table]))
        return found


class Tables:
    """Tables of 64-bit numbers and the bytes after them: from `at` in `body`, which is at `offset` of the file."""

    def __init__(self, path: str, body: memoryview, at: int, offset: int) -> None:
        self.path = path
        self.body = body
        self.at = at
        self.offset = offset

    def table(self, name: str, rows: int, columns: int) -> Ranges:
        """Returns the next table; `refuse_rows` checks the bounds of its numbers."""
        need, left = 8 * rows * columns, len(self.body) - self.at
        if need > left:
            raise ImageError(
                f"{self.path}: {name} at {self.offset + self.at:#x}: {rows} rows of {8 * columns} bytes, "
                f"{left} are left"
            )
        found = np.frombuffer(self.body, dtype="<i8", count=rows * columns, offset=self.at).reshape(rows, columns)
        self.at += need
        return found.astype(np.int64, copy=False)

    def ranges(self, name: str, rows: int, most: int) -> Ranges:
        """Returns the next table of ranges. Raises `ImageError` if one ends beyond `most` or two overlap."""
        begin = self.offset + self.at
        found = self.table(name, rows, 2)
        refuse_rows(f"{self.path}: {name}", begin, found, found[:, 0], found[:, 1], most)
        order = np.argsort(found[:, 0], kind="stable")
        over = np.flatnonzero(found[order[1:], 0] < found[order[:-1]].sum(axis=1))
        if len(over):
            row = int(order[1:][over[0]])
            raise ImageError(
                f"{self.path}: {name} row {row} at {begin + 16 * row:#x}: "
                f"{found[row].tolist()} is not apart from the other ranges"
            )
        return found


def refuse_rows(what: str, begin: int, table: Ranges, start: Ranges, length: Ranges, most: int) -> None:
    """Raises `ImageError` unless each row's range is not empty and inside `[0, most)`."""
    # The order of these checks avoids overflow.
    bad = (start < 0) | (length <= 0) | (start > most) | (length > most - np.clip(start, 0, most))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        where = begin + 8 * table.shape[1] * row
        raise ImageError(f"{what} row {row} at {where:#x}: {table[row].tolist()} is not a range of {most} bytes")


def _is_plain(name: str) -> bool:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    try:
        return len(os.fsencode(name)) <= NAME_MAX
    except UnicodeEncodeError:
        return False


def _shown(value: object) -> str:
    """Returns a value for a message, cut to `_SHOWN` characters."""
    text = repr(value) if isinstance(value, str | int | float | bool) or value is None else f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
