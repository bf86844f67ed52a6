"""Types of fields of records, requests and the API: names, ids, sizes and times, with their limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from vmconv.plugin import AccessError
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


Name = Annotated[str, Field(min_length=1, max_length=255)]
"""A name in a record of any node; it may be a trap."""
PlainName = Annotated[str, AfterValidator(_plain_name)]
"""A name in a request to this node; traps are refused."""
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
NodeId = Annotated[str, Field(pattern=r"^[1-9a-f][0-9a-f]{31}$")]
FormatName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
FileName = Annotated[str, AfterValidator(_file_name)]
DatastoreName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
DatastoreReference = Annotated[str, Field(pattern=r"^[1-9a-f][0-9a-f]{31}/[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""A datastore of any node: NODE/NAME, with the node's id."""
Option = Annotated[str, Field(max_length=255)]
Naming = Annotated[
    str, Field(pattern=r"^[^/\x00{}]*(\{(stem|suffix|format|job)\}[^/\x00{}]*)+$", min_length=1, max_length=200)
]
Bytes = Annotated[int, Field(ge=0, lt=1 << 63)]
Milliseconds = Annotated[int, Field(ge=0, lt=1 << 53)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Parallel = Annotated[int, Field(ge=1, le=1000)]
TokenId = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
Role = Literal["viewer", "operator", "admin"]
ZeroCopy = Literal["auto", "require"]
