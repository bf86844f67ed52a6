"""The REST API, on the sockets that the daemon serves it on."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import re
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fleet.in_memory import Node, nodes
from fleet.plain import PlainSigner, certificate, key_revocation, retirement, retirement_named
from fleet.serving import Served, running, served
from vmconv.errors import AccessError, UsageError, VmconvError
from vmconv_fleet.api import access, as_local, changing, create_app, exporting, sessions
from vmconv_fleet.api.app import MAX_BODY
from vmconv_fleet.cli.client import NodeClient, UnreachableError, _lines
from vmconv_fleet.limiter import Limiter
from vmconv_fleet.node.activation import LOCAL_LIMITS
from vmconv_fleet.node.serving import Site
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.replication.records import Change, decode, encode, seal
from vmconv_fleet.replication.requests import Outcome
from vmconv_fleet.testing import PATIENCE, wait_until
from vmconv_fleet.trust import tokens
from vmconv_fleet.trust.roles import VERBS


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Sequence[Node]]:
    """Two nodes; the second has a disk."""
    with nodes(2, tmp_path) as (one, other):
        other.write(
            Change("datastore", "ds", {"path": "/srv/images"}),
            Change("disk", "d1", {"datastore": "ds", "name": "a.vmdk", "format": "vmdk", "virtual_size": 1 << 30}),
        )
        one.body_when(other.id, "disk", "d1", lambda _record: True)
        yield one, other


@pytest.fixture
def api(pair: Sequence[Node]) -> Iterator[Served]:
    with served(pair[0]) as one:
        yield one


def raw(api: Served, method: str, path: str, body: bytes | None = None, **headers: str) -> http.client.HTTPResponse:
    """Returns a bare answer over TLS."""
    context = ssl.create_default_context(cafile=api.ca)
    connection = http.client.HTTPSConnection(api.url.removeprefix("https://"), timeout=PATIENCE, context=context)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response


# Who may do what


def test_joining_needs_a_token(api: Served) -> None:
    for said in ("", "Bearer nonsense", "Basic cm9vdDpyb290"):
        response = raw(api, "GET", "/api/v1/fleet", Authorization=said)
        assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert raw(api, "GET", "/metrics").status == 401
    assert raw(api, "GET", "/healthz").status == 200


def test_the_local_socket_is_the_administrator_and_tls_is_not(api: Served) -> None:
    assert api.local.get("/api/v1/fleet")["node"] == api.node.id
    assert raw(api, "GET", "/api/v1/fleet", X_Vmconv_User="root").status == 401


@pytest.mark.parametrize(
    ("role", "method", "path", "body", "allowed"),
    [
        ("viewer", "GET", "/api/v1/disks", None, True),
        ("viewer", "POST", "/api/v1/disks/n02/d1/convert", {"format": "qcow2"}, False),
        ("viewer", "POST", "/api/v1/conversions", {"select": "size>0", "format": "qcow2"}, False),
        ("viewer", "POST", "/api/v1/nodes/n01/scan", {}, False),
        ("viewer", "GET", "/api/v1/export", None, False),
        ("operator", "POST", "/api/v1/nodes/n01/scan", {}, True),
        ("operator", "POST", "/api/v1/disks/n02/d1/convert", {"format": "qcow2"}, True),
        ("operator", "PATCH", "/api/v1/nodes/n01/policy", {"max_parallel": 9}, False),
        ("operator", "POST", "/api/v1/tokens", {"label": "x", "role": "admin"}, False),
        ("operator", "POST", "/api/v1/nodes/n02/retire", {}, False),
        ("operator", "POST", "/api/v1/nodes/n02/revoke", {}, False),
        ("operator", "POST", "/api/v1/join-tokens", {}, False),
        ("operator", "DELETE", "/api/v1/datastores/n01/ds", None, False),
        ("operator", "POST", "/api/v1/requests", {"target": "n02", "verb": "policy-set", "arguments": {}}, False),
        ("admin", "PATCH", "/api/v1/nodes/n01/policy", {"max_parallel": 9}, True),
        ("admin", "POST", "/api/v1/tokens", {"label": "x", "role": "viewer"}, True),
        ("admin", "POST", "/api/v1/datastores", {"name": "x", "path": "/"}, False),
        ("admin", "PUT", "/api/v1/link", {"connected": False}, False),
    ],
)
def test_roles(api: Served, role: str, method: str, path: str, body: object, allowed: bool) -> None:
    with api.client(role) as client:
        if allowed:
            assert client.call(method, path, body).status in (200, 202)
        else:
            with pytest.raises(AccessError, match=r"needs the role|local administrator"):
                client.call(method, path, body)


def test_the_owner_refuses_what_the_first_node_let_through(api: Served, pair: Sequence[Node]) -> None:
    one, other = pair
    token = api.token("operator")
    other.write(Change("policy", "conversion", {"administrators_of": [other.id]}))
    one.body_when(other.id, "policy", "conversion", lambda _record: True)
    with pytest.raises(AccessError, match="does not accept administrators"):
        api.local.call("POST", "/api/v1/nodes/n02/scan", {})
    asked = one.service.submit(other.id, "scan", {}, {"node": one.id, "token": f"{one.id}/{token['token'][37:49]}"})
    answer = one.service.response(asked, 30)
    assert answer
    assert (answer.body["ok"], "does not accept" in answer.body["reason"]) == (False, True)


@pytest.mark.parametrize(("more", "said"), [({}, "was revoked"), ({"ttl_s": 0.001}, "has expired")])
def test_a_token_that_is_no_longer_valid_is_refused(api: Served, more: dict[str, float], said: str) -> None:
    made = api.token("admin", **more)
    if not more:
        api.local.call("DELETE", f"/api/v1/tokens/{api.node.id}/{made['body']['token']}")
    response = raw(api, "GET", "/api/v1/fleet", Authorization=f"Bearer {made['token']}")
    assert response.status == 401


def test_of_a_token_only_the_hash_is_kept_and_not_shown(api: Served) -> None:
    made = api.token("admin")
    secret = made["token"].rpartition("_")[2]
    everything = "\n".join(api.local.lines("/api/v1/export"))
    assert secret not in everything
    (listed,) = [one for one in api.local.everything("/api/v1/tokens") if one["id"] in made["token"]]
    assert "hash" not in listed["body"]
    stored = api.node.service.view().get(api.node.id, "token", listed["id"])
    assert stored
    assert stored.body["hash"] == hashlib.sha256(made["token"].encode()).hexdigest()


def test_the_hash_of_a_token_is_shown_nowhere(api: Served, caplog: pytest.LogCaptureFixture) -> None:
    """It is in the token's record, in the request for it and in the transaction, before and after."""
    caplog.set_level(logging.DEBUG)
    events = api.client("viewer").lines("/api/v1/events")
    _until(events, "event: here")
    made = api.token("viewer")
    api.local.call("DELETE", f"/api/v1/tokens/{api.node.id}/{made['body']['token']}")
    secret = hashlib.sha256(made["token"].encode()).hexdigest()
    stored = [
        kind
        for kind in ("token", "request", "transaction")
        for one in api.node.service.view().find(kind)
        if secret in json.dumps(one.body)
    ]
    assert set(stored) == {"token", "request", "transaction"}
    seen = [next(events) for _ in range(30)]
    paths = ["tokens", "requests", "transactions", "export", "records/token", "records/request", "records/transaction"]
    for path in paths:
        seen += api.local.lines(f"/api/v1/{path}")
    cookie = api.app.state.fleet.sessions.begin(api.token("admin")["token"])
    for page in ("/tokens", "/requests", "/history"):
        seen.append(page_of(api, page, cookie))
    text = "\n".join(seen)
    assert made["body"]["token"] in text
    assert secret not in text
    assert secret not in caplog.text
    assert not [record for record in caplog.records if secret in str(vars(record))]


