"""A node of the soak: the driver of the tests, with counted requests, and with retention that works within minutes.

{"do": "load", "every", "targets"}   requests with the verb `count` to all nodes in turn, and own records, until
{"do": "rest"}
{"do": "ledger"}                     requests made, requests executed here, and requests without an answer

A request has a serial number, dense for each requester and target. The target keeps the last one of each requester,
and how often a serial was there before or was missing, so nothing that retention deletes is needed for the proof.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from functools import partial
from typing import Any
from unittest.mock import patch

from vmconv.plugin import VmconvError
from vmconv_fleet.node import daemon
from vmconv_fleet.replication import engine, requests, service
from vmconv_fleet.replication.context import Timing
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.requests import Context, IncomingRequest, Outcome
from vmconv_fleet.replication.retention import Keep
from vmconv_fleet.testing import driver

CLEAN_MS, SHRINK_MS, FLOOR_MS, GRACE_MS = 10_000, 5_000, 10_000, 60_000
"""The pace of retention: hours and days otherwise."""
KEEP = Keep(60_000, 300)

_NOTHING = {"last": 0, "again": 0, "missing": 0}


def _count(context: Context, request: IncomingRequest) -> Outcome:
    """Counts a request: its serial follows the last one of its requester."""
    serial = int(request.arguments["serial"])
    before = context.get(context.node, "tally", request.requester)
    body: dict[str, Any] = dict(before.body) if before else dict(_NOTHING)
    body["again"] += serial <= body["last"]
    body["missing"] += max(0, serial - body["last"] - 1)
    body["last"] = max(serial, body["last"])
    return Outcome([Change("tally", request.requester, body)], {})


class SoakDriver(driver.Driver):
    """The commands of the soak, besides those of the tests."""

    def __init__(self, node: daemon.Daemon) -> None:
        super().__init__(node)
        self._asked_of: dict[str, int] = {}
        self._refused: list[str] = []
        self._service.subscribe(self._see)

    def do(self, do: str, **arguments: Any) -> dict[str, Any]:
        if do in ("load", "ledger"):
            answer: dict[str, Any] = getattr(self, do)(**arguments)
            return answer
        return super().do(do, **arguments)

    def load(self, every: float, targets: list[str]) -> dict[str, Any]:
        self._working.set()
        self._worker = threading.Thread(target=self._load, args=(every, targets), daemon=True)
        self._worker.start()
        return {}

    def _load(self, every: float, targets: list[str]) -> None:
        turn = 0
        while self._working.is_set():
            turn += 1
            # Without room, or before it serves, a node takes no request: the same serial is tried again.
            with contextlib.suppress(VmconvError, TimeoutError):
                self._ask(targets[turn % len(targets)])
                self._service.write([Change("note", f"own{turn % 50}", {"text": str(turn)})]).result(30)
            time.sleep(every)

    def _ask(self, target: str) -> None:
        if target not in self._asked_of:
            self._asked_of[target] = self._asked_before(target)
        serial = self._asked_of[target] + 1
        self._service.submit(target, "count", {"serial": serial}, driver.BY, id=f"{target[:8]}-{serial:09}")
        self._asked_of[target] = serial

    def _asked_before(self, target: str) -> int:
        """Returns the last serial of an earlier process: of a request that is still kept, or that was executed."""
        view, node = self._service.view(), self._service.node
        mine = [one.body for one in view.find("request", node) if one.body["target"] == target]
        serials = [int(body["arguments"].get("serial", 0)) for body in mine]
        done = view.get(target, "tally", node)
        return max([0, *serials, done.body["last"] if done else 0])

    def _see(self, records: list[Record]) -> None:
        answers = [one.body for one in records if one.kind == "response" and not one.deleted]
        mine = [body for body in answers if body.get("requester") == self._service.node]
        self._refused += [str(body.get("reason")) for body in mine if not body.get("ok")]

    def ledger(self) -> dict[str, Any]:
        if not self._service.serving:
            return {"serving": False}
        view, node = self._service.view(), self._service.node
        tallies = {one.id: dict(one.body) for one in view.find("tally", node)}
        executed = {owner: one.body["last"] for owner in view.numbers() if (one := view.get(owner, "tally", node))}
        for target in self._asked_of.keys() | executed.keys():
            self._asked_of.setdefault(target, self._asked_before(target))
        return {
            "serving": True,
            "asked": dict(self._asked_of),
            "tallies": tallies,
            "unanswered": self.state()["unanswered"],
            "refused": sorted(set(self._refused)),
            "open jobs": [one.id for one in view.find("job", node) if one.body.get("state") in ("queued", "running")],
        }


def main() -> int:
    with (
        patch.object(engine, "CLEAN_MS", CLEAN_MS),
        patch.object(requests, "KEPT_MS", KEEP.age_ms),
        patch.object(daemon, "kept_of", lambda _node, _records: KEEP),
        patch.object(engine, "SHRINK_MS", SHRINK_MS),
        patch.object(service, "Timing", partial(Timing, grace=GRACE_MS, floor=FLOOR_MS)),
    ):
        return driver.main(SoakDriver, {"count": _count})


if __name__ == "__main__":
    sys.exit(main())
