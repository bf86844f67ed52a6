"""The joining service's access to the node: known nodes, and the authority's signed records."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vmconv_fleet.errors import FleetError, NotReadyError
from vmconv_fleet.replication.records import Change
from vmconv_fleet.trust.identity import read_certificate
from vmconv_fleet.trust.names import name_key, names_in_use

if TYPE_CHECKING:
    from vmconv_fleet.replication.service import NodeService
    from vmconv_fleet.trust.certificates import CertificateTrust

DURABLE_WITHIN = 8.0


class Members:
    """Implements `joining.Membership` with the node's own records; writes the certificates of joining nodes.

    `seeds` returns addresses where this node has met members; `expect` is told the stated ones of a node that joins.
    """

    def __init__(
        self,
        service: NodeService,
        trust: CertificateTrust,
        changed: Callable[[], None],
        seeds: Callable[[], list[str]],
        expect: Callable[[str, object], None],
    ) -> None:
        self._service = service
        self._trust = trust
        self._changed = changed
        self._seeds = seeds
        self.expect = expect

    def is_known(self, node: str) -> bool:
        return node in self._service.view().positions() or self._trust.is_certified(node)

    def is_revoked(self, node: str, key_id: str) -> bool:
        return self._trust.is_revoked(node, key_id)

    def names(self) -> dict[str, set[str]]:
        found, certified = names_in_use([read_certificate(pem) for pem in self.certificates()]), self._trust.names()
        members = {*self._trust.members()}
        for record in self._service.view().find("node"):
            # Nodes of earlier versions have no name in their certificate.
            if record.id == record.owner and record.owner in members - certified.keys():
                found.setdefault(name_key(str(record.body.get("name"))), set()).add(record.owner)
        return found

    def seeds(self) -> list[str]:
        return self._seeds()

    def certificates(self) -> list[bytes]:
        members, newest = set(self._trust.members()), dict[str, tuple[datetime.datetime, bytes]]()
        for record in self._service.view().find("certificate"):
            pem = str(record.body.get("pem")).encode()
            bound = self._trust.learn_certificate(pem)
            if bound is not None and bound.node in members:
                newest[bound.node] = max((bound.not_after, pem), newest.get(bound.node, (bound.not_after, b"")))
        return [pem for _, pem in newest.values()]

    def certified(self, certificate: bytes) -> None:
        bound = self._trust.learn_certificate(certificate)
        if bound is None:
            raise FleetError(f"certificate {read_certificate(certificate).serial_number:x} is not of this fleet")
        change = Change("certificate", bound.key_id, {"pem": certificate.decode(), "node": bound.node})
        try:
            self._service.write([change]).result(DURABLE_WITHIN)
        except TimeoutError as exc:
            raise NotReadyError("this node cannot write yet", hint="it needs a neighbour first; try again") from exc
        self._changed()

    def revoke(self, node: str) -> None:
        by: dict[str, Any] = {"node": self._service.node, "user": "the node itself"}
        request = self._service.submit(self._service.node, "revoke", {"node": node}, by)
        response = self._service.response(request, DURABLE_WITHIN)
        if response is None or not response.body.get("ok"):
            reason = "no answer yet" if response is None else response.body.get("reason")
            raise FleetError(f"node {node} could not be revoked: {reason}")
