"""The clients of the NBD server, and the choice of those to disconnect if there are too many.

Port scans and denial of service open connections that never negotiate. Such a connection loses its place as soon as a
new one needs it. An idle client that has negotiated keeps its place until all places are taken.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

MAX_CLIENTS = 64
MAX_OF_ADDRESS = 32
"""Connections of one IPv4 address, one IPv6 network of 64 bits, or of the Unix socket."""

IDLE = 10.0
"""Seconds without a request after which a client may lose its place."""


class Client:
    """A connection: `negotiated` if it has chosen an export, `active` at its last completed request."""

    def __init__(self, connection: socket.socket, peer: Any) -> None:
        self.socket = connection
        self.address = address_of(connection, peer)
        self.negotiated = False
        self.active = time.monotonic()

    def progressed(self) -> None:
        self.negotiated = True
        self.active = time.monotonic()

    def disconnect(self) -> None:
        """Shuts the connection down, which ends its thread."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


def address_of(connection: socket.socket, peer: Any) -> bytes:
    """Returns a key of the peer: its IPv4 address, its IPv6 /64 network, or nothing for a Unix socket."""
    if connection.family == socket.AF_INET:
        return socket.inet_aton(peer[0])
    if connection.family == socket.AF_INET6:
        return socket.inet_pton(socket.AF_INET6, peer[0].partition("%")[0])[:8]
    return b""


class Clients:
    """The connections with a place, and disconnected ones with threads that have not ended yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._placed: set[Client] = set()
        self._leaving: set[Client] = set()

    def add(self, client: Client) -> bool:
        """Gives the client a place, that of another client if necessary; returns False if there is none."""
        with self._lock:
            # Disconnected clients hold a thread and a descriptor until they notice.
            if len(self._placed) + len(self._leaving) >= 2 * MAX_CLIENTS:
                return False
            same = [other for other in self._placed if other.address == client.address]
            if len(same) >= MAX_OF_ADDRESS:
                crowd = same
            elif len(self._placed) >= MAX_CLIENTS:
                crowd = list(self._placed)
            else:
                crowd = []
            if crowd and not self._disconnect_one(crowd):
                return False
            self._placed.add(client)
            return True

    def _disconnect_one(self, crowd: list[Client]) -> bool:
        """Disconnects one of the crowd: first without negotiation, then idle; first from the most frequent address."""
        dispensable = [one for one in crowd if not one.negotiated or time.monotonic() - one.active >= IDLE]
        if not dispensable:
            return False
        count = Counter(one.address for one in crowd)
        one = min(dispensable, key=lambda one: (one.negotiated, -count[one.address], one.active))
        self._placed.discard(one)
        self._leaving.add(one)
        one.disconnect()
        return True

    def drop_one(self) -> bool:
        """Disconnects one client that is idle or has not negotiated; returns False if all are in use."""
        with self._lock:
            return self._disconnect_one(list(self._placed))

    def remove(self, client: Client) -> None:
        """Forgets a client after its thread has ended."""
        with self._lock:
            self._placed.discard(client)
            self._leaving.discard(client)

    @property
    def any_negotiated(self) -> bool:
        with self._lock:
            return any(client.negotiated for client in self._placed | self._leaving)

    def disconnect_all(self) -> None:
        with self._lock:
            for client in self._placed | self._leaving:
                client.disconnect()
