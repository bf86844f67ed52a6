"""The replica's thread: takes queued work, commits it as a group, and only then sends and reports it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar

from vmconv_fleet.errors import ArchiveError, ClosedError, StoreError
from vmconv_fleet.replication.clock import MAX_AHEAD_MS, wall_ms
from vmconv_fleet.replication.messages import MAX_MESSAGE, Send, merged
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.replica import Replica
from vmconv_fleet.replication.requests import Requests
from vmconv_fleet.replication.store import ReplicaView

T = TypeVar("T")

GROUP = 256
"""The most events that share a commit; a commit also ends after GROUP_S seconds."""

GROUP_S = 0.05

BURST = 256 << 10
"""Bytes of messages that end a group. A link drops live messages beyond its own queue (`zenoh_config.LIVE_BATCHES`)."""

MAX_QUEUED = 32 << 20
"""Bytes of queued messages. Messages beyond are dropped, and their records are pulled later."""

CLEAN_MS = 3600 * 1000
CLEAN_STEP_MS = 1000
"""The pause between two batches of deletions."""

SHRINK_MS = 60 * 1000
JOIN_S = 10.0
LONGEST_SLEEP_S = 60.0
FAILURE_PAUSE_S = 0.5

_log = logging.getLogger(__name__)


class Events(Protocol):
    """The callbacks of a transport. They may be called on any thread, return at once and raise nothing."""

    def connected(self, peer: str) -> None: ...

    def disconnected(self, peer: str) -> None: ...

    def received(self, peer: str, message: bytes) -> None: ...


class Transport(Protocol):
    """Links to neighbours. A peer's id comes from its certificate, never from its messages."""

    def start(self, events: Events) -> None:
        """Starts; calls `connected` for each present and future neighbour."""

    def send(self, peer: str | None, message: bytes) -> None:
        """Sends to a neighbour, or to all (None). Never blocks for long, may lose messages, raises nothing."""

    def close(self) -> None:
        """Stops. No callback runs after it has returned."""


class _Work(NamedTuple):
    """Work for the replica's thread: `function` returns the future's result and the messages to send.

    `own`: it writes own records and waits until the replica is serving.
    """

    function: Callable[[], tuple[Any, list[Send]]]
    future: Future[Any] | None = None
    own: bool = False
    size: int = 0


