"""The daemon: links, replica, API, scanner and job runner in one process that always ends on request."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from vmconv.plugin import VmconvError
from vmconv_fleet import config as settings
from vmconv_fleet.catalogue.indexes import INDEXES
from vmconv_fleet.catalogue.joining import join
from vmconv_fleet.catalogue.terms import SCHEMA
from vmconv_fleet.config import NodeConfig
from vmconv_fleet.errors import FleetError
from vmconv_fleet.jobs.handlers import make_handlers
from vmconv_fleet.jobs.policy import ENDED, kept_of
from vmconv_fleet.limiter import raise_descriptor_limit
from vmconv_fleet.links.peers import Dialler
from vmconv_fleet.links.watching import Watch
from vmconv_fleet.links.zenoh_link import ZenohLink
from vmconv_fleet.node.activation import ApiSockets
from vmconv_fleet.node.heartbeat import HeartbeatWriter, node_record
from vmconv_fleet.node.lock import locked, note_process
from vmconv_fleet.node.marks import FOUNDED, RESTORED
from vmconv_fleet.node.memory import bound_heaps, release
from vmconv_fleet.node.room import wait_for_room
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.requests import Handler
from vmconv_fleet.replication.retention import Retention
from vmconv_fleet.replication.service import NodeService
from vmconv_fleet.replication.store import ReplicaView
from vmconv_fleet.trust import credentials
from vmconv_fleet.trust.addresses import announced
from vmconv_fleet.trust.certificates import CertificateTrust
from vmconv_fleet.trust.identity import Ed25519Signer, write_private
from vmconv_fleet.trust.names import name_key
from vmconv_fleet.trust.renewal import Renewal

if TYPE_CHECKING:
    from vmconv_fleet.notices.syslog import Syslog

PATIENCE_MS = 3000
END_WITHIN_S = 20
"""Threads that still run this long after the request to stop are abandoned."""
RELEASE_S = 30.0
"""The time between two times that memory which is not needed is given back."""
MERGED = "merged.jsonl"
"""A file in a node's directory: the records of other histories of the node, before they were merged."""
_log = logging.getLogger("vmconv_fleet.daemon")


