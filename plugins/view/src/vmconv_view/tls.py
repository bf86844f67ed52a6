"""TLS of the NBD server: certificates (X.509) or shared keys (PSK), and the clients that may use the exports.

A directory of certificates has the file names of nbdkit, qemu-nbd and libnbd.
"""

from __future__ import annotations

import binascii
import os
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping

from vmconv.plugin import UsageError
from vmconv_view.nbd import ProtocolError

CA, REVOKED, CERTIFICATE, KEY = "ca-cert.pem", "ca-crl.pem", "server-cert.pem", "server-key.pem"

MAX_KEYS = 10_000
"""Lines of a file of shared keys."""
_LONGEST_KEYS = 4 << 20
_KEY_SIZES = range(16, 257)
"""Bytes of a shared key; OpenSSL takes 256 at most, and shorter ones can be guessed."""


class Tls:
    """How connections are encrypted; `required` if no client is served without.

    `verifies` is True if a client must prove who it is, with a certificate of the CA or a shared key. `allowed` are the
    names of the certificates that are let in, all if there are none.
    """

    def __init__(self, context: ssl.SSLContext, *, required: bool, verifies: bool, allowed: Iterable[str] = ()) -> None:
        self._context = context
        self.required = required
        self.verifies = verifies
        self._allowed = frozenset(allowed)

    def wrap(self, connection: socket.socket) -> ssl.SSLSocket:
        """Returns the socket that takes the place of `connection`, before its handshake."""
        return self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)

    def shake_hands(self, connection: ssl.SSLSocket) -> None:
        """Raises `ProtocolError` if the client and the server do not agree, or if the client is not let in."""
        try:
            connection.do_handshake()
        except ssl.SSLError as exc:
            raise ProtocolError(f"TLS with a client: {_reason(exc)}") from exc
        if not self._allowed:
            return
        names = names_of(connection.getpeercert() or {})
        if self._allowed.isdisjoint(names):
            raise ProtocolError(f"TLS with a client: its certificate is of {', '.join(map(repr, names)) or 'no name'}")


def _reason(exc: ssl.SSLError) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {exc.verify_message}"
    return (exc.reason or "the handshake failed").lower().replace("_", " ")


def names_of(certificate: Mapping[str, object]) -> list[str]:
    """Returns the common name and the DNS names of a verified certificate, as `getpeercert` gives it."""
    subject: Iterable[Iterable[tuple[str, str]]] = certificate.get("subject", ())  # type: ignore[assignment]
    others: Iterable[tuple[str, str]] = certificate.get("subjectAltName", ())  # type: ignore[assignment]
    names = [value for part in subject for key, value in part if key == "commonName"]
    return list(dict.fromkeys(names + [value for key, value in others if key == "DNS"]))


def with_certificates(directory: str, *, required: bool, verify_peer: bool, allowed: Iterable[str] = ()) -> Tls:
    """Returns the settings of a directory of certificates. Raises `UsageError` naming the file that is no use."""
    context = _context()
    certificate, key = (os.path.join(directory, name) for name in (CERTIFICATE, KEY))
    # Without a password an encrypted key is an error. OpenSSL would ask the terminal.
    _load(certificate, lambda: context.load_cert_chain(certificate, key, password=""), key)
    if verify_peer:
        authority, revoked = (os.path.join(directory, name) for name in (CA, REVOKED))
        _load(authority, lambda: context.load_verify_locations(authority))
        context.verify_mode = ssl.CERT_REQUIRED
        if os.path.lexists(revoked):
            _load(revoked, lambda: context.load_verify_locations(revoked))
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return Tls(context, required=required, verifies=verify_peer, allowed=allowed)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A resumed session would skip the verification, and is worth nothing to connections that last.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    return context


def with_shared_keys(path: str, *, required: bool) -> Tls:
    """Returns the settings of a file of shared keys, lines of `NAME:HEX`. Raises `UsageError` if Python cannot."""
    context = _context()
    if not hasattr(context, "set_psk_server_callback"):
        raise UsageError(
            "--tls-psk: the ssl module of this Python has no shared keys",
            hint="use Python 3.13 or later, or --tls-certificates",
        )
    keys = read_keys(path)

    def key_of(name: str | None) -> bytes:
        # An empty key ends the handshake.
        return keys.get(name or "", b"")

    context.set_ciphers("kECDHEPSK+AESGCM:kECDHEPSK+CHACHA20")
    context.set_psk_server_callback(key_of)
    return Tls(context, required=required, verifies=True)


def read_keys(path: str) -> dict[str, bytes]:
    """Returns the keys by name of a file that psktool (GnuTLS) writes. Raises `UsageError` naming file and line."""
    try:
        with open(path, "rb") as file:
            data = file.read(_LONGEST_KEYS + 1)
    except OSError as exc:
        raise UsageError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    lines = data.splitlines()
    if len(data) > _LONGEST_KEYS or len(lines) > MAX_KEYS:
        raise UsageError(f"{path}: more than {MAX_KEYS} keys, or {_LONGEST_KEYS} bytes")
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name, key = _key(line, f"{path}: line {number}")
            if name in keys:
                raise UsageError(f"{path}: line {number}: a second key of {name!r}")
            keys[name] = key
    if not keys:
        raise UsageError(f"{path}: no key in it")
    return keys


def _key(line: bytes, where: str) -> tuple[str, bytes]:
    """Returns name and key of a line. No message shows the key."""
    name, _, digits = line.strip().rpartition(b":")
    try:
        key = binascii.unhexlify(digits)
        text = name.decode()
    except ValueError as exc:
        raise UsageError(f"{where}: not a name, a colon and a key in hexadecimal digits") from exc
    if not text or len(key) not in _KEY_SIZES:
        raise UsageError(
            f"{where}: a key of {len(key)} bytes, {_KEY_SIZES.start} to {_KEY_SIZES.stop - 1} are possible"
        )
    return text, key


def _load(path: str, load: Callable[[], None], other: str = "") -> None:
    """Runs `load` of `path`, and of `other` with it."""
    for one in filter(None, (path, other)):
        if not os.path.isfile(one):
            raise UsageError(
                f"{one}: no such file", hint=f"a directory of certificates has {CERTIFICATE}, {KEY} and {CA}"
            )
    try:
        load()
    except ssl.SSLError as exc:
        names = f"{path} and {other}" if other else path
        raise UsageError(f"{names}: cannot be used: {_reason(exc)}") from exc
    except OSError as exc:
        raise UsageError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
