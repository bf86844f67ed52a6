"""Which names and addresses the authority certifies, with OpenSSL as the judge of its name constraints."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from vmconv.plugin import UsageError
from vmconv_fleet.trust.authority import Authority, AuthorityError
from vmconv_fleet.trust.identity import Keys, binding, new_node_id, private_pem, read_certificate
from vmconv_fleet.trust.names import MAX_PERMITTED, PRIVATE, names_in_use, permitted_by_default

GOOD = ["n01.dc.example", "dc.example", "N02.DC.example", "10.1.2.3", "127.0.0.1", "::1", "localhost", "fd00::7"]
BAD = [
    "www.bank.example",
    "baddc.example",
    "example",
    "n01",
    "*.dc.example",
    ".dc.example",
    "*.com",
    "192.0.2.1",
    "11.0.0.1",
    "2001:db8::1",
    "::ffff:10.0.0.1",
]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.found(str(tmp_path), "lab", ["dc.example", "10.0.0.0/8", "fd00::/8"])


def issue(authority: Authority, *names: str, **options: object) -> frozenset[str]:
    """Returns the names in the certificate that a new node gets."""
    pem = authority.issue(Keys.generate().request(new_node_id(), "lab", [*names]), **options)  # type: ignore[arg-type]
    return binding(read_certificate(pem), [authority.certificate]).addresses


@pytest.mark.parametrize("name", GOOD)
def test_permitted_names_are_certified(authority: Authority, name: str) -> None:
    assert issue(authority, name) == {name}


@pytest.mark.parametrize("name", BAD)
def test_other_names_are_refused_or_left_out(authority: Authority, name: str) -> None:
    with pytest.raises(AuthorityError, match="is not"):
        issue(authority, "10.0.0.1", name)
    assert issue(authority, "10.0.0.1", name, drops=True) == {"10.0.0.1"}


def test_a_name_of_another_member_is_not_certified(authority: Authority) -> None:
    taken = {name: {new_node_id()} for name in ("n01.dc.example", "10.0.0.9", "127.0.0.1")}
    for name in ("N01.dc.example", "10.0.0.9"):
        with pytest.raises(AuthorityError, match="is in use by node"):
            issue(authority, name, taken=taken)
    assert issue(authority, "n01.dc.example", "10.0.0.9", "127.0.0.1", taken=taken, drops=True) == {"127.0.0.1"}
    keys, (node,) = Keys.generate(), taken["10.0.0.9"]
    authority.issue(keys.request(node, "lab", ["10.0.0.9"]), taken=taken)
    # A name that two have already, before names were checked.
    taken["10.0.0.9"].add(new_node_id())
    authority.issue(keys.request(node, "lab", ["10.0.0.9"]), taken=taken)


def test_names_in_use_are_those_of_the_certificates(authority: Authority) -> None:
    node = new_node_id()
    pem = authority.issue(Keys.generate().request(node, "lab", ["N1.dc.example", "fd00::1"]))
    assert names_in_use([read_certificate(pem)]) == {"n1.dc.example": {node}, "fd00::1": {node}}


def test_a_request_with_another_uri_is_refused(authority: Authority) -> None:
    keys = Keys.generate()
    asked = x509.load_pem_x509_csr(keys.request(new_node_id(), "lab", []))
    (extension,) = asked.extensions
    names = x509.SubjectAlternativeName(
        [*extension.value, x509.UniformResourceIdentifier("spiffe://bank.example/root")]
    )
    builder = x509.CertificateSigningRequestBuilder().subject_name(asked.subject).add_extension(names, critical=False)
    with pytest.raises(AuthorityError, match="URIs besides"):
        authority.issue(builder.sign(keys.tls, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


@pytest.mark.parametrize("name", ["n01.dc.example", "www.bank.example"])
def test_a_stolen_authority_cannot_speak_for_other_names(authority: Authority, name: str, tmp_path: Path) -> None:
    """A browser that trusts ca.pem is in no danger from it: it refuses what the constraints do not permit."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    forged = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
        .sign(authority._key, hashes.SHA256())
    )
    files = tmp_path / "forged.pem", tmp_path / "forged.key"
    files[0].write_bytes(forged.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(private_pem(key))
    server, client = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        ssl.create_default_context(cafile=str(tmp_path / "ca.pem")),
    )
    server.load_cert_chain(*files)
    if name.endswith("dc.example"):
        shake_hands(client, server, name)
    else:
        with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
            shake_hands(client, server, name)


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> None:
    """Makes a TLS handshake in memory."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(back, there, server_hostname=name)
    far = server.wrap_bio(there, back, server_side=True)
    for _ in range(2):
        for end in (near, far):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


def test_the_founders_domain_and_private_addresses_are_permitted_by_default(tmp_path: Path) -> None:
    assert permitted_by_default(["n01.dc.example", "n1.example", "vm", "192.0.2.1"]) == [
        *PRIVATE,
        "dc.example",
        "n1.example",
        "vm",
        "192.0.2.1",
    ]
    authority = Authority.found(str(tmp_path), "lab", permitted_by_default(["n01.dc.example", "192.0.2.1"]))
    assert issue(authority, "n07.dc.example", "192.0.2.1", "192.168.7.7", "n.internal")


@pytest.mark.parametrize("name", ["", "*.example", "10.0.0.1/8", "a/b", "300.0.0.1", "-rf"])
def test_what_is_neither_a_domain_nor_a_network_is_not_permitted(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a domain nor a network"):
        Authority.found(str(tmp_path), "lab", [name])


def test_the_number_of_permitted_names_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at most 64"):
        Authority.found(str(tmp_path), "lab", [f"n{number}" for number in range(MAX_PERMITTED)])