class Daemon:
    """A node, from `start` to `close`, both on the same thread."""

    def __init__(self, config: NodeConfig, *, handlers: Mapping[str, Handler] | None = None) -> None:
        self.config = config
        self._parts = ExitStack()
        self._credentials = credentials.load(config)
        self._signer = Ed25519Signer(config.node, self._credentials.keys.signing)
        with open(config.path("ca.pem"), "rb") as file:
            self.trust = CertificateTrust(file.read())
        self.trust.learn_members(credentials.read_members(config))
        self.trust.learn_certificate(self._credentials.certificate)
        self._dialler = Dialler(config, self.trust.members, self._record_of, self._meets, self._awaited)
        self.link = ZenohLink(
            config,
            members=self.trust.members,
            is_revoked=self.trust.is_revoked,
            changed=self._neighbours_changed,
            found=self._dialler.endpoints,
        )
        self.service = self._make_service(make_handlers(config.directory) if handlers is None else handlers)
        self.api = ApiSockets(config, self.service, self.link)
        self._heartbeat = HeartbeatWriter(self.service, self.link)
        self._joining = False
        self._started_ms = wall_ms()

    def start(self) -> None:
        """Returns once everything runs. After a failure `close` stops what was started."""
        parts = self._parts
        parts.callback(self.service.close)
        parts.callback(self.service.subscribe(self._written))
        self.service.start()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.config.path(FOUNDED))
        parts.callback(self.api.close)
        self.api.start()
        self._start_joining()
        self._say_who_it_is()
        for thread in self.link.threads:
            self.service.observe(thread)
        for part in (self._heartbeat, self._watch(), self._renewal()):
            self.service.observe(part.thread)
            parts.callback(part.close)
            part.start()
        self._start_notices()
        self._start_work()

    def close(self) -> None:
        """Stops everything, the last started first. Always returns, even after failures."""
        self._parts.close()

    def renew(self) -> None:
        """Reloads the node's keys, certificate, addresses and authority, without a restart."""
        self.config = replace(self.config, addresses=settings.load(self.config.directory).addresses)
        found = self._credentials = credentials.load(self.config)
        self.trust.learn_certificate(found.certificate)
        # The links first: a node without neighbours may have to wait for them until it can write.
        self.api.renew()
        self.link.renew()
        self.service.update(lambda _view: self._use(found)).result(PATIENCE_MS / 1000)
        self._start_joining()
        self._say_who_it_is()
        _log.info("certificate renewed, valid until %s", found.bound.not_after)

    def _use(self, found: credentials.Credentials) -> list[Change]:
        """Signs with the key of these credentials from now on; on the replica's thread."""
        self._signer.replace(found.keys.signing)
        return [_certificate_record(found)]

    def _make_service(self, handlers: Mapping[str, Handler]) -> NodeService:
        patience: int | None = PATIENCE_MS
        founded, restored = self.config.path(FOUNDED), self.config.path(RESTORED)
        if not os.path.exists(self.config.database) and os.path.exists(founded):
            patience = 0
        elif not os.path.exists(self.config.database) or os.path.exists(restored):
            # Other members may have later records of this node. Also after a restart, when there is a database.
            write_private(restored, b"")
            patience = None
        return NodeService(
            fleet=self.config.fleet,
            database=self.config.database,
            signer=self._signer,
            trust=self.trust,
            transport=self.link,
            handlers=handlers,
            schema=SCHEMA,
            patience_ms=patience,
            introduction=[_certificate_record(self._credentials)],
            indexes=INDEXES,
            merged=self.config.path(MERGED),
            join=join,
            retention=Retention(ENDED, partial(kept_of, self.config.node), self._archive()),
        )

    def _archive(self) -> str | None:
        """Returns the path of the file for records that are deleted because they are old."""
        return os.path.join(self.config.directory, self.config.archive) if self.config.archive else None

    def _say_who_it_is(self) -> None:
        """Writes the node's record as soon as possible, and its certificate if that was renewed."""
        authority = announced(self.config, self.config.join) if self._joining else []
        certificate = _certificate_record(self._credentials)
        node = node_record(self.config, self.api.port, authority, self._started_ms)

        def decide(view: ReplicaView) -> list[Change]:
            known = view.get(self.config.node, certificate.kind, certificate.id)
            return [node] if known is not None and known.body == certificate.body else [certificate, node]

        self.service.update(decide).add_done_callback(self._serves)

    def _serves(self, written: Future[list[Record]]) -> None:
        """Forgets that the database was restored: its records are continued."""
        if not written.cancelled() and written.exception() is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.config.path(RESTORED))

    def _watch(self) -> Watch:
        node = self.config.node
        bound, revoked = lambda: self._credentials.bound, lambda: self.trust.is_revoked(node)
        return Watch(self.config, self.link, bound, revoked, self._dialler)

    def _record_of(self, node: str) -> Mapping[str, Any]:
        record = self.service.view().get(node, "node", node)
        return {} if record is None else record.body

    def _awaited(self) -> Iterable[str]:
        """Returns the members that this node has to be linked with, however large the fleet is."""
        if self.service.is_forked:
            return self.trust.members()
        return self.service.awaited() if self.service.is_restored else ()

    def _meets(self, address: str) -> str | None:
        # TLS in Python takes memory that a node with all links does not need.
        from vmconv_fleet.links.probing import probe

        return probe(self.config, address).node

    def _renewal(self) -> Renewal:
        bound = self._credentials.bound
        asked = [*bound.addresses, name_key(bound.name)]
        return Renewal(lambda: self.config, lambda: self._credentials.renew_at, asked, self.renew)

    def _start_joining(self) -> None:
        """Serves joining nodes, if the authority is here and not served yet."""
        if self._joining or not self.config.join or not credentials.holds_authority(self.config):
            return
        from vmconv_fleet.trust.authority import Authority
        from vmconv_fleet.trust.joining import JoinService
        from vmconv_fleet.trust.membership import Members

        seeds = lambda: [*self.config.connect, *self._dialler.endpoints()]  # noqa: E731
        members = Members(self.service, self.trust, self.link.members_changed, seeds, self._dialler.expect)
        joining = JoinService(self.config, Authority.load(self.config.directory), members)
        self.service.observe(joining.limiter)
        self.service.observe(joining.thread)
        self._parts.callback(joining.close)
        joining.start()
        self._joining = True

    def _start_work(self) -> None:
        """Starts the scanner and the job runner."""
        from vmconv_fleet.catalogue.scanning import Scanner
        from vmconv_fleet.jobs.runner import JobRunner

        for part in (
            Scanner(self.service, self.config.datastores, retired=self.service.retirements),
            JobRunner(self.service, self.config.directory),
        ):
            self.service.observe(part.thread)
            self._parts.callback(part.stop)
            part.start()

    def _start_notices(self) -> None:
        """Starts webhooks, and syslog if it is configured."""
        from vmconv_fleet.notices.webhooks import Webhooks, delivery_of

        parts: list[Webhooks | Syslog] = [Webhooks(self.service, self.config.directory, delivery_of(self.config))]
        if self.config.syslog:
            from vmconv_fleet.notices.syslog import Syslog, destination

            try:
                where = destination(self.config.syslog)
            except ValueError as exc:
                raise FleetError(f"{self.config.path('node.toml')}: setting 'syslog': {exc}") from exc
            parts.append(Syslog(self.service, where, self.config.name))
        for part in parts:
            self.service.observe(part)
            self.service.observe(part.thread)
            self._parts.callback(part.stop)
            part.start()

    def _neighbours_changed(self) -> None:
        self._heartbeat.changed()

    def _written(self, records: list[Record]) -> None:
        """Handles committed records; on the replica's thread."""
        if any(record.kind in ("certificate", "revocation") for record in records):
            self.link.members_changed()


