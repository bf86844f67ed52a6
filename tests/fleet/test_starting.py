"""What a job may still do when it begins, which may be days after its request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fleet.asking import HERE, NOW, OTHER, Replica
from fleet.in_memory import Node, nodes
from support.disks import MIB, make_disk
from vmconv.errors import AccessError
from vmconv_fleet.catalogue.kinds import JobBody
from vmconv_fleet.catalogue.places import disk_id
from vmconv_fleet.errors import Refusal
from vmconv_fleet.jobs.policy import policy_of
from vmconv_fleet.jobs.runner import JobRunner
from vmconv_fleet.jobs.starting import openable
from vmconv_fleet.replication.records import Change
from vmconv_fleet.trust.groups import group_id

PERSON = {"issuer": "https://id.example", "subject": "s1"}


def asked(replica: Replica, by: Mapping[str, Any], **more: Any) -> JobBody:
    """Returns the job of a request."""
    replica.ask("convert", requester=OTHER, by=by, disk="d1", format="qcow2", **more)
    return JobBody.model_validate(replica.body("job", "r1"))


def begin(replica: Replica, job: JobBody) -> list[str] | None:
    return openable(HERE, job, replica, policy_of(HERE, replica))


def change(replica: Replica, by: Mapping[str, Any], **fields: Any) -> None:
    owner, _, identifier = by["token"].partition("/")
    record = replica.records[owner, "token", identifier]
    replica.add(owner, "token", identifier, {**record.body, **fields})


def signed_in(replica: Replica) -> dict[str, Any]:
    replica.add(OTHER, "group", group_id("ops"), {"group": "ops", "role": "operator"})
    # As from a database: not the same object as in the group's record.
    person = json.loads(json.dumps({**PERSON, "groups": ["ops"]}))
    return replica.token(OTHER, "viewer", person=person, expires_ms=NOW + 1) | PERSON


@pytest.fixture
def replica() -> Replica:
    return Replica()


@pytest.mark.parametrize(
    ("fields", "said"), [({"revoked": True}, "was revoked"), ({"role": "viewer"}, "needs the role operator")]
)
def test_a_token_counts_as_it_is_when_the_job_begins(replica: Replica, fields: dict[str, Any], said: str) -> None:
    by = replica.token(OTHER, "operator")
    job = asked(replica, by)
    assert begin(replica, job) is None
    change(replica, by, **fields)
    with pytest.raises(AccessError, match=said):
        begin(replica, job)


def test_a_token_without_a_record_does_not_begin_a_job(replica: Replica) -> None:
    by = replica.token(OTHER, "operator")
    job = asked(replica, by)
    owner, _, identifier = by["token"].partition("/")
    del replica.records[owner, "token", identifier]
    with pytest.raises(AccessError, match="is unknown here"):
        begin(replica, job)


def test_a_token_that_expires_while_its_job_waits_was_valid(replica: Replica) -> None:
    assert begin(replica, asked(replica, replica.token(OTHER, "operator", expires_ms=NOW + 1))) is None


def test_datastores_taken_from_a_token_are_not_opened(replica: Replica) -> None:
    replica.add(HERE, "datastore", "more", {"path": "/srv/more"})
    both = {f"{HERE}/ds": "operator", f"{HERE}/more": "operator"}
    by = replica.token(OTHER, "viewer", datastores=both)
    job = asked(replica, by)
    assert begin(replica, job) == job.within == ["ds", "more"]
    change(replica, by, datastores={f"{HERE}/ds": "operator"})
    assert begin(replica, job) == ["ds"]
    change(replica, by, role="admin")
    assert begin(replica, job) == ["ds", "more"]


def test_a_caller_with_datastores_now_opens_only_these(replica: Replica) -> None:
    by = replica.token(OTHER, "operator")
    job = asked(replica, by)
    change(replica, by, role="viewer", datastores={f"{HERE}/ds": "operator"})
    assert begin(replica, job) == ["ds"]


def test_groups_count_after_the_session_of_a_person(replica: Replica) -> None:
    by = signed_in(replica)
    job = asked(replica, by)
    assert begin(replica, job) is None
    owner, _, identifier = by["token"].partition("/")
    del replica.records[owner, "token", identifier]
    assert begin(replica, job) is None
    replica.add(OTHER, "group", group_id("ops"), {"group": "ops", "role": "viewer"})
    with pytest.raises(AccessError, match="needs the role operator"):
        begin(replica, job)
    del replica.records[OTHER, "group", group_id("ops")]
    with pytest.raises(AccessError, match="no group of this person"):
        begin(replica, job)


def test_a_revoked_session_begins_no_job(replica: Replica) -> None:
    by = signed_in(replica)
    job = asked(replica, by)
    change(replica, by, revoked=True)
    with pytest.raises(AccessError, match="was revoked"):
        begin(replica, job)


def test_administrators_who_are_not_accepted_any_more_begin_no_job(replica: Replica) -> None:
    job = asked(replica, {"node": OTHER, "user": "root"})
    assert begin(replica, job) is None
    replica.add(HERE, "policy", "conversion", {"administrators_of": []})
    with pytest.raises(AccessError, match="does not accept administrators"):
        begin(replica, job)


@pytest.mark.parametrize(
    ("policy", "said"), [({"may_remove_source": False}, "keeps sources"), ({"formats": ["vhdx"]}, "converts to vhdx")]
)
def test_the_policy_counts_as_it_is_when_the_job_begins(replica: Replica, policy: dict[str, Any], said: str) -> None:
    replica.add(HERE, "policy", "conversion", {"may_remove_source": True})
    job = asked(replica, replica.token(OTHER, "operator"), keep_source=False)
    assert begin(replica, job) is None
    replica.add(HERE, "policy", "conversion", {"may_remove_source": True, **policy})
    with pytest.raises(Refusal, match=said):
        begin(replica, job)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    (tmp_path / "images").mkdir()
    make_disk(tmp_path / "images" / "a.raw", MIB)
    with nodes(1, tmp_path) as (one,):
        disk = {"datastore": "ds", "name": "a.raw"}
        datastore = Change("datastore", "ds", {"path": str(tmp_path / "images")})
        one.write(datastore, Change("disk", disk_id("ds", "a.raw"), disk))
        yield one


@pytest.mark.parametrize("attempts", [0, 1], ids=["waiting", "interrupted"])
def test_the_job_of_a_revoked_token_fails_and_makes_nothing(node: Node, tmp_path: Path, attempts: int) -> None:
    token = {"label": "eve", "role": "operator", "hash": "0" * 64, "revoked": True}
    by = {"node": node.id, "token": f"{node.id}/0123456789ab", "user": "eve"}
    job = {"state": "queued", "disk": disk_id("ds", "a.raw"), "datastore": "ds", "format": "qcow2", "by": by}
    more = {"attempts": attempts, "started_ms": 1} if attempts else {}
    node.write(Change("token", "0123456789ab", token), Change("job", "j1", job | more))
    runner = JobRunner(node.service, str(node.directory))
    runner.start()
    try:
        ended = node.body_when(node.id, "job", "j1", lambda one: bool(one.body.get("ended_ms"))).body
    finally:
        runner.stop()
    assert (ended["state"], ended["error"]) == ("failed", "not allowed any more: token 0123456789ab was revoked")
    assert [one.name for one in (tmp_path / "images").iterdir()] == ["a.raw"]
