"""The fleet's authority: certifies nodes, admits new ones by one-time tokens, and revokes.

Its key lies in the directory `authority` of the node that founded the fleet. Any other node can get a copy (`vmconv
node authority export` and `import`), so no single node is indispensable. The signatures of all copies are valid.

 authority/ca.key        P-256, PKCS #8
 authority/tokens.json   {SHA-256 of a join token: time of expiry}
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vmconv_fleet.config import NodeConfig, join_address, split_address
from vmconv_fleet.trust.addresses import announced
from vmconv_fleet.trust.identity import (
    MAX_PEM,
    SIGNING_NAME,
    IdentityError,
    is_node_id,
    name_uri,
    private_pem,
    read_authorities,
    subject_name,
    write_private,
)
from vmconv_fleet.trust.names import PRIVATE, constraints, why_not, why_not_called

NODE_LIFETIME = datetime.timedelta(days=365)
AUTHORITY_LIFETIME = datetime.timedelta(days=20 * 365)
TOKEN_LIFETIME = 3600.0
MAX_NAMES = 64
_CLOCKS_DIFFER = datetime.timedelta(hours=1)
"""The time by which a certificate is backdated, for nodes with a slow clock."""
_REVOCATION_CONTEXT = b"vmconv fleet revocation\0"
_RETIREMENT_CONTEXT = b"vmconv fleet retirement\0"


class AuthorityError(IdentityError):
    """The node does not hold the authority, or the authority refuses."""


class Invitation(NamedTuple):
    """What a joining node needs: the address, the token, and the fingerprint of the authority.

    As text `vmconv-join://HOST:PORT/NODE/FINGERPRINT/TOKEN`; the fingerprint is the SHA-256 of the authority's
    certificate, which identifies the server at that address.
    """

    address: str
    node: str
    fingerprint: str
    token: str

    def __str__(self) -> str:
        return f"vmconv-join://{self.address}/{self.node}/{self.fingerprint}/{self.token}"

    @classmethod
    def parse(cls, text: str) -> Self:
        parts = text.removeprefix("vmconv-join://").split("/")
        if not text.startswith("vmconv-join://") or len(parts) != 4 or not is_node_id(parts[1]) or len(parts[2]) != 64:
            raise AuthorityError(
                "this is not an invitation to a fleet",
                hint="vmconv node invite, on a node with the authority, prints one",
            )
        return cls(*parts)


def fingerprint(certificate: x509.Certificate) -> str:
    return certificate.fingerprint(hashes.SHA256()).hex()


class Authority:
    """The holder of the authority's key; `now` is seconds since 1970, for the lifetimes of tokens."""

    def __init__(self, directory: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._directory = directory
        self._key = key
        self.certificate = certificate

    @classmethod
    def found(cls, directory: str, fleet: str, permitted: Iterable[str] = PRIVATE) -> Self:
        """Creates the authority of a new fleet in a node's directory, with its certificate in `ca.pem`.

        It certifies the `permitted` domains and networks only.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _self_signed(key, fleet, constraints(permitted))
        os.mkdir(os.path.join(directory, "authority"), 0o700)
        write_private(os.path.join(directory, "authority", "ca.key"), private_pem(key))
        write_private(os.path.join(directory, "ca.pem"), certificate.public_bytes(serialization.Encoding.PEM))
        return cls(directory, key, certificate)

    @classmethod
    def load(cls, directory: str) -> Self:
        """Returns the authority of a node. Raises AuthorityError if the node has none."""
        path = os.path.join(directory, "authority", "ca.key")
        try:
            with open(path, "rb") as file:
                return cls.of_key(directory, file.read(MAX_PEM))
        except FileNotFoundError:
            raise AuthorityError(
                f"{directory}: this node does not hold the fleet's authority",
                hint="ask the node that founded the fleet, or import the authority: vmconv node authority import",
            ) from None

    @classmethod
    def of_key(cls, directory: str, pem: bytes) -> Self:
        """Returns the authority with this key, whose certificate must be in the node's `ca.pem`."""
        try:
            key = serialization.load_pem_private_key(pem, None)
        except (ValueError, TypeError) as exc:
            raise AuthorityError(f"{directory}: no key of an authority: {exc}") from exc
        with open(os.path.join(directory, "ca.pem"), "rb") as file:
            certificates = read_authorities(file.read(MAX_PEM))
        for certificate in certificates:
            if isinstance(key, ec.EllipticCurvePrivateKey) and key.public_key() == certificate.public_key():
                return cls(directory, key, certificate)
        raise AuthorityError(f"{directory}: the key is not that of this fleet's authority")

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.certificate)

    @property
    def fleet(self) -> str:
        (name,) = self.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        return str(name.value)

    def export(self) -> bytes:
        """Returns the authority's private key as PEM: its holder can admit nodes."""
        return private_pem(self._key)

    def adopt(self) -> None:
        """Stores the key in the node's directory, which then holds the authority too."""
        os.makedirs(os.path.join(self._directory, "authority"), 0o700, exist_ok=True)
        write_private(os.path.join(self._directory, "authority", "ca.key"), private_pem(self._key))

    def issue(
        self,
        request: bytes,
        *,
        lifetime: datetime.timedelta = NODE_LIFETIME,
        node: str | None = None,
        taken: Mapping[str, AbstractSet[str]] = {},
        drops: bool = False,
        name: str = "",
    ) -> bytes:
        """Returns the PEM certificate for a request; with `node`, only for that node.

        Only the keys, the node id and the addresses are taken from the request. `taken` are names and addresses in use,
        and the nodes that use them. `drops`: the certificate lacks names that are not allowed; otherwise the request is
        refused. `name` is the node's own name; versions that state none get a certificate without one.
        """
        asked = _checked_request(request)
        (subject,) = asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        wanted = str(subject.value)
        if not is_node_id(wanted) or (node is not None and wanted != node):
            raise AuthorityError(f"certificate request for {wanted!r}" + (f", by {node}" if node else ", no node id"))
        names = asked.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        # A member whose name is in use gets a certificate without one, rather than none.
        own = self._own_name(name, wanted, taken, drops=node is not None)
        names = x509.SubjectAlternativeName([*self._allowed(names, wanted, taken, drops), *own])
        now = datetime.datetime.now(datetime.UTC)
        begin = min(now, now + lifetime) - _CLOCKS_DIFFER
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject_name(wanted, self.fleet))
            .issuer_name(self.certificate.subject)
            .public_key(asked.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(now + lifetime)
            .add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(_authority_identifier(self.certificate), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _own_name(
        self, name: str, node: str, taken: Mapping[str, AbstractSet[str]], *, drops: bool
    ) -> Iterator[x509.GeneralName]:
        reason = why_not_called(name, taken, node) if name else None
        if reason and not drops:
            raise AuthorityError(reason, hint="give another one with --name")
        if name and not reason:
            yield name_uri(name)

    def _allowed(
        self, names: Iterable[x509.GeneralName], node: str, taken: Mapping[str, AbstractSet[str]], drops: bool
    ) -> Iterator[x509.GeneralName]:
        for name in names:
            # The only name of another kind is the signing key.
            is_key = isinstance(name, x509.UniformResourceIdentifier)
            reason = None if is_key else why_not(name, self.certificate, taken, node)
            if reason is None:
                yield name
            elif not drops:
                raise AuthorityError(reason, hint="give others with --address, or addresses in node.toml")

    def revocation(
        self, node: str, *, key_id: str | None = None, upto: list[int] | None = None, retired: bool = False
    ) -> dict[str, Any]:
        """Returns the body of a revocation: for one signing key of a node, or for all its present and future keys.

        `upto` is the owner's position (epoch, seq) that is known now. Records up to it stay valid, so that all replicas
        agree; later ones are refused. `retired`: the node's records are dropped as well.
        """
        said = {"node": node, "key_id": key_id, "upto": upto or [0, 0], "retired": retired, "at": _now_ms()}
        return self._signed(_REVOCATION_CONTEXT, said)

    def retirement(self, node: str, *, name: str, reason: str, at_ms: int) -> dict[str, Any]:
        """Returns the body of a retirement: the name and the reason to show, besides the revocation that retires."""
        return self._signed(_RETIREMENT_CONTEXT, {"node": node, "name": name, "reason": reason, "at_ms": at_ms})

    def _signed(self, context: bytes, said: dict[str, Any]) -> dict[str, Any]:
        signature = self._key.sign(context + _canonical(said), ec.ECDSA(hashes.SHA256()))
        return {**said, "signature": signature.hex()}

    def make_token(self, lifetime: float = TOKEN_LIFETIME, *, now: float | None = None) -> str:
        """Returns a new token that admits one node; only its hash is kept."""
        token = secrets.token_urlsafe(24)
        now = time.time() if now is None else now
        with self._tokens() as tokens:
            for expired in [one for one, expires in tokens.items() if expires < now]:
                del tokens[expired]
            tokens[_hashed(token)] = now + lifetime
        return token

    def invite(self, config: NodeConfig, *, lifetime: float = TOKEN_LIFETIME, host: str | None = None) -> Invitation:
        """Returns an invitation for one node, which reaches the authority at `host`."""
        if not config.join:
            raise AuthorityError(f"{config.directory}: nodes cannot join here", hint="set join in node.toml")
        port = split_address(config.join)[1]
        reached = [join_address(host, port)] if host else [*announced(config, config.join), f"127.0.0.1:{port}"]
        return Invitation(reached[0], config.node, self.fingerprint, self.make_token(lifetime))

    def redeem(self, token: str, *, now: float | None = None) -> None:
        """Uses up a token. Raises AuthorityError if it is unknown, used, or expired."""
        with self._tokens() as tokens:
            expires = tokens.pop(_hashed(token), None)
        self._refuse_expired(expires, now)

    def refuse_unknown(self, token: str, *, now: float | None = None) -> None:
        """Raises AuthorityError as `redeem` would. It costs little: strangers may ask as often as they like."""
        self._refuse_expired(self._read_tokens().get(_hashed(token)), now)

    def _refuse_expired(self, expires: float | None, now: float | None) -> None:
        if expires is None:
            raise AuthorityError("the token is unknown or was used before", hint="each invitation admits one node")
        if expires < (time.time() if now is None else now):
            raise AuthorityError("the token has expired", hint="vmconv node invite makes a new one")

    @contextmanager
    def _tokens(self) -> Iterator[dict[str, float]]:
        """Locks the unused tokens and stores those that the block keeps."""
        with open(self._tokens_path + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tokens = self._read_tokens()
            before = dict(tokens)
            yield tokens
            if tokens != before:
                write_private(self._tokens_path, json.dumps(tokens).encode())

    @property
    def _tokens_path(self) -> str:
        return os.path.join(self._directory, "authority", "tokens.json")

    def _read_tokens(self) -> dict[str, float]:
        try:
            with open(self._tokens_path, encoding="utf-8") as file:
                tokens: dict[str, float] = json.load(file)
        except FileNotFoundError:
            return {}
        return tokens


def _now_ms() -> int:
    return int(time.time() * 1000)


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def is_revocation(body: Mapping[str, Any], authorities: list[x509.Certificate]) -> bool:
    """Returns whether one of the authorities signed this body of a revocation."""
    return _is_signed(_REVOCATION_CONTEXT, ("node", "key_id", "upto", "retired", "at"), body, authorities)


def is_retirement(body: Mapping[str, Any], authorities: list[x509.Certificate]) -> bool:
    """Returns whether one of the authorities signed this body of a retirement."""
    return _is_signed(_RETIREMENT_CONTEXT, ("node", "name", "reason", "at_ms"), body, authorities)


def _is_signed(
    context: bytes, names: Iterable[str], body: Mapping[str, Any], authorities: list[x509.Certificate]
) -> bool:
    said = {name: body.get(name) for name in names}
    text = str(body.get("signature"))
    try:
        signature = bytes.fromhex(text)
    except ValueError:
        return False
    # In one form only: a member could write a thousand variants of a revocation, which all nodes would keep.
    if body.keys() != {*said, "signature"} or text != signature.hex():
        return False
    return any(_verifies(authority, signature, context + _canonical(said)) for authority in authorities)


def _verifies(authority: x509.Certificate, signature: bytes, signed: bytes) -> bool:
    key = authority.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        key.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _checked_request(pem: bytes) -> x509.CertificateSigningRequest:
    """Returns the request. Raises AuthorityError unless its signature and content are those of a node's request."""
    try:
        asked = x509.load_pem_x509_csr(pem[:MAX_PEM])
        names = asked.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key = asked.public_key()
    except (ValueError, x509.ExtensionNotFound) as exc:
        raise AuthorityError(f"no certificate request of a node: {exc}") from exc
    signing = [n for n in names.get_values_for_type(x509.UniformResourceIdentifier) if n.startswith(SIGNING_NAME)]
    kinds = (x509.DNSName, x509.IPAddress, x509.UniformResourceIdentifier)
    if not asked.is_signature_valid or not isinstance(key, ec.EllipticCurvePublicKey):
        raise AuthorityError("certificate request with a bad signature, or with no P-256 key")
    if len(names.get_values_for_type(x509.UniformResourceIdentifier)) != len(signing):
        raise AuthorityError("certificate request with URIs besides the signing key")
    if len(signing) != 1 or len(names) > MAX_NAMES or not all(isinstance(name, kinds) for name in names):
        raise AuthorityError(f"certificate request with {len(signing)} signing keys and {len(names)} names")
    if len(asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME)) != 1:
        raise AuthorityError("certificate request without a node id")
    return asked


def _self_signed(key: ec.EllipticCurvePrivateKey, fleet: str, names: x509.NameConstraints) -> x509.Certificate:
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet),
            x509.NameAttribute(NameOID.COMMON_NAME, f"vmconv fleet {fleet}"[:64]),
        ]
    )
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(names, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256())


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_identifier(certificate: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
