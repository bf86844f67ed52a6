"""Who is connected to the NBD server, and who has to go when there are too many.

A connection that has not negotiated yet proves nothing: a port scan makes such connections, and so does somebody who
wants to lock others out. So it never keeps a place that a newcomer needs. A client that negotiated and has asked for
nothing in a while keeps its place until the places run out.
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
    """A connection; `negotiated` once it has chosen an export, `active` when it last completed something."""

    def __init__(self, connection: socket.socket, peer: Any) -> None:
        self.socket = connection
        self.address = address_of(connection, peer)
        self.negotiated = False
        self.active = time.monotonic()

    def progressed(self) -> None:
        self.negotiated = True
        self.active = time.monotonic()

    def disconnect(self) -> None:
        """Ends the connection under its thread, which then ends too."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


def address_of(connection: socket.socket, peer: Any) -> bytes:
    """Returns what the connections of one host have in common."""
    if connection.family == socket.AF_INET:
        return socket.inet_aton(peer[0])
    if connection.family == socket.AF_INET6:
        return socket.inet_pton(socket.AF_INET6, peer[0].partition("%")[0])[:8]
    return b""


class Clients:
    """The connections that have a place, and those that lost it and whose threads have not ended yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._placed: set[Client] = set()
        self._leaving: set[Client] = set()

    def add(self, client: Client) -> bool:
        """Gives the client a place, of another one's if need be; False when there is none."""
        with self._lock:
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
        """Disconnects one of the crowd: who has not negotiated, or else who is idle, of the address that has most."""
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
        """Disconnects one client that can be spared, whatever the limits; False when all are in use."""
        with self._lock:
            return self._disconnect_one(list(self._placed))

    def remove(self, client: Client) -> None:
        """Takes note that the thread of a client has ended."""
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
