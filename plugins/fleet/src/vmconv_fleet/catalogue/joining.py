"""Joining: which version of a record counts if two histories of its node differ in it.

What ended in one history has ended, whatever the clocks say: else a revoked token would work again, and a finished
conversion would run again. Bodies may have any form: a machine with stolen keys may have written them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from vmconv_fleet.catalogue.terms import ENDED, Role
from vmconv_fleet.replication.records import Record

ORDER: tuple[str, ...] = get_args(Role)
"""The roles, the lowest first."""

_Body = Mapping[str, Any]


def join(one: Record, other: Record) -> Record:
    """Returns what counts of two versions of a record; for most kinds the version with the later clock."""
    earlier, later = sorted((other, one), key=lambda record: record.clock)
    return _RULES.get(one.kind, _later)(earlier, later)


def _later(_earlier: Record, later: Record) -> Record:
    return later


def _granted(earlier: Record, later: Record) -> Record:
    """A removed group stays removed, a revoked token revoked; of roles, the lower ones of both count."""
    granted = max(later, earlier, key=lambda record: (record.deleted, bool(record.body.get("revoked"))))
    if granted.deleted or earlier.body == later.body:
        return granted
    body = {**granted.body, "role": _lower(earlier.body.get("role"), later.body.get("role"))}
    one, other = (record.body.get("datastores") for record in (earlier, later))
    body.pop("datastores", None)
    if isinstance(one, Mapping) and isinstance(other, Mapping) and (both := one.keys() & other.keys()):
        body["datastores"] = {name: _lower(one[name], other[name]) for name in sorted(both)}
    return granted._replace(body=body)


def _lower(one: object, other: object) -> str:
    """Returns the lower one of two roles: the lowest, if one of them is no role."""
    return min((one, other), key=ORDER.index) if one in ORDER and other in ORDER else ORDER[0]


def _job(earlier: Record, later: Record) -> Record:
    """Only jobs that have ended are deleted."""
    job = max(later, earlier, key=lambda record: (record.deleted, *_progress(record.body)))
    cancelled = any(record.body.get("cancel") for record in (earlier, later))
    if job.deleted or _progress(job.body)[0] or not cancelled:
        return job
    return job._replace(body={**job.body, "cancel": True})


def _progress(body: _Body) -> tuple[bool, bool]:
    """Returns whether a job is over, and whether it was begun."""
    state = str(body.get("state"))
    is_over = state in ENDED or (state == "planned" and bool(body.get("dry_run")))
    return is_over, state in ("planned", "running") or body.get("started_ms") is not None


def _policy(earlier: Record, later: Record) -> Record:
    """All rules of both count; where they differ, the stricter one if that can be told, else the later one."""
    body = {**earlier.body, **later.body}
    for name in ("administrators_of", "formats"):
        one, other = earlier.body.get(name), later.body.get(name)
        if isinstance(one, list) and isinstance(other, list):
            body[name] = [value for value in other if value in one]
    if "require" in (earlier.body.get("zero_copy"), later.body.get("zero_copy")):
        body["zero_copy"] = "require"
    if not (earlier.body.get("may_remove_source") and later.body.get("may_remove_source")):
        body.pop("may_remove_source", None)
    return later._replace(body=body, deleted=earlier.deleted and later.deleted)


_RULES: Mapping[str, Callable[[Record, Record], Record]] = {
    "group": _granted,
    "job": _job,
    "policy": _policy,
    "token": _granted,
}