def page_of(api: Served, path: str, cookie: str) -> str:
    """Returns a page of the console."""
    context = ssl.create_default_context(cafile=api.ca)
    connection = http.client.HTTPSConnection(api.url.removeprefix("https://"), timeout=PATIENCE, context=context)
    with closing(connection):
        connection.request("GET", path, headers={"Cookie": f"__Host-vmconv={cookie}"})
        response = connection.getresponse()
        assert response.status == 200
        return response.read().decode()


def test_each_change_is_logged_with_its_caller(api: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vmconv_fleet.audit"), api.client("operator") as client:
        client.call("POST", "/api/v1/nodes/n01/scan", {})
    fields: list[Any] = [getattr(one, "fields", {}) for one in caplog.records if one.name == "vmconv_fleet.audit"]
    scan = next(one for one in fields if one.get("verb") == "scan")
    assert (scan["by"]["user"], scan["by"]["node"]) == ("a operator", api.node.id)
    (transaction,) = [one for one in api.local.everything("/api/v1/transactions") if one["body"]["verb"] == "scan"]
    assert transaction["body"]["by"]["user"] == "a operator"


# Changes


def test_own_records_are_changed_at_once(api: Served) -> None:
    reply = api.local.call("PATCH", "/api/v1/nodes/n01/policy", {"max_parallel": 3})
    assert (reply.status, reply.content["ok"], reply.content["transaction"]) == (200, True, 1)
    assert api.local.everything("/api/v1/policies")[0]["body"]["max_parallel"] == 3


def test_changes_of_another_owner_are_accepted_with_the_requests_id(api: Served, pair: Sequence[Node]) -> None:
    one, other = pair
    one.wire.disconnect()
    reply = api.local.call("POST", "/api/v1/disks/n02/d1/convert", {"format": "qcow2"})
    assert (reply.status, reply.content["state"]) == (202, "sent")
    place = f"/api/v1/requests/{one.id}/{reply.content['request']}"
    assert api.local.call("GET", place).status == 202
    one.wire.reconnect()
    one.until(lambda: api.local.call("GET", place).status == 200)
    assert other.service.view().get(other.id, "job", reply.content["request"])


def test_a_response_is_waited_for(api: Served) -> None:
    reply = api.local.call("POST", "/api/v1/disks/n02/d1/convert", {"format": "qcow2"}, query={"wait": 30})
    assert (reply.status, reply.content["ok"]) == (200, True)


def test_a_refusal_is_a_conflict(api: Served) -> None:
    wish = {"target": "n02", "verb": "cancel", "arguments": {"job": "none"}}
    reply = api.local.call("POST", "/api/v1/requests", wish, query={"wait": 30})
    assert (reply.status, reply.content["ok"], reply.content["reason"]) == (
        409,
        False,
        "job none does not exist on this node",
    )


def test_members_do_not_falsify_the_keys_of_others(api: Served, pair: Sequence[Node]) -> None:
    one, other = pair
    mine, theirs = (PlainSigner(node.id).key_id for node in pair)
    for node, key in ((one.id, mine), (other.id, theirs), (other.id, "old")):
        other.write(certificate(node, key))
    other.write(key_revocation(other.id, "old"), Change("heartbeat", other.id, {"at_ms": 1, "interval_s": 5}))
    other.write(
        Change("revocation", "a", {"node": one.id, "key_id": mine}),
        Change("revocation", "b", {}),
        Change("certificate", "c", {"node": one.id, "pem": "junk"}),
        Change("certificate", "d", {"node": ["x"]}),
    )
    one.body_when(other.id, "certificate", "d", lambda _record: True)
    found = {(key["node"], key["key"]): key["state"] for key in api.local.get("/api/v1/keys")["items"]}
    assert found == {(one.id, mine): "unused", (other.id, theirs): "in use", (other.id, "old"): "revoked"}
    (only,) = api.local.get("/api/v1/keys", node=one.id)["items"]
    assert (only["node"], only["key"], only["until"]) == (one.id, mine, "2030-01-01T00:00:00+00:00")


def test_the_same_key_is_the_same_request(api: Served) -> None:
    context = ssl.create_default_context(cafile=api.ca)
    token = api.token("operator")["token"]
    answers = []
    for _ in range(2):
        connection = http.client.HTTPSConnection(api.url.removeprefix("https://"), context=context)
        headers = {
            "Authorization": f"Bearer {token}",
            "Idempotency-Key": "key-number-1",
            "Content-Type": "application/json",
        }
        connection.request("POST", "/api/v1/disks/n02/d1/convert?wait=30", json.dumps({"format": "raw"}), headers)
        answers.append(json.loads(connection.getresponse().read()))
        connection.close()
    assert answers[0] == answers[1]
    assert len(api.local.everything("/api/v1/jobs")) == 1


def test_the_key_of_another_caller_answers_nothing(api: Served, pair: Sequence[Node]) -> None:
    def ask(token: str, verb: str, **arguments: Any) -> tuple[int, dict[str, Any]]:
        context = ssl.create_default_context(cafile=api.ca)
        with closing(http.client.HTTPSConnection(api.url.removeprefix("https://"), context=context)) as connection:
            wish = json.dumps({"target": pair[0].id, "verb": verb, "arguments": arguments})
            headers = {
                "Authorization": f"Bearer {token}",
                "Idempotency-Key": "key-number-1",
                "Content-Type": "application/json",
            }
            connection.request("POST", "/api/v1/requests?wait=30", wish, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    admin, operator = (api.token(role)["token"] for role in ("admin", "operator"))
    first = ask(admin, "policy-set", max_parallel=3)
    assert (first[0], first[1]["state"]) == (200, "executed")
    assert ask(admin, "policy-set", max_parallel=3) == first
    for token, verb, arguments, other in (
        (operator, "scan", {}, "another caller"),
        (admin, "scan", {}, "another verb"),
        (admin, "policy-set", {"max_parallel": 4}, "other arguments"),
    ):
        status, said = ask(token, verb, **arguments)
        assert (status, said["error"]) == (409, f"request key-number-1 was sent before with {other}")


def test_all_selected_disks_are_requested(api: Served, pair: Sequence[Node]) -> None:
    _, other = pair
    for number in range(2, 6):
        body = {"datastore": "ds", "name": f"{number}.vmdk", "format": "vmdk" if number % 2 else "raw"}
        other.write(Change("disk", f"d{number}", body))
        pair[0].body_when(other.id, "disk", f"d{number}", lambda _record: True)
    at = wall_ms() + 10**9
    wish = {"select": "format=vmdk and node=n0*", "format": "qcow2", "max_parallel": 2, "at_ms": at}
    asked = api.local.call("POST", "/api/v1/conversions", wish, query={"wait": 30}).content
    assert [one["disk"] for one in asked] == ["d3", "d5", "d1"]
    assert all(one["answer"]["ok"] for one in asked)
    jobs = [one["body"] for one in api.local.everything("/api/v1/jobs")]
    assert {(job["max_parallel"], job["at_ms"], job["state"]) for job in jobs} == {(2, at, "queued")}
    assert len({job["batch"] for job in jobs}) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/v1/disks/n02/d1/convert", {"format": "qcow2", "target": "../../etc/cron.d/x"}),
        ("/api/v1/disks/n02/d1/convert", {"format": "qcow2", "target": "/etc/cron.d/x"}),
        ("/api/v1/disks/n02/d1/convert", {"format": "qcow2", "path": "/etc/shadow"}),
        ("/api/v1/disks/n02/d1/convert", {"format": "qcow2", "disk": "/etc/shadow"}),
        ("/api/v1/disks/n02/d1/convert", {"format": "../x"}),
        ("/api/v1/conversions", {"select": "nonsense", "format": "qcow2"}),
        ("/api/v1/requests", {"target": "n02", "verb": "rm", "arguments": {}}),
        ("/api/v1/tokens", {"label": "x", "role": "god"}),
        ("/api/v1/datastores", {"name": "x", "path": "/does/not/exist"}),
        ("/api/v1/datastores", {"name": "../x", "path": "/"}),
    ],
)
def test_invalid_requests_are_refused_in_one_line(api: Served, path: str, body: object) -> None:
    with pytest.raises(UsageError) as raised:
        api.local.call("POST", path, body)
    assert "\n" not in str(raised.value)
    # The words of the validator are not for people.
    assert not re.search("should|Value error|Input|pattern|body", str(raised.value))


