"""The one thing that is replicated: a record, written and signed by its owner, and never changed on its way.

    wire    = length of the signature (1 byte) + signature + payload
    payload = JSON array, UTF-8:
              [MAGIC, owner, kind, id, epoch, seq, schema, clock, deleted, txn, key_id, state, body]

`state` is what makes a replica's view verifiable: the sum modulo 2^128 of the hashes of all other live records that the
owner had when it wrote this one. A replica that is at this record must have the same sum.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple, NoReturn

from vmconv_fleet.clock import MAX_CLOCK
from vmconv_fleet.errors import MalformedError

MAGIC = "vmconv-record-1"
MAX_RECORD = 256 << 10
MAX_DEPTH = 32
MAX_NUMBER = (1 << 53) - 1
STATE_MODULUS = 1 << 128

_OWNER = re.compile(r"[1-9a-f][0-9a-f]{31}").fullmatch
_KIND = re.compile(r"[a-z][a-z0-9-]{0,31}").fullmatch
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+=~-]{0,127}").fullmatch
_STATE = re.compile(r"[0-9a-f]{32}").fullmatch
_FIELDS = 13


class Position(NamedTuple):
    """How far an owner has come: its records are numbered without a gap, for ever; a start begins an epoch."""

    epoch: int
    seq: int


START = Position(0, 0)
"""The position of who has nothing."""


class Key(NamedTuple):
    """The name of a record."""

    owner: str
    kind: str
    id: str

    def path(self, fleet: str) -> str:
        """Returns the key on the network."""
        return f"vmconv/{fleet}/{self.owner}/{self.kind}/{self.id}"


class Change(NamedTuple):
    """What an owner wants of a record of its own: a new body, or that it is no more (None)."""

    kind: str
    id: str
    body: Mapping[str, Any] | None


class Record(NamedTuple):
    """One version of a data structure. `body` is not to be changed; it is empty where `deleted`.

    `txn` is the number of the transaction that wrote it, 0 where there was none. `wire` is what is stored and
    passed on: the bytes that were signed, and their signature.
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
        """The bytes that were signed."""
        return payload_of(self.wire)


def payload_of(wire: bytes) -> bytes:
    """Returns the bytes that were signed."""
    return wire[1 + wire[0] :]


def fingerprint(payload: bytes) -> int:
    """Returns what a live record adds to the state of its owner."""
    return int.from_bytes(blake2b(payload, digest_size=16).digest(), "big")


def encode(fields: Record) -> bytes:
    """Returns the payload of a record, to be signed; `fields.wire` is not looked at."""
    head = [MAGIC, *fields[:7], int(fields.deleted), fields.txn, fields.key_id, f"{fields.state:032x}", fields.body]
    try:
        return json.dumps(head, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise MalformedError(f"{fields.kind}/{fields.id}: body is no JSON: {exc}") from exc


def seal(signature: bytes, payload: bytes) -> bytes:
    """Returns the wire of a signed payload."""
    return bytes((len(signature),)) + signature + payload


def decode(wire: bytes) -> Record:
    """Returns the record of a wire; MalformedError: it is none. Says nothing about the signature."""
    if not 2 <= len(wire) <= MAX_RECORD:
        raise MalformedError(f"record of {len(wire)} bytes, not 2 to {MAX_RECORD}")
    payload = payload_of(wire)
    try:
        fields = _parse(payload.decode())
    except (ValueError, RecursionError) as exc:
        raise MalformedError(f"record is no JSON: {exc}") from exc
    if type(fields) is not list or len(fields) != _FIELDS or fields[0] != MAGIC:
        raise MalformedError(f"record is no array of {_FIELDS} that begins with {MAGIC}")
    _check(fields, payload)
    return _made(fields, wire)


def restore(wire: bytes) -> Record:
    """Returns the record of a wire that `decode` has accepted before: from the database."""
    return _made(json.loads(payload_of(wire).decode()), wire)


def _made(fields: list[Any], wire: bytes) -> Record:
    return Record._make((*fields[1:8], fields[8] == 1, *fields[9:11], int(fields[11], 16), fields[12], wire))


def check_node_id(text: str) -> str:
    """Returns the id; MalformedError: it is none."""
    if not _OWNER(text):
        raise MalformedError(f"node id {text[:64]!r} is not 32 hex digits, the first not 0")
    return text


def _check(fields: list[Any], payload: bytes) -> None:
    _, owner, kind, id, epoch, seq, schema, clock, deleted, txn, key_id, state, body = fields
    _text("owner", owner, _OWNER)
    _text("kind", kind, _KIND)
    _text("id", id, _ID)
    _text("key_id", key_id, _ID)
    _text("state", state, _STATE)
    _number("epoch", epoch, 1, MAX_NUMBER)
    _number("seq", seq, 1, MAX_NUMBER)
    _number("schema", schema, 0, MAX_NUMBER)
    _number("clock", clock, 0, MAX_CLOCK)
    _number("deleted", deleted, 0, 1)
    _number("txn", txn, 0, MAX_NUMBER)
    if type(body) is not dict or (deleted and body):
        raise MalformedError("body is no object, or the record is deleted and has one")
    _check_body(body, payload)


def _check_body(body: dict[str, Any], payload: bytes) -> None:
    if payload.count(b"{") + payload.count(b"[") > MAX_DEPTH and _depth(body) > MAX_DEPTH:
        raise MalformedError(f"body is nested deeper than {MAX_DEPTH}")
    if b"\\u" in payload:
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as exc:
            raise MalformedError("body has half a surrogate pair") from exc


def _depth(value: object) -> int:
    """Returns how deep a value is nested, without recursion."""
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


def _text(name: str, value: object, pattern: Any) -> None:
    if type(value) is not str or not pattern(value):
        raise MalformedError(f"{name} {str(value)[:64]!r} is not what one looks like")


def _number(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise MalformedError(f"{name} {str(value)[:32]} is not a number from {low} to {high}")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("number out of range")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


_parse = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant).decode
