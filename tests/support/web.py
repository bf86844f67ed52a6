"""A small web server with ranges, whose answers a test can spoil; it counts its requests."""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Spoil = Callable[["Handler", int, int], bool]
"""Called with the handler and the range of a request; returns True if it has answered."""


def sparse_disk(path: Path, size: int, pieces: Iterable[tuple[int, int]]) -> Path:
    """Makes a raw disk with random bytes at `(offset, length)` and holes elsewhere."""
    rng = random.Random(0)
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in pieces:
            os.pwrite(file.fileno(), rng.randbytes(length), offset)
    return path


class Server(ThreadingHTTPServer):
    """Serves the files of a directory. `asked` are `(path, first, last)` of all requests with a range."""

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory = directory
        self.asked: list[tuple[str, int, int]] = []
        self.headers: list[dict[str, str]] = []
        self.spoil: Spoil | None = None
        self.etags = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: clients of the tests hang up."""

    @property
    def bytes_sent(self) -> int:
        return sum(last - first + 1 for _, first, last in self.asked)

    def url(self, name: str, scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        path = self.named()
        self.server.headers.append(dict(self.headers))
        if not path.is_file():
            self.answer(404, {}, b"")
            return
        size = path.stat().st_size
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if not found:
            self.answer(200, {}, path.read_bytes())
            return
        first, last = int(found[1]), min(int(found[2]), size - 1)
        self.server.asked.append((path.name, first, last))
        if self.server.spoil and self.server.spoil(self, first, last):
            return
        if first >= size:
            self.answer(416, {"Content-Range": f"bytes */{size}"}, b"")
            return
        self.part(path, first, last)

    def named(self) -> Path:
        """Returns the file that a request is for."""
        return self.server.directory / unquote(self.path.partition("?")[0]).lstrip("/")

    def part(self, path: Path, first: int, last: int, **changed: str) -> None:
        """Answers with a range; `changed` are other headers, with "_" for "-"."""
        status = path.stat()
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), last - first + 1, first)
        headers = {"Content-Range": f"bytes {first}-{last}/{status.st_size}"}
        if self.server.etags:
            headers["ETag"] = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
        self.answer(206, headers | {name.replace("_", "-"): value for name, value in changed.items()}, data)

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextmanager
def serving(directory: Path) -> Iterator[Server]:
    """Yields a server of the files in a directory."""
    with Server(directory) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
