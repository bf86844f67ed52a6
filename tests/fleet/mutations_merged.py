"""Mistakes in what counts after a merge of histories, as patches of the production code; see `mutations`."""

from __future__ import annotations

# ruff: noqa: ARG005 - a patch takes what it replaces takes
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

from fleet import test_forks
from fleet.mutations import mutation
from fleet.test_forks import POLICY, TOKEN
from vmconv_fleet.catalogue import joining
from vmconv_fleet.replication import merging
from vmconv_fleet.replication.records import Record
from vmconv_fleet.replication.replica import Replica
from vmconv_fleet.replication.requests import Requests

_Rule = Callable[[Record, Record], Record]
_JOB = {"state": "queued"}

_ENDED: Mapping[str, tuple[str, Any, Any, Any, Any]] = {
    "a revoked token": ("token", TOKEN, {**TOKEN, "revoked": True}, {**TOKEN, "x": 1}, {**TOKEN, "revoked": True}),
    "a removed group": ("group", {"role": "admin"}, None, {"role": "viewer"}, None),
    "a finished job": ("job", _JOB, {"state": "done"}, {**_JOB, "x": 1}, {"state": "done"}),
    "a policy": ("policy", {}, POLICY, {"max_parallel": 2}, {**POLICY, "max_parallel": 2}),
}
"""Arguments of `test_what_has_ended_in_one_history_has_ended`."""


def _test(name: str) -> Callable[[], None]:
    def test() -> None:
        for is_owner in (False, True):
            test_forks.test_what_has_ended_in_one_history_has_ended(*_ENDED[name], is_owner)

    test.__name__ = f"test_what_has_ended_in_one_history_has_ended[{name}]"
    return test


def _wrong(kind: str, rule: _Rule) -> Any:
    return patch.dict(joining._RULES, {kind: rule})


def _later(_earlier: Record, later: Record) -> Record:
    return later


@mutation("a revoked token works again after a merge", _test("a revoked token"))
def token_again() -> Iterator[None]:
    with _wrong("token", _later):
        yield


@mutation("a removed group has a role again after a merge", _test("a removed group"))
def group_again() -> Iterator[None]:
    with _wrong("group", _later):
        yield


@mutation("a finished job runs again after a merge", _test("a finished job"))
def job_again() -> Iterator[None]:
    with _wrong("job", _later):
        yield


@mutation("a merge forgets the stricter rules of a policy", _test("a policy"))
def policy_loosened() -> Iterator[None]:
    with _wrong("policy", _later):
        yield


def _lowered() -> None:
    roles: tuple[Any, ...] = ({"role": "admin"}, {"role": "viewer"}, {"role": "operator"}, {"role": "viewer"})
    test_forks.test_what_has_ended_in_one_history_has_ended("group", *roles, False)


@mutation("a merge raises a role that was lowered", _lowered)
def role_raised() -> Iterator[None]:
    with patch.object(joining, "_lower", lambda one, other: max((one, other), key=joining.ORDER.index)):
        yield


@mutation(
    "a merge whose commit fails begins an epoch",
    test_forks.test_a_merge_whose_commit_fails_leaves_the_history_as_it_was,
)
def failed_merge() -> Iterator[None]:
    with patch.object(Replica, "_undo", lambda self, epoch: self._context.feed.forget()):
        yield


@mutation(
    "only one of two other histories is taken over", test_forks.test_three_histories_become_one_with_all_that_has_ended
)
def two_of_three() -> Iterator[None]:
    original = merging._newest

    def newest(strays: Any) -> list[Record]:
        return list({(one.kind, one.id): one for one in original(strays)}.values())

    with patch.object(merging, "_newest", newest):
        yield


@mutation(
    "what was changed in one history alone is overridden",
    test_forks.test_what_was_not_changed_here_since_they_parted_is_not_overridden,
)
def overridden_too_many() -> Iterator[None]:
    original = merging.overridden

    with patch.object(merging, "overridden", lambda replica, strays, parted, join: original(replica, strays, 0, join)):
        yield


@mutation(
    "a merge forgets what the other history has executed and deleted",
    test_forks.test_a_request_that_the_other_history_has_executed_and_forgotten_is_not_executed_again,
)
def forgotten_by_a_merge() -> Iterator[None]:
    with patch.object(Requests, "remember_answered", lambda self, records: None):
        yield
