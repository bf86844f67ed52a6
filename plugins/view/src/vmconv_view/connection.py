"""One NBD client: negotiation, then requests, one after the other.

Each phase has a time limit, except the wait for a request, because an idle disk is normal. The whole negotiation and
each piece of a request have deadlines. A reply fails if the client does not read.
"""

from __future__ import annotations

import itertools
import socket
import struct
import time
from collections.abc import Callable

from vmconv.api import View
from vmconv.plugin import AccessError, VmconvError
from vmconv_view import nbd
from vmconv_view.nbd import Chunk, Cmd, Error, Handshake, Info, Opt, ProtocolError, Rep
from vmconv_view.overlay import WritableView, error_number

NEGOTIATION_TIME = 15.0
"""Seconds from connecting to the end of the negotiation."""

PIECE_TIME = 30.0
"""Seconds for the rest of a request's header, for each piece of its payload, and for a stalled reply."""

_PIECE = 64 << 10

_ENCRYPTED = 256 << 10
"""Bytes that are read and encrypted at a time."""

_ANSWERED_AT_ONCE = 64 << 10
"""Reads up to this size are answered with one chunk, which is read completely before it is sent."""

_ALLOWED = {Cmd.WRITE: nbd.FUA, Cmd.TRIM: nbd.FUA, Cmd.WRITE_ZEROES: nbd.FUA | nbd.NO_HOLE}
"""The requests that change a disk, with their possible flags."""

Secure = Callable[[socket.socket], socket.socket]


