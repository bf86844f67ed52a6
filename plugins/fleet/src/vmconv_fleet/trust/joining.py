"""Joining a fleet and renewing certificates: HTTPS between a node and a node with the authority.

The service answers three requests, each a POST of JSON, and returns the authority's certificate without
authentication (GET /ca):

 /join    with a token of an invitation: a certificate for an unused node id, and those of the members. The node
          states where it will listen for links, and this node dials it: strangers may hold all places of the port
          here
 /renew   with the node's certificate: a new one for the same node id, for the same or new keys. A certificate that
          expired comes in the body: the new one is for the same keys, with which the request is signed
 /leave   with the node's certificate: the revocation of this node

A joining node accepts the server's certificate only if the authority has the fingerprint of the invitation and the
server is the node that the invitation names. Then it sends the token.
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import json
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Protocol

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from vmconv.plugin import VmconvError
from vmconv_fleet.config import LINK_PORT, NodeConfig, join_address, split_address
from vmconv_fleet.errors import FleetError
from vmconv_fleet.limiter import Limiter, Limits, connection_of
from vmconv_fleet.resolving import Resolver, connected
from vmconv_fleet.supervision import Supervised
from vmconv_fleet.trust.authority import Authority, AuthorityError, Invitation, fingerprint
from vmconv_fleet.trust.identity import (
    MAX_MEMBERS,
    MAX_PEM,
    Binding,
    IdentityError,
    binding,
    read_authorities,
    read_certificate,
    request_binding,
)
from vmconv_fleet.trust.peers import common_name

LIMIT = 64 << 10
MAX_ANSWER = 2 * MAX_MEMBERS
TIMEOUT = 10.0
_RESOLVER = Resolver()
JOIN_S = 30.0
MAX_SEEDS = 8
RETURN_WITHIN = datetime.timedelta(days=180)
"""The time after its end within which a certificate renews itself: for a machine that was off."""
_log = logging.getLogger("vmconv_fleet.joining")


class JoinError(FleetError):
    """The joining service is unreachable, is not that of the invitation, or refuses."""


class UnreachableError(JoinError):
    """No authority answers at an address."""


class Membership(Protocol):
    """The joining service's interface to the running node."""

    def is_known(self, node: str) -> bool:
        """Returns whether a node has, or ever had, this id."""

    def is_revoked(self, node: str, key_id: str) -> bool:
        """Returns whether the node, or this key of it, was revoked."""

    def names(self) -> Mapping[str, AbstractSet[str]]:
        """Returns the names and addresses in certificates of members, and their nodes."""

    def seeds(self) -> list[str]:
        """Returns addresses of links of members."""

    def certificates(self) -> list[bytes]:
        """Returns a certificate of each member."""

    def certified(self, certificate: bytes) -> None:
        """Stores the certificate of a node durably."""

    def expect(self, node: str, stated: object) -> None:
        """Dials a node that joins at the addresses that it states, which may be anything."""

    def revoke(self, node: str) -> None:
        """Revokes the node durably."""