@pytest.mark.parametrize("path", ["/api/v1/nodes/n77", "/api/v1/disks?node=n77", "/api/v1/records/n02/disk/none"])
def test_missing_records_are_not_found(api: Served, path: str) -> None:
    with pytest.raises(VmconvError, match=r"n77|is not here"):
        api.local.call("GET", path)


# Reading


def test_an_etag_is_the_position_of_the_owner(api: Served, pair: Sequence[Node]) -> None:
    record = pair[0].service.view().get(pair[1].id, "disk", "d1")
    assert record
    token = f"Bearer {api.token('viewer')['token']}"
    path = f"/api/v1/records/{pair[1].id}/disk/d1"
    tag = raw(api, "GET", path, Authorization=token).headers["ETag"]
    assert tag == f'"{record.epoch}.{record.seq}"'
    assert raw(api, "GET", path, Authorization=token, If_None_Match=tag).status == 304
    pair[1].write(Change("disk", "d1", {**record.body, "in_use": True}))
    pair[0].body_when(pair[1].id, "disk", "d1", lambda one: bool(one.body.get("in_use")))
    fresh = raw(api, "GET", path, Authorization=token, If_None_Match=tag)
    assert (fresh.status, fresh.headers["ETag"] != tag) == (200, True)


@pytest.mark.parametrize("path", ["/api/v1/disks", "/api/v1/nodes", "/api/v1/transactions", "/api/v1/fleet"])
def test_lists_have_etags(api: Served, path: str) -> None:
    token = f"Bearer {api.token('viewer')['token']}"
    tag = raw(api, "GET", path, Authorization=token).headers["ETag"]
    assert raw(api, "GET", path, Authorization=token, If_None_Match=f'"other", W/{tag}').status == 304


