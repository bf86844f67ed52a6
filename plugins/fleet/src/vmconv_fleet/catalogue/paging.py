"""Pages of lists.

Each names the place where the next one begins, so that changes in between make no record appear twice or not at all.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vmconv.plugin import UsageError
from vmconv_fleet.replication.indexing import MAX_INTEGER
from vmconv_fleet.replication.records import Record
from vmconv_fleet.replication.store import Listed, Place


class Page(NamedTuple):
    """Records in order. `next` is where the next page begins, None at the end; `total` counts all pages, if known."""

    records: list[Record]
    next: str | None
    total: int | None


def page_of(
    found: Sequence[Listed], limit: int, total: int | None, fits: Callable[[Record], bool] = lambda _record: True
) -> Page:
    """Returns the page of the first `limit` records; one more says that there is another page.

    Records that do not fit are not shown: other nodes may write invalid bodies.
    """
    shown = found[:limit]
    following = _text_of(shown[-1][1]) if len(found) > limit else None
    return Page([record for record, _ in shown if fits(record)], following, total)


def place_of(text: str, columns: int) -> Place:
    """Returns the place that `Page.next` named. Raises UsageError for anything else."""
    try:
        place = json.loads(base64.urlsafe_b64decode(text.encode()))
        valid = isinstance(place, list) and len(place) == columns and all(map(_is_column, place))
    except (ValueError, RecursionError):
        valid = False
    if not valid:
        raise UsageError("after: is not the next of a page of this list")
    return tuple(place)


def _is_column(value: Any) -> bool:
    if isinstance(value, str):
        value.encode()
        return True
    return type(value) is int and -MAX_INTEGER <= value <= MAX_INTEGER


def _text_of(place: Place) -> str:
    return base64.urlsafe_b64encode(json.dumps(place, ensure_ascii=False).encode()).decode()
