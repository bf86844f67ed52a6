"""Listening sockets with limits: a stranger's connection loses its place to the next one, and ends after a while.

asyncio, uvicorn and http.server accept connections as long as there are descriptors. They limit neither the number of
connections nor the time of a TLS handshake, a head and a body.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import socket
import threading
import time
from collections import Counter, deque
from typing import Any, NamedTuple, Self, cast

DESCRIPTORS = 1 << 16
"""The limit of descriptors that a node asks for. The usual one, 1024, is for programs that call select(2)."""

SHARE = 4
"""The part of the requests and of the streams that one caller may have: so nobody's token keeps all others out."""

RECENT = 60.0
"""Seconds for which lost places count as a problem."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_log = logging.getLogger("vmconv_fleet.limiter")


class Limits(NamedTuple):
    """The limits of a listening socket.

    `total` connections at a time, `address` of them from one IPv4 address or IPv6 network of 64 bits. A stranger has
    `seconds` for the TLS handshake, the head, the body and reading the answer. A known caller has as long for the next
    head, and for a body. No more than `requests` are answered at a time, streams of events not counted. One caller has
    a quarter of them at most, and streams on a quarter of the connections.
    """

    total: int
    address: int
    seconds: float
    requests: int = 128


def raise_descriptor_limit() -> None:
    """Raises the soft limit of descriptors of this process towards `DESCRIPTORS`, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Connection:
    """An accepted connection: `known` once its caller is authenticated; `since` its last answer, or its begin."""

    def __init__(self, limiter: Limiter, accepted: socket.socket, peer: Any) -> None:
        self.address = address_key(accepted.family, peer)
        # Only the node's own administrator can open its Unix socket.
        self.known = accepted.family == socket.AF_UNIX
        self.since = time.monotonic()
        self.holder = ""
        self.is_stream = False
        self._limiter = limiter
        self._socket: socket.socket | None = accepted
        self._requests = 0
        self._reading = False

    def begin(self) -> bool:
        """Notes that the head of a request has arrived; returns whether it has a place."""
        self._requests += 1
        self.since = time.monotonic()
        return self._limiter.ask(self)

    def hold(self, holder: str) -> bool:
        """Notes who the caller is; returns whether one caller may have this request besides its others."""
        self.holder = holder
        return self._limiter.share(self)

    def stream(self) -> None:
        """Notes that the request has become a stream of events, which are limited elsewhere."""
        self.is_stream = True
        self._limiter.answered(self)

    def reading(self, reading: bool) -> None:
        """Notes whether the body of a request is waited for."""
        self._reading = reading

    def end(self) -> None:
        """Notes that a request was answered."""
        self._requests -= 1
        self._reading = self.is_stream = False
        self.since = time.monotonic()
        self._limiter.answered(self)

    @property
    def is_slow(self) -> bool:
        """Returns whether a stranger's body is waited for."""
        return not self.known and self._reading

    @property
    def is_busy(self) -> bool:
        """Returns whether a known caller's request is being answered."""
        return self.known and self._requests > 0 and not self._reading

    def replace(self, secured: socket.socket) -> None:
        """Follows a descriptor that has moved to another socket object."""
        self._socket = secured

    def disconnect(self) -> None:
        """Shuts the connection down; its server notices and closes it."""
        # The limiter's lock prevents that the descriptor is closed, and given to another file, at the same time.
        if self._socket is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives up the place, and closes the descriptor."""
        self._limiter.remove(self)

    def _close(self) -> None:
        closing, self._socket = self._socket, None
        if isinstance(closing, _Accepted):
            closing.close_now()
        elif closing is not None:
            closing.close()


class _Accepted(socket.socket):
    """An accepted socket: closing it gives up its connection's place."""

    connection: Connection | None = None

    def close(self) -> None:
        if self.connection is None:
            super().close()
        else:
            self.connection.close()

    def close_now(self) -> None:
        super().close()


