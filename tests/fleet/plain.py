"""Cheap signatures for tests of everything but cryptography: keyed hashes, the authority's too."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from vmconv_fleet.replication.records import Change, Position, Record
from vmconv_fleet.replication.signing import CertifiedKey

AUTHORITY = b"the fleet's authority"


def node_id(number: int) -> str:
    """Returns the id of a node of a test."""
    return f"{number + 10:x}" + f"{number:031x}"[-31 + (len(f"{number + 10:x}") - 1) :]


def signed_by_authority(body: dict[str, Any]) -> dict[str, Any]:
    """Returns a body with the signature of the authority."""
    return {**body, "ca": _hash(AUTHORITY, repr(sorted(body.items())).encode()).hex()}


def certificate(owner: str, key_id: str) -> Change:
    """Returns the record that says that the key is the owner's."""
    return Change("certificate", key_id, signed_by_authority({"owner": owner, "key": key_id}))


def retirement(owner: str) -> Change:
    """Returns the record that retires a node."""
    return Change("revocation", owner, signed_by_authority({"node": owner, "retired": True}))


def key_revocation(owner: str, key_id: str) -> Change:
    """Returns the record that revokes one key of a node."""
    return Change("revocation", key_id, signed_by_authority({"node": owner, "key": key_id}))


def retirement_named(owner: str, name: str) -> Change:
    """Returns the record with the name of a retired node."""
    return Change("retirement", owner, signed_by_authority({"node": owner, "name": name}))


class PlainSigner:
    """Signs for an owner."""

    def __init__(self, owner: str, key_id: str | None = None) -> None:
        self.owner = owner
        self.key_id = key_id or f"key-{owner[:8]}"

    def sign(self, payload: bytes) -> bytes:
        return _hash(f"{self.owner} {self.key_id}".encode(), payload)

    def sign_many(self, payloads: Sequence[bytes]) -> list[bytes]:
        return [self.sign(payload) for payload in payloads]


class PlainTrust:
    """Knows keys by the certificates that it has learned."""

    def __init__(self, signer: PlainSigner | None = None) -> None:
        self._keys = {(signer.owner, signer.key_id)} if signer else set()
        self._retired: set[str] = set()
        self._revoked: set[tuple[str, str]] = set()
        self._names: dict[str, str] = {}

    def verify(self, owner: str, key_id: str, signed: Sequence[tuple[bytes, bytes]], position: Position) -> bool:
        key = PlainSigner(owner, key_id)
        accepted = self._keys - self._revoked
        return (owner, key_id) in accepted and all(signature == key.sign(payload) for payload, signature in signed)

    def learn(self, record: Record) -> bool:
        body = {name: value for name, value in record.body.items() if name != "ca"}
        if record.body != signed_by_authority(body):
            return False
        if record.kind == "certificate":
            self._keys.add((body["owner"], body["key"]))
        elif record.kind == "retirement":
            self._names[body["node"]] = body["name"]
        elif body.get("retired"):
            self._retired.add(body["node"])
        else:
            self._revoked.add((body["node"], body["key"]))
        return True

    def members(self) -> set[str]:
        return {owner for owner, _ in self._keys - self._revoked} - self._retired

    def certified_keys(self) -> list[CertifiedKey]:
        end = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
        return [CertifiedKey(*key, end, key in self._revoked) for key in self._keys]

    def names(self) -> dict[str, str]:
        return {}

    def retired(self, owner: str) -> bool:
        return owner in self._retired

    def retirements(self) -> dict[str, str]:
        return {node: self._names.get(node, "") for node in self._retired}


def _hash(key: bytes, payload: bytes) -> bytes:
    return blake2b(payload, key=blake2b(key, digest_size=32).digest(), digest_size=16).digest()
