"""The authority: what it signs, whom it lets in, and what of that is refused."""

from __future__ import annotations

import datetime
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from vmconv_fleet import config as settings
from vmconv_fleet.config import NodeConfig
from vmconv_fleet.errors import FleetError, NotReadyError
from vmconv_fleet.replication.records import Position, Record
from vmconv_fleet.testing import Lab, free_port
from vmconv_fleet.trust import credentials, joining, membership
from vmconv_fleet.trust.authority import Authority, AuthorityError, Invitation, is_revocation
from vmconv_fleet.trust.certificates import CertificateTrust
from vmconv_fleet.trust.identity import IdentityError, Keys, binding, new_node_id, read_authorities, read_certificate
from vmconv_fleet.trust.joining import JoinError, JoinService
from vmconv_fleet.trust.renewal import Renewal


@pytest.fixture
def authority(lab: Lab) -> Authority:
    lab.add()
    assert lab.authority is not None
    return lab.authority


def csr(keys: Keys, node: str) -> bytes:
    return keys.request(node, "lab", ["10.0.0.1", "host.internal"])


def test_a_certificate_binds_the_node_id_to_both_keys(authority: Authority) -> None:
    keys, node = Keys.generate(), new_node_id()
    certificate = read_certificate(authority.issue(csr(keys, node)))
    bound = binding(certificate, [authority.certificate])
    assert (bound.node, bound.fleet) == (node, "lab")
    assert bound.key.public_bytes_raw() == keys.signing.public_key().public_bytes_raw()
    assert certificate.public_key() == keys.tls.public_key()


def test_a_request_cannot_make_its_node_an_authority(authority: Authority) -> None:
    keys, node = Keys.generate(), new_node_id()
    asked = x509.load_pem_x509_csr(csr(keys, node))
    builder = x509.CertificateSigningRequestBuilder().subject_name(asked.subject)
    for extension in asked.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    pem = builder.sign(keys.tls, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    constraints = read_certificate(authority.issue(pem)).extensions.get_extension_for_class(x509.BasicConstraints)
    assert not constraints.value.ca


@pytest.mark.parametrize("name", ["", "localhost", "0" * 32, "F" * 32, "a" * 31, "a" * 33])
def test_a_request_for_an_invalid_node_id_is_refused(authority: Authority, name: str) -> None:
    keys = Keys.generate()
    if not name:
        key = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        pem = key.sign(keys.tls, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    else:
        pem = csr(keys, name)
    with pytest.raises(AuthorityError):
        authority.issue(pem)


def test_a_request_that_was_changed_after_it_was_signed_is_refused(authority: Authority) -> None:
    other = x509.load_pem_x509_csr(csr(Keys.generate(), new_node_id()))
    der = bytearray(other.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    damaged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(AuthorityError, match="bad signature"):
        authority.issue(damaged)


def test_a_request_without_a_signing_key_is_refused(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, new_node_id())])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("a")]), critical=False)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(AuthorityError, match="0 signing keys"):
        authority.issue(pem)


