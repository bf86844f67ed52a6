"""A client of NBD (the protocol's document, doc/proto.md of the reference implementation). The server is not trusted.

    handshake   NBDMAGIC IHAVEOPT flags16           client flags32
    option      IHAVEOPT option32 length32 data     reply magic64 option32 type32 length32 data
    request     magic32 flags16 type16 cookie64 offset64 length32
    reply       simple: magic32 error32 cookie64 data
                structured: magic32 flags16 type16 cookie64 length32 payload, until a chunk with the flag DONE

Structured replies are asked for because of `base:allocation`: which ranges of the export are holes.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote_to_bytes

from vmconv.errors import AccessError, ReadError, UsageError, VmconvError
from vmconv.io.schemes.pipelined import Pipelined, Request

if TYPE_CHECKING:
    from vmconv.interface.scheme import Url
    from vmconv.io.schemes.secured import SecuredSocket

PORT = 10809
SILENCE = 30.0
"""Seconds that a server may send nothing."""
SLOWEST = 16 << 10
"""Bytes per second that an answer needs, after its first `SILENCE` seconds."""

_INIT, _OPTION, _REPLY = 0x4E42444D41474943, 0x49484156454F5054, 0x0003E889045565A9
_REQUEST, _SIMPLE, _STRUCTURED = 0x25609513, 0x67446698, 0x668E33EF
_FIXED, _NO_ZEROES = 1, 2
_STARTTLS, _GO, _STRUCTURED_REPLY, _SET_META_CONTEXT = 5, 7, 8, 10
_ACK, _INFO, _META_CONTEXT, _ERROR = 1, 3, 4, 1 << 31
_INFO_EXPORT = 0
_READ, _DISCONNECT, _BLOCK_STATUS = 0, 2, 7
_DONE = 1
_NONE, _OFFSET_DATA, _OFFSET_HOLE, _STATUS, _CHUNK_ERROR = 0, 1, 2, 5, 1 << 15
_STATE_ZERO = 2
_CONTEXT = b"base:allocation"

_SMALL = 64 << 10
"""Bytes of a reply to an option, or of an error, at most."""
_EXTENTS = 1 << 20
"""Ranges of one answer about allocation, at most."""
_MOST_RANGES = 1 << 22
"""Ranges with data that are kept; all that lies behind them counts as data."""
_INFOS = 64
"""Replies to one option before the last one, at most."""
_ASKED = 1 << 30
"""Bytes that one request about allocation is for, at most: lengths are of 32 bits."""
_MOST_ASKED = 1 << 17
"""Requests about allocation: enough for 128 TiB."""
_LONGEST = 1 << 62
_NAMES = {
    1: "unsupported",
    2: "forbidden",
    3: "invalid",
    5: "needs TLS",
    6: "there is no such export",
    7: "shutting down",
}


class NbdExport(Pipelined):
    """The export that a URL names. All requests go through one connection: many servers allow one only."""

    def __init__(self, url: Url) -> None:
        super().__init__(url.shown)
        self._socket: socket.socket | SecuredSocket
        self._name, self._socket = _connected(url)
        self._ranges: list[tuple[int, int]] | None = None
        try:
            self._socket.settimeout(SILENCE)
            self._context = self._negotiated(url)
        except BaseException as exc:
            self._socket.close()
            if isinstance(exc, OSError):
                raise ReadError(f"{self.shown}: the connection failed: {exc.strerror or exc}") from exc
            raise

    # -- handshake

    def _negotiated(self, url: Url) -> int | None:
        """Agrees on the export; returns the id of the context for allocation, None without one."""
        magic, option, flags = struct.unpack(">QQH", self._take(18))
        if (magic, option) != (_INIT, _OPTION) or not flags & _FIXED:
            raise ReadError(f"{self.shown}: is not a server of the fixed newstyle NBD protocol")
        self._socket.sendall(struct.pack(">I", _FIXED | flags & _NO_ZEROES))
        if url.scheme == "nbds":
            self._start_tls(url)
        structured = self._agrees(_STRUCTURED_REPLY, b"")
        context = self._context_of() if structured else None
        self._go()
        return context

    def _start_tls(self, url: Url) -> None:
        import ssl

        from vmconv.io.schemes.secured import SecuredSocket

        if not self._agrees(_STARTTLS, b""):
            raise AccessError(f"{self.shown}: the server has no TLS", hint="nbd:// is without it")
        try:
            assert isinstance(self._socket, socket.socket)
            self._socket = SecuredSocket(self._socket, url.bare_host)
        except ssl.SSLCertVerificationError as exc:
            hint = "SSL_CERT_FILE names a file with the certificates of other authorities"
            raise AccessError(f"{self.shown}: its certificate is refused: {exc.verify_message}", hint=hint) from exc

    def _option(self, number: int, data: bytes) -> tuple[int, bytes]:
        """Sends an option and returns type and data of the first reply."""
        self._socket.sendall(struct.pack(">QII", _OPTION, number, len(data)) + data)
        return self._reply(number)

    def _reply(self, number: int) -> tuple[int, bytes]:
        magic, option, kind, length = struct.unpack(">QIII", self._take(20))
        if magic != _REPLY or option != number or length > _SMALL:
            raise ReadError(f"{self.shown}: the answer to option {number} is not one ({magic:#x}, {option}, {length})")
        return kind, self._take(length)

    def _agrees(self, number: int, data: bytes) -> bool:
        kind, _ = self._option(number, data)
        if kind & _ERROR:
            return False
        if kind != _ACK:
            raise ReadError(f"{self.shown}: the answer to option {number} is of type {kind}")
        return True

    def _context_of(self) -> int | None:
        """Asks for `base:allocation`."""
        data = struct.pack(">I", len(self._name)) + self._name + struct.pack(">II", 1, len(_CONTEXT)) + _CONTEXT
        kind, answer = self._option(_SET_META_CONTEXT, data)
        found = None
        for _ in range(_INFOS):
            if kind != _META_CONTEXT or found is not None:
                break
            if answer[4:] == _CONTEXT:
                found = int.from_bytes(answer[:4])
            kind, answer = self._reply(_SET_META_CONTEXT)
        if kind != _ACK and not kind & _ERROR:
            raise ReadError(f"{self.shown}: the answer to option {_SET_META_CONTEXT} is of type {kind}")
        return found

    def _go(self) -> None:
        kind, answer = self._option(_GO, struct.pack(">I", len(self._name)) + self._name + struct.pack(">H", 0))
        size = None
        for _ in range(_INFOS):
            if kind != _INFO:
                break
            if len(answer) == 12 and int.from_bytes(answer[:2]) == _INFO_EXPORT:
                size = int.from_bytes(answer[2:10])
            kind, answer = self._reply(_GO)
        if kind & _ERROR:
            said = answer[:200].decode(errors="replace") or _NAMES.get(kind & ~_ERROR, f"error {kind:#x}")
            raise AccessError(f"{self.shown}: the server refuses: {' '.join(said.split())}")
        if kind != _ACK or size is None or size > _LONGEST:
            raise ReadError(f"{self.shown}: the server states no size of the export, or {size}")
        self.size = size

    # -- transmission

    def send(self, number: int, request: Request) -> None:
        self._ask(_READ, number, request.offset, len(request.buffer))

    def _ask(self, kind: int, number: int, offset: int, length: int) -> None:
        self._socket.sendall(struct.pack(">IHHQQI", _REQUEST, 0, kind, number, offset, length))

    def receive(self) -> None:
        (magic,) = struct.unpack(">I", self._take(4))
        if magic == _SIMPLE:
            error, number = struct.unpack(">IQ", self._take(12))
            request = self.expected(number)
            if error:
                self.settled(number, self._failed(request, error))
                return
            self._fill(request.buffer)
            self.settled(number)
        elif magic == _STRUCTURED:
            self._chunk()
        else:
            raise ReadError(f"{self.shown}: an answer begins with {magic:#x}")

    def _chunk(self) -> None:
        flags, kind, number, length = struct.unpack(">HHQI", self._take(16))
        request = self.expected(number)
        if kind == _OFFSET_DATA:
            self._data(request, length)
        elif kind == _OFFSET_HOLE and length == 12:
            offset, hole = struct.unpack(">QI", self._take(12))
            self._part(request, offset, hole)[:] = bytes(hole)
        elif kind == _STATUS:
            self._keep_status(number, length)
        elif kind & _CHUNK_ERROR and 6 <= length <= _SMALL:
            error = int.from_bytes(self._take(length)[:4])
            request.error = request.error or self._failed(request, error)
        elif kind != _NONE or length:
            raise ReadError(f"{self.shown}: an answer of type {kind:#x} has {length} bytes")
        if flags & _DONE:
            self._finish(number, request)

    def _finish(self, number: int, request: Request) -> None:
        if not (request.error or isinstance(request, _Status)):
            at = 0
            for begin, end in sorted(request.parts):
                if begin != at:
                    break
                at = end
            if at != len(request.buffer):
                where = f"{request.offset + at:#x}"
                raise ReadError(f"{self.shown}: the server's answer has nothing, or something twice, at {where}")
        self.settled(number, request.error)

    def _data(self, request: Request, length: int) -> None:
        offset = int.from_bytes(self._take(8))
        self._fill(self._part(request, offset, length - 8))

    def _part(self, request: Request, offset: int, length: int) -> memoryview:
        """Returns where a chunk goes."""
        at = offset - request.offset
        # Also for one that sends the same bytes again and again.
        if at < 0 or length <= 0 or max(at, request.filled) + length > len(request.buffer):
            raise ReadError(f"{self.shown}: the server sends {length} bytes of {offset:#x}, which were not asked for")
        request.parts.append((at, at + length))
        request.filled += length
        return request.buffer[at : at + length]

    def _failed(self, request: Request, error: int) -> VmconvError:
        return ReadError(f"{self.shown}: cannot be read at {request.offset:#x}: {os.strerror(error)}")

    # -- allocation

    def data_ranges(self, start: int, end: int) -> list[tuple[int, int]]:
        if self._context is None:
            return super().data_ranges(start, end)
        if self._ranges is None:
            self._ranges = self._allocated()
        return [(max(low, start), min(high, end)) for low, high in self._ranges if high > start and low < end]

    def _allocated(self) -> list[tuple[int, int]]:
        """Returns the ranges of the export that may have data."""
        found: list[tuple[int, int]] = []
        at = 0
        for _ in range(_MOST_ASKED):
            if at >= self.size:
                return found
            if len(found) > _MOST_RANGES:
                return [*found, (at, self.size)]
            before = at
            for length, flags in self._extents(at, min(_ASKED, self.size - at)):
                end = min(at + length, self.size)
                if not flags & _STATE_ZERO and end > at:
                    begin = found.pop()[0] if found and found[-1][1] == at else at
                    found.append((begin, end))
                at = end
            if at == before:
                break
        raise ReadError(f"{self.shown}: the server says too little of what is allocated, at {at:#x} for the last time")

    def _extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Returns `(length, flags)` of what is allocated from an offset on, as far as one answer goes."""
        request = _Status(offset)
        self.exchange([request], lambda number, _: self._ask(_BLOCK_STATUS, number, offset, length))
        return request.extents

    def _keep_status(self, number: int, length: int) -> None:
        request = self.expected(number)
        if not isinstance(request, _Status) or length % 8 != 4 or not 12 <= length <= 4 + 8 * _EXTENTS:
            raise ReadError(f"{self.shown}: an answer about allocation has {length} bytes")
        data = self._take(length)
        if int.from_bytes(data[:4]) != self._context:
            raise ReadError(f"{self.shown}: an answer about allocation is of another context")
        request.extents = list(struct.iter_unpack(">II", data[4:]))

    # -- bytes

    def _take(self, length: int) -> bytes:
        data = bytearray(length)
        self._fill(memoryview(data))
        return bytes(data)

    def _fill(self, buffer: memoryview) -> None:
        deadline = time.monotonic() + SILENCE + len(buffer) / SLOWEST
        while buffer:
            # Each byte of a slow server would otherwise have its own time-out.
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(min(SILENCE, left))
            step = self._socket.recv_into(buffer)
            if not step:
                raise OSError(errno.ECONNRESET, "the server closed it")
            buffer = buffer[step:]

    def close(self) -> None:
        from contextlib import suppress

        with suppress(OSError):
            self._ask(_DISCONNECT, 0, 0, 0)
        self._socket.close()


class _Status(Request):
    """A request about allocation; `extents` are `(length, flags)` from its offset on."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset, memoryview(b""))
        self.extents: list[tuple[int, int]] = []


def _connected(url: Url) -> tuple[bytes, socket.socket]:
    """Returns the name of the export, and a connection to its server."""
    name = unquote_to_bytes(url.path[1:])
    if len(name) > 4096:
        raise UsageError(f"{url.shown}: the name of its export is longer than 4096 bytes")
    try:
        if url.scheme == "nbd+unix":
            paths = parse_qs(url.query, keep_blank_values=True, errors="surrogateescape").get("socket", [])
            if len(paths) != 1 or not paths[0] or url.host:
                raise UsageError(f"{url.shown}: names no socket", hint="nbd+unix:///EXPORT?socket=PATH")
            return name, _connected_to(paths[0])
        if not url.host or url.query:
            raise UsageError(f"{url.shown}: is not {url.scheme}://HOST[:PORT]/EXPORT")
        connection = socket.create_connection((url.bare_host, url.port or PORT), timeout=SILENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as exc:
        raise ReadError(f"{url.shown}: cannot be reached: {exc.strerror or exc}") from exc
    return name, connection


def _connected_to(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(SILENCE)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection
