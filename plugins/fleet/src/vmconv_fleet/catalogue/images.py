"""What the record of a disk says of its image, wherever the image lies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmconv.plugin import printable

if TYPE_CHECKING:
    from vmconv.plugin import Image

MAX_WARNINGS = 8
_MAX_TEXT = 400


def facts_of(image: Image, warnings: Iterable[str]) -> dict[str, Any]:
    """Returns fields of a disk's record."""
    fields: dict[str, Any] = {"format": image.format_name, "virtual_size": image.size}
    if (identity := image.facts.identity) is not None:
        fields["identity"] = str(identity)
    if said := [short(text) for text in warnings]:
        fields["warnings"] = said[:MAX_WARNINGS]
    return fields


def short(text: str) -> str:
    """Returns a text for a record: one line that can be printed, and not too long."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


def problem_of(remarks: list[str]) -> str:
    """Returns the remarks on a datastore as its problem: the first, and how many there are."""
    more = f" (and {len(remarks) - 1} more)" if len(remarks) > 1 else ""
    return short(remarks[0]) + more
