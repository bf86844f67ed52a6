"""Whose name is whose: the authority gives a node its name, and no other node is shown or selected by it."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from fleet.written import NODES, Written
from vmconv.plugin import UsageError
from vmconv_fleet.catalogue.selection import parse
from vmconv_fleet.catalogue.snapshot import Snapshot
from vmconv_fleet.trust.authority import Authority, AuthorityError
from vmconv_fleet.trust.certificates import CertificateTrust
from vmconv_fleet.trust.identity import IdentityError, Keys, binding, new_node_id, read_certificate
from vmconv_fleet.trust.names import name_key, names_in_use


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.found(str(tmp_path), "lab")


def certified(
    authority: Authority, name: str, *, node: str | None = None, member: bool = False, **more: object
) -> bytes:
    """Returns the certificate of a new node, or of a member that renews it."""
    id = node or new_node_id()
    request = Keys.generate().request(id, "lab", ["127.0.0.1"])
    return authority.issue(request, node=id if member else None, name=name, **more)  # type: ignore[arg-type]


def called(authority: Authority, pem: bytes) -> str:
    return binding(read_certificate(pem), [authority.certificate]).name


@pytest.mark.parametrize("name", ["n01", "Grüße 1", "a:b%2f", "x" * 80, ""])
def test_a_certificate_has_the_name_of_its_node(authority: Authority, name: str) -> None:
    assert called(authority, certified(authority, name)) == name


@pytest.mark.parametrize("name", ["-rf", ".hidden", "a/b", "a\nb", "a\u202eb", " a", "x" * 500])
def test_a_name_that_is_a_trap_is_not_certified(authority: Authority, name: str) -> None:
    with pytest.raises(IdentityError, match="name of a node that"):
        certified(authority, name)


@pytest.mark.parametrize("name", ["0123abcd", "a" * 32])
def test_a_name_that_looks_like_an_id_is_not_certified(authority: Authority, name: str) -> None:
    with pytest.raises(AuthorityError, match="may be taken for the id of a node"):
        certified(authority, name)


def test_a_name_in_use_is_refused_to_a_new_node_and_left_out_for_a_member(authority: Authority) -> None:
    first = certified(authority, "n01", node=NODES[1])
    taken = names_in_use([read_certificate(first)])
    assert taken[name_key("N01")] == {NODES[1]}
    for name in ("n01", "N01"):
        with pytest.raises(AuthorityError, match=f"{name} is the name of node {NODES[1]}"):
            certified(authority, name, taken=taken)
        assert called(authority, certified(authority, name, member=True, taken=taken)) == ""
    assert called(authority, certified(authority, "n01", node=NODES[1], member=True, taken=taken)) == "n01"
    assert called(authority, certified(authority, "n02", taken=taken)) == "n02"


def test_the_newest_certificate_has_the_name_of_a_node(authority: Authority) -> None:
    trust = CertificateTrust(authority.certificate.public_bytes(serialization.Encoding.PEM))
    trust.learn_certificate(certified(authority, "later", node=NODES[1], lifetime=datetime.timedelta(days=20)))
    trust.learn_certificate(certified(authority, "before", node=NODES[1], lifetime=datetime.timedelta(days=10)))
    trust.learn_certificate(certified(authority, "", node=NODES[2]))
    assert trust.names() == {NODES[1]: "later"}


@pytest.fixture
def fleet() -> Snapshot:
    """The first node has its name from the authority; the second one claims it, and the third is of an old version."""
    written = Written()
    for node, name in zip(NODES, ("n01", "n01", "n03"), strict=False):
        written.write(node, ("node", node, {"name": name, "fleet": "f"}))
        written.write(node, ("datastore", "ds", {"path": "/srv"}))
        written.write(node, ("disk", "d", {"datastore": "ds", "name": "a", "format": "raw", "virtual_size": 1}))
    return Snapshot(written.store, NODES[0], 0, neighbours=(), retirements={}, names={NODES[0]: "n01"})


def test_a_node_that_claims_a_name_of_another_is_shown_by_its_id(fleet: Snapshot) -> None:
    shown = {one.node: (one.name, one.claims) for one in fleet.nodes()}
    assert shown == {NODES[0]: ("n01", ""), NODES[1]: (NODES[1][:8], "n01"), NODES[2]: ("n03", "")}


def test_a_claimed_name_selects_its_owner_alone(fleet: Snapshot) -> None:
    assert fleet.find_node("n01") == NODES[0]
    assert fleet.find_node(NODES[1]) == NODES[1]
    for text in ("node=n01", "node='*n01*'"):
        chosen = fleet.disks(parse(text), limit=10).records
        assert [one.owner for one in chosen] == [NODES[0]], text


def test_a_node_is_not_shown_by_a_name_that_it_states_besides_its_own() -> None:
    written = Written()
    written.write(NODES[0], ("node", NODES[0], {"name": "other", "fleet": "f"}))
    snapshot = Snapshot(written.store, NODES[0], 0, neighbours=(), retirements={}, names={NODES[0]: "n01"})
    assert [(one.name, one.claims) for one in snapshot.nodes()] == [("n01", "other")]
    assert snapshot.find_node("other") is None


def test_a_member_without_a_valid_record_of_itself_is_listed() -> None:
    written = Written()
    written.write(NODES[0], ("node", NODES[0], {"name": "n01", "fleet": "f"}))
    written.write(NODES[1], ("node", NODES[1], {"name": 1}), ("heartbeat", NODES[1], {}), ("note", "x", {}))
    snapshot = Snapshot(written.store, NODES[0], 0, neighbours=[NODES[1]], retirements={}, certified=NODES[:2])
    shown = {one.node: (one.name, one.state, one.has_record) for one in snapshot.nodes()}
    assert shown == {NODES[0]: ("n01", "here", True), NODES[1]: (NODES[1][:8], "up", False)}
    assert snapshot.find_node(NODES[1]) == NODES[1]


def test_two_nodes_of_an_old_version_may_still_have_one_name() -> None:
    written = Written()
    for node in NODES[:2]:
        written.write(node, ("node", node, {"name": "n01", "fleet": "f"}))
    snapshot = Snapshot(written.store, NODES[0], 0, neighbours=(), retirements={})
    with pytest.raises(UsageError, match="2 nodes are called n01"):
        snapshot.find_node("n01")