class JoinService:
    """The joining service, on threads of its own, from `start` to `close`."""

    def __init__(
        self, config: NodeConfig, authority: Authority, membership: Membership, *, limits: Limits | None = None
    ) -> None:
        self.config = config
        self.authority = authority
        self.membership = membership
        total, address = config.limit("join_connections"), config.limit("join_connections_per_address")
        self.limiter = Limiter("join", limits or Limits(total, address, JOIN_S))
        self._server: _Server | None = None
        self._ended = threading.Event()
        self.thread = Supervised("joining", self._run, self._ended)

    def start(self) -> int:
        """Listens and returns the port. Raises JoinError if it cannot."""
        self._server = server = self._listen()
        self.thread.start()
        return int(server.server_address[1])

    def _listen(self) -> _Server:
        host, port = split_address(self.config.join)
        try:
            return _Server(host, port, self)
        except OSError as exc:
            raise JoinError(f"{self.config.join}: cannot listen for nodes that join: {exc.strerror or exc}") from exc

    def _run(self, works: Callable[[], None]) -> None:
        if self._server is None:
            self._server = self._listen()
        try:
            self._server.works = works
            self._server.serve_forever(0.5)
        finally:
            self._server.server_close()
            self._server = None

    def close(self) -> None:
        self._ended.set()
        if (server := self._server) is not None and self.thread.is_alive():
            server.shutdown()
        self.thread.join(TIMEOUT)
        self.limiter.close()

    def answer(self, path: str, asked: dict[str, Any], caller: bytes | None) -> dict[str, Any]:
        """Returns the answer to a question; `caller` is the client's verified certificate (DER), if any."""
        match path:
            case "/join":
                return self._join(asked, str(asked.get("token")))
            case "/renew":
                request, expired = str(asked.get("request")).encode(), asked.get("certificate")
                bound = self._member(caller) if caller or not expired else self._returning(str(expired), request)
                return self._certified(self._issue(asked, bound.node))
            case "/leave":
                self.membership.revoke(self._member(caller).node)
                return {}
            case _:
                raise AuthorityError(f"nothing at {path}")

    def _member(self, caller: bytes | None) -> Binding:
        if caller is None:
            raise AuthorityError("only for nodes with a client certificate")
        return self._unrevoked(x509.load_der_x509_certificate(caller))

    def _returning(self, pem: str, request: bytes) -> Binding:
        """Returns the member whose certificate has expired: its request proves that it holds the keys."""
        certificate = read_certificate(pem.encode())
        bound = self._unrevoked(certificate)
        since = datetime.datetime.now(datetime.UTC) - bound.not_after
        if since > RETURN_WITHIN:
            raise AuthorityError(
                f"the certificate of node {bound.node} expired {since.days} days ago, "
                f"at most {RETURN_WITHIN.days} are allowed",
                hint="retire the node, and let the machine join as a new one",
            )
        if request_binding(request) != (certificate.public_key(), bound.key):
            raise AuthorityError("a node with an expired certificate gets a new one only for the same keys")
        return bound

    def _unrevoked(self, certificate: x509.Certificate) -> Binding:
        bound = binding(certificate, [self.authority.certificate])
        if self.membership.is_revoked(bound.node, bound.key_id):
            raise AuthorityError(f"node {bound.node} was revoked")
        return bound

    def _issue(self, asked: dict[str, Any], node: str | None = None) -> bytes:
        request, drops = str(asked.get("request")).encode(), asked.get("drops") is True
        taken, name = self.membership.names(), str(asked.get("name") or "")
        return self.authority.issue(request, node=node, taken=taken, drops=drops, name=name)

    def _join(self, asked: dict[str, Any], token: str) -> dict[str, Any]:
        # To sign a certificate takes long, and strangers may ask.
        self.authority.refuse_unknown(token)
        # The request is checked first, so that a refused one does not use up the token.
        certificate = self._issue(asked)
        node = binding(read_certificate(certificate), [self.authority.certificate]).node
        if self.membership.is_known(node):
            raise AuthorityError(f"node id {node} is taken")
        self.authority.redeem(token)
        _log.info("node %s joins", node)
        self.membership.expect(node, asked.get("links"))
        # All members, within a limit: the new node accepts them from its first session on.
        return {**self._certified(certificate), "members": _within(MAX_MEMBERS, self.membership.certificates())}

    def _certified(self, certificate: bytes) -> dict[str, Any]:
        self.membership.certified(certificate)
        with open(self.config.path("ca.pem"), encoding="ascii") as file:
            authorities = file.read(LIMIT)
        return {
            "certificate": certificate.decode(),
            "authorities": authorities,
            "fleet": self.config.fleet,
            "link_port": split_address(self.config.listen[0])[1] if self.config.listen else LINK_PORT,
            "seeds": self.membership.seeds()[:MAX_SEEDS],
        }


def _within(limit: int, certificates: list[bytes]) -> str:
    """Returns as many certificates as fit into `limit` bytes, concatenated."""
    text = ""
    for certificate in certificates:
        if len(text) + len(certificate) > limit:
            break
        text += certificate.decode("ascii")
    return text


class _Server(ThreadingHTTPServer):
    """HTTPS with handshakes on the threads of the connections, within the limits of the service."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    works: Callable[[], None]

    def __init__(self, host: str, port: int, service: JoinService) -> None:
        self.service = service
        self.limiter = service.limiter
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)
        self.socket = self.limiter.listen(self.socket)

    def service_actions(self) -> None:
        self.limiter.sweep()
        self.works()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        connection = connection_of(request)
        try:
            with contextlib.suppress(OSError):
                request.settimeout(TIMEOUT)
                # A new context for each connection: certificates may have been renewed.
                context = server_context(self.service.config)
                secured = context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
                connection.replace(secured)
                secured.do_handshake()
                self.finish_request(secured, client_address)
        except Exception:
            self.handle_error(request, client_address)
        finally:
            connection.disconnect()
            connection.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.warning("a connection for joining failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "vmconv"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path != "/ca":
            self._send(404, b"")
            return
        with open(self.server.service.config.path("ca.pem"), "rb") as file:
            self._send(200, file.read(LIMIT))

    def do_POST(self) -> None:
        try:
            size = int(self.headers.get("Content-Length", "0"))
            if not 0 < size <= LIMIT:
                raise AuthorityError(f"body of {size} bytes, at most {LIMIT} are read")
            asked = json.loads(self.rfile.read(size))
            if not isinstance(asked, dict):
                raise AuthorityError("the body is not a JSON object")
            self._answer(200, self.server.service.answer(self.path, asked, self._caller()))
        except VmconvError as exc:
            _log.warning("refused at %s: %s", self.path, exc)
            self._answer(403, {"error": str(exc), "hint": exc.hint})
        except ValueError as exc:
            self._answer(400, {"error": f"the body is not JSON: {exc}", "hint": None})

    def _caller(self) -> bytes | None:
        assert isinstance(self.connection, ssl.SSLSocket)
        return self.connection.getpeercert(binary_form=True)

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, json.dumps(body).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base class
        _log.debug(format, *args)


def server_context(config: NodeConfig) -> ssl.SSLContext:
    """Returns the TLS context of a service of this node; clients may show a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(config.credential("node.pem"), config.credential("tls.key"))
    context.load_verify_locations(config.path("ca.pem"))
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