def test_lists_come_in_pages(api: Served) -> None:
    for number in range(5):
        api.token("viewer", label=f"t{number}")
    first = api.local.get("/api/v1/tokens", limit=2)
    # A change between two pages moves nothing across their border.
    api.token("viewer", label="t0 later")
    second = api.local.get("/api/v1/tokens", limit=2, after=first["next"])
    third = api.local.get("/api/v1/tokens", limit=2, after=second["next"])
    labels = [one["body"]["label"] for page in (first, second, third) for one in page["items"]]
    assert labels == ["t0", "t1", "t2", "t3", "t4"]
    assert (first["total"], third["total"], third["next"]) == (5, 6, None)
    with pytest.raises(UsageError):
        api.local.get("/api/v1/tokens", limit=100_000)


@pytest.mark.parametrize("after", ["x", "W10=", "WzEsMl0=", "WzFlOTksMSwieCJd", "WyJ4IiwiXHVkODAwIiwieCJd"])
def test_only_the_next_of_a_page_continues_a_list(api: Served, after: str) -> None:
    with pytest.raises(UsageError, match="not the next of a page"):
        api.local.get("/api/v1/tokens", after=after)


def test_unsound_records_of_another_node_are_tolerated(api: Served, pair: Sequence[Node]) -> None:
    one, other = pair
    other.write(
        Change("disk", "bad", {"datastore": 5, "name": ["x"]}),
        Change("job", "bad", {"created_ms": "never"}),
        Change("heartbeat", other.id, {"at_ms": "now"}),
        Change("future-kind", "x", {"anything": [1, 2]}),
    )
    one.body_when(other.id, "future-kind", "x", lambda _record: True)
    assert [disk["id"] for disk in api.local.everything("/api/v1/disks")] == ["d1"]
    assert api.local.everything("/api/v1/jobs") == []
    assert len(api.local.get("/api/v1/nodes")["items"]) == 2
    assert api.local.everything("/api/v1/records/future-kind")[0]["body"] == {"anything": [1, 2]}


def test_a_policy_that_is_none_is_no_failure_of_this_node(api: Served, pair: Sequence[Node]) -> None:
    one, other = pair
    other.write(Change("policy", "conversion", {"max_parallel": "many"}))
    one.body_when(other.id, "policy", "conversion", lambda _record: True)
    with pytest.raises(AccessError, match="is not valid"):
        api.local.call("POST", f"/api/v1/nodes/{other.id}/scan", {})


@pytest.mark.parametrize(("verb", "wish"), [("retire", {}), ("revoke", {}), ("revoke", {"key_id": "stolen"})])
def test_a_member_that_only_says_to_hold_the_authority_is_not_believed(
    api: Served, pair: Sequence[Node], verb: str, wish: dict[str, str]
) -> None:
    one, other = pair
    third = "f" * 32
    other.write(certificate(third, "stolen"), Change("policy", "conversion", {"administrators_of": [one.id]}))
    one.body_when(other.id, "policy", "conversion", lambda _record: True)
    changes: list[Change] = []
    handlers = {verb: lambda _context, _request: Outcome(changes)}
    other.service._requests._handlers = handlers

    def ask() -> Any:
        path = f"/api/v1/nodes/{third}/{verb}?wait=300"
        return api.local.call("POST", path, {"authority": other.id, **wish}).content

    refused = ask()
    assert not refused["ok"]
    assert refused["reason"].endswith("does not hold the fleet's authority")
    changes.append(retirement(third) if verb == "retire" else key_revocation(third, "stolen"))
    assert ask()["ok"]


