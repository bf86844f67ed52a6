"""Printing: sizes for people, JSON for machines, tables, and progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from vmconv.errors import printable


def size_text(size: int) -> str:
    """Returns a size for people: three digits and a unit of 1024, as qemu-img prints it."""
    value, units = float(size), iter(("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))
    unit = "B"
    while value >= 1000 and (following := next(units, None)):
        value, unit = value / 1024, following
    return f"{value:.3g} {unit}"


def as_plain(value: Any) -> Any:
    """Returns a result in JSON's types: named tuples become dictionaries."""
    if hasattr(value, "_asdict"):
        return {name: as_plain(field) for name, field in value._asdict().items()}
    return [as_plain(item) for item in value] if isinstance(value, tuple) else value


def print_json(value: Any, *, indent: int | None = None) -> None:
    """Prints one JSON document, on one line without `indent`."""
    import json

    # File names need not be Unicode: JSON escapes the surrogates of such bytes.
    print(json.dumps(value, indent=indent, default=str), flush=True)


def say(text: str, *, to: TextIO | None = None) -> None:
    """Prints one line, on standard output by default; names of files may have any character."""
    print(printable(text), file=to)


def print_table(rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """Prints rows of text in aligned columns; the first row is the heading."""
    for line in table_lines(rows, indent):
        print(line)


def table_lines(rows: Sequence[Sequence[str]], indent: str = "") -> Iterator[str]:
    """Yields rows of text in aligned columns, with escapes for unprintable characters."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        yield indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


class ProgressBar:
    """A progress bar on a terminal, redrawn at most ten times a second; `close` ends its line."""

    _WIDTH = 30

    def __init__(self) -> None:
        self._drawn = 0.0
        self._shown = False

    def __call__(self, done: int, to_do: int) -> None:
        now = time.monotonic()
        if now - self._drawn < 0.1 and done < to_do:
            return
        self._drawn, self._shown = now, True
        part = done / to_do if to_do else 1.0
        bar = "#" * int(part * self._WIDTH)
        text = f"[{bar:<{self._WIDTH}}] {part:7.2%} of {size_text(to_do)}"
        print(f"\r{text}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._shown:
            print(file=sys.stderr)
