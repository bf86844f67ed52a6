"""A web server that answers each request as a test says."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

STEP = 256 << 10
"""Bytes that a slow server takes at once."""


class Asked(BaseHTTPRequestHandler):
    """A request, and how to answer it."""

    protocol_version = "HTTP/1.1"
    answer: Callable[[Asked], None]

    def do_GET(self) -> None:
        type(self).answer(self)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def say(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        """Answers; `length` is what Content-Length states, by default the truth."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def take(self, pause: float = 0) -> str:
        """Reads the body, with a pause after each `STEP` bytes, and returns its MD5 in hexadecimal."""
        content, left = md5(usedforsecurity=False), int(self.headers["Content-Length"])
        while left:
            piece = self.rfile.read(min(left, STEP))
            content.update(piece)
            left -= len(piece)
            time.sleep(pause)
        return content.hexdigest()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def scripted_server(answer: Callable[[Asked], None]) -> Iterator[int]:
    """Yields the port of a server that answers so. The system takes little of what it has not read."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def server_bind(self) -> None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
            super().server_bind()

        def handle_error(self, *_: object) -> None:
            """Says nothing: clients of the tests hang up."""

    with Server(("127.0.0.1", 0), type("Handler", (Asked,), {"answer": answer})) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
