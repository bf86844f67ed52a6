"""TLS on a connection that one thread reads while another one writes, which OpenSSL allows for no single connection."""

from __future__ import annotations

import socket
import ssl
import threading
from typing import cast

_STEP = 64 << 10


class SecuredSocket:
    """A connected socket with TLS as its client: the few methods of a socket that a client needs.

    Raises `ssl.SSLError`, an `OSError`, where TLS fails. The certificate is verified for `host`.
    """

    def __init__(self, plain: socket.socket, host: str) -> None:
        self._plain = plain
        self._came, self._goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = ssl.create_default_context().wrap_bio(self._came, self._goes, server_hostname=host)
        # Of both together, `_sending` is taken first.
        self._sending, self._using = threading.Lock(), threading.Lock()
        while not self._shook_hands():
            self._receive()

    def settimeout(self, seconds: float) -> None:
        self._plain.settimeout(seconds)

    def close(self) -> None:
        self._plain.close()

    def sendall(self, data: bytes) -> None:
        with self._sending:
            with self._using:
                self._tls.write(data)
            self._send()

    def recv_into(self, buffer: memoryview) -> int:
        """Receives at least one byte, 0 at the end. Called by one thread at a time."""
        while True:
            with self._using:
                try:
                    # With a buffer it is the count of bytes, which typeshed does not know.
                    return cast("int", self._tls.read(len(buffer), buffer))
                except ssl.SSLWantReadError:
                    pass
                except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                    return 0
            self._receive()

    def _shook_hands(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        finally:
            # What says why a handshake ends, too.
            self._send()
        return True

    def _receive(self) -> None:
        if self._goes.pending:
            # TLS has answers of its own.
            with self._sending:
                self._send()
        data = self._plain.recv(_STEP)
        with self._using:
            if data:
                self._came.write(data)
            else:
                self._came.write_eof()

    def _send(self) -> None:
        with self._using:
            data = self._goes.read()
        if data:
            self._plain.sendall(data)
