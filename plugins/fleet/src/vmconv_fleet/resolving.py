"""Addresses of names, within a time: the system's resolver has none of its own that a caller could set.

A look-up that is not answered keeps a thread of its own, but not its caller. Few such threads are left behind: a name
that is being looked up is not looked up once more, and a resolver has `MAX_LOOK_UPS` at a time.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, NamedTuple

LOOK_UP_S = 5.0
"""Seconds after which a look-up counts as not answered, for all that wait for it."""
MAX_LOOK_UPS = 16

Found = list[tuple[Any, ...]]
"""What `socket.getaddrinfo` returns."""


class _LookUp(NamedTuple):
    answer: Future[Found]
    until: float


class Resolver:
    """Look-ups of one user, so that the names of another one cannot take its places."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[tuple[str, int, int], _LookUp] = {}

    def addresses(self, host: str, port: int, kind: int = socket.SOCK_STREAM, *, within: float = LOOK_UP_S) -> Found:
        """Returns the addresses of a host. Raises OSError: the name is unknown, or not answered in time."""
        if _is_address(host):
            return socket.getaddrinfo(host, port, type=kind)
        look_up = self._begun(host, port, kind)
        try:
            return look_up.answer.result(max(0.0, min(within, look_up.until - time.monotonic())))
        except FutureTimeoutError:
            raise TimeoutError(f"the address of {host} is not found in time: no answer of the name server") from None

    def _begun(self, host: str, port: int, kind: int) -> _LookUp:
        name = host, port, kind
        with self._lock:
            running = self._running.get(name)
            if running is not None:
                return running
            if len(self._running) >= MAX_LOOK_UPS:
                raise OSError(f"the address of {host} is not looked up: {MAX_LOOK_UPS} other names are not answered")
            begun = self._running[name] = _LookUp(Future(), time.monotonic() + LOOK_UP_S)
        try:
            threading.Thread(target=self._look_up, args=(name, begun.answer), name="look-up", daemon=True).start()
        except RuntimeError as exc:
            with self._lock:
                del self._running[name]
            raise OSError(f"the address of {host} is not looked up: {exc}") from exc
        return begun

    def _look_up(self, name: tuple[str, int, int], answer: Future[Found]) -> None:
        host, port, kind = name
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=kind))
        except Exception as exc:
            answer.set_exception(exc)
        finally:
            with self._lock:
                del self._running[name]


def connected(resolver: Resolver, host: str, port: int, seconds: float) -> socket.socket:
    """Returns a connection to the first address of a host that answers, with a time-out; each step has `seconds`."""
    error: OSError = OSError(f"{host} has no address")
    for *_, address in resolver.addresses(host, port, within=seconds):
        try:
            return socket.create_connection((str(address[0]), port), seconds)
        except OSError as exc:
            error = exc
    raise error


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
