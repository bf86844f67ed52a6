"""The rows of `map` in qemu-img's layouts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from vmconv.cli.qemu_img.handing import NotAnsweredError
from vmconv.inspect.mapping import MapRow

_COLUMN = 16


def as_json(rows: Sequence[MapRow]) -> Iterator[str]:
    """Yields qemu-img's lines of JSON."""
    for number, row in enumerate(rows):
        text = json.dumps(row.as_json())
        yield f"{'' if number else '['}{{ {text[1:-1]}}}{']' if number == len(rows) - 1 else ','}"


def as_table(rows: Sequence[MapRow]) -> Iterator[str]:
    """Yields qemu-img's table. Raises `NotAnsweredError` if payload has no place in a file: qemu-img fails then."""
    yield "".join(f"{title:<{_COLUMN}}" for title in ("Offset", "Length", "Mapped to")) + "File"
    for row in rows:
        if not row.data or row.zero:
            continue
        if row.offset is None:
            raise NotAnsweredError("compressed or encrypted clusters")
        places = (_hex(number) for number in (row.start, row.length, row.offset))
        yield "".join(f"{place:<{_COLUMN}}" for place in places) + (row.file or "")


def _hex(number: int) -> str:
    """Returns a number as C prints it with `%#x`."""
    return hex(number) if number else "0"
