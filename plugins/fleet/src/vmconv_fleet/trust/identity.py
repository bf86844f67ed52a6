"""The identity of a node: its id, its two keys, and the authority's certificate that binds them.

A node signs its records with an Ed25519 key and speaks TLS with a P-256 key: browsers, which open its console,
do not accept Ed25519 certificates. One certificate holds both: its subject key is the TLS key, and one of its
alternative names is the signing key, `vmconv:ed25519:HEX`. So there is one serial number to revoke and to renew.

 node.pem      CN = node id, O = fleet, subject key P-256, names: addresses of the node and the URI of the signing key
 tls.key       P-256, PKCS #8
 signing.key   Ed25519, PKCS #8
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import secrets
from collections.abc import Sequence
from typing import NamedTuple, Self
from urllib.parse import quote, unquote

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from vmconv_fleet.errors import FleetError
from vmconv_fleet.replication.hashtree import MAX_LEAVES, root_of, tree
from vmconv_fleet.replication.signing import SIGNATURE
from vmconv_fleet.words import trap_in

SIGNING_NAME = "vmconv:ed25519:"
NODE_NAME = "vmconv:name:"
"""Begins the alternative name with the node's own name, percent-encoded."""
NODE_ID_DIGITS = 32
MAX_PEM = 64 << 10
MAX_MEMBERS = 4 << 20
"""The limit for members' certificates in bytes."""
MAX_ROOTS = 8192
_RECORD_CONTEXT = b"vmconv fleet record\0"
"""A prefix of all signed data, so that a record's signature is never valid for anything else."""


class IdentityError(FleetError):
    """A key or certificate is missing, damaged, or not valid."""


