"""Syslog: the events of a node as messages of RFC 5424, to the machine's own daemon or to another host.

    <PRI>1 TIME HOST vmconv-fleet PID TYPE - JSON

The message is JSON in ASCII without control characters, so that no name can end a line or forge one. It is sent once:
messages of an unreachable daemon wait in memory, the newest thousand. The standard library's handler has no time-outs,
does not connect again, and writes the older RFC 3164; its numbers of levels are used.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from logging.handlers import SysLogHandler
from typing import NamedTuple

from vmconv_fleet.notices.event import KINDS, Event, Events
from vmconv_fleet.replication.records import Record
from vmconv_fleet.replication.writing import Writes
from vmconv_fleet.resolving import Resolver, connected
from vmconv_fleet.supervision import Supervised

PORT = 514
MAX_WAITING = 1000
MAX_DATAGRAM = 2048
"""The length that every receiver should take, by RFC 5424."""
_TIMEOUT_S = 5.0
_RESOLVER = Resolver()
_HOST = re.compile("[^!-~]")
_ADDRESS = re.compile(
    r"(?P<kind>udp|tcp)://(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9_.-]+))(?::(?P<port>[0-9]{1,5}))?"
)
_FAILURE = frozenset({"job.failed", "datastore.problem", "node.problem"})


class Destination(NamedTuple):
    """Where messages go: a Unix socket, or a host and its port. `kind` is that of the socket."""

    address: str | tuple[str, int]
    kind: socket.SocketKind


def destination(text: str) -> Destination:
    """Returns the destination of a setting. Raises ValueError."""
    if text.startswith("/"):
        return Destination(text, socket.SOCK_DGRAM)
    match = re.fullmatch(
        r"(?P<kind>udp|tcp)://(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[\w.-]+))(?::(?P<port>\d+))?", text
    )
    if match is None or not 0 < int(match["port"] or PORT) < 1 << 16:
        raise ValueError(f"{text!r} is not /dev/log, udp://HOST:PORT or tcp://HOST:PORT")
    kind = socket.SOCK_DGRAM if match["kind"] == "udp" else socket.SOCK_STREAM
    return Destination((match["six"] or match["host"], int(match["port"] or PORT)), kind)


def message(event: Event, host: str) -> bytes:
    """Returns an event as a message of RFC 5424."""
    level = SysLogHandler.LOG_WARNING if event.type in _FAILURE else SysLogHandler.LOG_INFO
    at = datetime.fromtimestamp(event.at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
    name = _HOST.sub("?", host)[:255] or "-"
    head = f"<{SysLogHandler.LOG_DAEMON << 3 | level}>1 {at}Z {name} vmconv-fleet {os.getpid()} {event.type} - "
    found = _json({"event": event.id, **event.data})
    if len(head) + len(found) > MAX_DATAGRAM:
        found = _json({"event": event.id, "id": event.data.get("id"), "shortened": True})
    return (head + found).encode("ascii")


def _json(data: object) -> str:
    # In ASCII, with all control characters escaped, DEL among them.
    return json.dumps(data, ensure_ascii=True)


class Syslog:
    """Sends the events of a node."""

    kind = "syslog"
    name = "syslog"

    def __init__(self, service: Writes, where: Destination, host: str) -> None:
        self.counters = {"sent": 0, "dropped": 0}
        self._service = service
        self._where = where
        self._host = host
        self._events = Events()
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._lost = 0
        self._arrived = threading.Event()
        self._ending = threading.Event()
        self._socket: socket.socket | None = None
        self.thread = Supervised("syslog", self._run, self._ending)
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self) -> None:
        self._unsubscribe = self._service.subscribe(self._notice)
        self.thread.start()

    def stop(self) -> None:
        self._unsubscribe()
        self._ending.set()
        self._arrived.set()
        self.thread.join(2 * _TIMEOUT_S)

    def problem(self) -> str | None:
        """Returns how many messages were lost since one was sent."""
        return f"syslog {_text(self._where)}: {self._lost} messages were dropped" if self._lost else None

    def _notice(self, records: list[Record]) -> None:
        """Keeps the messages of committed records; on the replica's thread."""
        found = [one for one in records if one.owner == self._service.node and one.kind in KINDS]
        for event in (event for record in found for event in self._events.of(record)):
            if len(self._waiting) == MAX_WAITING:
                self._lost += 1
                self.counters["dropped"] += 1
            self._waiting.append(message(event, self._host))
        if found:
            self._arrived.set()

    def _run(self, works: Callable[[], None]) -> None:
        try:
            while not self._ending.is_set():
                self._send_waiting()
                works()
                self._arrived.wait()
                self._arrived.clear()
            self._send_waiting()
        finally:
            self._disconnect()

    def _send_waiting(self) -> None:
        while self._waiting:
            # A message that fails is sent again; meanwhile newer ones may have displaced it.
            first = self._waiting[0]
            self._send(first)
            self.counters["sent"] += 1
            self._lost = 0
            if self._waiting and self._waiting[0] is first:
                self._waiting.popleft()

    def _send(self, text: bytes) -> None:
        """Sends a message. Raises OSError."""
        try:
            connected = self._socket = self._socket or _connected(self._where)
            is_stream = connected.type == socket.SOCK_STREAM
            # Octet counting of RFC 6587.
            framed = b"%d %s" % (len(text), text) if is_stream else text
            connected.sendall(framed)
        except OSError as exc:
            self._disconnect()
            raise OSError(f"{_text(self._where)}: {exc.strerror or exc}") from exc

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _connected(where: Destination) -> socket.socket:
    if isinstance(where.address, str):
        made = socket.socket(socket.AF_UNIX, where.kind)
        try:
            made.settimeout(_TIMEOUT_S)
            made.connect(where.address)
        except OSError:
            made.close()
            raise
        return made
    if where.kind == socket.SOCK_STREAM:
        return connected(_RESOLVER, *where.address, _TIMEOUT_S)
    family, kind, protocol, _, address = _RESOLVER.addresses(*where.address, where.kind, within=_TIMEOUT_S)[0]
    made = socket.socket(family, kind, protocol)
    made.connect(address)
    return made


def _text(where: Destination) -> str:
    return where.address if isinstance(where.address, str) else f"{where.address[0]}:{where.address[1]}"
