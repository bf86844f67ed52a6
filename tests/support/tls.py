"""Servers with TLS, by a certificate that nobody has signed."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer

from support.requirements import oracle_program


def certified(path: Path) -> ssl.SSLContext:
    """Makes a certificate for 127.0.0.1 at `path`, its key beside it, and returns what a server needs."""
    key = path.with_suffix(".key")
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [oracle_program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run([*command, *subject, "-keyout", key, "-out", path], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, key)
    return context


@contextmanager
def in_front_of(port: int, context: ssl.SSLContext) -> Iterator[int]:
    """Yields the port of a server with TLS that passes everything on to a port of this machine."""

    class Relay(BaseRequestHandler):
        def handle(self) -> None:
            with (
                suppress(OSError),
                socket.create_connection(("127.0.0.1", port)) as behind,
                context.wrap_socket(self.request, server_side=True) as before,
            ):
                back = threading.Thread(target=_pass, args=(behind, before))
                back.start()
                _pass(before, behind)
                back.join()

    class Server(ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Relay) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def _pass(source: socket.socket, target: socket.socket) -> None:
    """Passes on what arrives until it ends."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
