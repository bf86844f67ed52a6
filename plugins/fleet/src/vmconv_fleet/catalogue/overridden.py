"""What a merge of two histories has overridden, for its administrator: rights first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vmconv_fleet.catalogue.differences import differences
from vmconv_fleet.replication.merging import Overridden
from vmconv_fleet.replication.records import Record

MAX_LISTED = 200
_FIRST = ("token", "group", "policy", "webhook", "job")
_NAMES = ("label", "group", "place", "source", "name")
_MAX_FIELDS = 20


def overridden_in(found: Sequence[Overridden]) -> dict[str, Any]:
    """Returns what was overridden, MAX_LISTED at most, and how many records it is in all."""
    ordered = sorted(found, key=lambda one: (_rank(one.record.kind), one.record.kind, one.record.id))
    return {"overridden": [_shown(one) for one in ordered[:MAX_LISTED]], "overridden_count": len(ordered)}


def _rank(kind: str) -> int:
    return _FIRST.index(kind) if kind in _FIRST else len(_FIRST)


def _shown(one: Overridden) -> dict[str, Any]:
    """`fields` are those whose values do not count; `is_deletion`: the record was deleted, and counts all the same."""
    lost = differences(_body(one.record), _body(one.kept))
    return {
        "kind": one.record.kind,
        "id": one.record.id,
        "name": _name(one.record.body) or _name(one.kept.body),
        "history": "this" if one.is_own else "other",
        "is_deletion": one.record.deleted,
        "is_deleted": one.kept.deleted,
        "fields": [each.field for each in lost[:_MAX_FIELDS]],
    }


def _body(record: Record) -> Mapping[str, Any] | None:
    return None if record.deleted else record.body


def _name(body: Mapping[str, Any]) -> str:
    return next((body[field] for field in _NAMES if isinstance(body.get(field), str)), "")