def test_a_call_that_waits_when_the_node_ends_is_told_so(
    pair: Sequence[Node], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = pair
    other.wire.disconnect()
    said: list[str] = []

    def wait(client: NodeClient) -> None:
        try:
            client.call("POST", f"/api/v1/nodes/{other.id}/scan?wait=300", {})
        except VmconvError as exc:
            said.append(str(exc))

    unix, limiter = socket.socket(socket.AF_UNIX), Limiter("local", LOCAL_LIMITS)
    unix.bind(str(one.directory / "api.sock"))
    unix.listen()
    app = as_local(create_app(one.service, directory=str(one.directory)))
    with limiter.listen(unix) as listening, NodeClient(str(one.directory)) as client:
        with running([Site(app, listening, {})]):
            thread = threading.Thread(target=wait, args=(client,), daemon=True)
            thread.start()
            wait_until(lambda: one.service.view().find("request", one.id), PATIENCE, "the request is made")
        thread.join(PATIENCE)
    limiter.close()
    assert said == ["this node ends, and has no answer yet"]
    assert "Exception in ASGI application" not in caplog.text


def test_a_change_that_is_not_made_in_time_is_no_failure(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changing, "_RESUMES_WITHIN", 0.0)
    monkeypatch.setattr(api.node.service, "merge", lambda *_by: Future())
    with pytest.raises(VmconvError, match="did not do it in time"):
        api.local.call("POST", "/api/v1/resume", {"merge": True})


def test_a_retired_node_is_asked_for_nothing(api: Served, pair: Sequence[Node]) -> None:
    """It would never answer: who takes its storage is another node."""
    retired = "f" * 32
    pair[1].write(retirement_named(retired, "n09"), retirement(retired))
    pair[0].body_when(pair[1].id, "retirement", retired, lambda _record: True)
    for owner in ("n09", retired):
        with pytest.raises(UsageError, match="node n09 is retired: it answers no requests"):
            api.local.call("POST", f"/api/v1/datastores/{owner}/images/take", {})
    assert not pair[0].service.view().find("request", pair[0].id)


def test_a_retired_node_is_history(api: Served, pair: Sequence[Node]) -> None:
    retired = "f" * 32
    pair[1].write(retirement_named(retired, "n09"), retirement(retired))
    pair[0].body_when(pair[1].id, "retirement", retired, lambda _record: True)
    states = {one["name"]: (one["state"], one["age_ms"]) for one in api.local.get("/api/v1/nodes")["items"]}
    assert states["n09"] == ("retired", None)
    assert 'vmconv_fleet_nodes{state="retired"} 1.0' in list(api.local.lines("/metrics"))
    assert [one["name"] for one in api.local.get("/api/v1/fleet")["unseen"]] == []


def test_no_member_speaks_for_another(api: Served, pair: Sequence[Node]) -> None:
    one, other = pair
    before = api.local.get("/api/v1/nodes")["items"]
    body = {"node": one.id, "name": "gone", "reason": "forged"}
    other.write(
        Change("retirement", one.id, body),
        Change("retirement", other.id, body),
        Change("revocation", one.id, {"node": one.id, "key_id": None, "upto": [0, 0], "retired": True}),
        Change("node", one.id, {"name": "n01 of another", "fleet": "test", "retired": True}),
        Change("node", "x", {"name": "n01 of another", "fleet": "test", "retired": True}),
        Change("heartbeat", "x", {"at_ms": 1, "interval_s": 5}),
        Change("policy", "conversion-of-others", {"administrators_of": []}),
    )
    one.body_when(other.id, "policy", "conversion-of-others", lambda _record: True)
    after = api.local.get("/api/v1/nodes")["items"]
    assert [(node["name"], node["state"]) for node in after] == [(node["name"], node["state"]) for node in before]
    assert [disk["id"] for disk in api.local.everything("/api/v1/disks")] == ["d1"]


def test_a_name_that_two_nodes_have_is_refused_with_their_ids(api: Served, pair: Sequence[Node]) -> None:
    one, other = pair
    other.write(Change("node", other.id, {"name": "n01", "fleet": "test"}))
    one.body_when(other.id, "node", other.id, lambda record: record.body["name"] == "n01")
    with pytest.raises(VmconvError, match="2 nodes are called n01"):
        api.local.get("/api/v1/nodes/n01")
    assert api.local.get(f"/api/v1/nodes/{one.id}")["node"] == one.id
    retired = "f" * 32
    other.write(Change("node", other.id, {"name": "n02", "fleet": "test"}))
    other.write(retirement_named(retired, "n01"), retirement(retired))
    one.body_when(other.id, "retirement", retired, lambda _record: True)
    assert api.local.get("/api/v1/nodes/n01")["node"] == one.id


def test_an_invitation_obeys_the_policy(api: Served, pair: Sequence[Node]) -> None:
    one, other = pair
    new = tokens.make(other.id)
    other.write(Change("token", new.id, {"label": "root of n02", "role": "admin", "hash": new.hash}))
    one.body_when(other.id, "token", new.id, lambda _record: True)
    client = NodeClient(api.url, ca=api.ca, token=new.text)
    governing: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/api/v1/join-tokens", {}),
        ("POST", "/api/v1/tokens", {"label": "of n01", "role": "admin"}),
        ("POST", "/api/v1/nodes/n02/retire", {}),
        ("POST", "/api/v1/nodes/n02/revoke", {}),
        ("PATCH", "/api/v1/nodes/n01/policy", {"administrators_of": [other.id]}),
    ]
    with client:
        for call in governing:
            with pytest.raises(AccessError, match=f"does not accept administrators of {other.id}"):
                client.call(*call)
        assert client.call("PATCH", "/api/v1/nodes/n01/policy", {"max_parallel": 3}).status == 200
        one.write(Change("policy", "conversion", {"administrators_of": [one.id]}))
        with pytest.raises(AccessError, match=f"does not accept administrators of {other.id}"):
            client.call("PATCH", "/api/v1/nodes/n01/policy", {"max_parallel": 3})
        one.write(Change("policy", "conversion", {"administrators_of": [one.id, other.id]}))
        with pytest.raises(VmconvError, match="does not hold the fleet's authority"):
            client.call(*governing[0])
        assert client.call(*governing[1]).content["ok"]


def test_a_node_of_which_only_a_heartbeat_came_is_shown(api: Served, pair: Sequence[Node]) -> None:
    pair[1].write(Change("node", pair[1].id, None), Change("heartbeat", pair[1].id, {"at_ms": 1, "interval_s": 5}))
    pair[0].body_when(pair[1].id, "heartbeat", pair[1].id, lambda _record: True)
    assert pair[1].id[:8] in [one["name"] for one in api.local.get("/api/v1/nodes")["items"]]


def test_a_certified_node_that_writes_nothing_of_itself_is_shown(api: Served, pair: Sequence[Node]) -> None:
    one, other = pair
    other.write(Change("node", other.id, None), certificate(other.id, "k"))
    one.body_when(other.id, "certificate", "k", lambda _record: True)
    shown = {node["node"]: (node["name"], node["has_record"]) for node in api.local.get("/api/v1/nodes")["items"]}
    assert shown[other.id] == (other.id[:8], False)


