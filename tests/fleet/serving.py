"""The API of a node, served as the daemon serves it: on a Unix socket for its administrator, and over TLS."""

from __future__ import annotations

import asyncio
import datetime
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastapi import FastAPI

from fleet.in_memory import Node
from vmconv_fleet import console
from vmconv_fleet.api import as_local, create_app
from vmconv_fleet.cli.client import NodeClient
from vmconv_fleet.config import LIMITS
from vmconv_fleet.limiter import Limiter, Limits
from vmconv_fleet.node.activation import API_S, LOCAL_LIMITS
from vmconv_fleet.node.serving import Site, serve
from vmconv_fleet.oidc.settings import OidcSettings
from vmconv_fleet.testing import PATIENCE

USUAL = Limits(LIMITS["connections"], LIMITS["connections_per_address"], API_S)


class Served(NamedTuple):
    """A node whose API can be called: `local` by its administrator; `url` is its HTTPS, `ca` what to trust for it."""

    node: Node
    app: FastAPI
    local: NodeClient
    url: str
    ca: str
    limiter: Limiter

    def client(self, role: str, **more: object) -> NodeClient:
        """Returns a client with a new token of this role."""
        token = self.token(role, **more)["token"]
        return NodeClient(self.url, ca=self.ca, token=token)

    def token(self, role: str, **more: object) -> dict[str, Any]:
        reply = self.local.call("POST", "/api/v1/tokens", {"label": f"a {role}", "role": role, **more})
        made: dict[str, Any] = reply.content
        return made


@contextmanager
def served(
    node: Node, limits: Limits = USUAL, sign_in: Callable[[str], OidcSettings] | None = None
) -> Iterator[Served]:
    """Yields the node's API while it is served; `sign_in` returns where people sign in, for the console's address."""
    app = create_app(node.service, directory=str(node.directory), link=node.wire)
    key, certificate = tls_files(node.directory)
    local, remote = Limiter("local", LOCAL_LIMITS), Limiter("api", limits)
    node.service.observe(remote)
    with ExitStack() as stack:
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(node.directory / "api.sock"))
        unix.listen()
        listening = [local.listen(unix), remote.listen(socket.create_server(("127.0.0.1", 0)))]
        url = f"https://127.0.0.1:{listening[1].getsockname()[1]}"
        console.install(app, sign_in(url) if sign_in else None)
        for one in listening:
            stack.enter_context(one)
        tls = {"ssl_keyfile": key, "ssl_certfile": certificate}
        stack.enter_context(running([Site(as_local(app), listening[0], {}), Site(app, listening[1], tls)]))
        stack.callback(local.close)
        stack.callback(remote.close)
        yield Served(node, app, stack.enter_context(NodeClient(str(node.directory))), url, certificate, remote)


@contextmanager
def running(sites: Sequence[Site]) -> Iterator[None]:
    """Serves while the block runs. Connections made before the servers run wait for them."""
    servers = [site.server() for site in sites]
    thread = threading.Thread(
        target=lambda: asyncio.run(serve(servers, [site.listening for site in sites])), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        for server in servers:
            server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def tls_files(directory: Path) -> tuple[str, str]:
    """Returns the files of a new key and of its certificate, for loopback."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, directory.name)])
    now = datetime.datetime.now(datetime.UTC)
    import ipaddress

    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = directory / "tls.key", directory / "tls.pem"
    pem = serialization.Encoding.PEM
    files[0].write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    files[1].write_bytes(certificate.public_bytes(pem))
    return str(files[0]), str(files[1])
