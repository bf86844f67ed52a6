"""One NBD client: its negotiation, then its requests, one after the other."""

from __future__ import annotations

import itertools
import socket
import struct

from vmconv.errors import AccessError, VmconvError
from vmconv.views import View
from vmconv_view import nbd
from vmconv_view.nbd import Chunk, Cmd, Error, Handshake, Info, Opt, ProtocolError, Rep

_PATIENCE = 30.0
"""Seconds that a client may be silent while it negotiates."""

_ANSWERED_AT_ONCE = 64 << 10
"""Reads of at most so many bytes are one simple chunk, checked before any of it is sent."""


class Connection:
    """Talks to one client about `exports`: views by name; the last is the default, which has no name.

    `serve` returns when the client has gone; it raises `ProtocolError`, or `AccessError` when the source has changed.
    """

    def __init__(self, client: socket.socket, exports: dict[bytes, View]) -> None:
        self._client = client
        self._exports = exports
        self._view: View | None = None
        self._structured = False
        self._context_of: bytes | None = None
        self._has_context = False

    def serve(self) -> None:
        try:
            self._client.settimeout(_PATIENCE)
            self._negotiate()
            self._client.settimeout(None)
            while self._view and self._request(self._view):
                pass
        except (ConnectionError, TimeoutError):
            pass
        if self._view:
            # What was sent may have been read after a change that nobody could know of then.
            self._view.refuse_changed()

    # -- negotiation

    def _negotiate(self) -> None:
        ours = Handshake.FIXED_NEWSTYLE | Handshake.NO_ZEROES
        self._client.sendall(nbd.GREETING + struct.pack(">H", ours))
        (flags,) = struct.unpack(">I", self._receive(4))
        if flags & ~ours or not flags & Handshake.FIXED_NEWSTYLE:
            raise ProtocolError(f"handshake flags {flags:#x} of the client are not understood")
        while self._option(zeroes=not flags & Handshake.NO_ZEROES):
            pass

    def _option(self, *, zeroes: bool) -> bool:
        """Answers one option; returns whether more will follow."""
        magic, option, length = nbd.OPTION.unpack(self._receive(nbd.OPTION.size))
        if magic != nbd.OPTION_MAGIC:
            raise ProtocolError(f"option magic {magic:#x} is not {nbd.OPTION_MAGIC:#x}")
        if length > nbd.MAX_OPTION:
            raise ProtocolError(f"option {option} with {length} bytes of data, {nbd.MAX_OPTION} at most")
        data = self._receive(length)
        if option == Opt.EXPORT_NAME:
            self._begin_at_once(data, zeroes=zeroes)
            return False
        if option == Opt.ABORT:
            self._answer(option, Rep.ACK)
            return False
        try:
            return self._negotiable(option, data)
        except ProtocolError as exc:
            self._answer(option, Rep.ERR_INVALID, str(exc).encode())
            return True

    def _negotiable(self, option: int, data: bytes) -> bool:
        if option in (Opt.INFO, Opt.GO):
            return not (self._inform(option, nbd.parse_export_request(data)) and option == Opt.GO)
        if option == Opt.LIST and not data:
            for name in self._exports:
                self._answer(option, Rep.SERVER, struct.pack(">I", len(name)) + name)
            self._answer(option, Rep.ACK)
        elif option == Opt.STRUCTURED_REPLY and not data:
            self._structured = True
            self._answer(option, Rep.ACK)
        elif option in (Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT):
            self._contexts(option, *nbd.parse_context_request(data))
        else:
            known = option in (Opt.LIST, Opt.STRUCTURED_REPLY)
            self._answer(option, Rep.ERR_INVALID if known else Rep.ERR_UNSUP)
        return True

    def _answer(self, option: int, kind: Rep, data: bytes = b"") -> None:
        self._client.sendall(nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    def _export(self, name: bytes) -> View | None:
        return self._exports.get(name or next(reversed(self._exports)))

    def _begin_at_once(self, name: bytes, *, zeroes: bool) -> None:
        self._view = self._export(name)
        if self._view is None:
            raise ProtocolError(f"the client asks for export {name!r}, which is not there")
        self._client.sendall(nbd.EXPORT.pack(self._view.size, nbd.EXPORT_FLAGS) + bytes(124 if zeroes else 0))

    def _inform(self, option: int, name: bytes) -> bool:
        view = self._export(name)
        if view is None:
            self._answer(option, Rep.ERR_UNKNOWN)
            return False
        self._answer(option, Rep.INFO, struct.pack(">H", Info.EXPORT) + nbd.EXPORT.pack(view.size, nbd.EXPORT_FLAGS))
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
        """Answers one request; returns whether more will follow."""
        header = self._receive(nbd.REQUEST.size)
        magic, flags, command, cookie, offset, length = nbd.REQUEST.unpack(header)
        if magic != nbd.REQUEST_MAGIC:
            raise ProtocolError(f"request magic {magic:#x} is not {nbd.REQUEST_MAGIC:#x}")
        inside = offset + length <= view.size
        if command == Cmd.DISC:
            return False
        if command == Cmd.READ and not flags and inside and 0 < length <= nbd.MAX_REQUEST:
            self._read(view, cookie, offset, length)
        elif command == Cmd.BLOCK_STATUS and self._has_context and not flags & ~nbd.REQ_ONE and inside and length:
            self._block_status(view, cookie, offset, length, 1 if flags & nbd.REQ_ONE else nbd.MAX_SPANS)
        elif command == Cmd.FLUSH and not flags:
            self._refuse(cookie, None)
        elif command in (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES):
            self._skip(length if command == Cmd.WRITE else 0)
            self._refuse(cookie, Error.EPERM)
        else:
            self._refuse(cookie, Error.EINVAL)
        return True

    def _refuse(self, cookie: int, error: Error | None) -> None:
        self._client.sendall(nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error or 0, cookie))

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
        """Answers a read without copying payload; what goes wrong in the middle of it ends the connection."""
        if not self._structured:
            self._client.sendall(nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie))
            view.send(self._client.fileno(), offset, length)
            view.refuse_changed()
            return
        for span, is_data in view.spans(offset, length):
            where = struct.pack(">Q", offset)
            if is_data:
                self._client.sendall(self._chunk(cookie, Chunk.OFFSET_DATA, 8 + span) + where)
                view.send(self._client.fileno(), offset, span)
            else:
                self._client.sendall(self._chunk(cookie, Chunk.OFFSET_HOLE, 12) + where + struct.pack(">I", span))
            offset += span
        try:
            view.refuse_changed()
        except AccessError as exc:
            self._fail(cookie, exc)
            return
        self._client.sendall(self._chunk(cookie, Chunk.NONE, 0, done=True))

    def _block_status(self, view: View, cookie: int, offset: int, length: int, most: int) -> None:
        spans = list(itertools.islice(view.spans(offset, length), most))
        data = struct.pack(">I", nbd.CONTEXT_ID)
        data += b"".join(struct.pack(">II", span, 0 if is_data else nbd.HOLE_AND_ZERO) for span, is_data in spans)
        self._client.sendall(self._chunk(cookie, Chunk.BLOCK_STATUS, len(data), done=True) + data)

    def _fail(self, cookie: int, exc: VmconvError) -> None:
        """Tells the client that a read failed, and why; raises `exc` when the source has changed: that ends it all."""
        text = str(exc).encode(errors="backslashreplace")[:4096]
        if self._structured:
            data = struct.pack(">IH", Error.EIO, len(text)) + text
            self._client.sendall(self._chunk(cookie, Chunk.ERROR, len(data), done=True) + data)
        else:
            self._refuse(cookie, Error.EIO)
        if isinstance(exc, AccessError):
            raise exc

    def _chunk(self, cookie: int, kind: Chunk, length: int, *, done: bool = False) -> bytes:
        return nbd.CHUNK.pack(nbd.STRUCTURED_REPLY_MAGIC, nbd.DONE if done else 0, kind, cookie, length)

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        left = memoryview(data)
        while left:
            count = self._client.recv_into(left)
            if not count:
                raise ConnectionResetError
            left = left[count:]
        return bytes(data)

    def _skip(self, length: int) -> None:
        while length:
            length -= len(self._receive(min(length, 1 << 16)))
