"""The members that a node dials besides its seeds: found in their own signed records, or stated when they joined, and
probed before Zenoh dials.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vmconv_fleet.config import NodeConfig, split_address
from vmconv_fleet.links.zenoh_config import MESH
from vmconv_fleet.trust.addresses import MAX_ANNOUNCED, announced, dialable, is_loopback

DEGREE = 8
"""The number of members that a node of a large fleet dials."""
AT_ONCE = 8
"""Probes at the same time. A look makes at most four times as many."""
SOONEST, LATEST = 2.0, 60.0
"""Seconds between two probes of a missing member: an eighth of its absence, within these limits. The first one comes
after the shortest time.
"""

MAX_EXPECTED = 64
"""The number of nodes that joined and have no record yet, whose addresses are remembered."""


def links_of(config: NodeConfig) -> list[str]:
    """Returns the addresses of this node's links, for its record."""
    return [address for listening in config.listen for address in announced(config, listening)][:MAX_ANNOUNCED]


def dialled(me: str, members: Iterable[str], is_missing: Callable[[str], bool]) -> list[str]:
    """Returns the members that a node dials: all, or in a large fleet its successor by id and some at random.

    The choice is the same each time, so that members return after a partition. Those that are missing are replaced by
    others until they are back. The successors alone connect the whole fleet.
    """
    others = sorted({*members} - {me})
    if len(others) < MESH:
        return others
    successor = next((node for node in others if node > me), others[0])
    order = sorted(others, key=lambda node: (node != successor, hashlib.sha256(f"{me}{node}".encode()).digest()))
    found, present = [], 0
    for node in order:
        if present == DEGREE:
            break
        found.append(node)
        present += not is_missing(node)
    return found


class Dialler:
    """Finds the addresses to dial: only those where a probe has met the member.

    `members` returns the nodes of the fleet, `record` the body of a node's record, `meets` the node at an address, or
    None, `awaited` the members that this node has to hear. Called on one thread; `endpoints` on any.
    """

    def __init__(
        self,
        config: NodeConfig,
        members: Callable[[], Iterable[str]],
        record: Callable[[str], Mapping[str, Any]],
        meets: Callable[[str], str | None],
        awaited: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self._config = config
        self._members = members
        self._record = record
        self._meets = meets
        self._awaited = awaited
        self._here = any(is_loopback(split_address(address)[0]) for address in config.listen)
        self._absent: dict[str, tuple[float, float]] = {}
        self._found: dict[str, str] = {}
        self._expected: dict[str, list[str]] = {}

    def expect(self, node: str, stated: object) -> None:
        """Remembers where a node that joins will listen, until it has a record. Called on any thread.

        It may know no other node than this one, and strangers may keep it from this one's port.
        """
        expected = {**self._expected, node: dialable(stated, here=self._here)}
        self._expected = dict(list(expected.items())[-MAX_EXPECTED:])

    def endpoints(self) -> list[str]:
        """Returns the addresses to dial, one for each member that was met."""
        return list(self._found.values())

    def look(self, linked: Iterable[str], now: float) -> bool:
        """Probes the missing members that are due; returns whether there is one to dial. `now` is in seconds."""
        if not self._config.gossip:
            return False
        linked, members = set(linked), set(self._members())
        for node in [one for one in self._absent if one in linked or one not in members]:
            del self._absent[node]
        self._found = {node: address for node, address in self._found.items() if node in members}
        wanted = {*dialled(self._config.node, members, self._is_missing), *(members & {*self._awaited()})}
        missing = sorted(wanted - linked)
        # Most links come without a probe, and a probe takes memory: TLS in Python.
        due = [node for node in missing if self._absent.setdefault(node, (now, now + SOONEST))[1] <= now]
        if not due:
            return False
        # The longest absent last: a dead member costs a timeout.
        due = sorted(due, key=lambda node: self._absent[node][0], reverse=True)[: 4 * AT_ONCE]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            met = dict(zip(due, pool.map(self._meet, due), strict=True))
        for node, address in met.items():
            since = self._absent[node][0]
            self._absent[node] = (since, now + min(max(SOONEST, (now - since) / 8), LATEST))
            if address is None:
                self._found.pop(node, None)
            else:
                self._found[node] = address
        return any(met.values())

    def _is_missing(self, node: str) -> bool:
        return node in self._absent and node not in self._found

    def _meet(self, node: str) -> str | None:
        """Returns an address at which the member itself answers, or None."""
        record = self._record(node)
        addresses: Sequence[str] = (
            dialable(record.get("links"), here=self._here) if record else self._expected.get(node, [])
        )
        return next((address for address in addresses if self._meets(address) == node), None)
