"""The NBD protocol of a server (NetworkBlockDevice/nbd, doc/proto.md).

Fixed newstyle negotiation, with TLS if it is configured; simple and structured replies; block status in the context
base:allocation.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

from vmconv.plugin import VmconvError

DEFAULT_PORT = 10809

GREETING = b"NBDMAGICIHAVEOPT"
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

OPTION = struct.Struct(">QII")
"""Magic, option, length of its data."""
OPTION_REPLY = struct.Struct(">QIII")
"""Magic, option, type of the reply, length of its data."""
REQUEST = struct.Struct(">IHHQQI")
"""Magic, command flags, command, cookie, offset, length."""
SIMPLE_REPLY = struct.Struct(">IIQ")
"""Magic, error, cookie."""
CHUNK = struct.Struct(">IHHQI")
"""Magic, flags, type, cookie, length of its data."""
EXPORT = struct.Struct(">QH")
"""Size, transmission flags."""

MAX_OPTION = 64 << 10
"""Bytes of an option's data: a name and many queries."""
MAX_NAME = 4096
"""Bytes of a string."""
MAX_REQUEST = 32 << 20
"""Bytes of a read, as the protocol recommends."""
MAX_SPANS = 4096
"""Ranges of one reply to BLOCK_STATUS; clients request the rest again."""

CONTEXT = b"base:allocation"
CONTEXT_ID = 1


class Handshake(IntFlag):
    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Opt(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Rep(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_INVALID = (1 << 31) + 3
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_TOO_BIG = (1 << 31) + 9


class Info(IntEnum):
    EXPORT = 0
    BLOCK_SIZE = 3


class Transmission(IntFlag):
    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    CAN_MULTI_CONN = 256


class Cmd(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


FUA = 1
"""Flag of a change: it is durable before the reply."""
NO_HOLE = 2
"""Flag of WRITE_ZEROES: the client would like allocated blocks; a layer's zeros have none."""
REQ_ONE = 8
"""Flag of BLOCK_STATUS: the client wants one range."""


class Chunk(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1


DONE = 1
"""Flag of the last chunk of a reply."""

HOLE_AND_ZERO = 3
"""Block status of unallocated zeros; 0 is data."""


class Error(IntEnum):
    EPERM = 1
    EIO = 5
    EINVAL = 22
    ENOSPC = 28


EXPORT_FLAGS = Transmission.HAS_FLAGS | Transmission.READ_ONLY | Transmission.CAN_MULTI_CONN
WRITABLE_FLAGS = (
    Transmission.HAS_FLAGS
    | Transmission.SEND_FLUSH
    | Transmission.SEND_FUA
    | Transmission.SEND_TRIM
    | Transmission.SEND_WRITE_ZEROES
    | Transmission.CAN_MULTI_CONN
)


class ProtocolError(VmconvError):
    """The client violates the protocol."""


def parse_export_request(data: bytes) -> bytes:
    """Returns the name in the data of INFO or GO; raises `ProtocolError`."""
    name, rest = _name(data)
    (count,) = _unpack(">H", rest)
    if len(rest) != 2 + 2 * count:
        raise ProtocolError(f"{len(rest)} bytes of data for {count} information requests")
    return name


def parse_context_request(data: bytes) -> tuple[bytes, list[bytes]]:
    """Returns the export's name and the queries in the data of LIST_ and SET_META_CONTEXT; raises `ProtocolError`."""
    export, rest = _name(data)
    (count,) = _unpack(">I", rest)
    rest = rest[4:]
    queries = []
    # Each query takes at least 4 bytes, so a wrong count ends with the data.
    for _ in range(count):
        query, rest = _name(rest)
        queries.append(query)
    return export, queries


def _name(data: bytes) -> tuple[bytes, bytes]:
    """Returns a length-prefixed string and the rest of the data."""
    (length,) = _unpack(">I", data)
    if length > MAX_NAME:
        raise ProtocolError(f"a string of {length} bytes, {MAX_NAME} at most")
    if length > len(data) - 4:
        raise ProtocolError(f"a string of {length} bytes in {len(data)} bytes of data")
    return data[4 : 4 + length], data[4 + length :]


def _unpack(layout: str, data: bytes) -> tuple[int, ...]:
    size = struct.calcsize(layout)
    if len(data) < size:
        raise ProtocolError(f"{len(data)} bytes of data where {size} are needed")
    return struct.unpack(layout, data[:size])


def is_asked_for(queries: list[bytes], *, listing: bool) -> bool:
    """True if the queries of a client include base:allocation, the only context of this server."""
    return any(q == CONTEXT or (listing and q == b"base:") for q in queries) or (listing and not queries)
