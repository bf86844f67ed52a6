"""The indexes of the catalogue: what lists are searched, chosen and sorted by.

Texts that selections match are case-folded. Bodies come from other nodes and may have any form. A body whose columns
are not valid is in no list.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vmconv_fleet.catalogue.terms import ENDED
from vmconv_fleet.replication.indexing import Body, Index, InvalidColumnError, Row, number, text


def _folded(body: Body, name: str, *, most: int = 255, needed: bool = False) -> str:
    return text(body, name, most=most, needed=needed).casefold()


def _list(body: Body, name: str) -> list[Any]:
    value = body.get(name, [])
    if not isinstance(value, list):
        raise InvalidColumnError(name)
    return value


def _references(items: Iterable[Any]) -> str:
    """Returns the ids of disks in a list of objects as one text, each between two spaces."""
    found = [one.get("disk") for one in items if isinstance(one, dict)]
    return " ".join(["", *(id for id in found if isinstance(id, str)), ""])


def _disk(body: Body) -> Row:
    chain = _list(body, "chain")
    return (
        _folded(body, "datastore", needed=True),
        _folded(body, "name", most=4096, needed=True),
        _folded(body, "format"),
        _folded(body, "identity"),
        number(body, "virtual_size"),
        number(body, "actual_size"),
        len(chain),
        int(bool(body.get("in_use"))),
        int(bool(body.get("problem"))),
        _references(chain),
    )


def _vm(body: Body) -> Row:
    disks = _list(body, "disks")
    return (
        _folded(body, "name", most=4096),
        _folded(body, "file", most=4096, needed=True),
        *(_folded(body, name) for name in ("datastore", "format", "system", "os", "firmware")),
        *(number(body, name) for name in ("memory", "processors")),
        len(disks),
        int(bool(body.get("problem"))),
        _references(disks),
    )


def _person(body: Body) -> str:
    """Returns the name of the person who asked for it."""
    by = body.get("by")
    return _folded(by, "user") if isinstance(by, dict) else ""


def _job(body: Body) -> Row:
    state = text(body, "state") or "queued"
    plan = body.get("plan")
    plan = plan if isinstance(plan, dict) else {}
    return (
        state,
        int(bool(body.get("dry_run"))),
        int(state in ENDED or (state == "planned" and bool(body.get("dry_run")))),
        number(body, "created_ms"),
        number(body, "ended_ms"),
        text(body, "disk"),
        text(body, "vm"),
        text(body, "datastore"),
        text(body, "target_datastore"),
        text(body, "batch"),
        _folded(body, "source", most=4096),
        _folded(body, "format"),
        _person(body),
        *(number(plan, name) for name in ("shared", "referenced", "copied", "written")),
    )


def _datastore(body: Body) -> Row:
    return (number(body, "disks"),)


def _token(body: Body) -> Row:
    return (text(body, "label", needed=True),)


def _group(body: Body) -> Row:
    return (text(body, "group", needed=True),)


def _without_columns(_body: Body) -> Row:
    return ()


_TEXT, _INTEGER = "TEXT", "INTEGER"

INDEXES = (
    Index(
        "disk",
        dict.fromkeys(("datastore", "name", "format", "identity"), _TEXT)
        | dict.fromkeys(("size", "actual_size", "depth", "in_use", "problem"), _INTEGER)
        | {"parents": _TEXT},
        _disk,
        # The second order of each is that of a place in a list.
        by=(
            "owner, datastore, name, id",
            *(f"{name}, owner, id" for name in ("name", "format", "size", "actual_size")),
        ),
    ),
    Index(
        "vm",
        dict.fromkeys(("name", "file", "datastore", "format", "system", "os", "firmware"), _TEXT)
        | dict.fromkeys(("memory", "processors", "disks", "problem"), _INTEGER)
        | {"uses": _TEXT},
        _vm,
        by=[f"{name}, owner, id" for name in ("name", "system", "memory", "processors", "disks")],
    ),
    Index(
        "job",
        {"state": _TEXT}
        | dict.fromkeys(("dry_run", "ended", "created_ms", "ended_ms"), _INTEGER)
        | dict.fromkeys(("disk", "vm", "datastore", "target_datastore", "batch", "source", "format", "person"), _TEXT)
        | dict.fromkeys(("shared", "referenced", "copied", "written"), _INTEGER),
        _job,
        by=("created_ms, owner, id", "owner, ended, ended_ms, id", "disk, owner", "vm, owner", "batch"),
    ),
    Index("datastore", {"disks": _INTEGER}, _datastore),
    Index("policy", {}, _without_columns),
    Index("webhook", {}, _without_columns),
    Index("token", {"label": _TEXT}, _token),
    Index("group", {"name": _TEXT}, _group),
)