class Engine:
    """Runs a replica and its requests on one thread."""

    def __init__(self, replica: Replica, requests: Requests, transport: Transport) -> None:
        self._replica = replica
        self._requests = requests
        self._transport = transport
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._deferred: list[_Work] = []
        self._backlog: list[_Work] = []
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._queued = 0
        self._next_clean = _monotonic_ms() + CLEAN_MS
        self._next_shrink = _monotonic_ms() + SHRINK_MS
        self._lead = wall_ms() - _monotonic_ms()
        self._thread = threading.Thread(target=self._run, name="fleet-replica", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._transport.start(self)

    def close(self) -> None:
        """Stops the transport and the thread, and closes the store. Always returns; pending futures get ClosedError."""
        if self._closed.is_set():
            return
        self._closed.set()
        try:
            self._transport.close()
        except Exception:
            _log.exception("the transport did not close")
        self._queue.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(JOIN_S)
        self._fail([*self._backlog, *self._deferred, *self._drain(GROUP << 10)], ClosedError("node has ended"))
        if not self._thread.is_alive():
            self._replica.store.close()

    def connected(self, peer: str) -> None:
        self._queue.put(_Work(lambda: (None, self._replica.connected(peer))))

    def disconnected(self, peer: str) -> None:
        self._queue.put(_Work(lambda: (None, self._replica.disconnected(peer))))

    def received(self, peer: str, message: bytes) -> None:
        size = len(message)
        with self._lock:
            fits = size <= MAX_MESSAGE and self._queued + size <= MAX_QUEUED
            self._queued += size if fits else 0
        if fits:
            self._queue.put(_Work(lambda: (None, self._replica.received(peer, message)), size=size))
        else:
            self._replica.problems.count("dropped")

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs a function on the replica's thread. The future is done once its writes are durable."""
        return self._put(lambda: (function(), []), own=False)

    def act(self, function: Callable[[], tuple[T, list[Send]]]) -> Future[T]:
        """Calls a function that returns a result and messages, whether the replica is serving or not."""
        return self._put(function, own=False)

    def write(self, changes: Sequence[Change]) -> Future[list[Record]]:
        """Writes own records without a transaction number. Waits until the replica is serving."""
        return self._put(lambda: self._replica.write(changes), own=True)

    def update(self, decide: Callable[[ReplicaView], Sequence[Change]]) -> Future[list[Record]]:
        """Writes the changes that `decide(view)` returns on the replica's thread. Waits until it is serving."""
        return self._put(lambda: self._replica.write(decide(self._replica.store)), own=True)

    def request(self, function: Callable[[Requests], tuple[T, list[Send]]]) -> Future[T]:
        """Calls a function with the node's requests on the replica's thread. Waits until the replica is serving."""
        return self._put(lambda: function(self._requests), own=True)

    def _put(self, function: Callable[[], tuple[Any, list[Send]]], *, own: bool) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.put(_Work(function, future, own))
        if self._closed.is_set() and not self._thread.is_alive():
            self._fail(self._drain(GROUP), ClosedError("node has ended"))
        return future

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._step(self._wait())
            except Exception:
                _log.exception("the replica's thread continues after an internal error")
                self._replica.problems.report("internal", "the replica's thread continued after an internal error")
                self._closed.wait(FAILURE_PAUSE_S)

    def _wait(self) -> list[_Work]:
        if self._backlog or self._requests.waiting():
            backlog, self._backlog = self._backlog, []
            return [*backlog, *self._drain(GROUP - len(backlog))]
        pause = min(max(self._replica.due() - _monotonic_ms(), 0) / 1000, LONGEST_SLEEP_S)
        try:
            first = self._queue.get(timeout=pause) if pause else self._queue.get_nowait()
        except Empty:
            return []
        return [*([] if first is None else [first]), *self._drain(GROUP - 1)]

    def _drain(self, limit: int) -> list[_Work]:
        items = []
        for _ in range(limit):
            try:
                item = self._queue.get_nowait()
            except Empty:
                break
            if item is not None:
                items.append(item)
        return items

    def _step(self, items: list[_Work]) -> None:
        if self._replica.serving:
            items, self._deferred = [*self._deferred, *items], []
        else:
            self._deferred += [item for item in items if item.own]
            items = [item for item in items if not item.own]
        sends: list[Send] = []
        results: list[Callable[[], None]] = []
        done: list[_Work] = []
        try:
            with self._replica.batch():
                end = time.monotonic() + GROUP_S
                size = 0
                while items and size < BURST and time.monotonic() < end:
                    done.append(items.pop(0))
                    before = len(sends)
                    self._do(done[-1], sends, results)
                    size += sum(len(send.message) for send in sends[before:])
                self._backlog = items
                self._routine(sends)
        except Exception as exc:
            self._requests.reset()
            self._backlog = items
            self._fail(done, exc)
            self._replica.problems.report("store", str(exc))
            self._closed.wait(FAILURE_PAUSE_S)
            if not isinstance(exc, StoreError):
                raise
            return
        if any(item.own for item in done):
            self._replica.problems.forget("store")
        for send in merged(sends):
            self._transport.send(send.peer, send.message)
        for result in results:
            result()
        if not items and _monotonic_ms() >= self._next_shrink:
            self._next_shrink = _monotonic_ms() + SHRINK_MS
            self._replica.store.shrink()

    def _routine(self, sends: list[Send]) -> None:
        now = _monotonic_ms()
        self._notice_jump(wall_ms() - now, now)
        if self._replica.due() <= now:
            sends += self._replica.tick()
        sends += self._requests.run()
        if now >= self._next_clean:
            cleaned = self._clean()
            # The next batch after other work, until there is none.
            self._next_clean = now + (CLEAN_MS if not cleaned else CLEAN_STEP_MS)
            sends += cleaned

    def _clean(self) -> list[Send]:
        try:
            return self._requests.clean()
        except ArchiveError as exc:
            self._replica.problems.report("retention", str(exc))
            return []

    def _notice_jump(self, lead: int, now: int) -> None:
        """Postpones the cleaning after a jump of the wall clock, by which all records may seem old."""
        if abs(lead - self._lead) > MAX_AHEAD_MS:
            self._lead, self._next_clean = lead, now + CLEAN_MS

    def _do(self, item: _Work, sends: list[Send], results: list[Callable[[], None]]) -> None:
        with self._lock:
            self._queued -= item.size
        future = item.future
        if future is not None and not future.set_running_or_notify_cancel():
            return
        try:
            value, told = item.function()
        except StoreError:
            raise
        except Exception as exc:
            if future is None:
                raise
            error = exc
            results.append(lambda: future.set_exception(error))
            return
        sends += told
        if future is not None:
            results.append(lambda: future.set_result(value))

    def _fail(self, items: Sequence[_Work], error: Exception) -> None:
        for item in items:
            if item.future is not None:
                try:
                    item.future.set_exception(error)
                except InvalidStateError:
                    continue


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000
