"""What the fleet's authority signed: the keys whose signatures a replica accepts, and the retired nodes."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from vmconv_fleet.replication.signing import CertifiedKey
from vmconv_fleet.trust.authority import is_retirement, is_revocation
from vmconv_fleet.trust.identity import (
    Binding,
    IdentityError,
    SignatureCache,
    binding,
    read_authorities,
    read_certificate,
    read_certificates,
)

if TYPE_CHECKING:
    from vmconv_fleet.replication.records import Position, Record

_ALL_KEYS = ""
"""Stands for all keys of a node among the revoked ones."""


class CertificateTrust:
    """Certificates, revocations and retirements signed by the fleet's authority. May be asked from any thread.

    The authority's signature in the body counts, not the writer of the record. So anyone may forward a certificate, and
    any holder of the authority may revoke.
    """

    def __init__(self, authorities: bytes) -> None:
        self._authorities: list[x509.Certificate] = read_authorities(authorities)
        self._lock = threading.Lock()
        self._signatures = SignatureCache()
        self._keys: dict[tuple[str, str], Ed25519PublicKey] = {}
        self._bindings: dict[str, dict[int, Binding]] = {}
        self._revoked: dict[tuple[str, str], tuple[int, int]] = {}
        self._retired: set[str] = set()
        self._names: dict[str, str] = {}

    def verify(self, owner: str, key_id: str, signed: Sequence[tuple[bytes, bytes]], position: Position) -> bool:
        """Returns whether the owner signed all payloads with a key that is not revoked at this position."""
        key = self._keys.get((owner, key_id))
        if key is None or self.is_revoked(owner, key_id, (position.epoch, position.seq)):
            return False
        return self._signatures.good(key, signed)

    def learn(self, record: Record) -> bool:
        """Learns a record of these kinds; returns False for other records and without the authority's signature."""
        if record.kind == "certificate":
            return self.learn_certificate(str(record.body.get("pem")).encode()) is not None
        if record.kind == "retirement":
            return self._learn_retirement(record.body)
        return record.kind == "revocation" and self.learn_revocation(record.body)

    def retired(self, owner: str) -> bool:
        """Returns whether the node was retired."""
        return owner in self._retired

    def retirements(self) -> dict[str, str]:
        """Returns the retired nodes and their names, empty if unknown."""
        with self._lock:
            return {node: self._names.get(node, "") for node in self._retired}

    def names(self) -> dict[str, str]:
        """Returns the names that the authority has given to nodes, each from the node's newest certificate."""
        with self._lock:
            newest = {
                node: max(known.values(), key=lambda one: one.not_after) for node, known in self._bindings.items()
            }
        return {node: bound.name for node, bound in newest.items() if bound.name}

    def learn_certificate(self, pem: bytes) -> Binding | None:
        """Returns the content of a certificate; None if it is not of this fleet."""
        try:
            return self._bind(read_certificate(pem))
        except IdentityError:
            return None

    def learn_members(self, pem: bytes) -> None:
        """Learns members' certificates. Raises IdentityError at the first that is damaged or not of this fleet."""
        for certificate in read_certificates(pem):
            self._bind(certificate)

    def _bind(self, certificate: x509.Certificate) -> Binding:
        bound = binding(certificate, self._authorities)
        with self._lock:
            self._keys[bound.node, bound.key_id] = bound.key
            self._bindings.setdefault(bound.node, {})[bound.serial] = bound
        return bound

    def learn_revocation(self, body: Mapping[str, Any]) -> bool:
        """Returns whether the authority signed the revocation. Of several for one key, the earliest counts."""
        if not is_revocation(body, self._authorities):
            return False
        epoch, seq = body["upto"]
        name = (body["node"], body["key_id"] or _ALL_KEYS)
        with self._lock:
            self._revoked[name] = min((epoch, seq), self._revoked.get(name, (epoch, seq)))
            if body["retired"]:
                self._retired.add(body["node"])
        return True

    def _learn_retirement(self, body: Mapping[str, Any]) -> bool:
        """Learns the name of a retired node. Only a revocation retires it."""
        if not is_retirement(body, self._authorities):
            return False
        with self._lock:
            self._names[str(body["node"])] = str(body["name"])
        return True

    def is_revoked(self, node: str, key_id: str = _ALL_KEYS, position: tuple[int, int] | None = None) -> bool:
        """Returns whether the node, or this key, is revoked; with a position, whether the revocation covers it."""
        found = [self._revoked.get((node, name)) for name in {_ALL_KEYS, key_id}]
        limits = [limit for limit in found if limit is not None]
        return bool(limits) and (position is None or position > min(limits))

    def certified_keys(self) -> list[CertifiedKey]:
        """Returns all certified keys, revoked ones too, in no order."""
        until: dict[tuple[str, str], datetime.datetime] = {}
        with self._lock:
            for bound in (one for bindings in self._bindings.values() for one in bindings.values()):
                key = bound.node, bound.key_id
                until[key] = max(until.get(key, bound.not_after), bound.not_after)
            return [CertifiedKey(*key, end, self.is_revoked(*key)) for key, end in until.items()]

    def is_certified(self, node: str) -> bool:
        return node in self._bindings

    def members(self) -> Iterable[str]:
        """Returns the nodes with a certificate that is not revoked, in no order."""
        with self._lock:
            return [
                node
                for node, bindings in self._bindings.items()
                if any(not self.is_revoked(node, bound.key_id) for bound in bindings.values())
            ]
