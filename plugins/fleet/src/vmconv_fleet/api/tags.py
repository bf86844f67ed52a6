"""ETags from positions of owners: they change when an answer does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from vmconv_fleet.replication.records import Position, Record


def tag_of(record: Record) -> str:
    """Returns the ETag of one record: its position."""
    return f'"{record.epoch}.{record.seq}"'


def tag_of_all(records: Iterable[Record], *more: object) -> str:
    """Returns the ETag of several records: it changes with each of them."""
    hashed = hashlib.blake2b(digest_size=16)
    for one in records:
        hashed.update(f"{one.owner}/{one.kind}/{one.id}@{one.epoch}.{one.seq}\n".encode())
    hashed.update(repr(more).encode())
    return f'"{hashed.hexdigest()}"'


def tag_of_positions(positions: dict[str, Position]) -> str:
    """Returns the ETag of the whole replica."""
    return tag_of_all((), sorted(positions.items()))


def tagged(request: Request, tag: str, content: object) -> Response:
    """Returns the answer with its ETag; 304 if the caller has it already."""
    known = request.headers.get("if-none-match", "")
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if known.strip() == "*" or tag in (part.strip().removeprefix("W/") for part in known.split(",")):
        return Response(status_code=304, headers=headers)
    return JSONResponse(content, headers=headers)
