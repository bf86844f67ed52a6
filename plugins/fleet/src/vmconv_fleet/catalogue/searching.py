"""Searches: words that people type, looked for in the texts by which they know a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vmconv_fleet.replication.indexing import ALL, Where

MAX_SEARCH = 200

_COLUMNS: Mapping[str, Sequence[str]] = {
    # All are in the index by which disks are listed: others would be looked up row by row.
    "disk": ("name", "datastore", "id"),
    "vm": ("name", "file", "datastore", "format", "system", "os", "id"),
    "job": ("source", "datastore", "format", "person", "id"),
}
"""The columns of the indexes that are searched; their texts are case-folded, ids are lower case."""


def containing(kind: str, text: str) -> Where:
    """Returns the condition that each word of the text is in one of the kind's columns."""
    where = ALL
    for word in text[:MAX_SEARCH].replace("\0", " ").casefold().split():
        columns = _COLUMNS[kind]
        where = where.also(" OR ".join(f"instr({one}, ?)" for one in columns), *[word] * len(columns))
    return where
