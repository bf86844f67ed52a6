"""The replica's interface to signatures; `trust` implements it with Ed25519 and the fleet's certificates."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from vmconv_fleet.replication.records import Position, Record

SIGNATURE = 64
"""The length of the key's own signature. A proof of membership in a hash tree may follow."""


class Signer(Protocol):
    """The node's own signing key."""

    @property
    def owner(self) -> str:
        """The id of the node, 32 hex digits."""

    @property
    def key_id(self) -> str:
        """The id of the key, which is also the id of the `certificate` record that has it."""

    def sign_many(self, payloads: Sequence[bytes]) -> list[bytes]:
        """Returns a signature for each payload, 255 bytes at most, which can be verified without the others.

        Signatures with the same first SIGNATURE bytes are verified together.
        """


class CertifiedKey(NamedTuple):
    """A signing key that the authority has certified for a node; `until` is the end of its last certificate."""

    node: str
    key_id: str
    until: datetime.datetime
    is_revoked: bool


class Trust(Protocol):
    """The accepted keys. Runs on the replica's thread, except `verify`, which runs on several threads."""

    def verify(self, owner: str, key_id: str, signed: Sequence[tuple[bytes, bytes]], position: Position) -> bool:
        """Returns whether the owner's key signed all payloads and counts at this position.

        False for an unknown key. The expiry of certificates is not checked.
        """

    def learn(self, record: Record) -> bool:
        """Learns a `certificate`, `revocation` or `retirement` record; returns whether the authority signed its body.

        Called before the record's own signature is verified, at each start for all stored records, and again for known
        ones: the authority's signature in the body decides, not the sender.
        """

    def members(self) -> Iterable[str]:
        """Returns the known nodes of the fleet that are not revoked, this one included. May be called on any thread."""

    def certified_keys(self) -> Iterable[CertifiedKey]:
        """Returns all certified keys, revoked ones too, in no order. May be called on any thread."""

    def names(self) -> Mapping[str, str]:
        """Returns the names that the authority has given to nodes. May be called on any thread."""

    def retired(self, owner: str) -> bool:
        """Returns whether the node was retired: its records are dropped everywhere."""

    def retirements(self) -> Mapping[str, str]:
        """Returns the retired nodes and their names, as the authority signed them. May be called on any thread."""
