"""The scanner: keeps the catalogue of a node's datastores up to date."""

from __future__ import annotations

import json
import logging
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from vmconv_fleet.catalogue.appointing import converters
from vmconv_fleet.catalogue.places import is_container
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.store import ReplicaView
from vmconv_fleet.replication.writing import Writes, settled
from vmconv_fleet.supervision import Supervised

_log = logging.getLogger("vmconv_fleet.scanning")

INTERVAL = 600.0
"""Seconds between scans without a request."""

PATIENCE = 3600.0
"""The time limit of a scan in seconds."""

STUCK = 60.0
"""Seconds without a word after which the inspection hangs in the file that it reads."""

MAX_DEATHS = 20
"""The files of which the inspection may die in one scan."""

_DIED = "cannot be read: its inspection crashed, or did not end"
_SILENT = "cannot be listed: its store does not answer, or its inspection crashed"
_BATCH = 200
_ACTS = ("give_to", "take")
_WATCH_STEP = 1.0
_NOTHING = ("", "")
_INSPECTION = (sys.executable, "-m", "vmconv_fleet.catalogue.inspection")

Found = dict[tuple[str, str], dict[str, Any]]
"""Bodies by kind and id."""


class Scanner:
    """Scans the node's datastores at its start, periodically, and when a datastore's record asks for it.

    `seeds` are the datastores in the node's settings, by name and path. Each becomes a record once; from then on the
    record counts.
    """

    def __init__(
        self,
        service: Writes,
        seeds: Mapping[str, str],
        *,
        retired: Callable[[], Iterable[str]] = tuple,
        interval: float = INTERVAL,
        command: Sequence[str] = _INSPECTION,
    ) -> None:
        self._service = service
        self._seeds = dict(seeds)
        self._retired = retired
        self._interval = interval
        self._command = list(command)
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._child: subprocess.Popen[str] | None = None
        self._heard = 0.0
        self._begun = _NOTHING
        self._converted: queue.SimpleQueue[Record] = queue.SimpleQueue()
        """Jobs by which other nodes have made something beside own disks or machines."""
        self._ending = threading.Event()
        self.thread = Supervised("scanner", self._run, self._ending)
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self) -> None:
        self._unsubscribe = self._service.subscribe(self._notice)
        self.thread.start()

    def stop(self) -> None:
        """Stops a running scan; returns when nothing runs."""
        self._ending.set()
        self._unsubscribe()
        self._wanted.put(True)
        child = self._child
        if child:
            child.kill()
        self.thread.join()

    def _notice(self, records: list[Record]) -> None:
        node, stores = self._service.node, [one for one in records if one.kind == "datastore"]
        if any(one.owner == node and (one.deleted or _is_due(one.body)) for one in stores):
            self._wanted.put(True)
        if any(one.owner != node and one.body.get("owner") == node for one in stores):
            # Another node may have given a shared datastore to this one.
            self._wanted.put(True)
        for one in records:
            if one.kind == "job" and one.body.get("of") == node and one.body.get("state") == "done":
                self._converted.put(one)
                self._wanted.put(True)

    def _run(self, works: Callable[[], None]) -> None:
        settled(self._service.update(self._seeded), self._ending)
        asked = False
        while not self._ending.is_set():
            self._scan(everything=not asked)
            works()
            asked = self._is_asked()

    def _is_asked(self) -> bool:
        """Waits until a scan is due. Returns whether one was asked for."""
        try:
            self._wanted.get(timeout=self._interval)
        except queue.Empty:
            return False
        while not self._wanted.empty():
            self._wanted.get()
        return True

    def _seeded(self, view: ReplicaView) -> list[Change]:
        """Returns records for datastores in the settings that have none yet."""
        node = self._service.node
        before = view.get(node, "capabilities", "installed")
        seeded = dict(before.body.get("seeded", {})) if before else {}
        new = {name: path for name, path in self._seeds.items() if seeded.get(name) != path}
        if not new:
            return []
        known = {one.id for one in view.find("datastore", node)}
        changes = [Change("datastore", name, {"path": path}) for name, path in new.items() if name not in known]
        body = {**(before.body if before else {}), "seeded": seeded | new}
        return [Change("capabilities", "installed", body), *changes]

    def _is_wanted(self, datastore: Record, changed: Container[str]) -> bool:
        return _is_due(datastore.body) or self._is_given(datastore) or datastore.id in changed

    def _changed(self, view: ReplicaView) -> set[str]:
        """Returns the own datastores in which other nodes have made something."""
        found = set()
        node = self._service.node
        while not self._converted.empty():
            job = self._converted.get()
            kind = "vm" if job.body.get("vm") else "disk"
            source = view.get(node, kind, str(job.body.get(kind)))
            name = str(source.body.get("datastore")) if source else ""
            # Others have nothing to say about it.
            if job.owner in converters(view, node, name):
                found.add(name)
        return found

    def _is_given(self, datastore: Record) -> bool:
        """Returns whether another node says that this node owns a storage that it still holds to be another's."""
        body, node = datastore.body, self._service.node
        if body.get("owner", node) == node:
            return False
        found = self._service.view().find("datastore", body["owner"])
        return any(one.body.get("storage") == body["storage"] and one.body.get("owner") == node for one in found)

    def _scan(self, *, everything: bool) -> None:
        node, view = self._service.node, self._service.view()
        changed = self._changed(view)
        stores = [one for one in view.find("datastore", node) if everything or self._is_wanted(one, changed)]
        wanted = {one.id: one.body["path"] for one in stores}
        # What is asked for later is not answered by this scan.
        asked = {one.id: one.body["scan_asked_ms"] for one in stores if "scan_asked_ms" in one.body}
        if self._ending.is_set():
            return
        began = wall_ms()
        found: Found = {}
        complete: set[str] = set()
        for kind, identifier, body in self._inspected(wanted) if wanted or everything else ():
            found[kind, identifier] = body
            if kind == "datastore":
                complete.add(identifier)
        if self._ending.is_set():
            return
        for name in wanted.keys() - complete:
            found["datastore", name] = {"problem": "the scan did not end", "scanned_ms": began}
        for name, at in asked.items():
            found["datastore", name]["scan_answered_ms"] = at
        self._write(found, complete)
        _log.info("scanned", extra={"fields": {"datastores": sorted(complete), "records": len(found)}})

    def _inspected(self, datastores: Mapping[str, str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yields the records that the inspection prints. What it dies of is skipped in another attempt."""
        left, skip = dict(datastores), dict[str, dict[str, str]]()
        until = time.monotonic() + PATIENCE
        for _ in range(MAX_DEATHS + 1):
            self._begun = _NOTHING
            for kind, identifier, body in self._attempt(left, skip, until):
                yield kind, identifier, body
                if kind == "datastore":
                    left.pop(identifier, None)
                    self._begun = _NOTHING
            if not left or self._begun == _NOTHING or self._ending.is_set() or time.monotonic() > until:
                return
            datastore, name = self._begun
            _log.warning("the inspection died of %s in %s", name, datastore)
            skip.setdefault(datastore, {})[name] = _DIED if name else _SILENT

    def _attempt(
        self, datastores: Mapping[str, str], skip: Mapping[str, Mapping[str, str]], until: float
    ) -> Iterator[tuple[str, str, dict[str, Any]]]:
        with subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        ) as child:
            self._child = child
            if self._ending.is_set():
                # `stop` came before it could see the child.
                child.kill()
            assert child.stdin and child.stdout
            self._heard = time.monotonic()
            ended = threading.Event()
            watch = threading.Thread(target=self._watch, args=(child, until, ended), name="inspection", daemon=True)
            watch.start()
            try:
                child.stdin.write(json.dumps(self._task(datastores, skip)) + "\n")
                child.stdin.close()
                for line in child.stdout:
                    said = json.loads(line)
                    self._heard = time.monotonic()
                    if "begins" in said:
                        self._begun = (said["begins"][0], said["begins"][1])
                        continue
                    yield said["kind"], said["id"], said["body"]
            except (OSError, ValueError) as exc:
                _log.warning("the inspection failed: %s", exc)
            finally:
                ended.set()
                watch.join()
                self._child = None
                child.kill()

    def _task(self, datastores: Mapping[str, str], skip: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
        node = self._service.node
        stores = self._service.view().find("datastore", node)
        acts = {one.id: {key: one.body[key] for key in _ACTS if key in one.body} for one in stores}
        gone = {*self._retired(), *(str(one.body["owner"]) for one in stores if self._is_released(one))}
        task = {"datastores": dict(datastores), "skip": skip, "node": node, "acts": acts, "retired": sorted(gone)}
        known = {name: self._known(name) for name, path in datastores.items() if is_container(path)}
        capabilities = self._service.view().get(node, "capabilities", "installed")
        return {
            **task,
            "stores": self._stores(),
            "known": known,
            "capabilities": dict(capabilities.body) if capabilities else {},
        }

    def _known(self, datastore: str) -> dict[str, dict[str, Any]]:
        """Returns the disks of a datastore of which the version that was read is known."""
        found = self._service.view().find("disk", self._service.node)
        return {
            str(one.body["name"]): dict(one.body)
            for one in found
            if one.body.get("datastore") == datastore and one.body.get("version")
        }

    def _stores(self) -> dict[str, list[str]]:
        """Returns the storages of each known node."""
        view = self._service.view()
        found: dict[str, list[str]] = {one.owner: [] for one in view.find("node")}
        for one in view.find("datastore"):
            if one.owner in found:
                found[one.owner].append(str(one.body.get("storage")))
        return found

    def _is_released(self, datastore: Record) -> bool:
        """Returns whether the owner of a shared storage says that it no longer has it."""
        view, owner = self._service.view(), str(datastore.body.get("owner", ""))
        if view.get(owner, "node", owner) is None:
            return False
        storage = datastore.body.get("storage")
        return all(one.body.get("storage") != storage for one in view.find("datastore", owner))

    def _watch(self, child: subprocess.Popen[str], until: float, ended: threading.Event) -> None:
        """Kills the inspection if it hangs, or if the scan takes too long."""
        while not ended.wait(_WATCH_STEP):
            now = time.monotonic()
            if now > until or now - self._heard > STUCK:
                child.kill()
                return

    def _write(self, found: Found, complete: set[str]) -> None:
        """Writes the changes, the datastores last, because they confirm that the others are complete."""
        order = sorted(found, key=lambda key: (key[0] == "datastore", key))
        gone = list(self._gone(found, complete))
        keys = [*gone, *order]
        for at in range(0, len(keys), _BATCH):
            batch = keys[at : at + _BATCH]
            settled(self._service.update(partial(self._changes, keys=batch, found=found)), self._ending)

    def _gone(self, found: Found, complete: set[str]) -> Iterator[tuple[str, str]]:
        """Yields the records in the catalogue that the scan did not find, or whose datastore is gone."""
        node, view = self._service.node, self._service.view()
        datastores = {one.id for one in view.find("datastore", node)}
        unavailable = {name for name in complete if "size" not in found["datastore", name]}
        for kind in ("disk", "vm"):
            for one in view.find(kind, node):
                name = one.body.get("datastore")
                looked_at = name in complete and name not in unavailable
                if name not in datastores or (looked_at and (kind, one.id) not in found):
                    yield kind, one.id

    def _changes(self, view: ReplicaView, *, keys: Iterable[tuple[str, str]], found: Found) -> list[Change]:
        changes = []
        for kind, identifier in keys:
            before = view.get(self._service.node, kind, identifier)
            body = found.get((kind, identifier))
            if body is None:
                changes += [Change(kind, identifier, None)] if before else []
                continue
            if kind == "datastore":
                if before is None:
                    continue
                body = _datastore(before.body, body)
            elif kind == "capabilities" and before:
                body = {**body, **{key: before.body[key] for key in ("seeded",) if key in before.body}}
            elif kind in ("disk", "vm") and view.get(self._service.node, "datastore", body["datastore"]) is None:
                # The datastore was removed during the scan.
                continue
            if before is None or dict(before.body) != body:
                changes.append(Change(kind, identifier, body))
        return changes


def _is_due(datastore: Mapping[str, Any]) -> bool:
    """Returns whether a scan was asked for after the last one began, by whatever clock."""
    return bool(datastore.get("scan_asked_ms") != datastore.get("scan_answered_ms"))


def _datastore(before: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a datastore's body after a scan. Newer requests stay, and so do records that could not be read."""
    # What was asked for after the scan began is done by the next one.
    done = _ACTS if before.get("scan_asked_ms") == found.get("scan_answered_ms") else ()
    kept = {key: value for key, value in before.items() if key != "problem" and key not in done}
    body = {**kept, **found, "path": before["path"]}
    if any(body.get(name) != before.get(name) for name in ("storage", "owner")):
        # They were appointed for that storage, by its owner of then.
        body.pop("converters", None)
    return body