class Connection:
    """Serves one client `exports`: views by name, the default also by "".

    `serve` returns if the client disconnects or is too slow. It raises `ProtocolError`, or `AccessError` if the source
    has changed. `progressed` is called after the negotiation and after each request. `secure` returns the socket with
    TLS that replaces the given one; without it there is no TLS. With `requires_tls` nothing is told before.
    """

    def __init__(
        self,
        client: socket.socket,
        exports: dict[bytes, View],
        progressed: Callable[[], None] = lambda: None,
        *,
        secure: Secure | None = None,
        requires_tls: bool = False,
    ) -> None:
        self._client = client
        self._exports = exports
        self._progressed = progressed
        self._secure = secure
        self._requires_tls = requires_tls
        self._encrypted = False
        self._deadline: float | None = None
        self._transmits = False
        self._view: View | None = None
        self._structured = False
        self._context_of: bytes | None = None
        self._has_context = False

    def serve(self) -> None:
        try:
            self._deadline = time.monotonic() + NEGOTIATION_TIME
            self._negotiate()
            if self._view:
                self._transmit(self._view)
        except (ConnectionError, TimeoutError, BlockingIOError):
            pass
        if self._view:
            # Sent bytes may have been read after a change that was not visible yet.
            self._view.refuse_changed()

    def _transmit(self, view: View) -> None:
        self._transmits = True
        # With TLS, Python repeats calls that the kernel ends. It has limits of its own, which `_limit` sets.
        if not self._encrypted:
            # Blocking, for sendfile. With these options the kernel ends stalled calls with EAGAIN.
            self._client.settimeout(None)
            limit = struct.pack("@ll", int(PIECE_TIME), int(PIECE_TIME % 1 * 1e6))
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                self._client.setsockopt(socket.SOL_SOCKET, option, limit)
        self._progressed()
        while self._request(view):
            self._progressed()

    # -- negotiation

    def _negotiate(self) -> None:
        ours = Handshake.FIXED_NEWSTYLE | Handshake.NO_ZEROES
        self._send(nbd.GREETING + struct.pack(">H", ours))
        (flags,) = struct.unpack(">I", self._receive(4))
        if flags & ~ours or not flags & Handshake.FIXED_NEWSTYLE:
            raise ProtocolError(f"handshake flags {flags:#x} of the client are not understood")
        while self._option(zeroes=not flags & Handshake.NO_ZEROES):
            pass

    def _option(self, *, zeroes: bool) -> bool:
        """Answers one option; returns whether more may follow."""
        magic, option, length = nbd.OPTION.unpack(self._receive(nbd.OPTION.size))
        if magic != nbd.OPTION_MAGIC:
            raise ProtocolError(f"option magic {magic:#x} is not {nbd.OPTION_MAGIC:#x}")
        if length > nbd.MAX_OPTION:
            self._refuse_big(option, length)
            return True
        data = self._receive(length)
        if self._requires_tls and not self._encrypted and option not in (Opt.STARTTLS, Opt.ABORT):
            if option == Opt.EXPORT_NAME:
                raise ProtocolError("the client requests an export without TLS")
            self._answer(option, Rep.ERR_TLS_REQD, b"TLS is required")
            return True
        if option == Opt.EXPORT_NAME:
            self._begin_at_once(data, zeroes=zeroes)
            return False
        if option == Opt.ABORT:
            self._answer(option, Rep.ACK)
            return False
        if option == Opt.STARTTLS and not data and self._secure and not self._encrypted:
            # Its errors are the end: there is no connection left to answer on.
            self._start_tls(self._secure)
            return True
        try:
            return self._negotiable(option, data)
        except ProtocolError as exc:
            self._answer(option, Rep.ERR_INVALID, str(exc).encode())
            return True

    def _refuse_big(self, option: int, length: int) -> None:
        """Skips data that is too long and answers with an error. Raises `ProtocolError` beyond `MAX_REQUEST`."""
        if length > nbd.MAX_REQUEST or option == Opt.EXPORT_NAME:
            raise ProtocolError(f"option {option} with {length} bytes of data, {nbd.MAX_OPTION} at most")
        self._skip(length)
        self._answer(option, Rep.ERR_TOO_BIG)

    def _negotiable(self, option: int, data: bytes) -> bool:
        if option in (Opt.INFO, Opt.GO):
            return not (self._inform(option, nbd.parse_export_request(data)) and option == Opt.GO)
        if option == Opt.LIST and not data:
            for name in filter(None, self._exports):
                self._answer(option, Rep.SERVER, struct.pack(">I", len(name)) + name)
            self._answer(option, Rep.ACK)
        elif option == Opt.STRUCTURED_REPLY and not data and not self._structured:
            self._structured = True
            self._answer(option, Rep.ACK)
        elif option in (Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT):
            self._contexts(option, *nbd.parse_context_request(data))
        else:
            known = option in (Opt.LIST, Opt.STRUCTURED_REPLY) or (option == Opt.STARTTLS and self._secure)
            self._answer(option, Rep.ERR_INVALID if known else Rep.ERR_UNSUP)
        return True

    def _start_tls(self, secure: Secure) -> None:
        self._answer(Opt.STARTTLS, Rep.ACK)
        self._limit()
        self._client = secure(self._client)
        self._encrypted = True
        # Others on the way may have sent what came before.
        self._structured = self._has_context = False
        self._context_of = None

    def _answer(self, option: int, kind: Rep, data: bytes = b"") -> None:
        self._send(nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    def _export(self, name: bytes) -> View | None:
        return self._exports.get(name)

    def _begin_at_once(self, name: bytes, *, zeroes: bool) -> None:
        self._view = self._export(name)
        if self._view is None:
            raise ProtocolError(f"the client requests export {name!r}, which does not exist")
        self._send(nbd.EXPORT.pack(self._view.size, _flags(self._view)) + bytes(124 if zeroes else 0))

    def _inform(self, option: int, name: bytes) -> bool:
        view = self._export(name)
        if view is None:
            self._answer(option, Rep.ERR_UNKNOWN)
            return False
        self._answer(option, Rep.INFO, struct.pack(">H", Info.EXPORT) + nbd.EXPORT.pack(view.size, _flags(view)))
        sizes = struct.pack(">HIII", Info.BLOCK_SIZE, 1, 4096, nbd.MAX_REQUEST)
        self._answer(option, Rep.INFO, sizes)
        self._answer(option, Rep.ACK)
        if option == Opt.GO:
            self._view = view
            self._has_context = self._has_context and self._context_of == name
        return True

    def _contexts(self, option: int, export: bytes, queries: list[bytes]) -> None:
        if self._export(export) is None:
            self._answer(option, Rep.ERR_UNKNOWN)
            return
        listing = option == Opt.LIST_META_CONTEXT
        if not (listing or self._structured):
            raise ProtocolError("contexts need structured replies")
        wanted = nbd.is_asked_for(queries, listing=listing)
        if not listing:
            self._context_of, self._has_context = export, wanted
        if wanted:
            self._answer(option, Rep.META_CONTEXT, struct.pack(">I", 0 if listing else nbd.CONTEXT_ID) + nbd.CONTEXT)
        self._answer(option, Rep.ACK)

    # -- requests

    def _request(self, view: View) -> bool:
        """Answers one request; returns whether more may follow."""
        header = self._request_header()
        magic, flags, command, cookie, offset, length = nbd.REQUEST.unpack(header)
        if magic != nbd.REQUEST_MAGIC:
            raise ProtocolError(f"request magic {magic:#x} is not {nbd.REQUEST_MAGIC:#x}")
        inside = length > 0 and offset + length <= view.size
        if command == Cmd.DISC:
            return False
        if command == Cmd.READ and not flags and inside and length <= nbd.MAX_REQUEST:
            self._read(view, cookie, offset, length)
        elif command == Cmd.BLOCK_STATUS and self._has_context and not flags & ~nbd.REQ_ONE and inside:
            self._block_status(view, cookie, offset, length, 1 if flags & nbd.REQ_ONE else nbd.MAX_SPANS)
        elif command in (Cmd.READ, Cmd.BLOCK_STATUS):
            self._refuse_read(cookie, Error.EINVAL, b"not a range of the export, or not negotiated")
        elif command == Cmd.FLUSH and not flags:
            self._change(view, Cmd.FLUSH, 0, cookie, 0, memoryview(b""), 0)
        elif command in _ALLOWED and isinstance(view, WritableView):
            self._answer_change(view, command, flags, cookie, offset, length)
        elif command in _ALLOWED:
            self._refuse_change(command, cookie, length)
        else:
            self._reply(cookie, Error.EINVAL)
        return True

    def _request_header(self) -> bytes:
        """Waits for the first byte without limit, then for the rest of the header up to `PIECE_TIME`."""
        self._deadline = None
        first = self._receive(1)
        self._deadline = time.monotonic() + PIECE_TIME
        header = first + self._receive(nbd.REQUEST.size - 1)
        if self._encrypted:
            self._client.settimeout(PIECE_TIME)
        return header

    def _answer_change(self, view: View, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        data = self._payload(length) if command == Cmd.WRITE else memoryview(b"")
        if flags & ~_ALLOWED[Cmd(command)] or not length:
            self._reply(cookie, Error.EINVAL)
        elif offset + length > view.size:
            self._reply(cookie, Error.ENOSPC if command == Cmd.WRITE else Error.EINVAL)
        else:
            self._change(view, command, flags, cookie, offset, data, length)

    def _change(
        self, view: View, command: int, flags: int, cookie: int, offset: int, data: memoryview, length: int
    ) -> None:
        """Answers a request that changes a disk, or flushes it."""
        error = None
        try:
            view.refuse_changed()
            if isinstance(view, WritableView):
                if command == Cmd.WRITE:
                    view.layer.write(offset, data)
                elif command != Cmd.FLUSH:
                    view.layer.zero(offset, length, exact=command == Cmd.WRITE_ZEROES)
                if command == Cmd.FLUSH or flags & nbd.FUA:
                    view.layer.flush()
        except OSError as exc:
            error = Error(error_number(exc))
        except VmconvError as exc:
            self._reply(cookie, Error.EIO)
            if isinstance(exc, AccessError):
                raise
            return
        self._reply(cookie, error)

    def _payload(self, length: int) -> memoryview:
        """Returns the data of a write."""
        if length > nbd.MAX_REQUEST:
            raise ProtocolError(f"a write of {length} bytes, {nbd.MAX_REQUEST} at most")
        data = memoryview(bytearray(length))
        for at in range(0, length, _PIECE):
            self._deadline = time.monotonic() + PIECE_TIME
            piece = data[at : at + _PIECE]
            piece[:] = self._receive(len(piece))
        return data

    def _refuse_change(self, command: int, cookie: int, length: int) -> None:
        if command == Cmd.WRITE:
            if length > nbd.MAX_REQUEST:
                raise ProtocolError(f"a write of {length} bytes, {nbd.MAX_REQUEST} at most")
            self._skip(length)
        self._reply(cookie, Error.EPERM)

    def _reply(self, cookie: int, error: Error | None) -> None:
        self._client.sendall(nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error or 0, cookie))

    def _refuse_read(self, cookie: int, error: Error, text: bytes) -> None:
        """Answers READ or BLOCK_STATUS with an error, as a chunk if structured replies are negotiated."""
        if not self._structured:
            self._reply(cookie, error)
            return
        data = struct.pack(">IH", error, len(text)) + text
        self._client.sendall(self._chunk(cookie, Chunk.ERROR, len(data), done=True) + data)

    def _read(self, view: View, cookie: int, offset: int, length: int) -> None:
        try:
            view.refuse_changed()
            if length <= _ANSWERED_AT_ONCE:
                data = view.read(offset, length)
        except VmconvError as exc:
            self._fail(cookie, exc)
            return
        if length > _ANSWERED_AT_ONCE:
            self._read_much(view, cookie, offset, length)
        elif self._structured:
            where = struct.pack(">Q", offset)
            self._client.sendall(self._chunk(cookie, Chunk.OFFSET_DATA, 8 + length, done=True) + where + data)
        else:
            self._client.sendall(nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie) + data)

    def _read_much(self, view: View, cookie: int, offset: int, length: int) -> None:
        """Answers a read with sendfile. An error inside announced data can only end the connection."""
        if not self._structured:
            self._client.sendall(nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie))
            self._send_range(view, offset, length)
            view.refuse_changed()
            return
        for span, is_data in view.spans(offset, length):
            where = struct.pack(">Q", offset)
            if is_data:
                self._client.sendall(self._chunk(cookie, Chunk.OFFSET_DATA, 8 + span) + where)
                self._send_range(view, offset, span)
            else:
                self._client.sendall(self._chunk(cookie, Chunk.OFFSET_HOLE, 12) + where + struct.pack(">I", span))
            offset += span
        try:
            view.refuse_changed()
        except AccessError as exc:
            self._fail(cookie, exc)
            return
        self._client.sendall(self._chunk(cookie, Chunk.NONE, 0, done=True))

    def _send_range(self, view: View, offset: int, length: int) -> None:
        if not self._encrypted:
            view.send(self._client.fileno(), offset, length)
            return
        buffer = memoryview(bytearray(min(length, _ENCRYPTED)))
        for at in range(0, length, len(buffer)):
            part = buffer[: length - at]
            view.read_into(offset + at, part)
            self._client.sendall(part)

    def _block_status(self, view: View, cookie: int, offset: int, length: int, most: int) -> None:
        spans = list(itertools.islice(view.spans(offset, length), most))
        data = struct.pack(">I", nbd.CONTEXT_ID)
        data += b"".join(struct.pack(">II", span, 0 if is_data else nbd.HOLE_AND_ZERO) for span, is_data in spans)
        self._client.sendall(self._chunk(cookie, Chunk.BLOCK_STATUS, len(data), done=True) + data)

    def _fail(self, cookie: int, exc: VmconvError) -> None:
        """Answers with EIO and the reason. Raises `exc` if the source has changed, which ends the server."""
        self._refuse_read(cookie, Error.EIO, str(exc).encode(errors="backslashreplace")[: nbd.MAX_NAME])
        if isinstance(exc, AccessError):
            raise exc

    def _chunk(self, cookie: int, kind: Chunk, length: int, *, done: bool = False) -> bytes:
        return nbd.CHUNK.pack(nbd.STRUCTURED_REPLY_MAGIC, nbd.DONE if done else 0, kind, cookie, length)

    def _receive(self, length: int) -> bytes:
        """Returns exactly `length` bytes. Raises `TimeoutError` after the deadline."""
        data = bytearray(length)
        left = memoryview(data)
        while left:
            try:
                self._limit()
                count = self._client.recv_into(left)
            except BlockingIOError:
                continue
            if not count:
                raise ConnectionResetError
            left = left[count:]
        return bytes(data)

    def _send(self, data: bytes) -> None:
        """Sends a reply of the negotiation."""
        self._limit()
        self._client.sendall(data)

    def _limit(self) -> None:
        """Raises `TimeoutError` after the deadline; limits the next call to the rest, where calls have own limits."""
        if self._deadline is None:
            if self._encrypted:
                self._client.settimeout(None)
            return
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if self._encrypted or not self._transmits:
            self._client.settimeout(left)

    def _skip(self, length: int) -> None:
        while length:
            if self._transmits:
                self._deadline = time.monotonic() + PIECE_TIME
            length -= len(self._receive(min(length, _PIECE)))


def _flags(view: View) -> int:
    """Returns the transmission flags of an export."""
    return nbd.WRITABLE_FLAGS if isinstance(view, WritableView) else nbd.EXPORT_FLAGS
