"""Roles by datastore: what each act needs where, as the owner judges it and as the API grants it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fleet.asking import ASKED, HERE, OTHER, Replica
from fleet.in_memory import Node, nodes
from fleet.serving import Served, served
from support.disks import MIB, QemuImg, make_disk
from vmconv.errors import AccessError, UsageError, VmconvError
from vmconv_fleet.catalogue.places import disk_id
from vmconv_fleet.catalogue.terms import Role
from vmconv_fleet.jobs.runner import JobRunner
from vmconv_fleet.replication.records import Change
from vmconv_fleet.trust.groups import group_id
from vmconv_fleet.trust.rights import Rights
from vmconv_fleet.trust.roles import VERBS
from vmconv_fleet.words import role_text

IN_DATASTORES: dict[str, dict[str, Any]] = {
    **{verb: ASKED[verb] for verb in ("convert", "convert-machine", "cancel")},
    **{
        verb: {**ASKED[verb], "name": "ds"}
        for verb in ("datastore-remove", "datastore-appoint", "datastore-give", "datastore-take")
    },
    "scan": {"datastore": "ds"},
}
"""The verbs that concern a datastore, here `ds`; all others concern the node."""


@pytest.fixture
def replica() -> Replica:
    replica = Replica()
    replica.add(HERE, "datastore", "other", {"path": "/srv/other"})
    replica.add(HERE, "job", "j1", {"disk": "d1", "datastore": "ds", "format": "qcow2", "state": "queued"})
    replica.ask("policy-set", administrators_of=[OTHER])
    return replica


def scoped(replica: Replica, role: Role, *references: str) -> dict[str, Any]:
    """Returns who asks with a token of another node that has a role in these datastores alone."""
    return replica.token(OTHER, "viewer", datastores=dict.fromkeys(references, role))


def is_allowed(replica: Replica, verb: str, by: dict[str, Any], **what: Any) -> bool:
    """Returns whether the caller may; what else is wrong with the request does not matter."""
    try:
        replica.ask(verb, requester=OTHER, by=by, **what)
    except VmconvError as exc:
        return "needs the role" not in str(exc)
    return True


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("role", ["operator", "admin"])
def test_a_role_of_a_datastore_holds_there_alone(replica: Replica, verb: str, role: Role) -> None:
    what = IN_DATASTORES.get(verb, ASKED[verb])
    there = verb in IN_DATASTORES and (role == "admin" or VERBS[verb] == "operator")
    assert is_allowed(replica, verb, scoped(replica, role, f"{HERE}/ds"), **what) == there
    assert not is_allowed(replica, verb, scoped(replica, role, f"{HERE}/other", f"{OTHER}/ds"), **what)


def test_a_target_in_another_datastore_needs_the_role_there_too(replica: Replica) -> None:
    elsewhere = {**ASKED["convert"], "target_datastore": "other"}
    by = scoped(replica, "operator", f"{HERE}/ds")
    with pytest.raises(VmconvError, match="convert in ds and other needs the role operator, eve has viewer"):
        replica.ask("convert", requester=OTHER, by=by, **elsewhere)
    assert is_allowed(replica, "convert", scoped(replica, "operator", f"{HERE}/ds", f"{HERE}/other"), **elsewhere)


def test_a_job_into_another_datastore_is_cancelled_with_the_role_there_too(replica: Replica) -> None:
    replica.add(HERE, "job", "j2", {**replica.body("job", "j1"), "target_datastore": "other"})
    assert not is_allowed(replica, "cancel", scoped(replica, "operator", f"{HERE}/ds"), job="j2")
    assert is_allowed(replica, "cancel", scoped(replica, "operator", f"{HERE}/ds", f"{HERE}/other"), job="j2")


@pytest.mark.parametrize("what", [{"disk": "d9"}, {"disk": ["d1"]}, {"disk": None}, {}, {"disk": {"a": 1}}], ids=str)
def test_what_is_in_no_datastore_is_refused(replica: Replica, what: dict[str, Any]) -> None:
    assert not is_allowed(replica, "convert", scoped(replica, "operator", f"{HERE}/ds"), format="qcow2", **what)


def test_a_scan_of_all_datastores_is_for_operators_of_the_node(replica: Replica) -> None:
    assert not is_allowed(replica, "scan", scoped(replica, "operator", f"{HERE}/ds", f"{HERE}/other"))


def test_a_job_opens_the_datastores_of_its_caller_alone(replica: Replica) -> None:
    asked = scoped(replica, "operator", f"{HERE}/ds", f"{OTHER}/other")
    replica.ask("convert", requester=OTHER, by=asked, request="r2", **ASKED["convert"])
    assert replica.body("job", "r2")["within"] == ["ds"]
    replica.ask("convert", requester=OTHER, by=replica.token(OTHER, "operator"), request="r3", **ASKED["convert"])
    assert "within" not in replica.body("job", "r3")


def test_a_record_that_is_no_token_grants_nothing(replica: Replica) -> None:
    for body in ({"datastores": {"x": "admin"}}, {"datastores": [1]}, {"role": "root"}, {"label": ""}):
        by = replica.token(OTHER, "admin", **{name: value for name, value in body.items() if name != "role"})
        if "role" in body:
            by = replica.token(OTHER, body["role"])  # type: ignore[arg-type]
        with pytest.raises(AccessError, match="is not valid"):
            replica.ask("scan", requester=OTHER, by=by)


def test_the_id_of_a_group_stays_what_it_is() -> None:
    """Records of earlier versions have it."""
    assert group_id("ops") == "a92c36e66a25ee99ff862faa8e87987b"


def test_a_node_without_roles_by_datastore_sees_a_viewer() -> None:
    rights = Rights("viewer", {f"{HERE}/ds": "operator"})
    assert rights.role == "viewer"
    assert rights.reach("operator")
    assert not rights.reach("admin")
    assert rights.only_in(HERE, "operator") == ["ds"]
    assert rights.only_in(HERE, "viewer") is None


@pytest.mark.parametrize(
    ("granted", "said"),
    [
        ({"role": "admin"}, "admin"),
        ({"role": "viewer", "datastores": {f"{HERE}/b": "operator", f"{HERE}/a": "operator"}}, "operator of n:a, n:b"),
        ({"role": "operator", "datastores": {f"{HERE}/a": "admin"}}, "operator; admin of n:a"),
    ],
    ids=["all", "some", "both"],
)
def test_roles_in_words(granted: dict[str, Any], said: str) -> None:
    assert role_text(granted, lambda _node: "n") == said


# Of people who have signed in


PERSON = {"issuer": "https://id.example", "subject": "248289"}


def signed_in(replica: Replica, *groups: str, **more: Any) -> dict[str, Any]:
    """Returns who asks: a person of these groups, who has signed in at another node."""
    by = replica.token(OTHER, "viewer", person={**PERSON, "groups": list(groups)})
    return {**by, **PERSON, **more}


def group(replica: Replica, name: str, role: Role, owner: str = OTHER, **more: Any) -> None:
    replica.add(owner, "group", group_id(name), {"group": name, "role": role, **more})


def test_the_groups_of_a_person_give_the_role(replica: Replica) -> None:
    group(replica, "staff", "viewer")
    group(replica, "ops", "operator")
    assert is_allowed(replica, "scan", signed_in(replica, "staff", "ops"))
    assert not is_allowed(replica, "scan", signed_in(replica, "staff"))
    assert not is_allowed(replica, "policy-set", signed_in(replica, "staff", "ops"), max_parallel=3)


def test_groups_give_roles_by_datastore(replica: Replica) -> None:
    group(replica, "web", "viewer", datastores={f"{HERE}/ds": "operator"})
    group(replica, "db", "viewer", datastores={f"{HERE}/ds": "viewer", f"{HERE}/other": "admin"})
    by = signed_in(replica, "web", "db")
    assert is_allowed(replica, "scan", by, datastore="ds")
    assert is_allowed(replica, "datastore-remove", by, name="other")
    assert not is_allowed(replica, "datastore-remove", by, name="ds")
    assert not is_allowed(replica, "scan", signed_in(replica, "web"), datastore="other")


def test_a_changed_role_of_a_group_counts_at_once(replica: Replica) -> None:
    group(replica, "ops", "operator")
    by = signed_in(replica, "ops")
    assert is_allowed(replica, "scan", by)
    group(replica, "ops", "viewer")
    assert not is_allowed(replica, "scan", by)
    del replica.records[OTHER, "group", group_id("ops")]
    with pytest.raises(AccessError, match="no group of this person has a role any more"):
        replica.ask("scan", requester=OTHER, by=by)


def test_a_group_has_the_role_that_the_node_of_the_sign_in_gives(replica: Replica) -> None:
    group(replica, "ops", "admin", owner=HERE)
    group(replica, "ops", "viewer")
    assert not is_allowed(replica, "scan", signed_in(replica, "ops"))


@pytest.mark.parametrize("body", [{"group": "staff", "role": "admin"}, {"group": "ops", "role": "root"}, {}], ids=str)
def test_a_record_that_is_no_group_of_this_name_gives_nothing(replica: Replica, body: dict[str, Any]) -> None:
    replica.add(OTHER, "group", group_id("ops"), body)
    with pytest.raises(AccessError, match="no group of this person has a role any more"):
        replica.ask("scan", requester=OTHER, by=signed_in(replica, "ops"))


@pytest.mark.parametrize("stated", [{"subject": "1"}, {"issuer": "x"}, {"user": "root"}, {"issuer": None}], ids=str)
def test_nobody_states_to_be_another_person(replica: Replica, stated: dict[str, Any]) -> None:
    group(replica, "ops", "admin")
    with pytest.raises(AccessError, match="states another person"):
        replica.ask("scan", requester=OTHER, by=signed_in(replica, "ops", **stated))


def test_a_person_is_stated_with_a_session_alone(replica: Replica) -> None:
    for by in ({"node": OTHER, "user": "root"}, replica.token(OTHER, "admin")):
        with pytest.raises(AccessError, match="states another person"):
            replica.ask("scan", requester=OTHER, by={**by, **PERSON})


def test_groups_are_set_and_removed(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmconv_fleet.jobs.groups.MAX_GROUPS", 1)
    wanted: dict[str, Any] = {"group": "/dc/ops", "role": "viewer", "datastores": {f"{HERE}/ds": "operator"}}
    replica.ask("group-set", **wanted)
    assert replica.body("group", group_id("/dc/ops")) == wanted
    replica.ask("group-set", group="/dc/ops", role="viewer")
    assert replica.body("group", group_id("/dc/ops")) == {"group": "/dc/ops", "role": "viewer"}
    with pytest.raises(VmconvError, match="already has 1 groups"):
        replica.ask("group-set", group="more", role="viewer")
    replica.ask("group-remove", id=group_id("/dc/ops"))
    assert not replica.find("group")
    faults: list[dict[str, Any]] = [{"group": one} for one in ("a\nb", "\u202e", "")]
    for wrong in (*faults, {"group": "x", "datastores": {"ds": "admin"}}):
        with pytest.raises(VmconvError, match="group-set: "):
            replica.ask("group-set", **{"role": "viewer", **wrong})


# By the API, across nodes


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Sequence[Node]]:
    """Two nodes; the second has two datastores."""
    with nodes(2, tmp_path) as (one, other):
        for name in ("x", "y"):
            (tmp_path / name).mkdir()
            make_disk(tmp_path / name / f"{name}.raw", MIB)
            disk = Change("disk", disk_id(name, f"{name}.raw"), {"datastore": name, "name": f"{name}.raw"})
            other.write(Change("datastore", name, {"path": str(tmp_path / name)}), disk)
        one.body_when(other.id, "disk", disk_id("y", "y.raw"), lambda _record: True)
        yield one, other


@pytest.fixture
def api(pair: Sequence[Node]) -> Iterator[Served]:
    with served(pair[0]) as one:
        yield one


def test_an_operator_of_a_datastore_converts_there_alone(api: Served, pair: Sequence[Node]) -> None:
    other = pair[1].id
    paths = [f"/api/v1/disks/{other}/{disk_id(name, f'{name}.raw')}/convert" for name in ("x", "y")]
    with api.client("operator", datastores=["n02:x"]) as client:
        assert client.call("POST", paths[0], {"format": "qcow2"}, query={"wait": 30}).content["ok"]
        with pytest.raises(AccessError, match="convert in y needs the role operator"):
            client.call("POST", paths[1], {"format": "qcow2"})
        for path in ("/api/v1/nodes/n02/scan", "/api/v1/nodes/n01/scan"):
            with pytest.raises(AccessError, match="needs the role operator"):
                client.call("POST", path, {})
        body = {"select": "format!=none", "format": "vhdx"}
        answers = client.call("POST", "/api/v1/conversions", body, query={"wait": 30}).content
        assert {one["name"]: one["answer"]["ok"] for one in answers} == {"x.raw": True, "y.raw": False}


def test_the_owner_judges_the_datastore_too(api: Served, pair: Sequence[Node]) -> None:
    one, other = pair
    token = api.token("operator", datastores=["n02:x"])["token"]
    by = {"node": one.id, "token": f"{one.id}/{token[37:49]}"}
    for name, ok in (("x", True), ("y", False)):
        wish = {"disk": disk_id(name, f"{name}.raw"), "format": "qcow2"}
        answer = one.service.response(one.service.submit(other.id, "convert", wish, by), 30)
        assert answer
        assert answer.body["ok"] == ok


@pytest.mark.parametrize(
    ("role", "datastores", "error"),
    [
        ("operator", ["n02:z"], VmconvError),
        ("operator", ["n99:x"], VmconvError),
        ("operator", ["x"], VmconvError),
        ("viewer", ["n02:x"], UsageError),
        ("operator", [], UsageError),
    ],
    ids=["no datastore", "no node", "not here", "viewer", "none"],
)
def test_a_token_names_datastores_that_exist(
    api: Served, role: str, datastores: list[str], error: type[VmconvError]
) -> None:
    with pytest.raises(error, match=r"is not here|no node|a viewer sees all|1 items at least"):
        api.token(role, datastores=datastores)
    assert not api.node.service.view().find("token")


def test_a_disk_does_not_read_its_parent_in_another_ones_datastore(
    api: Served, pair: Sequence[Node], tmp_path: Path, qemu_img: QemuImg
) -> None:
    """The tenant of `x` makes an image whose parent is a disk in `y`."""
    other = pair[1]
    qemu_img("create", "-q", "-f", "qcow2", "-b", tmp_path / "y" / "y.raw", "-F", "raw", tmp_path / "x" / "top.qcow2")
    top = disk_id("x", "top.qcow2")
    other.write(Change("disk", top, {"datastore": "x", "name": "top.qcow2"}))
    pair[0].body_when(other.id, "disk", top, lambda _record: True)
    runner = JobRunner(other.service, str(other.directory))
    runner.start()
    try:
        for datastores, state in ((["n02:x"], "failed"), (["n02:x", "n02:y"], "done")):
            with api.client("operator", datastores=datastores) as client:
                path = f"/api/v1/disks/{other.id}/{top}/convert"
                answer = client.call("POST", path, {"format": "raw"}, query={"wait": 30}).content
            job = answer["body"]["job"]
            body = other.body_when(other.id, "job", job, lambda one: one.body["state"] in ("done", "failed")).body
            assert body["state"] == state, body
            if state == "failed":
                assert "lies outside" in body["error"]
                assert sorted(os.listdir(tmp_path / "x")) == ["top.qcow2", "x.raw"]
    finally:
        runner.stop()


@pytest.mark.parametrize(("reference", "allowed"), [(f"{OTHER}/web", True), (f"{HERE}/ds", False)])
def test_a_disk_of_another_node_is_converted_with_a_role_there(reference: str, allowed: bool) -> None:
    """On shared storage, by the node that its owner has appointed. A role in what that node calls it does not count."""
    replica = Replica()
    held = {"storage": "s" * 32, "owner": OTHER}
    replica.add(OTHER, "datastore", "web", {"path": "/srv/web", **held, "converters": [HERE]})
    replica.add(OTHER, "disk", "d9", {"datastore": "web", "name": "z.raw", "format": "raw"})
    replica.add(HERE, "datastore", "ds", {"path": "/srv/images", **held})
    by = scoped(replica, "operator", reference)
    assert is_allowed(replica, "convert", by, disk="d9", of=OTHER, format="qcow2", job="j9") == allowed
    if allowed:
        job = replica.body("job", "j9")
        assert (job["of"], job["datastore"], job["source"], job["within"]) == (OTHER, "ds", "z.raw", ["ds"])