def new_node_id() -> str:
    """Returns a random id: 32 hex digits, the first not 0, as in Zenoh."""
    while True:
        text = secrets.token_hex(NODE_ID_DIGITS // 2)
        if is_node_id(text):
            return text


def is_node_id(text: str) -> bool:
    return len(text) == NODE_ID_DIGITS and set(text) <= set("0123456789abcdef") and text[0] != "0"


def key_id_of(key: Ed25519PublicKey) -> str:
    """Returns the id of a signing key: 32 hex digits of its SHA-256."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:32]


class Binding(NamedTuple):
    """The content of a node's certificate, after its signature was verified."""

    node: str
    fleet: str
    key_id: str
    key: Ed25519PublicKey
    serial: int
    not_after: datetime.datetime
    addresses: frozenset[str]
    name: str = ""
    """The node's name, which the authority gives to no other node; empty in certificates of earlier versions."""


def read_certificate(pem: bytes) -> x509.Certificate:
    """Returns the first certificate of a PEM text. Raises IdentityError if there is none."""
    if len(pem) > MAX_PEM:
        raise IdentityError(f"certificate of {len(pem)} bytes, at most {MAX_PEM} are read")
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as exc:
        raise IdentityError(f"no certificate: {exc}") from exc


def read_certificates(pem: bytes) -> list[x509.Certificate]:
    """Returns all certificates of a PEM text, possibly none. Raises IdentityError if one is damaged."""
    if len(pem) > MAX_MEMBERS:
        raise IdentityError(f"certificates of {len(pem)} bytes, at most {MAX_MEMBERS} are read")
    try:
        return x509.load_pem_x509_certificates(pem) if pem else []
    except ValueError as exc:
        raise IdentityError(f"no certificates: {exc}") from exc


def read_authorities(pem: bytes) -> list[x509.Certificate]:
    """Returns the authority's certificates, the newest last. Raises IdentityError if there is none."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as exc:
        raise IdentityError(f"no certificate of an authority: {exc}") from exc


def binding(certificate: x509.Certificate, authorities: list[x509.Certificate]) -> Binding:
    """Returns the content of a certificate. Raises IdentityError unless one of the authorities signed it for a node.

    Expiry is not checked: clocks differ, and signatures of its lifetime stay valid. Links refuse expired certificates.
    """
    if not any(_signed_by(certificate, authority) for authority in authorities):
        raise IdentityError(f"certificate {certificate.serial_number:x} is not of this fleet's authority")
    node, fleet = (_only(certificate, oid) for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME))
    if not is_node_id(node):
        raise IdentityError(f"certificate of {node!r}, which is not a node id")
    key = _signing_key(certificate.extensions)
    end = certificate.not_valid_after_utc
    names = certificate.extensions
    return Binding(
        node, fleet, key_id_of(key), key, certificate.serial_number, end, _addresses(names), node_name(names)
    )


def request_binding(pem: bytes) -> tuple[object, Ed25519PublicKey]:
    """Returns the TLS key and the signing key of a certificate request, unverified."""
    try:
        request = x509.load_pem_x509_csr(pem[:MAX_PEM])
        return request.public_key(), _signing_key(request.extensions)
    except ValueError as exc:
        raise IdentityError(f"no certificate request: {exc}") from exc


def _signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _only(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    found = certificate.subject.get_attributes_for_oid(oid)
    if len(found) != 1 or not isinstance(found[0].value, str):
        raise IdentityError(f"certificate with {len(found)} of {oid._name} in its subject, exactly 1 is allowed")
    return found[0].value


def _addresses(extensions: x509.Extensions) -> frozenset[str]:
    """Returns the names and addresses among the alternative names."""
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    return frozenset([*addresses, *names.get_values_for_type(x509.DNSName)])


def node_name(extensions: x509.Extensions) -> str:
    """Returns the name of the node among the alternative names, empty without one."""
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found = [one for one in names.get_values_for_type(x509.UniformResourceIdentifier) if one.startswith(NODE_NAME)]
    if len(found) > 1:
        raise IdentityError(f"certificate with {len(found)} names of nodes, at most 1 is allowed")
    return _name_in(found[0]) if found else ""


def _name_in(uri: str) -> str:
    """Returns the name of a node in an alternative name. Raises IdentityError if it is not valid."""
    name = unquote(uri.removeprefix(NODE_NAME), errors="surrogateescape")
    if problem := trap_in(name):
        raise IdentityError(f"name of a node that {problem}: {name[:80]!r}")
    return name


def _signing_key(extensions: x509.Extensions) -> Ed25519PublicKey:
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = [n for n in names.get_values_for_type(x509.UniformResourceIdentifier) if n.startswith(SIGNING_NAME)]
        if len(found) != 1:
            raise IdentityError(f"certificate with {len(found)} signing keys, exactly 1 is allowed")
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(found[0].removeprefix(SIGNING_NAME)))
    except (x509.ExtensionNotFound, ValueError) as exc:
        raise IdentityError(f"certificate without a signing key: {exc}") from exc


class Keys(NamedTuple):
    """The two private keys of a node."""

    tls: ec.EllipticCurvePrivateKey
    signing: Ed25519PrivateKey

    @classmethod
    def generate(cls) -> Self:
        return cls(ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, directory: str) -> Self:
        """Returns the keys in a directory. Raises IdentityError if they are missing or of another kind."""
        tls, signing = (_load_key(os.path.join(directory, name)) for name in ("tls.key", "signing.key"))
        if not isinstance(tls, ec.EllipticCurvePrivateKey) or not isinstance(signing, Ed25519PrivateKey):
            raise IdentityError(f"{directory}: keys of another kind than P-256 and Ed25519")
        return cls(tls, signing)

    def save(self, directory: str) -> None:
        for name, key in (("tls.key", self.tls), ("signing.key", self.signing)):
            write_private(os.path.join(directory, name), private_pem(key))

    def request(self, node: str, fleet: str, addresses: list[str]) -> bytes:
        """Returns a PEM certificate request for both keys, signed with the TLS key."""
        subject = subject_name(node, fleet)
        names = subject_names(self.signing.public_key(), addresses)
        builder = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(names, critical=False)
        return builder.sign(self.tls, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def subject_name(node: str, fleet: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet), x509.NameAttribute(NameOID.COMMON_NAME, node)]
    )


def subject_names(key: Ed25519PublicKey, addresses: list[str]) -> x509.SubjectAlternativeName:
    """Returns the alternative names of a node: its addresses, host names and signing key."""
    names: list[x509.GeneralName] = []
    for address in addresses:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(address)))
        except ValueError:
            names.append(x509.DNSName(address))
    signing = x509.UniformResourceIdentifier(SIGNING_NAME + key.public_bytes_raw().hex())
    return x509.SubjectAlternativeName([*names, signing])


def name_uri(name: str) -> x509.UniformResourceIdentifier:
    """Returns the alternative name that is the node's own name. Raises IdentityError if it is not valid."""
    uri = x509.UniformResourceIdentifier(NODE_NAME + quote(name))
    _name_in(uri.value)
    return uri


def private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load_key(path: str) -> object:
    try:
        with open(path, "rb") as file:
            return serialization.load_pem_private_key(file.read(MAX_PEM), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise IdentityError(f"{path}: no private key: {exc}") from exc


def write_private(path: str, content: bytes) -> None:
    """Writes a file for its owner only, durably, whole or not at all."""
    temporary = f"{path}.{secrets.token_hex(4)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class Ed25519Signer:
    """Signs the records of this node. Call `replace` on the replica's thread only, which signs them."""

    def __init__(self, owner: str, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.owner = owner
        self.key_id = key_id_of(key.public_key())

    def replace(self, key: Ed25519PrivateKey) -> None:
        self._key, self.key_id = key, key_id_of(key.public_key())

    def sign(self, payload: bytes) -> bytes:
        return self.sign_many([payload])[0]

    def sign_many(self, payloads: Sequence[bytes]) -> list[bytes]:
        """Returns a signature for each payload: one by the key for up to `MAX_LEAVES` payloads, with a proof."""
        found = []
        for first in range(0, len(payloads), MAX_LEAVES):
            root, proofs = tree(payloads[first : first + MAX_LEAVES])
            signature = self._key.sign(_RECORD_CONTEXT + root)
            found += [signature + proof for proof in proofs]
        return found


class SignatureCache:
    """Verifies signatures of records, each root of a tree once. May be called on any thread."""

    def __init__(self) -> None:
        self._good: dict[bytes, None] = {}

    def good(self, key: Ed25519PublicKey, signed: Sequence[tuple[bytes, bytes]]) -> bool:
        """Returns whether the key signed all payloads, each with its signature, in one tree."""
        signature = signed[0][1][:SIGNATURE]
        if any(not other.startswith(signature) for _, other in signed):
            return False
        root = root_of([(payload, other[SIGNATURE:]) for payload, other in signed])
        if root is None:
            return False
        known = root + signature + key.public_bytes_raw()
        if known in self._good:
            return True
        try:
            key.verify(signature, _RECORD_CONTEXT + root)
        except InvalidSignature:
            return False
        if len(self._good) >= MAX_ROOTS:
            # All at once, and rarely: several threads may be here.
            self._good = {}
        self._good[known] = None
        return True
