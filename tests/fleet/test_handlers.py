"""What an owner does when it is asked, on a replica made for the purpose."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fleet.asking import ASKED, HERE, NOW, OTHER, THIRD, Replica
from vmconv.errors import VmconvError
from vmconv_fleet.catalogue.terms import Role
from vmconv_fleet.jobs.handlers import MAX_OPEN_JOBS, make_handlers
from vmconv_fleet.replication.requests import IncomingRequest
from vmconv_fleet.replication.signing import CertifiedKey
from vmconv_fleet.trust.rights import ORDER
from vmconv_fleet.trust.roles import GOVERNING, VERBS


@pytest.fixture
def replica() -> Replica:
    return Replica()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("role", ORDER)
def test_each_verb_takes_its_role(replica: Replica, verb: str, role: Role) -> None:
    replica.ask("policy-set", administrators_of=[OTHER])
    if ORDER.index(role) < ORDER.index(VERBS[verb]):
        with pytest.raises(VmconvError, match=f"{verb} needs the role {VERBS[verb]}, eve has {role}"):
            replica.ask(verb, requester=OTHER, by=replica.token(OTHER, role), **ASKED[verb])
        return
    try:
        replica.ask(verb, requester=OTHER, by=replica.token(OTHER, role), **ASKED[verb])
    except VmconvError as exc:
        assert "needs the role" not in str(exc)


@pytest.mark.parametrize(
    ("more", "said"), [({"revoked": True}, "was revoked"), ({"expires_ms": NOW}, "has expired")], ids=["revoked", "old"]
)
def test_an_invalid_token_is_refused_by_the_owner(replica: Replica, more: dict[str, Any], said: str) -> None:
    with pytest.raises(VmconvError, match=said):
        replica.ask("scan", requester=OTHER, by=replica.token(OTHER, "admin", **more))


def test_a_token_that_the_owner_does_not_know_is_refused(replica: Replica) -> None:
    by = {"node": OTHER, "token": f"{OTHER}/{'0' * 12}", "user": "eve"}
    with pytest.raises(VmconvError, match="is unknown here"):
        replica.ask("scan", requester=OTHER, by=by)


def test_a_request_in_the_name_of_another_node_is_refused(replica: Replica) -> None:
    with pytest.raises(VmconvError, match=f"{OTHER} states a caller of another node, {HERE}"):
        replica.ask("datastore-add", requester=OTHER, by={"node": HERE, "user": "root"}, **ASKED["datastore-add"])


def test_paths_are_named_by_the_local_administrator_alone(replica: Replica) -> None:
    for by in ({"node": OTHER, "user": "root"}, replica.token(OTHER, "admin")):
        with pytest.raises(VmconvError, match="for the local administrator"):
            replica.ask("datastore-add", requester=OTHER, by=by, **ASKED["datastore-add"])


def test_a_policy_restricts_administrators_to_some_nodes(replica: Replica) -> None:
    replica.ask("policy-set", administrators_of=[THIRD])
    assert replica.body("policy", "conversion")["administrators_of"] == [THIRD, HERE]
    with pytest.raises(VmconvError, match="does not accept administrators"):
        replica.ask("scan", requester=OTHER)
    with pytest.raises(VmconvError, match="does not accept administrators"):
        replica.ask("scan", requester=THIRD, by={**replica.token(OTHER, "admin"), "node": THIRD})
    replica.ask("scan", requester=THIRD)


# Conversions


def test_a_conversion_becomes_a_job(replica: Replica) -> None:
    outcome = replica.ask("convert", requester=OTHER, request="r7", **ASKED["convert"], options={"compat": "0.10"})
    assert outcome.body == {"job": "r7"}
    job = replica.body("job", "r7")
    assert (job["state"], job["source"], job["datastore"], job["format"]) == ("queued", "a.vmdk", "ds", "qcow2")
    assert (job["options"], job["by"]["node"], job["created_ms"]) == ({"compat": "0.10"}, OTHER, NOW)


def test_the_same_job_again_is_the_same_job(replica: Replica) -> None:
    replica.ask("convert", **ASKED["convert"], job="mine")
    before = replica.body("job", "mine")
    again = replica.ask("convert", request="r2", **ASKED["convert"], job="mine")
    assert (again.changes, again.body) == ((), {"job": "mine", "state": "queued"})
    assert replica.body("job", "mine") == before


def test_an_id_is_not_used_for_two_conversions(replica: Replica) -> None:
    replica.add(HERE, "disk", "d2", {"datastore": "ds", "name": "b.vmdk"})
    replica.ask("convert", **ASKED["convert"], job="mine")
    with pytest.raises(VmconvError, match="a different conversion"):
        replica.ask("convert", disk="d2", format="qcow2", job="mine")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"disk": "d9", "format": "qcow2"}, "disk d9 does not exist"),
        ({"disk": "/srv/images/a.vmdk", "format": "qcow2"}, "convert: disk"),
        ({"disk": "d1", "format": "qcow2", "target": "../etc/x"}, "is not the name of a file"),
        ({"disk": "d1", "format": "qcow2", "target": "a/b"}, "is not the name of a file"),
        ({"disk": "d1", "format": "qcow2", "target": ".."}, "is not the name of a file"),
        ({"disk": "d1", "format": "qcow2", "target_datastore": "none"}, "datastore none does not exist"),
        ({"disk": "d1", "format": "dmg"}, "this node cannot write dmg; it writes qcow2"),
        ({"disk": "d1", "format": "qcow2", "path": "/etc/passwd"}, "convert: path: is not allowed here"),
        ({"disk": "d1", "format": "qcow2", "keep_source": False}, "keeps sources"),
        ({"disk": "d1"}, "convert: format: is missing"),
    ],
)
def test_a_conversion_that_makes_no_sense_is_refused(replica: Replica, what: dict[str, Any], said: str) -> None:
    with pytest.raises(VmconvError, match=said):
        replica.ask("convert", **what)
    assert not replica.find("job")


@pytest.mark.parametrize("verb", ["convert", "convert-machine"])
@pytest.mark.parametrize(("name", "said"), [("-rf.raw", "begins with '-'"), ("x" * 200 + ".raw", "is longer than")])
def test_a_source_that_gives_its_target_a_trap_as_name_needs_another_one(
    replica: Replica, verb: str, name: str, said: str
) -> None:
    replica.add(HERE, "disk", "d1", {"datastore": "ds", "name": f"sub/{name}"})
    replica.add(HERE, "vm", "v1", {"datastore": "ds", "file": f"sub/{name}", "name": "x"})
    with pytest.raises(VmconvError, match=f"the target would be called '{name[:3]}.*which {said}"):
        replica.ask(verb, **ASKED[verb])
    replica.ask(verb, **ASKED[verb], target="harmless")


def test_a_conversion_of_a_machine_becomes_a_job(replica: Replica) -> None:
    more: dict[str, Any] = {"disk_format": "qcow2", "disk_options": {"compat": "0.10"}, "strict": True, "target": "new"}
    outcome = replica.ask("convert-machine", requester=OTHER, request="r7", **ASKED["convert-machine"], **more)
    assert outcome.body == {"job": "r7"}
    job = replica.body("job", "r7")
    assert (job["vm"], job["source"], job["datastore"], job["format"]) == ("v1", "web.vmx", "ds", "libvirt")
    assert {name: job[name] for name in more} == more
    assert "disk" not in job
    again = replica.ask("convert-machine", request="r8", **ASKED["convert-machine"], job="r7")
    assert again.body == {"job": "r7", "state": "queued"}
    with pytest.raises(VmconvError, match="a different conversion"):
        replica.ask("convert", **ASKED["convert"], job="r7")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"vm": "v9"}, "vm v9 does not exist"),
        ({"vm": "broken"}, "vm broken cannot be read: no brand"),
        ({"format": "qcow2"}, "this node cannot write qcow2 machines; it writes libvirt"),
        ({"format": "old"}, "this node cannot write old machines; it writes libvirt"),
        ({"disk_format": "dmg"}, "this node cannot write dmg; it writes qcow2"),
        ({"target": "../x"}, "is not the name of a file"),
        ({"target_datastore": "none"}, "datastore none does not exist"),
        ({"keep_source": False}, "keeps its source"),
        ({"disk": "d1"}, "convert-machine: disk: is not allowed here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_conversion_of_a_machine_that_makes_no_sense_is_refused(
    replica: Replica, what: dict[str, Any], said: str
) -> None:
    replica.add(HERE, "vm", "broken", {"datastore": "ds", "file": "b.vmx", "name": "b", "problem": "no brand"})
    with pytest.raises(VmconvError, match=said):
        replica.ask("convert-machine", **ASKED["convert-machine"] | what)
    assert not replica.find("job")


def test_the_policy_rules_over_the_disks_of_machines(replica: Replica) -> None:
    replica.ask("policy-set", formats=["raw"], zero_copy="require")
    with pytest.raises(VmconvError, match="converts to raw, not to qcow2"):
        replica.ask("convert-machine", **ASKED["convert-machine"])
    replica.ask("policy-set", formats=["qcow2"])
    replica.ask("convert-machine", **ASKED["convert-machine"])
    assert replica.body("job", "r1")["zero_copy"] == "require"


def test_an_unreadable_disk_is_refused(replica: Replica) -> None:
    replica.add(HERE, "disk", "d1", {"datastore": "ds", "name": "a.vmdk", "problem": "no signature"})
    with pytest.raises(VmconvError, match="cannot be read: no signature"):
        replica.ask("convert", **ASKED["convert"])


def test_the_policy_rules_over_requests(replica: Replica) -> None:
    replica.ask("policy-set", formats=["raw"], zero_copy="require", may_remove_source=True)
    with pytest.raises(VmconvError, match="converts to raw, not to qcow2"):
        replica.ask("convert", **ASKED["convert"])
    replica.ask("policy-set", formats=None)
    replica.ask("convert", **ASKED["convert"], keep_source=False)
    assert replica.body("job", "r1")["zero_copy"] == "require"
    assert replica.body("job", "r1")["keep_source"] is False


def test_jobs_have_a_limit(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmconv_fleet.jobs.handlers.MAX_OPEN_JOBS", 1)
    assert MAX_OPEN_JOBS > 1000
    replica.ask("convert", **ASKED["convert"])
    with pytest.raises(VmconvError, match="already has 1 jobs that have not ended"):
        replica.ask("convert", request="r2", **ASKED["convert"])


@pytest.mark.parametrize("end", [{"state": "done"}, {"state": "failed"}, {"state": "planned", "dry_run": True}])
def test_ended_jobs_do_not_count(replica: Replica, monkeypatch: pytest.MonkeyPatch, end: Mapping[str, Any]) -> None:
    monkeypatch.setattr("vmconv_fleet.jobs.handlers.MAX_OPEN_JOBS", 1)
    for number in range(3):
        replica.add(HERE, "job", f"j{number}", {"disk": "d1", "datastore": "ds", "format": "qcow2", **end})
    replica.ask("convert", **ASKED["convert"])


@pytest.mark.parametrize(
    ("state", "after"),
    [("queued", "cancelled"), ("planned", "planned"), ("running", "running"), ("done", None), ("failed", None)],
)
def test_cancelling(replica: Replica, state: str, after: str | None) -> None:
    replica.add(HERE, "job", "j1", {"state": state, "disk": "d1", "datastore": "ds", "format": "qcow2"})
    if after is None:
        with pytest.raises(VmconvError, match=f"is already {state}"):
            replica.ask("cancel", job="j1")
        return
    replica.ask("cancel", job="j1")
    assert (replica.body("job", "j1")["state"], replica.body("job", "j1")["cancel"]) == (after, True)


def test_a_completed_plan_cannot_be_cancelled(replica: Replica) -> None:
    body = {"state": "planned", "dry_run": True, "disk": "d1", "datastore": "ds", "format": "qcow2"}
    replica.add(HERE, "job", "j1", body)
    with pytest.raises(VmconvError, match="is already planned"):
        replica.ask("cancel", job="j1")


# Datastores, tokens, nodes


def test_a_scan_is_requested_in_the_record(replica: Replica) -> None:
    assert replica.ask("scan").body == {"datastores": ["ds"]}
    assert replica.body("datastore", "ds")["scan_asked_ms"] == NOW
    with pytest.raises(VmconvError, match="datastore none does not exist"):
        replica.ask("scan", datastore="none")


@pytest.mark.parametrize("path", ["/srv", "/srv/images", "/srv/images/below", "/"])
def test_datastores_lie_apart(replica: Replica, path: str) -> None:
    with pytest.raises(VmconvError, match="overlap"):
        replica.ask("datastore-add", name="more", path=path)
    replica.ask("datastore-add", name="more", path="/srv/images2")


@pytest.mark.parametrize("path", ["images", "/srv/../etc", "/srv/./x", "/srv/x/..", "/a\0b"])
def test_a_datastore_has_a_plain_path(replica: Replica, path: str) -> None:
    with pytest.raises(VmconvError, match="is not an absolute path"):
        replica.ask("datastore-add", name="more", path=path)


def test_a_datastore_is_not_removed_under_a_conversion(replica: Replica) -> None:
    job = {"state": "running", "disk": "d1", "datastore": "ds", "format": "qcow2"}
    replica.add(HERE, "job", "j1", job)
    with pytest.raises(VmconvError, match="1 jobs are running in datastore ds"):
        replica.ask("datastore-remove", name="ds")
    replica.add(HERE, "job", "j1", {**job, "state": "done"})
    replica.ask("datastore-remove", name="ds")
    assert not replica.find("datastore")


def test_a_token_is_made_and_revoked(replica: Replica) -> None:
    replica.ask("token-create", **ASKED["token-create"])
    with pytest.raises(VmconvError, match="already exists"):
        replica.ask("token-create", **ASKED["token-create"])
    replica.ask("token-revoke", id="0" * 12)
    assert replica.body("token", "0" * 12)["revoked"] is True


def test_naming_has_no_path_and_no_attribute(replica: Replica) -> None:
    replica.ask("policy-set", naming="{stem}-{format}{suffix}")
    for naming in ("../{stem}", "{stem.__class__}", "{0}", "{stem!r}", "fixed", "{stem}{", "-{stem}", ".{stem}"):
        with pytest.raises(VmconvError, match="naming"):
            replica.ask("policy-set", naming=naming)
    assert replica.body("policy", "conversion") == {"naming": "{stem}-{format}{suffix}"}


def test_only_a_node_with_the_authority_revokes(replica: Replica, tmp_path: Path) -> None:
    asked = IncomingRequest("r1", HERE, "revoke", {"node": OTHER}, {"node": HERE}, 0, False)
    with pytest.raises(VmconvError):
        make_handlers(str(tmp_path))["revoke"](replica, asked)
    for verb in ("revoke", "retire"):
        with pytest.raises(VmconvError, match="itself"):
            replica.ask(verb, node=HERE)


def test_a_key_is_revoked_of_its_node_alone(replica: Replica, tmp_path: Path) -> None:
    from vmconv_fleet.trust.authority import Authority

    Authority.found(str(tmp_path), "test")
    end = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
    replica.certified = [CertifiedKey(*one, end, False) for one in ((HERE, "k"), (HERE, "k2"), (OTHER, "k3"))]
    replica.add(OTHER, "certificate", "k4", {"pem": "junk", "node": HERE})
    replica.add(HERE, "heartbeat", HERE, {})

    def revoke(node: str, key: str) -> Any:
        asked = IncomingRequest("r1", HERE, "revoke", {"node": node, "key_id": key}, {"node": HERE}, 0, False)
        return make_handlers(str(tmp_path))["revoke"](replica, asked).changes[0]

    strange = ((HERE, "k3"), (OTHER, "k2"), (HERE, "k4"))
    for node, key, said in ((HERE, "k", "signs with key k"), *((*one, "has no key") for one in strange)):
        with pytest.raises(VmconvError, match=said):
            revoke(node, key)
    assert (revoke(HERE, "k2").id, revoke(OTHER, "k3").body["key_id"]) == ("k2", "k3")


def test_the_authority_retires_a_node(replica: Replica, tmp_path: Path) -> None:
    from vmconv_fleet.trust.authority import Authority

    Authority.found(str(tmp_path), "test")
    asked = IncomingRequest("r1", HERE, "retire", {"node": OTHER, "reason": "burnt"}, {"node": HERE}, 0, False)
    outcome = make_handlers(str(tmp_path))["retire"](replica, asked)
    assert {change.kind for change in outcome.changes} == {"retirement", "revocation"}
    (retirement,) = [one for one in outcome.changes if one.kind == "retirement"]
    assert retirement.body
    told = {name: value for name, value in retirement.body.items() if name != "signature"}
    assert (retirement.id, told) == (OTHER, {"node": OTHER, "name": "", "reason": "burnt", "at_ms": NOW})
    with pytest.raises(VmconvError, match="does not accept administrators"):
        make_handlers(str(tmp_path))["retire"](replica, asked._replace(requester=THIRD, by={"node": THIRD}))
    replica.ask("policy-set", administrators_of=[THIRD])
    assert make_handlers(str(tmp_path))["retire"](replica, asked._replace(requester=THIRD, by={"node": THIRD})).changes


@pytest.mark.parametrize("verb", sorted(GOVERNING & VERBS.keys()))
@pytest.mark.parametrize("connected", [HERE, OTHER])
@pytest.mark.parametrize("issued", [None, HERE, OTHER])
def test_who_governs_a_node_is_its_own_unless_its_policy_names_others(
    replica: Replica, verb: str, connected: str, issued: str | None
) -> None:
    by = {"node": connected, "user": "root"}
    if issued:
        by = {**replica.token(issued, "admin"), "node": connected}
    own = {connected, issued or connected} == {HERE}
    for accepted in (None, [OTHER]):
        if accepted:
            replica.ask("policy-set", administrators_of=accepted)
        try:
            replica.ask(verb, requester=connected, by=by, **ASKED[verb])
            refused = False
        except VmconvError as exc:
            refused = "does not accept administrators" in str(exc)
        assert refused == (not own and not accepted)


def test_who_is_accepted_is_decided_by_the_own_administrators(replica: Replica) -> None:
    with pytest.raises(VmconvError, match="does not accept administrators"):
        replica.ask("policy-set", requester=OTHER, administrators_of=[OTHER])
    with pytest.raises(VmconvError, match="does not accept administrators"):
        replica.ask("policy-set", by={**replica.token(OTHER, "admin"), "node": HERE}, administrators_of=None)
    assert not replica.find("policy")
    replica.ask("policy-set", requester=OTHER, max_parallel=3)
