"""The replica: one state machine without sockets, threads or a clock of its own. Skeleton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmconv_fleet.records import Change, Record
from vmconv_fleet.signing import Signer, Trust
from vmconv_fleet.store import Store


class Send(NamedTuple):
    """A message to be sent; `peer` None: to all neighbours. `message[0]` is its kind, one of `messages.LIVE` ..."""

    peer: str | None
    message: bytes


class Problem(NamedTuple):
    """Something an administrator has to know. `kind`: fork, forged, malformed, clock, lost, cloned ..."""

    kind: str
    text: str


class Replica:
    """The node's copy of all records, and the log of its own.

    Every method runs on one thread. `received`, `connected`, `disconnected`, `tick` and `write` are each one durable
    transaction, and what they return may be sent only once they have returned; inside `with batch():` they are one
    transaction together, and nothing may be sent before the block has ended.
    """

    def __init__(self, store: Store, signer: Signer, trust: Trust, now: Callable[[], int], *, schema: int = 1) -> None:
        raise NotImplementedError

    @property
    def serving(self) -> bool:
        """Whether own records can be written: the node has recovered what its neighbours had of them."""
        raise NotImplementedError

    def write(self, changes: Sequence[Change], *, txn: int = 0) -> tuple[list[Record], list[Send]]:
        """Writes own records, all or none. NotReadyError before `serving`; MalformedError: a change is refused."""
        raise NotImplementedError

    def connected(self, peer: str) -> list[Send]: ...

    def disconnected(self, peer: str) -> list[Send]: ...

    def received(self, peer: str, message: bytes) -> list[Send]:
        """Takes a message of a neighbour, whose id the transport vouches for. Raises nothing for what a peer sends."""
        raise NotImplementedError

    def tick(self) -> list[Send]:
        """To be called every `messages.TICK_MS`."""
        raise NotImplementedError

    def subscribe(self, callback: Callable[[list[Record]], None]) -> Callable[[], None]:
        """Calls back after each commit with what was written and taken, deletions too; returns what ends it."""
        raise NotImplementedError

    def on_problem(self, callback: Callable[[Problem], None]) -> None:
        raise NotImplementedError
