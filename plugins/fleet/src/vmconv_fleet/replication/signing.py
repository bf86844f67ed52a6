"""What the replica asks of signatures: `trust.identity` answers with Ed25519 and the fleet's certificates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vmconv_fleet.replication.records import Position, Record

SIGNATURE = 64
"""So many bytes of a signature are those of the key; what follows may be a proof that they are of this record, too."""


class Signer(Protocol):
    """The node's own signing key."""

    @property
    def owner(self) -> str:
        """The id of the node, 32 hex digits."""

    @property
    def key_id(self) -> str:
        """The id of the key, of the form of a record's id: that of the record of kind `certificate` that has it."""

    def sign_many(self, payloads: Sequence[bytes]) -> list[bytes]:
        """Returns a signature for each, 255 bytes at most; each can be verified without the others.

        Those that begin with the same SIGNATURE bytes are verified together.
        """


class Trust(Protocol):
    """Whose signature counts. Called on the replica's thread, but `verify`, which several threads call at a time."""

    def verify(self, owner: str, key_id: str, signed: Sequence[tuple[bytes, bytes]], position: Position) -> bool:
        """Whether the owner's key signed all the payloads, each with its signature, and counts at this position.

        False for a key that is not known (yet). Certificates are not judged by the wall clock.
        """

    def learn(self, record: Record) -> bool:
        """Takes note of a `certificate` or a `revocation`; whether it is one that the fleet's CA has signed.

        Called with every such record before its own signature is verified, again at each start with all that are
        stored, and again for one already known: the CA's signature in the body alone decides, not who passes it on.
        """

    def retired(self, owner: str) -> bool:
        """Whether the node has left for ever: its records are dropped everywhere and never taken again."""