def _certificate_record(found: credentials.Credentials) -> Change:
    return Change("certificate", found.bound.key_id, {"pem": found.certificate.decode(), "node": found.bound.node})


def run(config: NodeConfig, ready: Callable[[Daemon], None], *, handlers: Mapping[str, Handler] | None = None) -> int:
    """Runs the node until SIGTERM or SIGINT and returns the exit code; calls `ready` once it is up.

    It first waits for room on its disk. SIGHUP reloads certificate and keys. An exception that ends a thread ends the
    daemon with code 1. If a session of the links does not close, the process exits here instead of returning.
    """
    raise_descriptor_limit()
    bound_heaps()
    with locked(config), _Signals() as told:
        if not wait_for_room(config.directory, told.next):
            return 0
        note_process(config)
        daemon = Daemon(config, handlers=handlers)
        try:
            daemon.start()
            ready(daemon)
            while _next(told) == signal.SIGHUP:
                _renew(daemon)
        finally:
            told.must_end()
            daemon.close()
            if not daemon.link.hangs:
                told.has_ended()
        code = 1 if told.failed else 0
    if daemon.link.hangs:
        # Zenoh's threads call Python, so the interpreter would wait for them forever at exit. All of ours is
        # closed and durable.
        _log.warning("the process ends with a session of the links open")
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    return code


def _next(told: _Signals) -> int:
    """Returns the next event, and gives memory back until it comes."""
    while (event := told.next(RELEASE_S)) is None:
        release()
    return event


def _renew(daemon: Daemon) -> None:
    try:
        daemon.renew()
    except (VmconvError, TimeoutError) as exc:
        _log.error("not all settings, certificates and keys are reloaded: %s", exc)


class _Signals:
    """Catches the daemon's signals, and exceptions that end threads, while the block runs.

    The interpreter's C handler writes signals as bytes into a socket. A handler in Python might never run if the signal
    arrives just before the main thread waits.
    """

    def __init__(self) -> None:
        self.failed = False
        self._told, self._tell = socket.socketpair()
        self._tell.setblocking(False)
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        self._wakeup = signal.set_wakeup_fd(self._tell.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._before[number] = signal.signal(number, lambda _number, _frame: None)
        self._excepthook, threading.excepthook = threading.excepthook, self._thread_failed
        return self

    def __exit__(self, *_exc: object) -> None:
        threading.excepthook = self._excepthook
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup)
        self._told.close()
        self._tell.close()

    def next(self, timeout: float) -> int | None:
        """Waits for the next event: SIGHUP asks for a renewal, anything else for the end; None: there was none."""
        self._told.settimeout(timeout)
        try:
            return self._told.recv(1)[0]
        except TimeoutError:
            return None

    def must_end(self) -> None:
        """Ends the process by force after a while, with a traceback, if something hangs."""
        faulthandler.dump_traceback_later(END_WITHIN_S, exit=True)

    def has_ended(self) -> None:
        """Cancels `must_end`."""
        faulthandler.cancel_dump_traceback_later()

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        name = failure.thread.name if failure.thread else "?"
        _log.critical("thread %s died", name, exc_info=failure.exc_value)
        self.failed = True
        # If the socket is full or closed, the daemon is about to end anyway.
        with contextlib.suppress(OSError):
            self._tell.send(bytes([signal.SIGTERM]))
