"""Types of fields of records, requests and the API: names, ids, sizes and times, with their limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from vmconv.plugin import AccessError
from vmconv_fleet.catalogue import windows
from vmconv_fleet.catalogue.places import refuse_as_file_name
from vmconv_fleet.words import trap_in


def _file_name(name: str) -> str:
    try:
        refuse_as_file_name(name)
    except AccessError as exc:
        raise ValueError(str(exc)) from exc
    return name


def _plain_name(name: str) -> str:
    if problem := trap_in(name):
        raise ValueError(f"{name[:80]!r} {problem}")
    return name


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text[:80]!r} contains characters that cannot be printed")
    return text


Name = Annotated[str, Field(min_length=1, max_length=255)]
"""A name in a record of any node; it may be a trap."""
PlainName = Annotated[str, AfterValidator(_plain_name)]
"""A name in a request to this node; traps are refused."""
_IDENTIFIER = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
_NODE_ID = r"^[1-9a-f][0-9a-f]{31}$"
_FORMAT = r"^[a-z][a-z0-9_-]{0,31}$"
_DATASTORE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_DATASTORE_OF = r"^[1-9a-f][0-9a-f]{31}/[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_NAMING = r"^[^/\x00{}]*(\{(stem|suffix|format|job)\}[^/\x00{}]*)+$"
_TOKEN_ID = r"^[0-9a-f]{12}$"
_WEBHOOK = r"^https?://[A-Za-z0-9.:_\[\]-]{1,260}$"
_EVENT = r"^[a-z*.]{1,64}$"
HASH = r"^[0-9a-f]{64}$"
REQUEST_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{7,63}$"

_PLAIN = "letters, digits, '.', '_' and '-', first a letter or a digit"
ALLOWED = {
    _IDENTIFIER: f"up to 128 of {_PLAIN}",
    _NODE_ID: "the id of a node, 32 hexadecimal digits",
    _FORMAT: "the name of a format, up to 32 of a-z, 0-9, '_' and '-'",
    _DATASTORE: f"up to 64 of {_PLAIN}",
    _DATASTORE_OF: "a datastore as NODE/NAME, with the node's id",
    _NAMING: "a name with {stem}, {suffix}, {format} or {job}, without '/' and other braces",
    windows.PATTERN: "HH:MM-HH:MM, in UTC or followed by a time zone such as Europe/Berlin",
    _WEBHOOK: "http:// or https:// and a host, with a port if you like",
    _EVENT: "a kind of events, up to 64 of a-z, '.' and '*'",
    HASH: "a SHA-256, 64 hexadecimal digits",
    _TOKEN_ID: "the id of a token, 12 hexadecimal digits",
    REQUEST_ID: f"8 to 64 of {_PLAIN}",
}
"""What the patterns of fields allow, in words."""

Identifier = Annotated[str, Field(pattern=_IDENTIFIER)]
NodeId = Annotated[str, Field(pattern=_NODE_ID)]
FormatName = Annotated[str, Field(pattern=_FORMAT)]
FileName = Annotated[str, AfterValidator(_file_name)]
DatastoreName = Annotated[str, Field(pattern=_DATASTORE)]
DatastoreReference = Annotated[str, Field(pattern=_DATASTORE_OF)]
"""A datastore of any node: NODE/NAME, with the node's id."""
GroupName = Annotated[str, AfterValidator(_printable), Field(min_length=1, max_length=255)]
"""A group of people, as an OpenID provider calls it."""
Option = Annotated[str, Field(max_length=255)]
Naming = Annotated[str, Field(pattern=_NAMING, min_length=1, max_length=200)]
Bytes = Annotated[int, Field(ge=0, lt=1 << 63)]
Milliseconds = Annotated[int, Field(ge=0, lt=1 << 53)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Rate = Annotated[int, Field(ge=1 << 16, lt=1 << 50)]
"""Bytes per second."""
WindowText = Annotated[str, Field(pattern=windows.PATTERN)]
"""A window; its time zone may be unknown to this node."""
Parallel = Annotated[int, Field(ge=1, le=1000)]
TokenId = Annotated[str, Field(pattern=_TOKEN_ID)]
WebhookPlace = Annotated[str, Field(pattern=_WEBHOOK)]
EventPattern = Annotated[str, Field(pattern=_EVENT)]
ZeroCopy = Literal["auto", "require"]
