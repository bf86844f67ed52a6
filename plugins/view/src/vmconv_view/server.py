"""The NBD server: its listener, its clients and its end."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from vmconv.api import View
from vmconv.plugin import AccessError, BackendError, VmconvError
from vmconv_view.clients import MAX_CLIENTS, Client, Clients
from vmconv_view.connection import Connection

if TYPE_CHECKING:
    from vmconv_view.tls import Tls

_UNSENT = 1 << 20
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_REST = 1.0
_SHORT_REST = 0.05
_MOST_REPORTS = 100
_LONGEST_REPORT = 500


def listen_on_socket(path: str) -> socket.socket:
    """Returns a socket that listens at `path`, which must not exist; only its owner may connect."""
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listener.bind(path)
    except OSError as exc:
        listener.close()
        raise BackendError(f"{path}: cannot be made a socket: {exc.strerror or exc}") from exc
    finally:
        os.umask(before)
    listener.listen(MAX_CLIENTS)
    return listener


def listen_on_port(address: str, port: int) -> socket.socket:
    """Returns a socket that listens on a TCP port; port 0 is any free one."""
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=MAX_CLIENTS)
    except OSError as exc:
        raise BackendError(f"{address}:{port}: cannot be listened on: {exc.strerror or exc}") from exc


class Server:
    """Serves clients of `listener`, each in a thread of its own, until `run` returns or raises.

    `exports` are views by name, the default one also by "".
    """

    def __init__(
        self, listener: socket.socket, exports: dict[bytes, View], *, persistent: bool, tls: Tls | None = None
    ) -> None:
        self._listener = listener
        self._exports = exports
        self._tls = tls
        self._persistent = persistent
        self._clients = Clients()
        self._accepts_from = 0.0
        self._served = False
        self._failure: VmconvError | None = None
        self._reports = Reports()
        self._woken, self._waker = socket.socketpair()

    def run(self) -> None:
        """Returns when the last client has disconnected, unless persistent. Raises `AccessError` if the source changed.

        Only connections that chose an export count as clients: a port scan must not end the server.
        """
        with selectors.DefaultSelector() as ready, self._listener, self._woken, self._waker:
            self._listener.setblocking(False)
            self._waker.setblocking(False)
            ready.register(self._woken, selectors.EVENT_READ)
            try:
                while not self._is_over():
                    self._wait(ready)
            finally:
                # What threads still meet comes from files and sockets that are closed under them.
                self._reports.end()
                self._clients.disconnect_all()
        if self._failure:
            raise self._failure

    def _is_over(self) -> bool:
        return bool(self._failure) or (self._served and not self._persistent and not self._clients.any_negotiated)

    def _wait(self, ready: selectors.BaseSelector) -> None:
        """Handles new connections and the end of clients; ignores the listener during a pause."""
        rest = self._accepts_from - time.monotonic()
        listens = self._listener in ready.get_map()
        if rest <= 0 and not listens:
            ready.register(self._listener, selectors.EVENT_READ)
        elif rest > 0 and listens:
            ready.unregister(self._listener)
        for key, _ in ready.select(rest if rest > 0 else None):
            if key.fileobj is self._woken:
                self._woken.recv(4096)
            else:
                self._accept()

    def _accept(self) -> None:
        try:
            connection, peer = self._listener.accept()
        except OSError as exc:
            # Other errors concern a connection that was closed again.
            if exc.errno in _EXHAUSTED:
                self._rest(f"no connection can be accepted: {exc.strerror}")
            return
        try:
            client = Client(connection, peer)
            _configure(connection)
            if self._clients.add(client):
                self._start(client)
            else:
                connection.close()
        except OSError:
            connection.close()

    def _start(self, client: Client) -> None:
        try:
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()
        except RuntimeError as exc:
            self._clients.remove(client)
            client.socket.close()
            self._rest(f"no client can be served: {exc}")

    def _rest(self, reason: str) -> None:
        """Pauses accepting: an exhausted resource would be exhausted again at once."""
        self._reports.say(reason)
        self._accepts_from = time.monotonic() + (_SHORT_REST if self._clients.drop_one() else _REST)

    def _serve(self, client: Client) -> None:
        def progressed() -> None:
            client.progressed()
            self._served = True

        tls = self._tls
        secure = partial(_secure, client, tls) if tls else None
        try:
            Connection(
                client.socket, self._exports, progressed, secure=secure, requires_tls=bool(tls and tls.required)
            ).serve()
        except AccessError as exc:
            # The source changed, so all further replies would be wrong.
            self._failure = exc
        except VmconvError as exc:
            self._reports.say(str(exc))
        except OSError:
            # The client has disconnected, or the server ends.
            pass
        except Exception as exc:
            self._reports.say(f"defect of vmconv or of a plugin: {type(exc).__name__}: {exc}")
        finally:
            self._clients.remove(client)
            client.socket.close()
            # If the pipe is full, the server wakes up anyway. If it is closed, the server has ended.
            with suppress(OSError):
                self._waker.send(b"+")


def _secure(client: Client, tls: Tls, connection: socket.socket) -> socket.socket:
    """Starts TLS with a client and returns its new socket; raises `ProtocolError` if it is not let in."""
    secured = tls.wrap(connection)
    client.replace(secured)
    tls.shake_hands(secured)
    client.authorised = tls.verifies
    return secured


def _configure(connection: socket.socket) -> None:
    connection.setblocking(True)
    if connection.family == socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT)
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Only keepalive tells a host that vanished from an idle client.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, seconds)


class Reports:
    """Messages on standard error: each once, and a limited number, because clients can provoke them."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self._ended = False

    def end(self) -> None:
        """Makes this the end: nothing is said any more."""
        self._ended = True

    def say(self, text: str) -> None:
        text = text[:_LONGEST_REPORT]
        with self._lock:
            if self._ended or text in self._said or len(self._said) >= _MOST_REPORTS:
                return
            self._said.add(text)
        with suppress(OSError, ValueError):
            print(f"vmconv: {text}", file=sys.stderr, flush=True)
