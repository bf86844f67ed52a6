"""The engine's transport: links to the neighbours by Zenoh.

One thread, the keeper, opens, closes and reopens the session, to apply new certificates and members. Zenoh calls back
on its own threads, where we only enqueue. A neighbour is identified by the common name of its certificate, and may put
under that name only.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Self

import zenoh

from vmconv_fleet.config import NodeConfig
from vmconv_fleet.links.sockets import give_up_after
from vmconv_fleet.links.zenoh_config import ALL, lease_ms, link_key, zenoh_settings
from vmconv_fleet.replication.engine import Events
from vmconv_fleet.replication.messages import LIVE, MAX_MESSAGE
from vmconv_fleet.replication.problems import NodeProblem
from vmconv_fleet.supervision import Supervised
from vmconv_fleet.trust.identity import is_node_id

QUIET = 0.3
"""Seconds without a change of links before a session is reopened, which interrupts all its links for a moment."""
SPREAD = 0.1
"""Seconds per member that are added at random, so that nodes reopen one after the other."""
LONGEST = 1.0
"""The longest wait for other changes, in seconds per member."""
URGENT = 1.0
"""Seconds within which, at random, the link with a revoked node ends."""
MAX_PATIENCE = 64
"""The largest factor for the wait for a neighbour that has a link but does not listen."""
CLOSE_WITHIN = 6.0
"""Seconds that a session may take to close: Zenoh 1.10 was seen to fail after ten, or never to return."""
MAX_WAITING = 64 << 20
"""Bytes of queued messages besides live ones. More is lost, and requested again by the receiver."""
_log = logging.getLogger("vmconv_fleet.link")


class _Publishers(NamedTuple):
    """The publishers for one neighbour, or for all: live messages may be dropped, bulk ones wait for room."""

    live: zenoh.Publisher
    bulk: zenoh.Publisher

    @classmethod
    def to(cls, session: zenoh.Session, key: str) -> Self:
        remote = zenoh.Locality.REMOTE
        live = session.declare_publisher(
            key,
            allowed_destination=remote,
            congestion_control=zenoh.CongestionControl.DROP,
            priority=zenoh.Priority.INTERACTIVE_HIGH,
            express=True,
        )
        blocking = zenoh.CongestionControl.BLOCK
        return cls(live, session.declare_publisher(key, congestion_control=blocking, allowed_destination=remote))


class _Closing(threading.Thread):
    """Closes a session on a thread of its own. After a failure Zenoh does not try again."""

    def __init__(self, session: zenoh.Session) -> None:
        super().__init__(name="link-close", daemon=True)
        self._session = session
        self.closed = False

    def run(self) -> None:
        try:
            self._session.close()  # type: ignore[no-untyped-call]
            self.closed = True
        except zenoh.ZError as exc:
            _log.warning("a session did not close: %s", exc)


class ZenohLink:
    """Implements `engine.Transport`; `members` returns the accepted nodes, `is_revoked` tells the refused ones.

    `changed` is called on the keeper's thread when neighbours connect or disconnect. `found` returns addresses to dial
    besides those of the settings.
    """

    def __init__(
        self,
        config: NodeConfig,
        *,
        members: Callable[[], Iterable[str]],
        is_revoked: Callable[[str], bool],
        changed: Callable[[], None] = lambda: None,
        found: Callable[[], Iterable[str]] = list,
    ) -> None:
        self._config = config
        self._members = members
        self._is_revoked = is_revoked
        self._changed = changed
        self._found = found
        self._dialled: list[str] = []
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: queue.SimpleQueue[tuple[str, bytes] | None] = queue.SimpleQueue()
        # Each is written by one thread only: the sender's, and the bulk thread.
        self._queued_bytes = 0
        self._taken_bytes = 0
        self._open: dict[str, _Publishers] = {}
        self._watched: dict[str, Any] = {}
        self._connected: frozenset[str] = frozenset()
        self._links: dict[str, set[tuple[str, str]]] = {}
        self._refused: frozenset[str] = frozenset()
        self._seen: set[str] = set()
        self._allowed: set[str] = set()
        self._session: zenoh.Session | None = None
        self._declared: list[Any] = []
        self._generation = 0
        self._looking = 0
        self._reopen_at: float | None = None
        self._reopen_by = 0.0
        self._not_listening: dict[str, float] = {}
        self._patience = 1
        self._closing: list[_Closing] = []
        self._disconnected = False
        self._ended = threading.Event()
        self.threads = [
            Supervised("link", self._keep, self._ended),
            Supervised("link-bulk", self._send_waiting, self._ended),
        ]
        self._problems: dict[str, NodeProblem] = {}
        self.counters = {"sent": 0, "received": 0, "dropped": 0, "opened": 0, "callback_errors": 0}

    # Called on any thread.

    def start(self, events: Events) -> None:
        self._events = events
        for thread in self.threads:
            thread.start()

    def send(self, peer: str | None, message: bytes) -> None:
        receiver = ALL if peer is None else peer
        if peer is None and not self._connected:
            return
        if message[0] == LIVE:
            self._put(receiver, message)
        elif self._queued_bytes - self._taken_bytes + len(message) <= MAX_WAITING:
            self._queued_bytes += len(message)
            self._waiting.put((receiver, message))
        else:
            self.counters["dropped"] += 1

    def close(self) -> None:
        """Stops. May be called twice, and before `start`."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._commands.put(lambda: None)
        self._waiting.put(None)
        for thread in self.threads:
            thread.join(CLOSE_WITHIN + 1)

    @property
    def hangs(self) -> bool:
        """Returns whether a session may still be open after `close`: the interpreter would then not exit by itself."""
        return any(thread.is_alive() for thread in self.threads) or any(not one.closed for one in self._closing)

    def neighbours(self) -> list[str]:
        return sorted(self._connected)

    def reached(self, address: str) -> bool:
        """Returns whether a link to this address, HOST:PORT in numbers, was made from here and still exists."""
        return any(address == far for links in self._links.values() for _, far in links)

    def problems(self) -> list[NodeProblem]:
        found = list(self._problems.values())
        return (
            [NodeProblem("disconnected", "the links were disconnected by the administrator"), *found]
            if self._disconnected
            else found
        )

    @property
    def is_disconnected(self) -> bool:
        return self._disconnected

    def disconnect(self) -> None:
        """Ends all links until `reconnect`."""
        self._disconnected = True
        self._reopen()

    def reconnect(self) -> None:
        """Reconnects after `disconnect`."""
        self._disconnected = False
        self._reopen()

    def renew(self) -> None:
        """Reopens the session, because certificate, key, authorities or revocations have changed."""
        self._reopen()

    def members_changed(self) -> None:
        """Reopens the session if the accepted members have changed, after a moment for more changes."""
        self._commands.put(self._look_at_members)

    def members_found(self) -> None:
        """Reopens the session if there are new addresses to dial, after a moment for more changes."""
        self._commands.put(self._look_at_addresses)

    def report(self, name: str, problem: NodeProblem | None) -> None:
        """Sets, or clears with None, a problem of the links."""
        if problem is None:
            self._problems.pop(name, None)
        elif self._problems.get(name) != problem:
            self._problems[name] = problem
            _log.warning("%s", problem.text)

    # The keeper's thread.

    def _reopen(self) -> None:
        self._commands.put(self._reopen_now)

    def _keep(self, works: Callable[[], None]) -> None:
        try:
            self._open_session()
            while not self._ended.is_set():
                works()
                self._next_command()
        finally:
            # Not at the interpreter's exit: an open session with callbacks hangs the process there.
            self._close_session()

    def _next_command(self) -> None:
        due = min(
            [*self._not_listening.values(), *([] if self._reopen_at is None else [self._reopen_at])], default=None
        )
        try:
            command = self._commands.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
        except queue.Empty:
            command = self._do_due
        try:
            command()
        except Exception:
            self.counters["callback_errors"] += 1
            _log.exception("an event of the links could not be handled")

    def _do_due(self) -> None:
        now = time.monotonic()
        if self._reopen_at is not None and self._reopen_at <= now:
            self._reopen_now()
            return
        late = [node for node, due in self._not_listening.items() if due <= now]
        if late:
            # Zenoh 1.10 keeps links of a session that closes while others open. The next session of that node then gets
            # no link with the other end until that opens a new session.
            _log.warning("neighbours have a link and do not listen: %s", ", ".join(late))
            self._not_listening.clear()
            self._patience = min(2 * self._patience, MAX_PATIENCE)
            self._reopen_when_quiet()

    def _reopen_when_quiet(self) -> None:
        """Reopens the session after a quiet moment, or after the longest wait."""
        if self._reopen_at is None:
            self._reopen_by = time.monotonic() + self._longest() * random.uniform(0.5, 1.0)
            self._wait_for_quiet()

    def _wait_for_quiet(self) -> None:
        quiet = QUIET + SPREAD * len(self._allowed) * random.random()
        self._reopen_at = min(time.monotonic() + quiet, self._reopen_by)

    def _longest(self) -> float:
        return LONGEST * (len(self._allowed) + 2)

    def _reopen_now(self) -> None:
        self._reopen_at = None
        self._close_session()
        if not self._disconnected and not self._ended.is_set():
            self._open_session()

    def _open_session(self) -> None:
        self._generation += 1
        generation = self._generation
        self._allowed = self._who_may()
        self._dialled = list(dict.fromkeys([*self._config.connect, *self._found()]))
        try:
            session = zenoh.open(zenoh.Config.from_json5(zenoh_settings(self._config, self._allowed, self._dialled)))
        except zenoh.ZError as exc:
            # Zenoh appends the place in its own sources.
            reason = str(exc).partition(" at /")[0]
            self.report("open", NodeProblem("link", f"links cannot be opened: {reason}"))
            self._reopen_at = time.monotonic() + 2
            return
        self.report("open", None)
        self.counters["opened"] += 1
        self._session = session
        me = self._config.node

        def link_event(_event: Any) -> None:
            # One look covers all changes until it begins.
            if self._looking != generation:
                self._looking = generation
                self._commands.put(lambda: self._look_at_links(generation))

        self._open[ALL] = _Publishers.to(session, link_key(self._config.fleet, me, ALL))
        remote = zenoh.Locality.REMOTE
        # First the subscription for all: a peer that sees ours may send either.
        keys = [link_key(self._config.fleet, "*", to) for to in (ALL, me)]
        self._declared = [
            *(session.declare_subscriber(key, self._heard, allowed_origin=remote) for key in keys),
            session.info.declare_link_events_listener(link_event, history=True),
        ]

    def _close_session(self) -> None:
        session, self._session = self._session, None
        self._generation += 1
        for peer in list(self._open):
            self._drop(peer)
        self._links = {}
        self._report_refused({})
        for declared in self._declared:
            with contextlib.suppress(zenoh.ZError):
                declared.undeclare()
        self._declared = []
        if session is not None:
            closing = _Closing(session)
            self._closing = [closing, *(one for one in self._closing if not one.closed)]
            closing.start()
            # The keeper survives any error.
            closing.join(CLOSE_WITHIN)
            if closing.is_alive():
                _log.warning("a session did not close within %g s", CLOSE_WITHIN)

    def _who_may(self) -> set[str]:
        return {node for node in {*self._members(), *self._seen} if not self._is_revoked(node)}

    def _look_at_addresses(self) -> None:
        # Zenoh 1.10 takes addresses when a session opens, and dials those until it closes.
        if not {*self._found()} <= {*self._dialled}:
            self._reopen_when_quiet()

    def _look_at_members(self) -> None:
        wanted = self._who_may()
        revoked = self._allowed - wanted
        if revoked:
            # From now on its messages are ignored; its link ends with the session.
            self._allowed = self._allowed & wanted
            for node in revoked:
                self._drop(node)
            self._reopen_at = self._reopen_by = time.monotonic() + QUIET + random.uniform(0, URGENT)
        elif wanted != self._allowed:
            self._reopen_when_quiet()

    def _look_at_links(self, generation: int) -> None:
        """Connects the nodes with a link and disconnects the others.

        Events may be late: one link of a neighbour may begin before the event about the end of another.
        """
        self._looking = 0
        if generation != self._generation or self._session is None:
            return
        links: dict[str, set[tuple[str, str]]] = {}
        refused: dict[str, NodeProblem] = {}
        for link in self._session.info.links():
            node, zid = str(link.auth_identifier or ""), str(link.zid)
            if node != zid or not is_node_id(node):
                text = f"{link.dst}: node {node or 'without certificate'} calls itself {zid}"
                refused[f"name {zid}"] = NodeProblem("impostor", text)
            elif self._is_revoked(node):
                text = f"{link.dst}: node {node} was revoked, its messages are refused"
                refused[f"revoked {node}"] = NodeProblem("revoked", text)
            else:
                ends = (str(link.src).removeprefix("tls/"), str(link.dst).removeprefix("tls/"))
                links.setdefault(node, set()).add(ends)
        self._report_refused(refused)
        # Both ends may have made a link: they belong together, and may end one after the other.
        for node in [one for one in self._open if one != ALL and links.get(one, set()).isdisjoint(self._links[one])]:
            self._drop(node)
        if self._reopen_at is not None and links != self._links:
            self._wait_for_quiet()
        self._bound(set().union(*links.values()) - set().union(*self._links.values()))
        self._links = links
        # Certified by the authority, but its record has not arrived yet.
        self._seen |= links.keys() - self._allowed
        self._look_at_members()
        for node in links:
            self._meet(generation, node)

    def _report_refused(self, refused: Mapping[str, NodeProblem]) -> None:
        """Reports refused links, and forgets those that have ended."""
        for name in self._refused - refused.keys():
            self.report(name, None)
        for name, problem in refused.items():
            self.report(name, problem)
        self._refused = frozenset(refused)

    def _bound(self, links: set[tuple[str, str]]) -> None:
        """Makes the kernel end links whose other end is gone.

        Zenoh 1.10 closes a link after its pending data is sent. Behind a partition that lasts as long as TCP tries. A
        new link with the same node in that time is mute, and ends with the old one.
        """
        if links:
            give_up_after(links, lease_ms(len(self._allowed)))

    def _meet(self, generation: int, node: str) -> None:
        """Declares the publishers for a neighbour; it counts as connected once it listens."""
        if node in self._open or self._session is None:
            return
        ways = _Publishers.to(self._session, link_key(self._config.fleet, self._config.node, node))

        def matched(status: Any) -> None:
            listens = bool(status.matching)
            self._commands.put(lambda: self._listens(generation, node, listens))

        self._open[node] = ways
        self._not_listening[node] = time.monotonic() + self._patience * 2 * self._longest()
        # Not a thread for each neighbour.
        direct: Any = zenoh.handlers.Callback(matched, indirect=False)
        self._watched[node] = ways.live.declare_matching_listener(direct)
        status: Any = ways.live.matching_status
        if status.matching:
            self._listens(generation, node, True)

    def _listens(self, generation: int, node: str, listens: bool) -> None:
        if generation != self._generation or node not in self._open or listens == (node in self._connected):
            return
        if listens:
            self._not_listening.pop(node, None)
            self._patience = self._patience if self._not_listening else 1
            self._connected |= {node}
            self._events.connected(node)
        else:
            self._connected -= {node}
            self._events.disconnected(node)
        self._changed()

    def _drop(self, node: str) -> None:
        # Not undeclared: another thread may be in a put.
        if self._open.pop(node, None) is None:
            return
        self._not_listening.pop(node, None)
        if node in self._connected:
            self._connected -= {node}
            self._events.disconnected(node)
            self._changed()
        if (watched := self._watched.pop(node, None)) is not None:
            with contextlib.suppress(zenoh.ZError):
                watched.undeclare()

    # Called on Zenoh's threads and on the senders'.

    def _heard(self, sample: zenoh.Sample) -> None:
        try:
            sender = str(sample.key_expr).rsplit("/", 2)[1]
            message = sample.payload.to_bytes()
            if 0 < len(message) <= MAX_MESSAGE and sender in self._allowed:
                self.counters["received"] += 1
                self._events.received(sender, message)
        except Exception:
            # Zenoh would swallow it.
            self.counters["callback_errors"] += 1
            _log.exception("a message could not be queued")

    def _put(self, peer: str, message: bytes) -> None:
        ways = self._open.get(peer)
        if ways is None:
            self.counters["dropped"] += 1
            return
        try:
            (ways.live if message[0] == LIVE else ways.bulk).put(message)
            self.counters["sent"] += 1
        except zenoh.ZError:
            # The neighbour is gone, or the session was closed meanwhile.
            self.counters["dropped"] += 1

    def _send_waiting(self, works: Callable[[], None]) -> None:
        while (item := self._waiting.get()) is not None:
            works()
            self._taken_bytes += len(item[1])
            if not self._ended.is_set():
                self._put(*item)