class Granted(NamedTuple):
    """The authority's answer to a node; `members` only when it joins."""

    certificate: bytes
    authorities: bytes
    fleet: str
    seeds: list[str]
    members: bytes = b""


def join(
    invitation: Invitation, request: bytes, *, drops: bool = False, name: str = "", links: Sequence[str] = ()
) -> Granted:
    """Requests a certificate with an invitation, for a node of this name that will listen at `links`.

    `drops`: without the addresses that the authority does not allow.
    """
    host, _ = split_address(invitation.address)
    context = _client_context(_authority_certificate(invitation))
    with _connected(invitation.address, context) as connection:
        assert isinstance(connection.sock, ssl.SSLSocket)
        node = common_name(connection.sock)
        if node != invitation.node:
            raise JoinError(f"{invitation.address}: is node {node}, the invitation names {invitation.node}")
        asked = {
            "request": request.decode(),
            "token": invitation.token,
            "drops": drops,
            "name": name,
            "links": [*links],
        }
        found = _post(connection, "/join", asked)
    link = join_address(host, int(found["link_port"]))
    seeds = list(dict.fromkeys([link, *map(str, found["seeds"])]))[: MAX_SEEDS + 1]
    return Granted(
        found["certificate"].encode(),
        found["authorities"].encode(),
        str(found["fleet"]),
        seeds,
        found["members"].encode(),
    )


def renew(config: NodeConfig, address: str, request: bytes) -> Granted:
    """Requests a new certificate with the present one, which may have expired."""
    with open(config.credential("node.pem"), "rb") as file:
        pem = file.read(MAX_PEM)
    asked: dict[str, Any] = {"request": request.decode(), "drops": not config.addresses, "name": config.name}
    present = read_certificate(pem)
    if present.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
        asked["certificate"] = pem.decode()
    with _connected(address, _member_context(config, shows="certificate" not in asked)) as connection:
        found = _post(connection, "/renew", asked)
    return Granted(found["certificate"].encode(), found["authorities"].encode(), str(found["fleet"]), [])


def leave(config: NodeConfig, address: str) -> None:
    """Requests the revocation of this node."""
    with _connected(address, _member_context(config)) as connection:
        _post(connection, "/leave", {})


def _authority_certificate(invitation: Invitation) -> str:
    """Returns the certificate with the invitation's fingerprint, as the server at the address sends it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with _connected(invitation.address, context) as connection:
        connection.request("GET", "/ca")
        pem = connection.getresponse().read(LIMIT)
    try:
        found = [one for one in read_authorities(pem) if fingerprint(one) == invitation.fingerprint]
    except IdentityError:
        found = []
    if not found:
        raise JoinError(
            f"{invitation.address}: is not of the invitation's fleet",
            hint="no secret was sent; the connection may be intercepted",
        )
    return found[0].public_bytes(serialization.Encoding.PEM).decode()


def _client_context(authorities: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The node id in the certificate identifies the server, not the address.
    context.check_hostname = False
    context.load_verify_locations(cadata=authorities)
    return context


def _member_context(config: NodeConfig, *, shows: bool = True) -> ssl.SSLContext:
    """Returns the TLS context of a member, which `shows` its certificate unless that has expired."""
    with open(config.path("ca.pem"), encoding="ascii") as file:
        context = _client_context(file.read(LIMIT))
    if shows:
        context.load_cert_chain(config.credential("node.pem"), config.credential("tls.key"))
    return context


@contextmanager
def _connected(address: str, context: ssl.SSLContext) -> Iterator[http.client.HTTPSConnection]:
    """Opens a connection; network errors in the block become JoinError."""
    host, port = split_address(address)
    connection = http.client.HTTPSConnection(host, port)
    try:
        connection.sock = context.wrap_socket(connected(_RESOLVER, host, port, TIMEOUT), server_hostname=host)
        yield connection
    except (OSError, http.client.HTTPException) as exc:
        reason = getattr(exc, "verify_message", None) or getattr(exc, "strerror", None) or exc
        raise UnreachableError(f"{address}: cannot ask the authority: {reason}") from exc
    finally:
        connection.close()


def _post(connection: http.client.HTTPSConnection, path: str, body: dict[str, Any]) -> dict[str, Any]:
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    try:
        found: dict[str, Any] = json.loads(response.read(MAX_ANSWER))
    except ValueError as exc:
        raise JoinError(f"{connection.host}: answers {response.status} without JSON") from exc
    if response.status != 200:
        raise JoinError(f"refused: {found.get('error')}", hint=found.get("hint"))
    return found


def first_that_answers(addresses: list[str], ask: Callable[[str], Any]) -> Any:
    """Returns the first good answer of an authority. Raises a refusal if there was one, or else the last error."""
    failed: FleetError = UnreachableError("no authority is known", hint="set authorities in node.toml")
    for address in addresses:
        try:
            return ask(address)
        except FleetError as exc:
            if isinstance(failed, UnreachableError):
                failed = exc
    raise failed
