"""Whose signature counts."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmconv_fleet.config import NodeConfig
from vmconv_fleet.replication.hashtree import root_of, tree
from vmconv_fleet.replication.records import Position
from vmconv_fleet.testing import Lab
from vmconv_fleet.trust import credentials
from vmconv_fleet.trust.authority import Authority
from vmconv_fleet.trust.certificates import CertificateTrust
from vmconv_fleet.trust.identity import Ed25519Signer, IdentityError, Keys, SignatureCache, is_node_id, new_node_id


@pytest.fixture
def pair(lab: Lab) -> tuple[NodeConfig, NodeConfig]:
    return lab.add(), lab.add()


def trust_of(config: NodeConfig) -> CertificateTrust:
    return CertificateTrust(Path(config.path("ca.pem")).read_bytes())


def signer_of(config: NodeConfig) -> Ed25519Signer:
    return Ed25519Signer(config.node, credentials.load(config).keys.signing)


AT = Position(10, 5)


def test_a_signature_counts_once_the_certificate_is_known(pair: tuple[NodeConfig, NodeConfig]) -> None:
    trust, signer = trust_of(pair[0]), signer_of(pair[1])
    signature = signer.sign(b"payload")
    assert not trust.verify(pair[1].node, signer.key_id, [(b"payload", signature)], AT)
    trust.learn_certificate(credentials.load(pair[1]).certificate)
    assert trust.verify(pair[1].node, signer.key_id, [(b"payload", signature)], AT)
    assert not trust.verify(pair[1].node, signer.key_id, [(b"Payload", signature)], AT)
    assert not trust.verify(pair[0].node, signer.key_id, [(b"payload", signature)], AT)
    assert not trust.verify(pair[1].node, signer.key_id, [(b"payload", signature[:-1])], AT)


def test_a_certificate_of_another_authority_is_not_learnt(pair: tuple[NodeConfig, NodeConfig], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    keys = Keys.generate()
    pem = Authority.found(str(tmp_path / "other"), "lab").issue(keys.request(pair[1].node, "lab", ["localhost"]))
    trust = trust_of(pair[0])
    assert trust.learn_certificate(pem) is None
    assert pair[1].node not in trust.members()


def test_a_node_keeps_its_signing_key(lab: Lab, pair: tuple[NodeConfig, NodeConfig]) -> None:
    """A member may put another's public key into its own request: what the other signs stays the other's."""
    trust, signer = trust_of(pair[0]), signer_of(pair[1])
    trust.learn_certificate(credentials.load(pair[1]).certificate)
    thief, stolen = new_node_id(), Keys(Keys.generate().tls, credentials.load(pair[1]).keys.signing)
    assert lab.authority is not None
    trust.learn_certificate(lab.authority.issue(stolen.request(thief, "lab", ["localhost"])))
    assert trust.verify(pair[1].node, signer.key_id, [(b"payload", signer.sign(b"payload"))], AT)


def test_an_expired_certificate_still_identifies_the_signer(lab: Lab) -> None:
    """Clocks differ: whether a record is good must not depend on whose clock is asked."""
    first, expired = lab.add(), lab.add(lifetime=datetime.timedelta(seconds=-5))
    trust, signer = trust_of(first), signer_of(expired)
    assert trust.learn_certificate(credentials.load(expired).certificate)
    assert trust.verify(expired.node, signer.key_id, [(b"payload", signer.sign(b"payload"))], AT)


def test_signatures_before_a_revocation_stay_valid(lab: Lab, pair: tuple[NodeConfig, NodeConfig]) -> None:
    trust, signer = trust_of(pair[0]), signer_of(pair[1])
    trust.learn_certificate(credentials.load(pair[1]).certificate)
    assert lab.authority is not None
    assert trust.learn_revocation(lab.authority.revocation(pair[1].node, upto=[10, 5]))
    signature = signer.sign(b"payload")
    good = [
        trust.verify(pair[1].node, signer.key_id, [(b"payload", signature)], p)
        for p in (AT, Position(10, 6), Position(11, 1))
    ]
    assert good == [True, False, False]
    assert trust.is_revoked(pair[1].node)
    assert pair[1].node not in trust.members()


def test_a_key_is_revoked_and_the_next_one_is_not(lab: Lab, pair: tuple[NodeConfig, NodeConfig]) -> None:
    trust, signer = trust_of(pair[0]), signer_of(pair[1])
    keys = Keys.generate()
    assert lab.authority is not None
    trust.learn_certificate(credentials.load(pair[1]).certificate)
    trust.learn_certificate(lab.authority.issue(keys.request(pair[1].node, "lab", ["localhost"])))
    trust.learn_revocation(lab.authority.revocation(pair[1].node, key_id=signer.key_id))
    new = Ed25519Signer(pair[1].node, keys.signing)
    assert not trust.verify(pair[1].node, signer.key_id, [(b"p", signer.sign(b"p"))], AT)
    assert trust.verify(pair[1].node, new.key_id, [(b"p", new.sign(b"p"))], AT)
    assert pair[1].node in trust.members()
    assert not trust.is_revoked(pair[1].node)


def test_only_a_retired_node_is_retired(lab: Lab, pair: tuple[NodeConfig, NodeConfig]) -> None:
    trust = trust_of(pair[0])
    assert lab.authority is not None
    trust.learn_revocation(lab.authority.revocation(pair[1].node))
    assert not trust.retired(pair[1].node)
    trust.learn_revocation(lab.authority.revocation(pair[1].node, retired=True))
    assert trust.retired(pair[1].node)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(["node", "key_id", "upto", "retired", "at", "signature"]),
        st.none() | st.text("a0-") | st.lists(st.integers()),
    )
)
def test_no_body_of_a_revocation_raises(body: dict[str, object]) -> None:
    assert not _TRUST.learn_revocation(body)


@given(st.binary(max_size=300))
def test_no_bytes_of_a_certificate_raise(pem: bytes) -> None:
    assert _TRUST.learn_certificate(pem) is None


@given(st.binary(max_size=80), st.binary(max_size=80))
@settings(deadline=None)
def test_a_signature_of_other_bytes_is_no_signature(payload: bytes, signature: bytes) -> None:
    key = _KEYS.signing.public_key()
    assert not SignatureCache().good(key, [(payload, signature)])
    # A signature that was made without the context of records is of something else.
    assert not SignatureCache().good(key, [(payload, _KEYS.signing.sign(payload) + bytes(2))])


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=40, unique=True), st.data())
@settings(deadline=None)
def test_each_of_many_payloads_is_verified_alone(payloads: list[bytes], data: st.DataObject) -> None:
    signer, key = Ed25519Signer("a" * 32, _KEYS.signing), _KEYS.signing.public_key()
    signatures = signer.sign_many(payloads)
    assert all(len(one) <= 255 for one in signatures)
    n = data.draw(st.integers(0, len(payloads) - 1))
    verifier = SignatureCache()
    assert verifier.good(key, [(payloads[n], signatures[n])])
    for _ in range(2):
        # What was verified before makes nothing else good.
        assert not verifier.good(key, [(payloads[n] + b"x", signatures[n])])
        damaged = bytearray(signatures[n])
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1
        assert not verifier.good(key, [(payloads[n], bytes(damaged))])
        assert not verifier.good(_OTHER, [(payloads[n], signatures[n])])


def test_writes_of_any_size_are_signed() -> None:
    signer, key = Ed25519Signer("a" * 32, _KEYS.signing), _KEYS.signing.public_key()
    payloads = [str(n).encode() for n in range(2500)]
    verifier = SignatureCache()
    for payload, signature in zip(payloads, signer.sign_many(payloads), strict=True):
        assert len(signature) <= 255
        assert verifier.good(key, [(payload, signature)])


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=40, unique=True), st.data())
@settings(deadline=None)
def test_some_of_many_payloads_are_verified_together(payloads: list[bytes], data: st.DataObject) -> None:
    signer, key = Ed25519Signer("a" * 32, _KEYS.signing), _KEYS.signing.public_key()
    signed = list(zip(payloads, signer.sign_many(payloads), strict=True))
    some = data.draw(st.lists(st.sampled_from(signed), min_size=1))
    assert SignatureCache().good(key, some)
    n = data.draw(st.integers(0, len(some) - 1))
    payload, signature = some[n]
    damaged = bytearray(signature)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1
    for wrong in ((payload + b"x", signature), (payload, bytes(damaged)), (payload, signature + bytes(16))):
        assert not SignatureCache().good(key, [*some[:n], wrong, *some[n + 1 :]])
        assert not SignatureCache().good(key, [*some, wrong])
    foreign = (b"foreign", signer.sign(b"foreign"))
    assert SignatureCache().good(key, [foreign])
    assert not SignatureCache().good(key, [*some, foreign])


def test_neither_an_inner_node_nor_a_foreign_leaf_passes_for_a_record() -> None:
    root, proofs = tree([b"a", b"b", b"c", b"d"])
    leaves = list(zip([b"a", b"b", b"c", b"d"], proofs, strict=True))
    assert {root_of([leaf]) for leaf in leaves} == {root_of(leaves), root_of(leaves[::-1])} == {root}
    left, right = proofs[2][2 + 16 :], tree([b"c", b"d"])[0]
    assert left != right
    assert root_of([(left + right, (0).to_bytes(2, "big"))]) != root
    assert root_of([(b"a", proofs[1])]) != root
    assert root_of([(b"a", proofs[0] + bytes(1))]) is None
    assert root_of([(b"a", (4).to_bytes(2, "big") + proofs[0][2:])]) is None


def test_new_ids_are_ids() -> None:
    made = {new_node_id() for _ in range(500)}
    assert len(made) == 500
    assert all(is_node_id(one) for one in made)
    assert not any(map(is_node_id, ["", "0" + "a" * 31, "A" * 32, "a" * 33, "a" * 31 + "g"]))


def test_credentials_are_replaced_together(lab: Lab) -> None:
    config = lab.add()
    before = credentials.load(config)
    credentials.request_new(config, new_keys=True)
    after = credentials.load(config)
    assert before.bound.key_id != after.bound.key_id
    assert len(list(Path(config.directory).glob("identity*"))) == 2


def test_credentials_of_another_node_or_for_other_keys_are_refused(pair: tuple[NodeConfig, NodeConfig]) -> None:
    with pytest.raises(IdentityError, match="the settings are of node"):
        credentials.load(dataclasses.replace(pair[0], node=new_node_id()))
    Keys.generate().save(pair[0].path("identity"))
    with pytest.raises(IdentityError, match="does not match the signing key"):
        credentials.load(pair[0])


_KEYS = Keys.generate()
_OTHER = Keys.generate().signing.public_key()


def _stranger() -> CertificateTrust:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        Authority.found(directory, "lab")
        return CertificateTrust(Path(directory, "ca.pem").read_bytes())


_TRUST = _stranger()