def test_changes_are_sent_as_they_arrive(api: Served, pair: Sequence[Node]) -> None:
    lines = api.local.lines("/api/v1/events", kinds="disk")
    assert next(lines) == "event: here"
    pair[1].write(Change("vm", "v1", {"datastore": "ds", "file": "x", "name": "x"}))
    (record,) = pair[1].write(Change("disk", "d9", {"datastore": "ds", "name": "new.raw"}))
    told = {}
    for line in lines:
        name, _, value = line.partition(": ")
        told[name] = value
        if not line and "kind" in told["data"]:
            break
    assert told["event"] == "disk"
    assert told["id"] == f"{record.owner}.{record.epoch}.{record.seq}"
    assert json.loads(told["data"])["body"]["name"] == "new.raw"


def test_a_stream_ends_with_its_token(api: Served) -> None:
    made = api.token("viewer")
    lines = NodeClient(api.url, ca=api.ca, token=made["token"]).lines("/api/v1/events")
    _until(lines, "event: here")
    api.local.call("DELETE", f"/api/v1/tokens/{api.node.id}/{made['body']['token']}")
    rest = list(lines)
    assert rest[-3:-1] == ["event: ended", f'data: {{"reason": "token {made["body"]["token"]} was revoked"}}']
    # What was committed with the revocation is not sent.
    assert not [line for line in rest if line == "event: transaction"]