@pytest.mark.parametrize("junk", [b"", b"\x00" * 100, b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"])
def test_an_invalid_request_is_refused_in_one_line(authority: Authority, junk: bytes) -> None:
    with pytest.raises(AuthorityError, match="no certificate request"):
        authority.issue(junk)


def test_a_token_admits_one_node(authority: Authority) -> None:
    token = authority.make_token()
    authority.redeem(token)
    with pytest.raises(AuthorityError, match="used before"):
        authority.redeem(token)


def test_a_token_used_by_many_at_once_admits_one(authority: Authority) -> None:
    token, let_in = authority.make_token(), []

    def redeem() -> None:
        try:
            authority.redeem(token)
            let_in.append(1)
        except AuthorityError:
            pass

    threads = [threading.Thread(target=redeem) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert let_in == [1]


def test_a_token_expires(authority: Authority) -> None:
    token = authority.make_token(60, now=1000.0)
    with pytest.raises(AuthorityError, match="expired"):
        authority.redeem(token, now=1061.0)


def test_tokens_are_kept_as_hashes(authority: Authority, lab: Lab) -> None:
    token = authority.make_token()
    assert token not in Path(lab.nodes[0].directory, "authority", "tokens.json").read_text()


def test_private_files_are_for_their_owner_only(authority: Authority, lab: Lab) -> None:
    directory = Path(lab.nodes[0].directory)
    authority.make_token()
    private = [
        *directory.glob("identity/*.key"),
        *directory.glob("authority/*.key"),
        directory / "authority/tokens.json",
    ]
    assert len(private) == 4
    assert [path.stat().st_mode & 0o777 for path in private] == [0o600] * 4


def test_a_copy_of_the_authority_signs_what_the_first_one_would(authority: Authority, lab: Lab) -> None:
    other = lab.add()
    with pytest.raises(AuthorityError, match="does not hold"):
        Authority.load(other.directory)
    Authority.of_key(other.directory, authority.export()).adopt()
    assert Path(other.directory, "authority").stat().st_mode & 0o777 == 0o700
    pem = Authority.load(other.directory).issue(csr(Keys.generate(), new_node_id()))
    binding(read_certificate(pem), [authority.certificate])


def test_an_authority_of_another_fleet_is_not_adopted(authority: Authority, lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    stranger = Authority.found(str(tmp_path / "other"), "other")
    with pytest.raises(AuthorityError, match="not that of this fleet"):
        Authority.of_key(lab.nodes[0].directory, stranger.export())


def test_a_revocation_is_the_authoritys_alone(authority: Authority, tmp_path: Path) -> None:
    node = new_node_id()
    body = authority.revocation(node, upto=[5, 7])
    assert is_revocation(body, [authority.certificate])
    for name, value in (
        ("node", new_node_id()),
        ("upto", [9, 9]),
        ("retired", True),
        ("key_id", "a"),
        ("signature", "x"),
    ):
        assert not is_revocation({**body, name: value}, [authority.certificate])
    (tmp_path / "other").mkdir()
    stranger = Authority.found(str(tmp_path / "other"), "lab")
    assert not is_revocation(stranger.revocation(node), [authority.certificate])


def test_what_the_authority_signed_has_one_form(authority: Authority) -> None:
    """A member could write variants of one revocation until all nodes had no room for the next true one."""
    body = authority.revocation(new_node_id(), retired=True)
    signature = body["signature"]
    spaced = " ".join(signature[at : at + 2] for at in range(0, len(signature), 2))
    for variant in ({"n": 1}, {"signature": signature.upper()}, {"signature": spaced}, {"signature": f"{signature} "}):
        assert not is_revocation({**body, **variant}, [authority.certificate])
    assert is_revocation(dict(reversed(body.items())), [authority.certificate])


def test_the_keys_of_nodes_and_their_revocations_are_the_authoritys_alone(authority: Authority, lab: Lab) -> None:
    trust = CertificateTrust(authority.certificate.public_bytes(serialization.Encoding.PEM))
    node, keys = new_node_id(), Keys.generate()
    for days in (20, 10):
        trust.learn_certificate(authority.issue(csr(keys, node), lifetime=datetime.timedelta(days=days)))
    ((owner, key, until, is_revoked),) = trust.certified_keys()
    assert (owner, is_revoked, (until - datetime.datetime.now(datetime.UTC)).days) == (node, False, 19)
    for body in ({"node": node, "key_id": key}, {"node": node, "key_id": None}, {}):
        assert not trust.learn_revocation(body)
    assert trust.learn_certificate(b"junk") is None
    assert trust.certified_keys() == [(node, key, until, False)]
    assert trust.learn_revocation(authority.revocation(node, key_id=key))
    assert trust.certified_keys() == [(node, key, until, True)]


def test_the_name_of_a_retired_node_is_the_authoritys_alone(authority: Authority) -> None:
    node, key = new_node_id(), authority.certificate.public_bytes(serialization.Encoding.PEM)
    body = authority.retirement(node, name="n09", reason="burnt", at_ms=5)
    trust = CertificateTrust(key)

    def learn(kind: str, said: Mapping[str, Any]) -> bool:
        return trust.learn(Record(new_node_id(), kind, node, 1, 1, 1, 0, False, 0, "k", 0, said, b""))

    for changed in ({"node": new_node_id()}, {"name": "n01"}, {"reason": ""}, {"at_ms": 6}, {"signature": "0"}):
        assert not learn("retirement", {**body, **changed})
    assert not learn("revocation", {**body, "upto": [0, 0], "retired": True, "key_id": None, "at": 5})
    assert learn("retirement", body)
    assert trust.retirements() == {}
    assert learn("revocation", authority.revocation(node, retired=True))
    assert trust.retirements() == {node: "n09"}
    assert not trust.is_revoked(new_node_id())


# Joining


def test_an_id_is_known_by_its_records_or_by_its_certificate(lab: Lab) -> None:
    config, certified = lab.add(), lab.add()
    trust = CertificateTrust(Path(config.directory, "ca.pem").read_bytes())
    trust.learn_certificate(credentials.load(certified).certificate)
    service = SimpleNamespace(view=lambda: SimpleNamespace(positions=lambda: {"e" * 32: Position(1, 1)}))
    members = membership.Members(service, trust, lambda: None, list, lambda *_: None)  # type: ignore[arg-type]
    assert [members.is_known(node) for node in (certified.node, "e" * 32, "f" * 32)] == [True, True, False]


def test_a_certificate_that_cannot_be_written_yet_admits_nobody(lab: Lab) -> None:
    config, other = lab.add(), lab.add()
    trust = CertificateTrust(Path(config.directory, "ca.pem").read_bytes())
    waiting: Future[list[Record]] = Future()
    waiting.set_exception(TimeoutError())
    service = SimpleNamespace(write=lambda _changes: waiting)
    members = membership.Members(service, trust, lambda: None, list, lambda *_: None)  # type: ignore[arg-type]
    with pytest.raises(NotReadyError, match="cannot write yet"):
        members.certified(credentials.load(other).certificate)


class Members:
    """Implements `joining.Membership` without a running node."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.revoked: set[str] = set()
        self.issued: list[bytes] = []
        self.used: dict[str, set[str]] = {}
        self.expected: dict[str, object] = {}

    def is_known(self, node: str) -> bool:
        return node in self.known

    def is_revoked(self, node: str, key_id: str) -> bool:
        return not {node, key_id}.isdisjoint(self.revoked)

    def names(self) -> dict[str, set[str]]:
        return self.used

    def seeds(self) -> list[str]:
        return [f"10.0.0.{number}:7447" for number in range(100)]

    def certificates(self) -> list[bytes]:
        return self.issued

    def certified(self, certificate: bytes) -> None:
        self.issued.append(certificate)

    def expect(self, node: str, stated: object) -> None:
        self.expected[node] = stated

    def revoke(self, node: str) -> None:
        self.revoked.add(node)


@pytest.fixture
def members() -> Members:
    return Members()


@pytest.fixture
def invite(
    authority: Authority, lab: Lab, members: Members, request: pytest.FixtureRequest
) -> Callable[[], Invitation]:
    """The joining service runs; returns an invitation to it."""
    config = replace(lab.nodes[0], join=f"127.0.0.1:{free_port()}")
    service = JoinService(config, authority, members)
    service.start()
    request.addfinalizer(service.close)
    return lambda: authority.invite(config, host="127.0.0.1")


def joined(lab: Lab, invitation: Invitation, directory: Path) -> NodeConfig:
    keys, node = Keys.generate(), new_node_id()
    granted = joining.join(invitation, csr(keys, node), links=["10.0.0.9:7447"])
    directory.mkdir()
    config = replace(
        lab.nodes[0], directory=str(directory), node=node, authorities=[invitation.address], connect=granted.seeds
    )
    (directory / "ca.pem").write_bytes(granted.authorities)
    credentials.keep_members(config.directory, [granted.members])
    credentials.install(config.directory, keys, granted.certificate)
    settings.save(config)
    return config


def test_a_node_joins_by_an_invitation(
    lab: Lab, invite: Callable[[], Invitation], members: Members, tmp_path: Path
) -> None:
    config = joined(lab, invite(), tmp_path / "joined")
    assert credentials.load(config).bound.node == config.node
    assert config.connect[0] == lab.nodes[0].listen[0]
    assert len(config.connect) == 1 + joining.MAX_SEEDS
    assert len(members.issued) == 1
    assert members.expected == {config.node: ["10.0.0.9:7447"]}


def test_a_joining_node_gets_the_members_certificates(
    lab: Lab, invite: Callable[[], Invitation], tmp_path: Path
) -> None:
    first, second = (joined(lab, invite(), tmp_path / name) for name in ("first", "second"))
    trust = CertificateTrust(Path(second.path("ca.pem")).read_bytes())
    trust.learn_members(credentials.read_members(second))
    assert set(trust.members()) == {first.node, second.node}


def test_certificates_of_another_authority_are_refused(lab: Lab, authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    stranger = Authority.found(str(tmp_path / "other"), "lab").issue(csr(Keys.generate(), new_node_id()))
    trust = CertificateTrust(authority.certificate.public_bytes(serialization.Encoding.PEM))
    credentials.keep_members(lab.nodes[0].directory, [stranger])
    with pytest.raises(IdentityError, match="not of this fleet"):
        trust.learn_members(credentials.read_members(lab.nodes[0]))
    assert list(trust.members()) == []


def test_no_more_members_are_sent_than_are_read() -> None:
    assert joining._within(25, [b"a" * 10, b"b" * 10, b"c" * 10]) == "a" * 10 + "b" * 10


def test_an_invitation_is_its_text(invite: Callable[[], Invitation]) -> None:
    invitation = invite()
    assert Invitation.parse(str(invitation)) == invitation


@pytest.mark.parametrize("text", ["", "x", "vmconv-join://", "https://a/b/c/d", "vmconv-join://a:1/b/c/d"])
def test_an_invalid_invitation_is_refused(text: str) -> None:
    with pytest.raises(AuthorityError, match="not an invitation"):
        Invitation.parse(text)


def test_an_invitation_is_good_once(lab: Lab, invite: Callable[[], Invitation], tmp_path: Path) -> None:
    invitation = invite()
    joined(lab, invitation, tmp_path / "first")
    with pytest.raises(JoinError, match="used before"):
        joined(lab, invitation, tmp_path / "second")


def test_a_stranger_without_a_token_costs_no_signature(
    invite: Callable[[], Invitation], members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of all members are read for each certificate, and anybody may ask as often as they like."""
    invitation, read = invite(), list[str]()

    def names() -> Mapping[str, set[str]]:
        read.append("names")
        return {}

    monkeypatch.setattr(members, "names", names)
    with pytest.raises(JoinError, match="unknown or was used"):
        joining.join(invitation._replace(token="guessed"), csr(Keys.generate(), new_node_id()))
    assert read == []


def test_expired_tokens_are_not_kept(authority: Authority, lab: Lab) -> None:
    authority.make_token(60, now=1000.0)
    authority.make_token(60, now=2000.0)
    kept = json.loads(Path(lab.nodes[0].directory, "authority", "tokens.json").read_text())
    assert list(kept.values()) == [2060.0]


def test_a_used_node_id_is_refused_and_the_token_stays_valid(
    lab: Lab, invite: Callable[[], Invitation], members: Members, tmp_path: Path
) -> None:
    invitation, node = invite(), new_node_id()
    members.known.add(node)
    with pytest.raises(JoinError, match="is taken"):
        joining.join(invitation, csr(Keys.generate(), node))
    joined(lab, invitation, tmp_path / "joined")


def test_nothing_is_sent_to_an_authority_with_another_fingerprint(
    invite: Callable[[], Invitation], authority: Authority
) -> None:
    invitation = invite()
    with pytest.raises(JoinError, match="not of the invitation's fleet") as caught:
        joining.join(invitation._replace(fingerprint="0" * 64), csr(Keys.generate(), new_node_id()))
    assert caught.value.hint is not None
    authority.redeem(invitation.token)


def test_a_member_that_is_not_the_one_of_the_invitation_gets_no_token(
    invite: Callable[[], Invitation], authority: Authority
) -> None:
    invitation = invite()
    with pytest.raises(JoinError, match="the invitation names"):
        joining.join(invitation._replace(node=new_node_id()), csr(Keys.generate(), new_node_id()))
    authority.redeem(invitation.token)


def test_an_unreachable_address_is_reported_in_one_line(invite: Callable[[], Invitation]) -> None:
    nowhere = invite()._replace(address=f"127.0.0.1:{free_port()}")
    with pytest.raises(JoinError, match="cannot ask the authority"):
        joining.join(nowhere, csr(Keys.generate(), new_node_id()))


def test_a_certificate_is_renewed_for_the_node_that_shows_it(
    lab: Lab, invite: Callable[[], Invitation], tmp_path: Path
) -> None:
    config = joined(lab, invite(), tmp_path / "joined")
    before = credentials.load(config)
    after = credentials.request_new(config)
    assert after.bound.serial != before.bound.serial
    assert after.bound.key_id == before.bound.key_id
    assert credentials.request_new(config, new_keys=True).bound.key_id != before.bound.key_id


@pytest.mark.parametrize("name", ["www.bank.example", "*.com", "10.0.0.9"])
def test_a_member_gets_no_certificate_for_names_that_are_not_its_own(
    name: str, lab: Lab, invite: Callable[[], Invitation], members: Members, tmp_path: Path
) -> None:
    """It may name what it likes in its own settings; a machine that names what it has gets what is allowed of it."""
    config = joined(lab, invite(), tmp_path / "joined")
    members.used["10.0.0.9"] = {lab.nodes[0].node}
    request = Keys.generate().request(config.node, config.fleet, ["10.0.0.8", name])
    with pytest.raises(JoinError, match=r"refused: .*is (not|in use)"):
        joining.renew(config, config.authorities[0], request)
    granted = joining.renew(replace(config, addresses=[]), config.authorities[0], request)
    bound = binding(read_certificate(granted.certificate), read_authorities(granted.authorities))
    assert bound.addresses == {"10.0.0.8"}


def test_a_node_cannot_renew_for_another(lab: Lab, invite: Callable[[], Invitation], tmp_path: Path) -> None:
    config = joined(lab, invite(), tmp_path / "joined")
    with pytest.raises(JoinError, match="refused"):
        joining.renew(config, config.authorities[0], csr(Keys.generate(), lab.nodes[0].node))


def test_without_a_certificate_nothing_is_renewed(invite: Callable[[], Invitation], authority: Authority) -> None:
    invitation = invite()
    context = joining._client_context(joining._authority_certificate(invitation))
    with (
        joining._connected(invitation.address, context) as connection,
        pytest.raises(JoinError, match="client certificate"),
    ):
        joining._post(connection, "/renew", {"request": csr(Keys.generate(), new_node_id()).decode()})


def test_an_expired_certificate_renews_itself_for_the_same_keys(
    lab: Lab, invite: Callable[[], Invitation], authority: Authority, tmp_path: Path
) -> None:
    config = joined(lab, invite(), tmp_path / "joined")
    expire(config, authority, days=120)
    with pytest.raises(JoinError, match="only for the same keys"):
        credentials.request_new(config, new_keys=True)
    before = credentials.load(config)
    after = credentials.request_new(config)
    assert after.bound.not_after > datetime.datetime.now(datetime.UTC) > before.bound.not_after
    assert after.bound.key_id == before.bound.key_id


def test_a_certificate_that_expired_long_ago_does_not_renew_itself(
    lab: Lab, invite: Callable[[], Invitation], authority: Authority, tmp_path: Path
) -> None:
    config = joined(lab, invite(), tmp_path / "joined")
    expire(config, authority, days=joining.RETURN_WITHIN.days + 1)
    with pytest.raises(JoinError, match="181 days ago, at most 180 are allowed"):
        credentials.request_new(config)


@pytest.mark.parametrize("what", ["node", "key"])
def test_an_expired_certificate_of_a_revoked_node_or_key_does_not_renew_itself(
    what: str, lab: Lab, invite: Callable[[], Invitation], authority: Authority, members: Members, tmp_path: Path
) -> None:
    config = joined(lab, invite(), tmp_path / "joined")
    expire(config, authority, days=1)
    members.revoked.add(config.node if what == "node" else credentials.load(config).bound.key_id)
    with pytest.raises(JoinError, match="was revoked"):
        credentials.request_new(config)


def test_another_ones_certificate_is_no_proof(
    lab: Lab, invite: Callable[[], Invitation], authority: Authority, tmp_path: Path
) -> None:
    """Certificates are public: a stranger has one, expired or not, and keys of its own."""
    config = joined(lab, invite(), tmp_path / "joined")
    for days in (1, -300):
        expire(config, authority, days=days)
        certificate = Path(config.credential("node.pem")).read_bytes()
        with (
            joining._connected(config.authorities[0], joining._member_context(config, shows=False)) as connection,
            pytest.raises(JoinError, match="only for the same keys"),
        ):
            asked = {"request": csr(Keys.generate(), config.node).decode(), "certificate": certificate.decode()}
            joining._post(connection, "/renew", asked)


def expire(config: NodeConfig, authority: Authority, *, days: int) -> None:
    """Gives the node a certificate that has expired so many days ago."""
    keys = Keys.load(config.path("identity"))
    lifetime = datetime.timedelta(days=-days)
    credentials.install(config.directory, keys, authority.issue(csr(keys, config.node), lifetime=lifetime))


def test_a_revoked_key_gets_no_new_certificate(
    lab: Lab, invite: Callable[[], Invitation], members: Members, tmp_path: Path
) -> None:
    """After a theft: the node has new keys, and the old ones alone were revoked."""
    config = joined(lab, invite(), tmp_path / "joined")
    shutil.copytree(config.directory, tmp_path / "thief", symlinks=True)
    members.revoked.add(credentials.load(config).bound.key_id)
    with pytest.raises(JoinError, match="was revoked"):
        credentials.request_new(replace(config, directory=str(tmp_path / "thief")), new_keys=True)


def test_a_member_that_pretends_to_be_the_authority_is_passed_over(
    lab: Lab, invite: Callable[[], Invitation], members: Members, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config, member = joined(lab, invite(), tmp_path / "joined"), joined(lab, invite(), tmp_path / "member")
    before = Path(config.path("ca.pem")).read_bytes()
    (tmp_path / "own").mkdir()
    pretended = JoinService(replace(member, join="127.0.0.1:0"), Authority.found(str(tmp_path / "own"), "lab"), members)
    pretended.authority.certificate = read_authorities(before)[0]
    address = f"127.0.0.1:{pretended.start()}"
    request.addfinalizer(pretended.close)
    with pytest.raises(IdentityError, match="not of this fleet's authority"):
        credentials.request_new(replace(config, authorities=[address]))
    credentials.request_new(replace(config, authorities=[address, *config.authorities]))
    assert Path(config.path("ca.pem")).read_bytes() == before


def test_a_refusal_says_more_than_an_authority_that_is_away(
    lab: Lab, invite: Callable[[], Invitation], members: Members, tmp_path: Path
) -> None:
    config = joined(lab, invite(), tmp_path / "joined")
    members.revoked.add(config.node)
    with pytest.raises(JoinError, match="was revoked"):
        credentials.request_new(replace(config, authorities=[*config.authorities, f"127.0.0.1:{free_port()}"]))


def test_a_change_of_addresses_is_certified_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(lab.add(), addresses=[])
    there = ["127.0.0.1", "10.0.0.5"]
    monkeypatch.setattr("vmconv_fleet.trust.addresses.local_addresses", lambda: list(there))
    due, renewed = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1), list[int]()
    renewal = Renewal(lambda: config, lambda: due, credentials.load(config).bound.addresses, lambda: renewed.append(1))
    for address in ("10.0.0.5", "10.0.0.6"):
        there[1] = address
        assert renewal.is_due()
        assert renewal.renew()
        assert not renewal.is_due()
        assert credentials.load(config).bound.addresses == set(there)
    assert renewed == [1, 1]


def test_a_revoked_node_gets_no_new_certificate(
    lab: Lab, invite: Callable[[], Invitation], members: Members, tmp_path: Path
) -> None:
    config = joined(lab, invite(), tmp_path / "joined")
    joining.leave(config, config.authorities[0])
    assert members.revoked == {config.node}
    with pytest.raises(JoinError, match="was revoked"):
        credentials.request_new(config)


def test_the_next_authority_is_asked_when_one_is_away(
    lab: Lab, invite: Callable[[], Invitation], tmp_path: Path
) -> None:
    config = joined(lab, invite(), tmp_path / "joined")
    credentials.request_new(replace(config, authorities=[f"127.0.0.1:{free_port()}", *config.authorities]))


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"x" * 100_000])
def test_junk_is_answered_and_the_service_continues(invite: Callable[[], Invitation], body: bytes) -> None:
    invitation = invite()
    context = joining._client_context(joining._authority_certificate(invitation))
    with joining._connected(invitation.address, context) as connection:
        connection.putrequest("POST", "/join")
        connection.putheader("Content-Length", str(len(body)))
        # Long requests are refused unread: a caller that is still sending may get no answer.
        connection.endheaders(body if len(body) <= joining.LIMIT else None)
        assert connection.getresponse().status in (400, 403)
    joining.join(invitation, csr(Keys.generate(), new_node_id()))


def test_invalid_settings_are_reported_in_one_line(lab: Lab) -> None:
    config = lab.add()
    path = Path(config.path("node.toml"))
    for text in (
        "x",
        'fleet = "a"',
        path.read_text() + "\ntypo = 1\n",
        path.read_text().replace("true", "3").replace("false", "3"),
    ):
        path.write_text(text)
        with pytest.raises(FleetError, match=r"node\.toml"):
            settings.load(config.directory)


def test_settings_are_kept_as_they_are(lab: Lab) -> None:
    config = replace(lab.add(), datastores={"b ä": '/data/"x"'}, name="\\nöde", connect=["[::1]:1"])
    config = replace(config, oidc={"issuer": "https://id.example", "minutes": 5})
    settings.save(config)
    assert settings.load(config.directory) == config
