"""The NBD server: where it listens, its clients, and how it ends."""

from __future__ import annotations

import os
import selectors
import socket
import sys
import threading
from contextlib import suppress

from vmconv.errors import AccessError, BackendError, VmconvError
from vmconv.views import View
from vmconv_view.connection import Connection

MAX_CLIENTS = 16

_UNSENT = 1 << 20


def listen_on_socket(path: str) -> socket.socket:
    """Returns a socket that listens at `path`, where nothing may be; only its owner may connect."""
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
    """Returns a socket that listens on a TCP port; 0 is any that is free."""
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=MAX_CLIENTS)
    except OSError as exc:
        raise BackendError(f"{address}:{port}: cannot be listened on: {exc.strerror or exc}") from exc


class Server:
    """Serves clients of `listener`, each in a thread of its own, until `run` returns or raises."""

    def __init__(self, listener: socket.socket, exports: dict[bytes, View], *, persistent: bool) -> None:
        self._listener = listener
        self._exports = exports
        self._persistent = persistent
        self._lock = threading.Lock()
        self._clients: set[socket.socket] = set()
        self._served = False
        self._failure: VmconvError | None = None
        self._woken, self._waker = socket.socketpair()

    def run(self) -> None:
        """Returns when the last client has gone, unless persistent; raises `AccessError` when the source changed."""
        with selectors.DefaultSelector() as ready, self._listener, self._woken, self._waker:
            ready.register(self._listener, selectors.EVENT_READ)
            ready.register(self._woken, selectors.EVENT_READ)
            try:
                while not self._is_over():
                    for key, _ in ready.select():
                        if key.fileobj is self._listener:
                            self._accept()
                        else:
                            self._woken.recv(64)
            finally:
                self._disconnect()
        if self._failure:
            raise self._failure

    def _is_over(self) -> bool:
        with self._lock:
            return bool(self._failure) or (self._served and not self._clients and not self._persistent)

    def _accept(self) -> None:
        with suppress(OSError):
            client, _ = self._listener.accept()
            with self._lock:
                if len(self._clients) >= MAX_CLIENTS:
                    client.close()
                    return
                self._clients.add(client)
                self._served = True
            if client.family == socket.AF_UNIX:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT)
            else:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            Connection(client, self._exports).serve()
        except AccessError as exc:
            # Nothing that is said from now on would be true.
            self._failure = exc
        except VmconvError as exc:
            print(f"vmconv: {exc}", file=sys.stderr, flush=True)
        except OSError:
            # The client has gone, or the server ends.
            pass
        finally:
            with self._lock:
                self._clients.discard(client)
            client.close()
            with suppress(OSError):
                self._waker.send(b"+")

    def _disconnect(self) -> None:
        with self._lock:
            for client in self._clients:
                with suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
