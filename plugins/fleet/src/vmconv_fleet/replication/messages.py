"""The messages of replicas: their encoding and their validation.

    message = kind (1 byte) + length of the header (4 bytes, big-endian) + header (JSON) + wires
    wire    = length (4 bytes) + a stored record

| kind | content |
| --- | --- |
| LIVE | records that an owner has just written, or a neighbour has just applied |
| DIGEST | the sender's position for each owner, and its neighbours |
| PULL | a request for an owner's records after a position |
| PAGE | a part of the answer |
| NOTICE | revocations, which outlive the log of their writer |

Only LIVE may be dropped; pages are small and requested one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vmconv_fleet.errors import MalformedError
from vmconv_fleet.replication.records import MAX_NUMBER, START, Position, Record, check_node_id

LIVE = ord("l")
DIGEST = ord("d")
PULL = ord("p")
PAGE = ord("g")
NOTICE = ord("n")

MAX_MESSAGE = 1 << 20
PAGE_BYTES = 192 << 10
"""A page or a live message ends with the record that exceeds this."""

WINDOW = 4
"""The number of pages that are sent before the receiver must request the next."""

_SUM = 16
_LIVE_HEAD = 7


class Summary(NamedTuple):
    """The position of a replica in an owner's records. Equal positions have equal `state` (16 hex digits), except after
    a fork.
    """

    position: Position
    state: str


class Live(NamedTuple):
    """Consecutive records of one owner, up to the end of a transaction."""

    wires: Sequence[bytes]


class Digest(NamedTuple):
    """Positions by owner. `whole`: of all owners, with `near`, the sender's neighbours, and `notices`, a hash of its
    revocations.
    """

    at: Mapping[str, Summary]
    whole: bool = False
    near: frozenset[str] = frozenset()
    notices: str = ""


class Pull(NamedTuple):
    """Asks for an owner's records after a position; the answer repeats `session`.

    `base` is where the pull began, START for all records. `seen` is the answerer's position with the previous page,
    `since` with the first one, or `base`. All pages belong to one history and no deletion after `since` was forgotten
    in between; otherwise the answerer starts over.
    """

    owner: str
    session: int
    after: Position
    base: Position
    since: Position = START
    seen: Position = START


class Page(NamedTuple):
    """Records in the order of their positions, after the first `certificates` ones, which help to verify them.

    `base`: the position that all pages of the answer follow; START if the requested position is not in the owner's
    history. `seen`: the answerer's position; `since`: as requested, or `seen` if the answer restarts, so that pages of
    two answers are not combined. `more`: further pages follow; `ask`: the next page must be requested.
    """

    owner: str
    session: int
    after: Position
    base: Position
    more: bool
    ask: bool
    seen: Position
    certificates: int
    wires: Sequence[bytes]
    since: Position = START


class Notice(NamedTuple):
    wires: Sequence[bytes]


Message = Live | Digest | Pull | Page | Notice


class Span(NamedTuple):
    """The range of records in a live message."""

    owner: str
    first: Position
    last: Position


class Send(NamedTuple):
    """A message to send; `peer` None: to all neighbours. Live messages have a `span`."""

    peer: str | None
    message: bytes
    span: Span | None = None


def merged(sends: Iterable[Send]) -> list[Send]:
    """Returns the messages with adjacent live messages to the same neighbour merged."""
    result: list[Send] = []
    last: dict[tuple[str | None, str], int] = {}
    for send in sends:
        if send.span is None:
            result.append(send)
            continue
        before = last.get((send.peer, send.span.owner))
        if before is not None and (both := _joined(result[before], send)) is not None:
            result[before] = both
            continue
        last[send.peer, send.span.owner] = len(result)
        result.append(send)
    return result


def _joined(one: Send, other: Send) -> Send | None:
    assert one.span is not None
    assert other.span is not None
    adjacent = (one.span.last.epoch, one.span.last.seq + 1) == other.span.first
    if not adjacent or len(one.message) + len(other.message) > PAGE_BYTES:
        return None
    return Send(one.peer, one.message + other.message[_LIVE_HEAD:], one.span._replace(last=other.span.last))


def encode(message: Message) -> bytes:
    """Returns the bytes of a message."""
    match message:
        case Live(wires):
            return _frame(LIVE, {}, wires)
        case Digest(at, whole, near, notices):
            summaries = {owner: [*position, state] for owner, (position, state) in at.items()}
            more = {"near": sorted(near), "notices": notices} if whole else {}
            return _frame(DIGEST, {"at": summaries, **more})
        case Pull():
            return _frame(PULL, message._asdict())
        case Page():
            fields = message._asdict()
            return _frame(PAGE, fields, fields.pop("wires"))
        case Notice(wires):
            return _frame(NOTICE, {}, wires)


def decode(data: bytes) -> Message:
    """Returns the message. Raises MalformedError if the bytes are no valid message; its records are not checked."""
    if not 5 <= len(data) <= MAX_MESSAGE:
        raise MalformedError(f"message of {len(data)} bytes, not 5 to {MAX_MESSAGE}")
    end = 5 + int.from_bytes(data[1:5], "big")
    try:
        header = json.loads(data[5:end])
        wires = _wires(data, end)
        match data[0], header:
            case (108, {}):
                return Live(_some(wires))
            case (100, {"at": dict(at)}):
                return _digest(at, header)
            case (112, {"owner": owner, "session": session, "after": after, "base": base, "since": since}):
                positions = map(_position, (after, base, since, header["seen"]))
                return Pull(check_node_id(owner), _number(session), *positions)
            case (103, {"owner": owner, "session": session, "after": after, "base": base, "seen": seen}):
                ids = check_node_id(owner), _number(session), _position(after), _position(base)
                flags = header["more"] is True, header["ask"] is True
                since = _position(header["since"])
                return Page(*ids, *flags, _position(seen), _number(header["certificates"]), wires, since)
            case (110, {}):
                return Notice(_some(wires))
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise MalformedError(f"message {data[:1]!r}: {exc}") from exc
    raise MalformedError(f"message {data[:1]!r} of an unknown kind or without its fields")


def live(records: Sequence[Record]) -> bytes | None:
    """Returns the live message of these records; None if they are too many and must be pulled."""
    if sum(len(record.wire) for record in records) > PAGE_BYTES:
        return None
    return encode(Live([record.wire for record in records]))


def span(records: Sequence[Record]) -> Span:
    """Returns the range of these records."""
    return Span(records[0].owner, records[0].position, records[-1].position)


def abridged(state: int) -> str:
    """Returns the part of a state that digests contain."""
    return f"{state:032x}"[:_SUM]


def _frame(kind: int, header: Mapping[str, Any], wires: Iterable[bytes] = ()) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    parts = [bytes((kind,)), len(text).to_bytes(4, "big"), text]
    for wire in wires:
        parts += (len(wire).to_bytes(4, "big"), wire)
    return b"".join(parts)


def _wires(data: bytes, start: int) -> list[bytes]:
    wires = []
    while start < len(data):
        end = start + 4 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data) or end < start + 5:
            raise ValueError(f"record at {start} of {end - start - 4} bytes ends past the message's {len(data)}")
        wires.append(data[start + 4 : end])
        start = end
    if start > len(data):
        raise ValueError(f"header ends at {start}, past the message's {len(data)} bytes")
    return wires


def _some(wires: list[bytes]) -> list[bytes]:
    if not wires:
        raise ValueError("no record")
    return wires


def _digest(at: dict[str, Any], header: Mapping[str, Any]) -> Digest:
    summaries = {check_node_id(owner): _summary(value) for owner, value in at.items()}
    if "near" not in header:
        return Digest(summaries)
    near = frozenset(check_node_id(peer) for peer in header["near"])
    return Digest(summaries, True, near, str(header["notices"])[:64])


def _summary(value: Any) -> Summary:
    epoch, seq, state = value
    if type(state) is not str or len(state) != _SUM:
        raise ValueError(f"state is not {_SUM} digits")
    return Summary(Position(_number(epoch), _number(seq)), state)


def _position(value: Any) -> Position:
    epoch, seq = value
    return Position(_number(epoch), _number(seq))


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"{str(value)[:32]} is not a number from 0 to {MAX_NUMBER}")
    return value
