"""Webhooks: each is a record of one node, which sends it the events of its own records, at least once.

Another node sends the events of its own records to its own webhooks. So no event is sent by several nodes.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from vmconv_fleet.config import NodeConfig
from vmconv_fleet.notices.addresses import network
from vmconv_fleet.notices.delivery import Delivery, DeliveryError, body_of
from vmconv_fleet.notices.event import DEFAULT, KINDS, Event, Events, fits
from vmconv_fleet.notices.outbox import FILE, MAX_WAITING, Message, Outbox
from vmconv_fleet.notices.secrets import HookSecrets
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.replication.records import Record
from vmconv_fleet.replication.writing import Writes
from vmconv_fleet.supervision import Supervised

SOONEST_MS, LATEST_MS = 5000, 3600 * 1000
"""The delays after a failed delivery, doubled with each failure, with a jitter of a half."""
GIVE_UP_MS = 24 * 3600 * 1000
"""The time after which an event is not sent again."""
OLDEST_MS = GIVE_UP_MS
"""The age of events that are not sent at all: without its outbox a node reads them again from its records."""
_PAGE = 500
_LOOK_AT_CLOCK = 60.0

_log = logging.getLogger("vmconv_fleet.webhooks")


class _State(NamedTuple):
    """What a webhook wants, and how it does: `failures` in a row, the `last` one, and when to try again."""

    patterns: Sequence[str]
    place: str
    failures: int = 0
    last: str = ""
    retry_ms: int = 0
    lost: int = 0


class Webhooks:
    """Sends the events of a node; `directory` is the node's own."""

    kind = "webhook"
    name = "webhooks"

    def __init__(self, service: Writes, directory: str, delivery: Delivery) -> None:
        self.counters = {"delivered": 0, "failed": 0, "dropped": 0, "expired": 0}
        self._service = service
        self._directory = directory
        self._secrets = HookSecrets(directory)
        self._delivery = delivery
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._outbox: Outbox | None = None
        self._events = Events()
        self._complete: set[str] = set()
        # Replaced, never changed: other threads read it.
        self._hooks: dict[str, _State] = {}
        self._ending = threading.Event()
        self.thread = Supervised("webhooks", self._run, self._ending)
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self) -> None:
        self._unsubscribe = self._service.subscribe(self._notice)
        self.thread.start()

    def stop(self) -> None:
        self._ending.set()
        self._unsubscribe()
        self._queue.put(None)
        self._delivery.abort()
        self.thread.join(10)
        if self._outbox is not None and not self.thread.is_alive():
            self._outbox.close()

    def problem(self) -> str | None:
        """Returns which webhooks fail at present."""
        found = [_problem(hook, state) for hook, state in sorted(self._hooks.items()) if state.failures or state.lost]
        return "; ".join(found) or None

    # On the replica's thread

    def _notice(self, records: list[Record]) -> None:
        for one in records:
            if one.owner == self._service.node and (one.kind == "webhook" or (self._hooks and one.kind in KINDS)):
                self._queue.put(one)

    # On the thread of the webhooks

    def _run(self, works: Callable[[], None]) -> None:
        # After a failure the file is opened again, which may be another one, and the records that were taken are read
        # again.
        if self._outbox is not None:
            self._outbox.close()
            self._outbox = None
        self._complete.clear()
        self._look()
        while not self._ending.is_set():
            due_ms = self._deliver_due(wall_ms())
            works()
            self._take(None if due_ms is None else max(0, due_ms - wall_ms()) / 1000)

    def _take(self, seconds: float | None) -> None:
        """Waits for records, and puts their events into the outbox."""
        records: list[Record] = []
        with suppress(queue.Empty):
            record = self._queue.get(timeout=_LOOK_AT_CLOCK if seconds is None else min(seconds, _LOOK_AT_CLOCK))
            while True:
                if record is not None:
                    records.append(record)
                record = self._queue.get_nowait()
        if any(one.kind == "webhook" for one in records):
            self._look()
        self._put(records)

    def _look(self) -> None:
        """Learns the webhooks from their records. Those that are new get all records behind their own."""
        records = self._service.view().find("webhook", self._service.node)
        if not records and not os.path.exists(os.path.join(self._directory, FILE)):
            return
        outbox = self._outbox = self._outbox or Outbox(self._directory)
        wanted = {one.id: _State(one.body.get("events") or DEFAULT, str(one.body.get("place", ""))) for one in records}
        for hook in outbox.hooks().keys() - wanted.keys():
            outbox.forget(hook)
            self._secrets.remove(hook)
        for one in records:
            outbox.begin(one.id, one.seq)
        self._hooks = {hook: self._hooks.get(hook, state) for hook, state in wanted.items()}
        # From here on `_notice` sees what is committed.
        if new := wanted.keys() - self._complete:
            places = outbox.hooks()
            self._put(self._since(min(places[hook] for hook in new)))
            self._complete |= new

    def _since(self, seq: int) -> list[Record]:
        """Returns the node's records behind a seq, in their order, also those committed while nobody listened."""
        view, found = self._service.view(), list[Record]()
        for kind in sorted(KINDS):
            after: Sequence[object] = ()
            while page := view.records(kind, owner=self._service.node, after=after, limit=_PAGE):
                found += [record for record, _ in page if record.seq > seq]
                after = page[-1][1]
        return sorted(found, key=lambda one: one.seq)

    def _put(self, records: Sequence[Record]) -> None:
        """Puts the events of records into the outbox, for each webhook that has not got them."""
        events = [event for one in records for event in self._events.of(one)]
        if not events or self._outbox is None:
            return
        for hook, seq in self._outbox.hooks().items():
            state = self._hooks.get(hook)
            if state is not None:
                self._put_for(hook, state, [one for one in events if one.seq > seq and fits(one.type, state.patterns)])

    def _put_for(self, hook: str, state: _State, events: Sequence[Event]) -> None:
        assert self._outbox is not None
        events = [one for one in events if one.at_ms >= wall_ms() - OLDEST_MS]
        if not events:
            return
        messages = [(one.id, body_of(one), one.at_ms) for one in events]
        if dropped := self._outbox.add(hook, messages, max(one.seq for one in events)):
            self.counters["dropped"] += dropped
            self._set(hook, state._replace(lost=state.lost + dropped))

    def _deliver_due(self, now_ms: int) -> int | None:
        """Delivers what is due; returns when the next message is."""
        if self._outbox is None:
            return None
        return min(filter(None, (self._deliver_of(hook, now_ms) for hook in list(self._hooks))), default=None)

    def _deliver_of(self, hook: str, now_ms: int) -> int | None:
        """Delivers one due message of a webhook; returns when its next one is due."""
        assert self._outbox is not None
        state, message = self._hooks[hook], self._outbox.first(hook)
        if message is None:
            return None
        due_ms = max(message.due_ms, state.retry_ms)
        # Beyond the longest delay the clock was wrong when it was noted.
        if now_ms < due_ms <= now_ms + 2 * LATEST_MS:
            return due_ms
        if message.attempts and now_ms - message.created_ms > GIVE_UP_MS:
            self.counters["expired"] += 1
            self._outbox.remove(hook, message.id)
            self._set(hook, state._replace(lost=state.lost + 1))
            return now_ms
        return self._deliver(hook, state, message)

    def _deliver(self, hook: str, state: _State, message: Message) -> int:
        assert self._outbox is not None
        try:
            target = self._secrets.all().get(hook)
            if target is None:
                raise DeliveryError("its secret is not on this node", hint="remove it and add it again")
            self._delivery.send(target.url, target.secret, message.id, message.body)
        except DeliveryError as exc:
            if self._ending.is_set():
                return 0
            return self._failed(hook, state, message, str(exc))
        self.counters["delivered"] += 1
        self._outbox.remove(hook, message.id)
        self._set(hook, state._replace(failures=0, last="", retry_ms=0, lost=0))
        return wall_ms()

    def _failed(self, hook: str, state: _State, message: Message, why: str) -> int:
        """Notes a failure; the message goes behind those that are due, so that it alone does not stop the others."""
        assert self._outbox is not None
        self.counters["failed"] += 1
        self._outbox.retry(hook, message.id, wall_ms() + delay_ms(message.attempts))
        retry_ms = wall_ms() + delay_ms(state.failures)
        self._set(hook, state._replace(failures=state.failures + 1, last=why, retry_ms=retry_ms))
        if not state.failures:
            _log.warning("webhook %s failed: %s", hook, why)
        return retry_ms

    def _set(self, hook: str, state: _State) -> None:
        self._hooks = {**self._hooks, hook: state}


def delivery_of(config: NodeConfig) -> Delivery:
    """Returns the delivery with the settings of a node."""
    return Delivery([network(text) for text in config.webhook_networks], config.webhook_ca or None)


def delay_ms(failures: int) -> int:
    """Returns the time until the next attempt after this number of failures in a row."""
    delay = min(SOONEST_MS * 2 ** min(failures, 20), LATEST_MS)
    return int(delay * random.uniform(0.5, 1.5))


def _problem(hook: str, state: _State) -> str:
    parts = []
    if state.failures:
        times = "once" if state.failures == 1 else f"{state.failures} times in a row"
        parts.append(f"failed {times}, the last time with: {state.last}")
    if state.lost:
        parts.append(f"{state.lost} events were not delivered: more than {MAX_WAITING} wait, or they are too old")
    return f"webhook {hook} ({state.place}): {', and '.join(parts)}"
