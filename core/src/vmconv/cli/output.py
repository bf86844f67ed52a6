"""Printing: sizes for people, JSON for machines, tables, and progress."""

from __future__ import annotations

import os
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
    """A progress bar with rate and time left, redrawn at most ten times a second; `close` ends its line.

    A call with fewer bytes, or with other words for the work, begins another piece of work.
    """

    _WIDTH = 30
    _WINDOW = 5.0
    """Seconds of the rate's average, so that the time left follows a change of speed."""
    _FIRST = 1.0
    """Seconds before a rate is shown."""

    def __init__(self) -> None:
        self._drawn = 0.0
        self._shown = False
        self._work = ""
        self._length = 0
        # Times and bytes, the oldest first.
        self._samples: list[tuple[float, int]] = []

    def __call__(self, done: int, to_do: int, work: str = "") -> None:
        now = time.monotonic()
        if work != self._work or not self._samples or done < self._samples[-1][1]:
            self._work, self._samples, self._drawn = work, [(now, done)], 0.0
        if now - self._drawn < 0.1 and done < to_do:
            return
        self._drawn, self._shown = now, True
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] >= self._WINDOW:
            self._samples.pop(0)
        part = done / to_do if to_do else 1.0
        bar = "#" * int(part * self._WIDTH)
        text = (
            f"{work}{' ' if work else ''}[{bar:<{self._WIDTH}}] {part:7.2%} of {size_text(to_do)}{self._speed(to_do)}"
        )
        self._draw(text)

    def _speed(self, to_do: int) -> str:
        """Returns rate and time left, or nothing before there is a rate."""
        (began, first), (now, done) = self._samples[0], self._samples[-1]
        if now - began < self._FIRST or done == first:
            return ""
        rate = (done - first) / (now - began)
        left = f", {_seconds_text((to_do - done) / rate)} left" if done < to_do else ""
        return f", {size_text(int(rate))}/s{left}"

    def _draw(self, text: str) -> None:
        from vmconv.cli.colours import is_terminal

        room = _columns_of(sys.stderr) - 1 if is_terminal(sys.stderr) else len(text)
        # Spaces hide the rest of a longer line on all terminals, dumb ones too.
        line = text[:room]
        print(f"\r{line:<{min(room, self._longest(len(line)))}}", end="", file=sys.stderr, flush=True)

    def _longest(self, length: int) -> int:
        before, self._length = self._length, length
        return max(before, length)

    def close(self) -> None:
        if self._shown:
            print(file=sys.stderr)


def _columns_of(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _seconds_text(seconds: float) -> str:
    """Returns a duration for people: seconds, minutes and seconds, or hours and minutes."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole // 60 % 60:02} min"
