"""Watches what Zenoh does not report: members and addresses without a link, certificates, our own revocation."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable

from vmconv_fleet.config import NodeConfig
from vmconv_fleet.links.peers import Dialler
from vmconv_fleet.links.zenoh_link import ZenohLink
from vmconv_fleet.replication.problems import NodeProblem
from vmconv_fleet.supervision import Supervised
from vmconv_fleet.trust.identity import Binding

INTERVAL = 5.0
DIAL_INTERVAL = 2.0
WARNING = datetime.timedelta(days=14)
_PATIENCE = 3
"""Number of successful probes without a link that count as a problem: Zenoh tries once a second."""


class Watch:
    """Checks every few seconds, on a thread of its own, and reports to the link; `bound` returns our certificate's
    content, `dialler` finds members.
    """

    def __init__(
        self,
        config: NodeConfig,
        link: ZenohLink,
        bound: Callable[[], Binding],
        is_revoked: Callable[[], bool],
        dialler: Dialler | None = None,
    ) -> None:
        self._config = config
        self._link = link
        self._bound = bound
        self._is_revoked = is_revoked
        self._dialler = dialler
        self._found: dict[str, str] = {}
        self._shunned: dict[str, int] = {}
        self._ended = threading.Event()
        self.thread = Supervised("watch", self._run, self._ended)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        self._ended.set()
        self.thread.join(10)

    def _run(self, works: Callable[[], None]) -> None:
        # Zenoh has time to link with the seeds: most of them need no probe.
        due = time.monotonic() + INTERVAL
        while not self._ended.wait(DIAL_INTERVAL):
            self.dial()
            if time.monotonic() >= due:
                self.look()
                due = time.monotonic() + INTERVAL
            works()

    def dial(self) -> None:
        """Looks for members without a link."""
        if self._dialler is None or self._link.is_disconnected:
            return
        if self._dialler.look(self._link.neighbours(), time.monotonic()):
            self._link.members_found()

    def look(self) -> None:
        self._look_at_certificate()
        for address in self._config.connect:
            if self._link.is_disconnected or self._ended.is_set():
                return
            name = f"address {address}"
            known = self._found.get(address) in {self._config.node, *self._link.neighbours()}
            if known or self._link.reached(address):
                self._shunned.pop(address, None)
                self._link.report(name, None)
            else:
                self._link.report(name, self._judge(address))

    def _judge(self, address: str) -> NodeProblem | None:
        """Returns the problem of an address without a known neighbour."""
        # TLS in Python takes memory that a node with all links does not need.
        from vmconv_fleet.links.probing import probe

        found = probe(self._config, address)
        if found.kind == "unreachable" and self._link.neighbours():
            # A seed is one way in: the node is in. The list of nodes shows those that are silent.
            return None
        if found.kind:
            return NodeProblem(found.kind, f"{found.text} ({found.hint})" if found.hint else found.text)
        if found.node is None:
            return NodeProblem("untrusted", f"{address}: shows a certificate without a node id")
        self._found[address] = found.node
        if found.node in {self._config.node, *self._link.neighbours()}:
            return None
        self._shunned[address] = self._shunned.get(address, 0) + 1
        if self._shunned[address] < _PATIENCE:
            return None
        return NodeProblem(
            "cloned",
            f"{address}: node {found.node} accepts this node's certificate but makes no link with it: "
            f"is a copy of this node running, with the same id {self._config.node}?",
        )

    def _look_at_certificate(self) -> None:
        left = self._bound().not_after - datetime.datetime.now(datetime.UTC)
        problem = None
        if self._is_revoked():
            problem = NodeProblem("revoked", "this node was revoked: other nodes refuse its messages")
        elif left < datetime.timedelta():
            problem = NodeProblem(
                "expired", f"the certificate of this node expired on {self._bound().not_after:%Y-%m-%d}"
            )
        elif left < WARNING:
            problem = NodeProblem("expiring", f"the certificate of this node expires in {left.days} days")
        self._link.report("certificate", problem)
