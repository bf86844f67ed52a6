"""The API's sockets: opened at the start, served from the first connection on.

FastAPI and its dependencies take more memory than the rest of a node. Most nodes are never asked over HTTP, so the
daemon only listens, and imports them at the first connection.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmconv_fleet.config import ConfigError, NodeConfig, split_address
from vmconv_fleet.errors import FleetError
from vmconv_fleet.limiter import LimitedSocket, Limiter, Limits
from vmconv_fleet.node.memory import release
from vmconv_fleet.oidc.settings import OidcSettings, read
from vmconv_fleet.supervision import Supervised

if TYPE_CHECKING:
    import uvicorn

    from vmconv_fleet.links.zenoh_link import ZenohLink
    from vmconv_fleet.replication.service import NodeService

LOCAL_LIMITS = Limits(128, 128, 60.0)
API_S = 15.0
END_S = 5
"""Time for the servers to stop."""


class ApiSockets:
    """Serves the API on the node's Unix socket and, if configured, over HTTPS."""

    def __init__(self, config: NodeConfig, service: NodeService, link: ZenohLink) -> None:
        self._config = config
        self._service = service
        self._link = link
        local = LOCAL_LIMITS._replace(requests=config.limit("requests"))
        self.limiters = [Limiter("local", local), Limiter("api", limits_of(config))]
        for limiter in self.limiters:
            service.observe(limiter)
        self._sign_in = sign_in_of(config)
        self._sockets: list[LimitedSocket] = []
        self._servers: list[uvicorn.Server] = []
        self._ended = threading.Event()
        self._wake = socket.socketpair()
        self.thread = Supervised("api", self._run, self._ended)
        service.observe(self.thread)

    def start(self) -> None:
        """Listens. Raises FleetError if an address is not available."""
        self._listen()
        self.thread.start()

    def _listen(self) -> None:
        local, remote = self.limiters
        self._sockets = [local.listen(_listen_locally(self._config.socket))]
        if self._config.api:
            self._sockets.append(remote.listen(_listen(self._config.api)))

    @property
    def port(self) -> int | None:
        """The port of HTTPS."""
        return int(self._sockets[1].getsockname()[1]) if len(self._sockets) > 1 else None

    def renew(self) -> None:
        """Reloads certificate and key for new connections."""
        for server in self._servers:
            if server.config.ssl is not None:
                server.config.ssl.load_cert_chain(
                    self._config.credential("node.pem"), self._config.credential("tls.key")
                )

    def close(self) -> None:
        self._ended.set()
        self._wake[1].close()
        for server in self._servers:
            server.should_exit = True
        self.thread.join(END_S)
        for listening in (*self._sockets, self._wake[0]):
            listening.close()
        for limiter in self.limiters:
            limiter.close()
        with contextlib.suppress(OSError):
            os.unlink(self._config.socket)

    def _run(self, works: Callable[[], None]) -> None:
        try:
            if self._sockets[0].fileno() < 0:
                # After a failure, which closed them.
                self._listen()
            else:
                select.select([*self._sockets, self._wake[0]], [], [])
            if not self._ended.is_set():
                self._serve(works)
        finally:
            for one in self._sockets:
                one.close()

    def _serve(self, works: Callable[[], None]) -> None:
        import asyncio

        from vmconv_fleet import console
        from vmconv_fleet.api import as_local, create_app
        from vmconv_fleet.node.serving import Site, serve

        app = create_app(self._service, directory=self._config.directory, link=self._link)
        console.install(app, self._sign_in)
        tls = {
            "ssl_certfile": self._config.credential("node.pem"),
            "ssl_keyfile": self._config.credential("tls.key"),
        }
        sites = [Site(as_local(app), self._sockets[0], {}), *(Site(app, one, tls) for one in self._sockets[1:])]
        self._servers = [site.server() for site in sites]
        if not self._ended.is_set():
            # The start of the API leaves memory too.
            gc.collect()
            release()
            asyncio.run(serve(self._servers, self._sockets, works))


def limits_of(config: NodeConfig) -> Limits:
    """Returns the limits of the API over HTTPS."""
    numbers = (config.limit(name) for name in ("connections", "connections_per_address", "requests"))
    total, address, requests = numbers
    return Limits(total, address, API_S, requests)


def sign_in_of(config: NodeConfig) -> OidcSettings | None:
    """Returns where people sign in. Raises ConfigError if the settings are not valid, or authlib is missing."""
    if not config.oidc:
        return None
    if importlib.util.find_spec("authlib") is None:
        raise ConfigError("authlib is not installed: oidc needs it", hint="pip install 'vmconv-fleet[oidc]'")
    try:
        return read(config.oidc)
    except ValueError as exc:
        raise ConfigError(f"{config.path('node.toml')}: oidc: {exc}") from exc


def _listen_locally(path: str) -> socket.socket:
    """Returns a Unix socket that only the node's own user can connect to."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listening.bind(path)
    except OSError as exc:
        raise FleetError(
            f"{path}: cannot listen: {exc.strerror or exc}", hint="a shorter --directory may help"
        ) from exc
    finally:
        os.umask(before)
    listening.listen(128)
    return listening


def _listen(address: str) -> socket.socket:
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as exc:
        raise FleetError(f"{address}: cannot listen: {exc.strerror or exc}", hint="set api in node.toml") from exc
    listening.listen(128)
    return listening
