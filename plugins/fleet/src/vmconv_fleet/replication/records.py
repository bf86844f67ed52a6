"""A record, the unit of replication: written and signed by its owner, and forwarded unchanged.

    wire    = length of the signature (1 byte) + signature + payload
    payload = JSON array, UTF-8:
              [MAGIC, owner, kind, id, epoch, seq, schema, clock, deleted, txn, key_id, state, body]
              without white space before the body

`state` is what makes a replica's view verifiable: the sum modulo 2^128 of the hashes of all other live records that the
owner had when it wrote this one. A replica that is at this record must have the same sum.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple, NoReturn

from vmconv_fleet.errors import MalformedError
from vmconv_fleet.replication.clock import MAX_CLOCK

MAGIC = "vmconv-record-1"
MAX_RECORD = 256 << 10
MAX_DEPTH = 32
MAX_NUMBER = (1 << 53) - 1
STATE_MODULUS = 1 << 128

_OWNER = "[1-9a-f][0-9a-f]{31}"
_ID = "[A-Za-z0-9][A-Za-z0-9._:@+=~-]{0,127}"
_NUMBER = "(?:0|[1-9][0-9]{0,18})"
_HEAD = (
    ("magic", f'\\["{MAGIC}"'),
    ("owner", f'"{_OWNER}"'),
    ("kind", '"[a-z][a-z0-9-]{0,31}"'),
    ("id", f'"{_ID}"'),
    ("epoch", "[1-9][0-9]{0,15}"),
    ("seq", "[1-9][0-9]{0,15}"),
    ("schema", _NUMBER),
    ("clock", _NUMBER),
    ("deleted", "[01]"),
    ("txn", _NUMBER),
    ("key_id", f'"{_ID}"'),
    ("state", '"[0-9a-f]{32}"'),
)
"""The fields before the body, each followed by a comma; the encoding is canonical."""

_owner = re.compile(_OWNER).fullmatch
_head = re.compile("".join(f"{pattern}," for _, pattern in _HEAD)).match


class Position(NamedTuple):
    """A position in an owner's records: `seq` has no gaps; each start of the owner begins an epoch."""

    epoch: int
    seq: int


START = Position(0, 0)
"""The position before the first record."""


class Key(NamedTuple):
    """The key of a record."""

    owner: str
    kind: str
    id: str

    def path(self, fleet: str) -> str:
        """Returns the key on the network."""
        return f"vmconv/{fleet}/{self.owner}/{self.kind}/{self.id}"


class Change(NamedTuple):
    """A change of an own record: its new body, or its deletion (None)."""

    kind: str
    id: str
    body: Mapping[str, Any] | None


class Record(NamedTuple):
    """One version of a record. `body` must not be modified; it is empty if `deleted`.

    `txn` is the number of the transaction that wrote the record, 0 without one. `wire` is stored and forwarded: the
    signed bytes and their signature.
    """

    owner: str
    kind: str
    id: str
    epoch: int
    seq: int
    schema: int
    clock: int
    deleted: bool
    txn: int
    key_id: str
    state: int
    body: Mapping[str, Any]
    wire: bytes

    @property
    def key(self) -> Key:
        return Key(self.owner, self.kind, self.id)

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.seq)

    @property
    def signature(self) -> bytes:
        return self.wire[1 : 1 + self.wire[0]]

    @property
    def payload(self) -> bytes:
        """The signed bytes."""
        return payload_of(self.wire)


def payload_of(wire: bytes) -> bytes:
    """Returns the signed bytes."""
    return wire[1 + wire[0] :]


def fingerprint(payload: bytes) -> int:
    """Returns the share of a live record in its owner's state."""
    return int.from_bytes(blake2b(payload, digest_size=16).digest(), "big")


def encode(fields: Record) -> bytes:
    """Returns the payload of a record for signing; ignores `fields.wire`."""
    head = [MAGIC, *fields[:7], int(fields.deleted), fields.txn, fields.key_id, f"{fields.state:032x}", fields.body]
    try:
        return _encode(head).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise MalformedError(f"{fields.kind}/{fields.id}: body is not JSON: {exc}") from exc


def seal(signature: bytes, payload: bytes) -> bytes:
    """Returns the wire of a signed payload."""
    return bytes((len(signature),)) + signature + payload


def decode(wire: bytes) -> Record:
    """Returns the record of a wire. Raises MalformedError if the bytes are no valid record; the signature is not
    checked.
    """
    if not 2 <= len(wire) <= MAX_RECORD:
        raise MalformedError(f"record of {len(wire)} bytes, not 2 to {MAX_RECORD}")
    try:
        text = payload_of(wire).decode()
        head = _head(text)
        if head is None:
            raise _misfit(text)
        values, end = _JSON.raw_decode(text)
    except (ValueError, RecursionError) as exc:
        raise MalformedError(f"record is not JSON: {exc}") from exc
    if end != len(text) or len(values) != len(Record._fields) or not text.endswith("}]"):
        raise MalformedError(f"record of {len(text)} characters, and its body does not end with it")
    if not text.startswith("{", head.end()):
        raise MalformedError("body is not an object")
    record = _made(values, wire)
    _check(record, text)
    return record


def restore(wire: bytes) -> Record:
    """Returns the record of a wire from the database, which `decode` has accepted before."""
    return _made(_JSON.raw_decode(payload_of(wire).decode())[0], wire)


def _made(values: list[Any], wire: bytes) -> Record:
    """Returns the record of the values of a payload."""
    _, owner, kind, id, epoch, seq, schema, clock, deleted, txn, key_id, state, body = values
    told = owner, kind, id, epoch, seq, schema, clock, deleted == 1, txn, key_id
    return tuple.__new__(Record, (*told, int(state, 16), body, wire))


def _misfit(text: str) -> MalformedError:
    """Returns the error in the head of a record."""
    at, pattern = 0, ""
    for name, part in _HEAD:
        pattern += f"{part},"
        found = re.match(pattern, text)
        if found is None:
            return MalformedError(f"{name} {text[at:].partition(',')[0][:64]} has another form")
        at = found.end()
    raise AssertionError("the head is as it should be")


def check_node_id(text: str) -> str:
    """Returns the id. Raises MalformedError if it is no valid id."""
    if not _owner(text):
        raise MalformedError(f"node id {text[:64]!r} is not 32 hex digits, the first not 0")
    return text


def _check(record: Record, text: str) -> None:
    largest = max(record.epoch, record.seq, record.schema, record.txn)
    if largest > MAX_NUMBER:
        raise MalformedError(f"number {largest} in a record, {MAX_NUMBER} at most")
    if record.clock > MAX_CLOCK:
        raise MalformedError(f"clock {record.clock}, {MAX_CLOCK} at most")
    if record.deleted and record.body:
        raise MalformedError("the record is deleted and has a body")
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(record.body) > MAX_DEPTH:
        raise MalformedError(f"body is nested deeper than {MAX_DEPTH}")
    if "\\" in text:
        try:
            json.dumps(record.body, ensure_ascii=False).encode()
        except UnicodeEncodeError as exc:
            raise MalformedError("body has half a surrogate pair") from exc


def _depth(value: object) -> int:
    """Returns the depth of nesting of a value, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("number out of range")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


_JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