class Limiter:
    """The connections of a listening socket; `name` is for administrators."""

    kind = "crowded"

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        self.limits = limits
        self.counters = {"accepted": 0, "displaced": 0, "refused": 0, "overdue": 0, "failed": 0, "busy": 0}
        self._lock = threading.RLock()
        self._placed: set[Connection] = set()
        self._leaving: set[Connection] = set()
        self._asking: set[Connection] = set()
        self._lost: deque[float] = deque(maxlen=10_000)
        self._logged = -RECENT
        self._spare: int | None = _spare()

    def listen(self, plain: socket.socket) -> LimitedSocket:
        """Returns the listening socket with limits, which replaces `plain`."""
        return LimitedSocket.of(plain, self)

    def find(self, descriptor: int) -> Connection | None:
        """Returns the connection with this descriptor."""
        with self._lock:
            connections = (*self._placed, *self._leaving)
            return next((one for one in connections if one._socket and one._socket.fileno() == descriptor), None)

    def __len__(self) -> int:
        return len(self._placed) + len(self._leaving)

    def add(self, connection: Connection) -> bool:
        """Gives a connection a place, if necessary that of another one. Returns False if all places are in use."""
        with self._lock:
            self.counters["accepted"] += 1
            if self._has_room(connection):
                self._placed.add(connection)
                return True
            self._lose("refused")
            return False

    def _has_room(self, connection: Connection) -> bool:
        # Disconnected ones have a descriptor until their server notices.
        if len(self) >= 2 * self.limits.total:
            return False
        same = [one for one in self._placed if one.address == connection.address]
        if len(same) >= self.limits.address:
            return self._displace_one(same)
        return len(self._placed) < self.limits.total or self._displace_one(list(self._placed))

    def _displace_one(self, crowd: list[Connection]) -> bool:
        """Disconnects one of the crowd: strangers first, of them the oldest of the most frequent address."""
        dispensable = [one for one in crowd if not one.is_busy]
        if not dispensable:
            return False
        count = Counter(one.address for one in dispensable)
        self._lose("displaced")
        self._disconnect(min(dispensable, key=lambda one: (one.known, -count[one.address], one.since)))
        return True

    def _disconnect(self, connection: Connection) -> None:
        self._placed.discard(connection)
        self._leaving.add(connection)
        connection.disconnect()

    def ask(self, connection: Connection) -> bool:
        """Gives a request a place, if necessary that of a stranger's slow body. Returns False if all are in use."""
        with self._lock:
            if len(self._asking) >= self.limits.requests:
                slow = [one for one in self._asking if one.is_slow]
                if not slow:
                    self.counters["busy"] += 1
                    return False
                oldest = min(slow, key=lambda one: one.since)
                self._asking.discard(oldest)
                self._lose("displaced")
                self._disconnect(oldest)
            self._asking.add(connection)
            return True

    def share(self, connection: Connection) -> bool:
        """Returns whether the caller of a request has no more than its share of requests and streams with it."""
        with self._lock:
            if connection not in self._asking:
                return True
            holder = connection.holder
            requests = sum(one.holder == holder for one in self._asking)
            streams = sum(one.is_stream and one.holder == holder for one in self._placed)
            most = max(1, self.limits.requests // SHARE), max(1, self.limits.total // SHARE)
            if requests > most[0] or streams >= most[1]:
                self.counters["busy"] += 1
                return False
            return True

    def answered(self, connection: Connection) -> None:
        """Frees the place of a connection's request."""
        with self._lock:
            self._asking.discard(connection)

    def sweep(self) -> None:
        """Disconnects those whose time has passed; to be called every second or so."""
        with self._lock:
            latest = time.monotonic() - self.limits.seconds
            for one in [one for one in self._placed if one.since < latest and not one.is_busy]:
                if not one.known:
                    self._lose("overdue")
                self._disconnect(one)

    def remove(self, connection: Connection) -> None:
        """Frees the place of a connection and closes its descriptor."""
        with self._lock:
            self._placed.discard(connection)
            self._leaving.discard(connection)
            self._asking.discard(connection)
            connection._close()

    def exhausted(self, listening: socket.socket) -> None:
        """Handles that there is no descriptor for a connection: refuses it with the one kept for this."""
        with self._lock:
            self._lose("failed")
            if self._spare is not None:
                os.close(self._spare)
                self._spare = None
                with contextlib.suppress(OSError):
                    socket.socket.accept(listening)[0].close()
            self._displace_one(list(self._placed))
            self._spare = _spare()

    def _lose(self, how: str) -> None:
        now = time.monotonic()
        self.counters[how] += 1
        self._lost.append(now)
        if now - self._logged >= RECENT:
            self._logged = now
            _log.warning("port %s: a connection was %s", self.name, how, extra={"fields": dict(self.counters)})

    def problem(self) -> str | None:
        """Returns what strangers did in the last minute, if they took all places."""
        with self._lock:
            oldest = time.monotonic() - RECENT
            while self._lost and self._lost[0] < oldest:
                self._lost.popleft()
            if len(self._lost) < self.limits.address:
                return None
            return f"port {self.name}: {len(self._lost)} connections of strangers were ended in the last minute"

    def close(self) -> None:
        """Disconnects all."""
        with self._lock:
            for one in [*self._placed]:
                self._disconnect(one)
            if self._spare is not None:
                os.close(self._spare)
                self._spare = None


class LimitedSocket(socket.socket):
    """A listening socket whose `accept` returns only connections with a place."""

    limiter: Limiter

    @classmethod
    def of(cls, plain: socket.socket, limiter: Limiter) -> Self:
        made = cls(plain.family, plain.type, plain.proto, fileno=plain.detach())
        made.limiter = limiter
        # A connection may be gone between select(2) and accept(2), which would then wait.
        made.setblocking(False)
        return made

    def accept(self) -> tuple[socket.socket, Any]:
        """Returns the next connection. Raises BlockingIOError if none waits, or if it was refused."""
        try:
            plain, peer = super().accept()
        except OSError as exc:
            if exc.errno not in _EXHAUSTED:
                raise
            # asyncio 3.11 would stop listening after an error of these.
            self.limiter.exhausted(self)
            raise BlockingIOError(errno.EAGAIN, "no descriptor is free") from exc
        accepted = _Accepted(plain.family, plain.type, plain.proto, fileno=plain.detach())
        connection = Connection(self.limiter, accepted, peer)
        if not self.limiter.add(connection):
            accepted.close()
            # The server closes disconnected sockets before it accepts again.
            raise BlockingIOError(errno.EAGAIN, "no place is free")
        accepted.connection = connection
        return accepted, peer


def connection_of(accepted: socket.socket) -> Connection:
    """Returns the connection of a socket that a `LimitedSocket` has accepted."""
    return cast("Connection", cast("_Accepted", accepted).connection)


def address_key(family: int, peer: Any) -> bytes:
    """Returns a key of the peer: its IPv4 address, its IPv6 network, or nothing for a Unix socket."""
    if family == socket.AF_INET:
        return socket.inet_aton(peer[0])
    if family == socket.AF_INET6:
        packed = socket.inet_pton(socket.AF_INET6, peer[0].partition("%")[0])
        # An IPv4 address of a socket for both.
        return packed[12:] if packed.startswith(bytes(10) + b"\xff\xff") else packed[:8]
    return b""


def network_key(address: bytes) -> bytes:
    """Returns a key of the network of an address's key: 24 bits of IPv4, 48 bits of IPv6, which one site has."""
    return address[: 3 if len(address) == 4 else 6]


def _spare() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
