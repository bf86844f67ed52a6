"""Requests and responses, on nothing but the replica. Skeleton; bodies are those of `kinds.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from vmconv_fleet.records import Change, Record


class Request(NamedTuple):
    """A request as its executor sees it."""

    id: str
    requester: str
    verb: str
    arguments: Mapping[str, Any]
    by: Mapping[str, Any]
    clock: int
    late: bool


class Outcome(NamedTuple):
    """What a handler decided: changes of own records, and what the requester is told (`body` of the response)."""

    changes: Sequence[Change] = ()
    body: Mapping[str, Any] = {}


class Context(Protocol):
    """What a handler may look at: the newest state, own records as of this very moment."""

    @property
    def node(self) -> str: ...

    @property
    def now(self) -> int:
        """Wall clock, ms."""

    def get(self, owner: str, kind: str, id: str) -> Record | None: ...

    def find(self, kind: str, owner: str | None = None) -> list[Record]: ...


Handler = Callable[[Context, Request], Outcome]
"""Decides, quickly and without side effects, on the replica's thread. Raises `errors.Refusal(phrase)`: nothing changes.

Any other VmconvError refuses with its message; any other exception refuses with "internal error" and is logged.
"""
