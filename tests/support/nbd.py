"""A running `vmconv serve`, and a scripted NBD client that knows how not to behave."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PATIENCE = 600.0

GO, INFO, LIST, STRUCTURED, EXPORT_NAME, ABORT, STARTTLS = 7, 6, 3, 8, 1, 2, 5
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = 0, 1, 2, 3, 4, 5, 6, 7


class Served:
    """A running `vmconv serve`: what it exports by name, and where."""

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self.process = process
        self.socket = path
        self.uris: dict[str, str] = {}
        self.sizes: dict[str, int] = {}

    @property
    def uri(self) -> str:
        """Where the default export is, the last one."""
        return list(self.uris.values())[-1]

    def end(self) -> tuple[int, str]:
        """Returns the exit code and what was printed on standard error."""
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said


@contextlib.contextmanager
def served(image: Path, *flags: str, exports: int = 1, on_socket: bool = True) -> Iterator[Served]:
    """Runs `vmconv serve` until the block ends, or until it ends by itself."""
    path = image.with_name("nbd.sock")
    where = ["--socket", str(path)] if on_socket else ["--port", "0"]
    command = [sys.executable, "-m", "vmconv", "serve", str(image), *where, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        running = Served(process, path)
        try:
            assert process.stdout
            for _ in range(exports):
                name, _, rest = process.stdout.readline().strip().partition(": ")
                size, _, uri = rest.partition(" bytes at ")
                running.uris[name], running.sizes[name] = uri, int(size)
            yield running
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(timeout=PATIENCE)


class Client:
    """A scripted NBD client."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.structured = False
        self.size = 0

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self.socket.recv(length - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def greet(self, flags: int = 3) -> None:
        assert self.receive(18) == b"NBDMAGICIHAVEOPT" + bytes([0, 3])
        self.socket.sendall(struct.pack(">I", flags))

    def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Sends an option and returns the replies to it."""
        self.socket.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        replies = []
        while True:
            magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
            assert (magic, option) == (0x3E889045565A9, number)
            replies.append((kind, self.receive(length)))
            if kind == 1 or kind >> 31:
                return replies

    def negotiate(self, *, structured: bool = True) -> None:
        self.greet()
        if structured:
            assert self.option(STRUCTURED) == [(1, b"")]
        self.structured = structured
        replies = self.option(GO, struct.pack(">IH", 0, 0))
        assert replies[-1] == (1, b"")
        (export,) = [data for kind, data in replies if kind == 3 and data[:2] == b"\0\0"]
        self.size, flags = struct.unpack(">QH", export[2:])
        assert flags == 1 | 2 | 256

    def request(self, command: int, offset: int, length: int, *, flags: int = 0, cookie: int = 77) -> None:
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length))

    def simple_reply(self) -> int:
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert (magic, cookie) == (0x67446698, 77)
        assert isinstance(error, int)
        return error

    def chunk(self) -> tuple[int, int, bytes]:
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.receive(20))
        assert (magic, cookie) == (0x668E33EF, 77)
        return flags, kind, self.receive(length)

    def read(self, offset: int, length: int) -> bytes | int:
        """Returns the bytes, or the error."""
        self.request(READ, offset, length)
        if not self.structured:
            error = self.simple_reply()
            return error or self.receive(length)
        data = bytearray(length)
        while True:
            flags, kind, payload = self.chunk()
            if kind == 1:
                at = struct.unpack(">Q", payload[:8])[0] - offset
                data[at : at + len(payload) - 8] = payload[8:]
            elif kind >> 15:
                assert flags == 1
                return int(struct.unpack(">I", payload[:4])[0])
            if flags:
                return bytes(data)


@contextlib.contextmanager
def client(running: Served) -> Iterator[Client]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(running.socket))
        yield Client(connection)
