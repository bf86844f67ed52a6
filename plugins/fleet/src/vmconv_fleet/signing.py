"""What the replica asks of signatures: `identity.py` answers with Ed25519 and the fleet's certificates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vmconv_fleet.records import Position, Record


class Signer(Protocol):
    """The node's own signing key."""

    @property
    def owner(self) -> str:
        """The id of the node, 32 hex digits."""

    @property
    def key_id(self) -> str:
        """The id of the key, of the form of a record's id: that of the record of kind `certificate` that has it."""

    def sign_many(self, payloads: Sequence[bytes]) -> list[bytes]:
        """Returns a signature for each, 255 bytes at most; each can be verified without the others."""


class Trust(Protocol):
    """Whose signature counts. Called on the replica's thread, but `verify`, which several threads call at a time."""

    def verify(self, owner: str, key_id: str, payload: bytes, signature: bytes, position: Position) -> bool:
        """Whether the owner's key signed it, and the key counts at this position of its owner.

        False for a key that is not known (yet). Certificates are not judged by the wall clock.
        """

    def learn(self, record: Record) -> bool:
        """Takes note of a `certificate` or a `revocation`; whether it is one that the fleet's CA has signed.

        Called with every such record before its own signature is verified, again at each start with all that are
        stored, and again for one already known: the CA's signature in the body alone decides, not who passes it on.
        """

    def retired(self, owner: str) -> bool:
        """Whether the node has left for ever: its records are dropped everywhere and never taken again."""
