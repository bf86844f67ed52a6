"""The process of `Driven`: the daemon with one more verb, and commands on standard input.

{"do": "write", "count", "size", "batch"}   records `note` of its own, without transactions
{"do": "catalogue", "disks", "datastores"}  records of disks that do not exist
{"do": "ask", "target", "count", "threads"} requests with the verb `note`, one after the other, or many at once
{"do": "request", "target", "verb", ...}     any other request, and its response
{"do": "work", "every"}                     writes, and sends requests to all nodes in turn, until
{"do": "rest"}
{"do": "record"} {"do": "recorded"}         when notes were committed here, by the clock that all processes share
{"do": "fail"}                              an exception that ends a thread
{"do": "stick"}                             the session of the links will never close
{"do": "modules"}                           the modules that the process has imported
{"do": "state"}                             neighbours, problems, requests without a response, counters
"""

from __future__ import annotations

import json
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

from vmconv_fleet import config as settings
from vmconv_fleet.errors import FleetError
from vmconv_fleet.jobs.handlers import make_handlers
from vmconv_fleet.node.daemon import Daemon, run
from vmconv_fleet.node.logs import configure
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.requests import Context, Handler, IncomingRequest, Outcome

BY = {"user": "driver"}


def _note(_context: Context, request: IncomingRequest) -> Outcome:
    text = request.arguments.get("text", "")
    return Outcome([Change("note", str(request.arguments["id"]), {"text": text, "from": request.requester})], {})


class _Stuck:
    """A session whose closing never returns."""

    def __init__(self, session: object) -> None:
        self._session = session

    def close(self) -> None:
        threading.Event().wait()


