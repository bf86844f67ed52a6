"""The clients of the NBD server, and the choice of those to disconnect if there are too many.

Port scans and denial of service open connections that never negotiate, or that negotiate and request nothing. Such a
connection loses its place as soon as a new one needs it. A client that has requested something keeps its place while it
is in use, and as long as there are free ones. A client that has proved who it is goes last.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

MAX_CLIENTS = 512
MAX_OF_ADDRESS = 32
"""Connections of one IPv4 address, one IPv6 network of 64 bits, or of the Unix socket."""

IDLE = 10.0
"""Seconds after which a client may lose its place that has requested something before."""


class Client:
    """A connection: `negotiated` if it has chosen an export, `active` at its last completed request.

    `used` is True if it has completed a request, `authorised` if it has proved who it is.
    """

    def __init__(self, connection: socket.socket, peer: Any) -> None:
        self.socket = connection
        self.address = address_of(connection, peer)
        self.negotiated = self.used = self.authorised = False
        self.active = time.monotonic()
        self._gone = False

    def progressed(self) -> None:
        """Notes the end of the negotiation, or of a request."""
        self.used = self.negotiated
        self.negotiated = True
        self.active = time.monotonic()

    def replace(self, connection: socket.socket) -> None:
        """Continues on a socket that has taken over the descriptor of the former one."""
        self.socket = connection
        if self._gone:
            self.disconnect()

    def disconnect(self) -> None:
        """Shuts the connection down, which ends its thread."""
        self._gone = True
        with suppress(OSError):
            # `SSLSocket.shutdown` would first let go of the encryption, and its thread could send plain bytes.
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    @property
    def stage(self) -> int:
        """How far it has come: 0 without an export, 1 without a request, 2 with one."""
        return self.negotiated + self.used


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
        """Disconnects one of the crowd: first without negotiation, then without a request, then idle.

        Clients that have proved who they are come after all others; of equals, the most frequent address is first.
        """
        dispensable = [one for one in crowd if not one.used or time.monotonic() - one.active >= IDLE]
        if not dispensable:
            return False
        count = Counter(one.address for one in crowd)
        one = min(dispensable, key=lambda one: (one.authorised, one.stage, -count[one.address], one.active))
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
