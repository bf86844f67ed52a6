"""The API of a node, served as the daemon serves it: on a Unix socket for its administrator, and over TLS."""

from __future__ import annotations

import datetime
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastapi import FastAPI

from fleet.in_memory import Node
from vmconv_fleet import console
from vmconv_fleet.api import as_local, create_app
from vmconv_fleet.cli.client import NodeClient
from vmconv_fleet.testing import PATIENCE


class Served(NamedTuple):
    """A node whose API can be called: `local` by its administrator; `url` is its HTTPS, `ca` what to trust for it."""

    node: Node
    app: FastAPI
    local: NodeClient
    url: str
    ca: str

    def client(self, role: str) -> NodeClient:
        """Returns a client with a new token of this role."""
        token = self.token(role)["token"]
        return NodeClient(self.url, ca=self.ca, token=token)

    def token(self, role: str, **more: object) -> dict[str, str]:
        reply = self.local.call("POST", "/api/v1/tokens", {"label": f"a {role}", "role": role, **more})
        made: dict[str, str] = reply.content
        return made


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


@contextmanager
def served(node: Node) -> Iterator[Served]:
    """Yields the node's API while it is served."""
    app = create_app(node.service, directory=str(node.directory), link=node.wire)
    console.install(app)
    key, certificate = _certificate(node.directory)
    path = str(node.directory / "api.sock")
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = listener.getsockname()[1]
        common = {"log_config": None, "lifespan": "off", "timeout_graceful_shutdown": 1}
        local = uvicorn.Config(as_local(app), uds=path, **common)  # type: ignore[arg-type]
        https = uvicorn.Config(app, fd=listener.fileno(), ssl_keyfile=key, ssl_certfile=certificate, **common)  # type: ignore[arg-type]
        for config in (local, https):
            stack.enter_context(_running(_Server(config)))
        url = f"https://127.0.0.1:{port}"
        yield Served(node, app, stack.enter_context(NodeClient(str(node.directory))), url, certificate)


@contextmanager
def _running(server: _Server) -> Iterator[None]:
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert server.is_up.wait(PATIENCE)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def _certificate(directory: Path) -> tuple[str, str]:
    """Returns the files of a new key and of its certificate, for loopback."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
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