def test_a_stream_ends_when_its_token_expires(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = api.client("viewer", ttl_s=3600).lines("/api/v1/events")
    _until(lines, "event: here")
    monkeypatch.setattr(api.app.state.fleet, "now_ms", lambda: wall_ms() + 3_600_000)
    assert "event: ended" in list(lines)


def test_a_stream_ends_with_its_browsers_session(api: Served) -> None:
    begun = api.app.state.fleet.sessions
    cookie = begun.begin(api.token("viewer")["token"])
    context = ssl.create_default_context(cafile=api.ca)
    connection = http.client.HTTPSConnection(api.url.removeprefix("https://"), timeout=PATIENCE, context=context)
    with closing(connection):
        connection.request("GET", "/api/v1/events", headers={"Cookie": f"__Host-vmconv={cookie}"})
        response = connection.getresponse()
        assert response.readline() == b"event: here\n"
        begun.end(cookie)
        assert b"event: ended\n" in response.read()


def test_many_sessions_of_one_token_end_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", sessions.MAX_OF_ONE + 1)
    all_ = sessions.BrowserSessions()
    other = all_.begin("other")
    made = [all_.begin("one") for _ in range(sessions.MAX_OF_ONE + 1)]
    assert all_.get(other)
    assert [one for one in made if not all_.get(one)] == made[:1]


def test_many_sessions_of_one_person_end_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", sessions.MAX_OF_ONE + 1)
    all_ = sessions.BrowserSessions()
    other = all_.begin("other", holder="issuer 1")
    made = [all_.begin(f"token {n}", holder="issuer 2") for n in range(sessions.MAX_OF_ONE + 1)]
    assert all_.get(other)
    assert [one for one in made if not all_.get(one)] == made[:1]


def test_a_caller_does_not_wait_beyond_its_token(api: Served, pair: Sequence[Node]) -> None:
    made = api.token("operator")
    pair[1].wire.disconnect()
    client = NodeClient(api.url, ca=api.ca, token=made["token"])
    revoke = f"/api/v1/tokens/{api.node.id}/{made['body']['token']}"

    def revoked() -> None:
        asked = lambda: [one for one in api.node.service.view().find("request") if one.body["verb"] == "scan"]  # noqa: E731
        api.node.until(asked)
        api.local.call("DELETE", revoke)

    thread = threading.Thread(target=revoked, daemon=True)
    thread.start()
    with pytest.raises(AccessError, match="was revoked"):
        client.call("POST", "/api/v1/nodes/n02/scan", {}, query={"wait": 300})
    thread.join(PATIENCE)


@pytest.mark.parametrize("path", ["export", "audit"])
def test_a_stream_of_records_ends_with_its_token(api: Served, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = api.token("admin")
    monkeypatch.setattr(exporting, "_LINES", 1)
    lines = NodeClient(api.url, ca=api.ca, token=made["token"]).lines(f"/api/v1/{path}")
    real = access.refuse_if_over

    def revoked(*arguments: Any) -> None:
        api.local.call("DELETE", f"/api/v1/tokens/{api.node.id}/{made['body']['token']}")
        real(*arguments)

    monkeypatch.setattr(exporting, "refuse_if_over", revoked)
    assert list(lines) == [f'{{"error": "token {made["body"]["token"]} was revoked"}}']


def test_an_answer_that_is_cut_off_is_not_complete() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nab\ncd\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        host, port = server.getsockname()
        with closing(http.client.HTTPConnection(host, port, timeout=PATIENCE)) as connection:
            connection.request("GET", "/")
            response = connection.getresponse()
            lines = _lines("n01", response)
            assert [next(lines), next(lines)] == [b"ab", b"cd"]
            with pytest.raises(UnreachableError, match="n01: the answer has ended early"):
                next(lines)
            response.close()


def test_the_audit_has_each_request_with_its_result(api: Served, pair: Sequence[Node]) -> None:
    one, other = pair
    made = api.token("operator")
    with NodeClient(api.url, ca=api.ca, token=made["token"]) as client:
        client.call("POST", "/api/v1/nodes/n01/scan", {})
        other.wire.disconnect()
        client.call("POST", "/api/v1/nodes/n02/scan", {})
    with api.client("admin") as client:
        entries = [json.loads(line) for line in client.lines("/api/v1/audit")]
    found = {(entry["verb"], entry["target"], entry["result"]): entry for entry in entries}
    mine = found["scan", one.id, "executed"]
    assert (mine["token"], mine["address"], mine["user"]) == (
        f"{one.id}/{made['body']['token']}",
        "127.0.0.1",
        "a operator",
    )
    assert mine["changes"] == []
    assert found["scan", other.id, "unanswered"]["arguments"] == {}
    created = found["token-create", one.id, "executed"]
    assert created["address"] is None
    assert "hash" not in json.dumps(entries)
    assert len({(entry["from"], entry["request"]) for entry in entries}) == len(entries)
    assert [entry["at_ms"] for entry in entries] == sorted(entry["at_ms"] for entry in entries)


def test_the_audit_is_bounded_and_not_for_operators(api: Served) -> None:
    api.local.call("POST", "/api/v1/nodes/n01/scan", {})
    (at,) = [json.loads(line)["at_ms"] for line in api.local.lines("/api/v1/audit")]

    def within(**query: int) -> int:
        return len(list(api.local.lines("/api/v1/audit", **query)))

    assert within(since_ms=at, until_ms=at + 1) == 1
    assert within(since_ms=at + 1, until_ms=at + 2) == within(until_ms=at) == 0
    with pytest.raises(UsageError, match="is not before"):
        within(since_ms=5, until_ms=5)
    with pytest.raises(AccessError, match="needs the role admin"), api.client("operator") as client:
        list(client.lines("/api/v1/audit"))


def _until(lines: Iterator[str], wanted: str) -> None:
    assert any(line == wanted for line in lines)


def test_a_reconnecting_subscriber_must_read_again(api: Served) -> None:
    context = ssl.create_default_context(cafile=api.ca)
    connection = http.client.HTTPSConnection(api.url.removeprefix("https://"), timeout=PATIENCE, context=context)
    headers = {"Authorization": f"Bearer {api.token('viewer')['token']}", "Last-Event-ID": "x.1.2"}
    with closing(connection):
        connection.request("GET", "/api/v1/events?kinds=disk", headers=headers)
        response = connection.getresponse()
        lines = [response.readline().decode().strip() for _ in range(6)]
    assert (lines[0], lines[4:]) == ("event: here", ["event: lost", "data: {}"])


def samples(api: Served) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Returns the metrics as Prometheus reads them, which refuses the same labels twice."""
    families = text_string_to_metric_families("\n".join(api.local.lines("/metrics")))
    found = [one for family in families for one in family.samples]
    read = {(one.name, frozenset(one.labels.items())): one.value for one in found}
    assert len(read) == len(found)
    return read


def test_metrics_are_what_prometheus_reads(api: Served, pair: Sequence[Node]) -> None:
    one, other = pair
    names = 'a"b\\c\nd', "n02\r\x00\u2028"
    other.write(
        Change("disk", "d2", {"datastore": "ds", "name": "x", "format": names[0]}),
        Change("node", other.id, {"name": names[1], "fleet": "test"}),
    )
    one.body_when(other.id, "node", other.id, lambda record: record.body["name"] == names[1])
    read = samples(api)
    formats = {dict(labels)["format"] for name, labels in read if name == "vmconv_fleet_disks"}
    assert formats == {"vmdk", names[0]}
    assert read["vmconv_fleet_nodes", frozenset({("state", "here")})] == 1
    assert all(name.startswith("vmconv_fleet_") for name, _ in read)
    assert read["vmconv_fleet_records_written_total", frozenset({"node": "n01", "id": one.id}.items())] > 0


def test_two_nodes_of_one_name_have_metrics_of_their_own(api: Served, pair: Sequence[Node]) -> None:
    one, other = pair
    for node in pair:
        node.write(Change("job", "j1", {"state": "done", "disk": "d1", "datastore": "ds", "format": "qcow2"}))
    other.write(
        Change("datastore", "ds", {"path": "/srv", "size": 5}), Change("node", other.id, {"name": "n01", "fleet": "f"})
    )
    one.write(Change("datastore", "ds", {"path": "/srv", "size": 7}))
    one.body_when(other.id, "node", other.id, lambda record: record.body["name"] == "n01")
    read = samples(api)
    sizes = {dict(labels)["id"]: value for (name, labels), value in read.items() if name.endswith("_size_bytes")}
    assert sizes == {one.id: 7, other.id: 5}


def test_metrics_have_the_format_that_is_asked_for(api: Served) -> None:
    token = api.token("viewer")["token"]
    kinds = {"text/plain": "text/plain", "application/openmetrics-text; version=1.0.0": "application/openmetrics-text"}
    for asked, given in kinds.items():
        answer = raw(api, "GET", "/metrics", Authorization=f"Bearer {token}", Accept=asked)
        assert (answer.status, answer.headers["Content-Type"].partition(";")[0]) == (200, given)


# A restored node


@pytest.fixture
def restored(tmp_path: Path) -> Iterator[Served]:
    """A node without links that waits for two members."""
    node = Node(3, tmp_path, {}, restored_with=["1" * 32, "2" * 32])
    with closing(node.service):
        node.service.start()
        with served(node) as one:
            yield one


def test_a_restored_node_says_whom_it_waits_for_and_changes_nothing(restored: Served) -> None:
    assert restored.local.get("/api/v1/fleet")["waits_for"] == ["1" * 8, "2" * 8]
    waits = "this node has a restored database, and writes again once it has heard from 11111111, 22222222"
    for path, body in (
        ("/api/v1/tokens", {"label": "x", "role": "viewer"}),
        (f"/api/v1/nodes/{restored.node.id}/scan", {}),
        (f"/api/v1/nodes/{restored.node.id}/revoke", {}),
    ):
        with pytest.raises(VmconvError) as refused:
            restored.local.call("POST", path, body)
        assert str(refused.value) == waits
        assert "vmconv node resume" in str(refused.value.hint)


def test_a_restored_node_resumes_without_members_and_its_history_says_so(restored: Served) -> None:
    for wish, said in (
        ({"without": ["4" * 32]}, "this node does not wait for"),
        ({"without": ["n77"]}, "this node does not wait for"),
    ):
        with pytest.raises(UsageError, match=said):
            restored.local.call("POST", "/api/v1/resume", wish)
    answer = restored.local.call("POST", "/api/v1/resume", {"without": ["1" * 32]}).content
    assert (answer, restored.node.service.serving) == ({"waits_for": ["2" * 8]}, False)
    assert restored.local.call("POST", "/api/v1/resume", {"alone": True}).content == {"waits_for": []}
    acts = restored.node.until(lambda: restored.node.service.view().find("transaction"))
    assert {("resume", "1" * 32)} <= {(act.body["verb"], *act.body["body"]["without"]) for act in acts}
    with pytest.raises(UsageError, match="waits for no other one"):
        restored.local.call("POST", "/api/v1/resume", {"alone": True})


def test_only_the_local_administrator_resumes_a_node(api: Served) -> None:
    with pytest.raises(AccessError, match="for the local administrator"):
        api.client("admin").call("POST", "/api/v1/resume", {"alone": True})


def test_a_node_with_two_histories_changes_nothing_until_they_are_merged(api: Served) -> None:
    one = api.node
    (record,) = one.write(Change("thing", "t", {"value": 1}))
    payload = encode(record._replace(body={"value": 2}))
    other = decode(seal(PlainSigner(one.id).sign(payload), payload))
    replica = one.service._replica
    one.service._engine.call(lambda: replica._context.forks.keep((record, other), 0)).result(PATIENCE)
    assert api.local.get("/api/v1/fleet")["forked"]
    with pytest.raises(VmconvError, match="this node has two histories") as refused:
        api.local.call("POST", "/api/v1/tokens", {"label": "x", "role": "viewer"})
    assert "vmconv node resume --merge" in str(refused.value.hint)
    assert any("has two histories" in text for text in api.local.get("/api/v1/fleet")["problems"])
    assert api.local.call("POST", "/api/v1/resume", {"merge": True}).content == {
        "waits_for": [],
        "overridden": [],
        "overridden_count": 0,
    }
    assert not api.local.get("/api/v1/fleet")["forked"]
    api.local.call("POST", "/api/v1/tokens", {"label": "x", "role": "viewer"})
    acts = one.service.view().find("transaction", one.id)
    assert ("resume", True) in {(act.body["verb"], act.body["body"].get("merge")) for act in acts}
    with pytest.raises(VmconvError, match="has one history"):
        api.local.call("POST", "/api/v1/resume", {"merge": True})


# The application itself


def test_the_description_has_every_verb(api: Served) -> None:
    described = api.local.get("/api/v1/openapi.json")
    assert described["openapi"].startswith("3.")
    operations = {f"{method.upper()} {path}" for path, ways in described["paths"].items() for method in ways}
    by_verb = {
        "convert": "POST /api/v1/disks/{owner}/{disk}/convert",
        "convert-machine": "POST /api/v1/vms/{owner}/{vm}/convert",
        "cancel": "POST /api/v1/jobs/{owner}/{job}/cancel",
        "scan": "POST /api/v1/nodes/{node}/scan",
        "datastore-add": "POST /api/v1/datastores",
        "datastore-remove": "DELETE /api/v1/datastores/{owner}/{name}",
        "datastore-appoint": "PUT /api/v1/datastores/{owner}/{name}/converters",
        "datastore-give": "POST /api/v1/datastores/{owner}/{name}/give",
        "datastore-take": "POST /api/v1/datastores/{owner}/{name}/take",
        "policy-set": "PATCH /api/v1/nodes/{node}/policy",
        "resume": "POST /api/v1/resume",
        "token-create": "POST /api/v1/tokens",
        "token-revoke": "DELETE /api/v1/tokens/{owner}/{identifier}",
        "webhook-add": "POST /api/v1/webhooks",
        "webhook-remove": "DELETE /api/v1/webhooks/{owner}/{identifier}",
        "group-set": "POST /api/v1/groups",
        "group-remove": "DELETE /api/v1/groups/{owner}/{identifier}",
        "retire": "POST /api/v1/nodes/{node}/retire",
        "revoke": "POST /api/v1/nodes/{node}/revoke",
    }
    assert by_verb.keys() == VERBS.keys()
    assert set(by_verb.values()) <= operations


def test_answers_protect_browsers(api: Served) -> None:
    for path in ("/healthz", "/login", "/nowhere", "/api/v1/fleet"):
        headers = raw(api, "GET", path).headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Cache-Control"] == "no-store"


def test_no_body_is_too_large_to_refuse(api: Served) -> None:
    token = f"Bearer {api.token('admin')['token']}"
    body = b'{"label": "' + b"x" * MAX_BODY + b'"}'
    response = raw(api, "POST", "/api/v1/tokens", body, Authorization=token, Content_Type="application/json")
    assert response.status == 413


def test_the_local_administrator_cuts_a_node_off(api: Served, pair: Sequence[Node]) -> None:
    assert api.local.call("PUT", "/api/v1/link", {"connected": False}).content == {"connected": False}
    wait_until(lambda: not pair[0].service.neighbours(), PATIENCE, "no neighbour")
    fleet = api.local.get("/api/v1/fleet")
    assert (fleet["cut"], fleet["problems"]) == (True, ["disconnected by the administrator"])
    assert api.local.call("PUT", "/api/v1/link", {"connected": True}).content == {"connected": True}
    # The service learns of links on its own thread.
    wait_until(lambda: pair[0].service.neighbours() == [pair[1].id], PATIENCE, "neighbours again")