class Driver:
    """Executes commands on a running node."""

    def __init__(self, daemon: Daemon) -> None:
        self._service = daemon.service
        self._link = daemon.link
        self._working = threading.Event()
        self._worker: threading.Thread | None = None
        self._seen: list[tuple[str, str, float]] = []
        self._asked = 0
        self._written = 0

    def do(self, do: str, **arguments: Any) -> dict[str, Any]:
        orders: dict[str, Callable[..., dict[str, Any]]] = {
            "catalogue": self.catalogue,
            "write": self.write,
            "ask": self.ask,
            "work": self.work,
            "rest": self.rest,
            "record": self.record,
            "recorded": self.recorded,
            "modules": lambda: {"modules": sorted(sys.modules)},
            "state": self.state,
            "forge": self.forge,
            "fail": self.fail,
            "stick": self.stick,
            "request": self.request,
        }
        return orders[do](**arguments)

    def write(self, count: int, size: int = 200, batch: int = 1, every: float = 0.0) -> dict[str, Any]:
        begin = time.monotonic()
        text, prefix, futures = "x" * size, secrets.token_hex(3), []
        for first in range(0, count, batch):
            changes = [Change("note", f"{prefix}-{n}", {"text": text}) for n in range(first, min(first + batch, count))]
            futures.append(self._service.write(changes))
            if every:
                time.sleep(every)
        for future in futures:
            future.result(120)
        return {"seconds": time.monotonic() - begin, "prefix": prefix}

    def catalogue(self, disks: int, datastores: int) -> dict[str, Any]:
        """Writes the records of datastores and disks that do not exist."""
        changes = [Change("datastore", f"ds{n}", {"path": f"/none/{n}", "scanned_ms": 1}) for n in range(datastores)]
        changes += [
            Change(
                "disk",
                f"{n:016x}",
                {
                    "datastore": f"ds{n % datastores}",
                    "name": f"folder/vm{n:06}.qcow2",
                    "format": ("qcow2", "raw", "vmdk")[n % 3],
                    "virtual_size": (n % 100) << 30,
                    "actual_size": n << 10,
                },
            )
            for n in range(disks)
        ]
        futures = [self._service.write(changes[at : at + 200]) for at in range(0, len(changes), 200)]
        for future in futures:
            future.result(600)
        return {}

    def ask(self, target: str, count: int = 1, threads: int = 0) -> dict[str, Any]:
        """Returns the time of each answer; with several `threads`, the time of all."""
        begin, times = time.monotonic(), []
        if threads:
            with ThreadPoolExecutor(threads) as pool:
                for request in list(pool.map(lambda _: self._submit(target), range(count))):
                    self._answered(request)
        else:
            for _ in range(count):
                start = time.monotonic()
                self._answered(self._submit(target))
                times.append(time.monotonic() - start)
        return {"times": times, "seconds": time.monotonic() - begin}

    def _submit(self, target: str) -> str:
        return self._service.submit(target, "note", {"id": secrets.token_hex(6)}, BY)

    def _answered(self, request: str) -> None:
        response = self._service.response(request, 60)
        if response is None or not response.body["ok"]:
            raise AssertionError(f"request {request}: {response and dict(response.body)}")

    def request(self, target: str, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Returns the response to a request of the node's local administrator."""
        by = {"node": self._service.node, **BY}
        response = self._service.response(self._service.submit(target, verb, arguments, by), 60)
        return {"ok": False, "reason": "no answer"} if response is None else dict(response.body)

    def work(self, every: float, targets: list[str]) -> dict[str, Any]:
        self._working.set()
        self._worker = threading.Thread(target=self._work, args=(every, targets), daemon=True)
        self._worker.start()
        return {}

    def _work(self, every: float, targets: list[str]) -> None:
        turn = 0
        while self._working.is_set():
            turn += 1
            try:
                self._service.submit(
                    targets[turn % len(targets)], "note", {"id": f"n{turn % 50}", "text": str(turn)}, BY
                )
                self._asked += 1
                self._service.write([Change("note", f"own{turn % 50}", {"text": str(turn)})]).result(30)
                self._written += 1
            except (FleetError, TimeoutError):
                # Not serving yet: it has just been started.
                pass
            time.sleep(every)

    def rest(self) -> dict[str, Any]:
        self._working.clear()
        if self._worker is not None:
            self._worker.join(60)
        return {"asked": self._asked, "written": self._written}

    def record(self) -> dict[str, Any]:
        def see(records: list[Record]) -> None:
            now = time.monotonic()
            self._seen += [(one.owner, one.id, now) for one in records if one.kind == "note"]

        self._seen.clear()
        self._service.subscribe(see)
        return {}

    def recorded(self) -> dict[str, Any]:
        return {"seen": list(self._seen)}

    def state(self) -> dict[str, Any]:
        view = self._service.view()
        answered = {(record.body["requester"], record.body["request"]) for record in view.find("response")}
        mine = [record.id for record in view.find("request", self._service.node)]
        return {
            "serving": self._service.serving,
            "neighbours": self._link.neighbours(),
            "problems": [problem.text for problem in (*self._link.problems(), *self._service.problems())],
            "kinds": [problem.kind for problem in (*self._link.problems(), *self._service.problems())],
            "requests": len(mine),
            "unanswered": sum((self._service.node, id) not in answered for id in mine),
            "counters": {**self._service.counters(), **self._link.counters},
        }

    def fail(self) -> dict[str, Any]:
        """Makes a thread end with an exception."""

        def die() -> None:
            raise RuntimeError("failure on command")

        threading.Thread(target=die, name="failing").start()
        return {}

    def stick(self) -> dict[str, Any]:
        """Makes closing the session of the links hang, as seen with Zenoh."""
        self._link._session = _Stuck(self._link._session)  # type: ignore[assignment]
        return {}

    def forge(self, peer: str, message: str) -> dict[str, Any]:
        """Sends bytes of the test to a neighbour."""
        self._link.send(peer, bytes.fromhex(message))
        return {}


def main(kind: type[Driver] = Driver, verbs: Mapping[str, Handler] = MappingProxyType({})) -> int:
    """Runs the node of a directory with commands of a kind, and with more verbs."""
    config = settings.load(sys.argv[1])
    configure(sys.stderr)

    def obey(daemon: Daemon) -> None:
        driver = kind(daemon)
        _say({"ready": True})
        for line in sys.stdin:
            try:
                _say(driver.do(**json.loads(line)))
            except Exception as exc:
                _say({"error": repr(exc)})

    def ready(daemon: Daemon) -> None:
        threading.Thread(target=obey, args=(daemon,), daemon=True).start()

    return run(config, ready, handlers={**make_handlers(config.directory), "note": _note, **verbs})


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    sys.exit(main())
